//! Depthwise causal convolution over time with optional SiLU, its window as a state, and the in-place update.

mod autograd;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{DType, Result, Tensor};

use crate::args::{Checker, Dim};
use crate::layout::{Activation, SequenceLayout};
use crate::packing::Packing;
use crate::part::Part;
use crate::simd::Isa;
use crate::state_indices::StateIndices;
use crate::{args, checkpoint, host};

const OP: &str = "causal_conv1d";
const UPDATE_OP: &str = "causal_conv1d_update";

/// Arguments of [`causal_conv1d`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct CausalConv1d<'a> {
    /// The input, `(batch, dim, seqlen)` or, channels last, `(batch, seqlen, dim)`.
    pub x: &'a Tensor,
    /// One filter a channel, `(dim, width)`; the last column meets the newest input.
    pub weight: &'a Tensor,
    /// `(dim,)`.
    pub bias: Option<&'a Tensor>,
    /// The `width - 1` inputs before the first, oldest first, `(batch, dim, width - 1)`; zeros if absent.
    pub initial_state: Option<&'a Tensor>,
    /// What is applied to the sum.
    pub activation: Activation,
    /// How `x` and `y` are laid out.
    pub layout: SequenceLayout,
    /// Where sequences lie in the batch; each row is one if absent.
    pub packing: Option<&'a Packing>,
}

impl<'a> CausalConv1d<'a> {
    /// The required arguments; everything else absent, SiLU, channels first.
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Self {
        let (activation, layout) = (Activation::default(), SequenceLayout::default());
        Self { x, weight, bias: None, initial_state: None, activation, layout, packing: None }
    }

    /// Whether there are fused kernels; those for GPUs take filters that are not wide.
    fn fused(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.x.device().is_cuda() && self.weight.dims()[1] > cuda::WIDEST {
            return false;
        }
        args::fused(self.x)
    }

    /// The op as a part of a fused block, with its outputs.
    pub(crate) fn part(&self, tracked: bool) -> Result<(Part, [Tensor; 2])> {
        let (sizes, inputs) = (self.sizes(OP)?, autograd::inputs(self));
        if self.fused() {
            return Part::fused(autograd::Node::new(self, sizes), &inputs, tracked);
        }
        let (activation, layout, packing) = (self.activation, self.layout, self.packing.cloned());
        checkpoint::part(OP, &inputs, tracked, move |inputs: [Option<&Tensor>; autograd::SLOTS]| {
            let [Some(x), Some(weight), bias, initial_state] = inputs else { return Ok(None) };
            let args =
                CausalConv1d { bias, initial_state, activation, layout, ..CausalConv1d::new(x, weight) };
            let output = causal_conv1d(&CausalConv1d { packing: packing.as_ref(), ..args })?;
            Ok(Some([output.y, output.final_state]))
        })
    }

    /// Checks the arguments; `op` is the name in errors.
    fn sizes(&self, op: &'static str) -> Result<Sizes> {
        let check = Checker::new(op, "x", self.x)?;
        let [batch, a, b] = check.main_dims(match self.layout {
            SequenceLayout::ChannelsFirst => ["batch", "dim", "seqlen"],
            SequenceLayout::ChannelsLast => ["batch", "seqlen", "dim"],
        })?;
        let (dim, seqlen) = self.layout.dim_and_seqlen([a, b]);
        let width = self.weight.dims().last().copied().unwrap_or(0);
        check.parameter("weight", self.weight, &[("dim", dim), ("width", width)])?;
        check.require(width > 0, || "`weight` has width 0, expected at least 1".into())?;
        if let Some(bias) = self.bias {
            check.parameter("bias", bias, &[("dim", dim)])?;
        }
        let sequences: Dim = check.packing(self.packing, batch, seqlen)?;
        if let Some(state) = self.initial_state {
            let window = ("width - 1", width - 1);
            check.state("initial_state", state, &[sequences, ("dim", dim), window])?;
        }
        Ok(Sizes { batch, dim, seqlen, width, sequences: sequences.1 })
    }
}

/// What [`causal_conv1d`] returns.
#[derive(Debug, Clone)]
pub struct CausalConv1dOutput {
    /// The shape and dtype of `x`.
    pub y: Tensor,
    /// The last `width - 1` inputs of each sequence, oldest first, `(batch, dim, width - 1)`, `f32`.
    pub final_state: Tensor,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    dim: usize,
    seqlen: usize,
    width: usize,
    /// As many as there are states: the batch, unless it is packed.
    sequences: usize,
}

/// Convolves each channel with its own causal filter.
///
/// `y_t = activation(bias + Σ_k weight[k] · x_{t - width + 1 + k})`, where inputs before the first are those of
/// `initial_state`. The window after the last token is an output, so a sequence may be cut anywhere.
///
/// # Shapes
/// `x`, `y`: `(batch, dim, seqlen)`, or `(batch, seqlen, dim)` with [`SequenceLayout::ChannelsLast`] ·
/// `weight`: `(dim, width)`, any width from 1 · `bias`: `(dim,)` · `initial_state`, `final_state`:
/// `(batch, dim, width - 1)`, or `(sequences, dim, width - 1)` with [`packing`](Packing), `f32` (`f64` if `x` is). `x` is f32, f16, bf16 or f64; arithmetic is `f32` (`f64` for
/// `f64`).
/// # Gradients
/// For `x`, `weight`, `bias` and `initial_state`, through `y` and through `final_state`.
/// # Errors
/// If a shape, dtype, device or the packing disagrees with `x`.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{CausalConv1d, causal_conv1d};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::randn(0f32, 1.0, (2, 3, 10), &Device::Cpu)?;
/// let weight = Tensor::randn(0f32, 1.0, (3, 4), &Device::Cpu)?;
/// let whole = causal_conv1d(&CausalConv1d::new(&x, &weight))?;
/// // The same in two parts: the second starts from the window that the first leaves.
/// let first = causal_conv1d(&CausalConv1d::new(&x.narrow(2, 0, 6)?, &weight))?;
/// let second = causal_conv1d(&CausalConv1d {
///     initial_state: Some(&first.final_state),
///     ..CausalConv1d::new(&x.narrow(2, 6, 4)?, &weight)
/// })?;
/// let gap = (whole.y.narrow(2, 6, 4)? - second.y)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(gap < 1e-6);
/// # Ok(()) }
/// ```
/// # Source
/// `causal_conv1d_ref` in Dao-AILab/causal-conv1d.
pub fn causal_conv1d(args: &CausalConv1d) -> Result<CausalConv1dOutput> {
    let sizes = args.sizes(OP)?;
    if args.fused() { autograd::apply(args, sizes) } else { reference::forward(args) }
}

/// Arguments of [`causal_conv1d_update`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct CausalConv1dUpdate<'a> {
    /// The new inputs, as in [`CausalConv1d`].
    pub x: &'a Tensor,
    /// The last `width - 1` inputs, `(batch, dim, width - 1)` or, with indices, `(states, dim, width - 1)`: changed in
    /// place.
    pub state: &'a Tensor,
    /// `(dim, width)`.
    pub weight: &'a Tensor,
    /// `(dim,)`.
    pub bias: Option<&'a Tensor>,
    /// What is applied to the sum.
    pub activation: Activation,
    /// How `x` and `y` are laid out.
    pub layout: SequenceLayout,
    /// Which states the rows move on; each its own if absent.
    pub state_indices: Option<&'a StateIndices>,
}

impl<'a> CausalConv1dUpdate<'a> {
    /// The required arguments; everything else absent, SiLU, channels first.
    pub fn new(x: &'a Tensor, state: &'a Tensor, weight: &'a Tensor) -> Self {
        let (activation, layout) = (Activation::default(), SequenceLayout::default());
        Self { x, state, weight, bias: None, activation, layout, state_indices: None }
    }

    /// As a convolution from zeros.
    fn forward(&self) -> CausalConv1d<'a> {
        let Self { x, weight, bias, activation, layout, .. } = *self;
        CausalConv1d { bias, activation, layout, ..CausalConv1d::new(x, weight) }
    }
}

/// Convolves the next token (or several) and moves the window on, in place.
///
/// The same equation as [`causal_conv1d`] with `state` as the initial window; afterwards `state` holds the window
/// after the last token. Every clone of the tensor `state` sees the change.
///
/// # Shapes
/// `x`, `y`: as in [`causal_conv1d`], with `seqlen` 1 for one token · `state`: `(batch, dim, width - 1)`, or
/// `(states, dim, width - 1)` with [`state_indices`](StateIndices), `f32` (`f64` if `x` is), contiguous.
/// # Gradients
/// None: this serves decoding.
/// # Errors
/// If a shape, dtype or device disagrees with `x`, or an argument tracks gradients.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{Activation, CausalConv1dUpdate, causal_conv1d_update};
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::new(&[[1f32, 10.0, 100.0]], &Device::Cpu)?;
/// let state = Tensor::new(&[[[1f32, 2.0]]], &Device::Cpu)?;
/// let x = Tensor::new(&[[[3f32]]], &Device::Cpu)?;
/// let activation = Activation::Identity;
/// let args = CausalConv1dUpdate { activation, ..CausalConv1dUpdate::new(&x, &state, &weight) };
/// assert_eq!(causal_conv1d_update(&args)?.to_vec3::<f32>()?, [[[321.0]]]);
/// assert_eq!(state.to_vec3::<f32>()?, [[[2.0, 3.0]]]);
/// # Ok(()) }
/// ```
/// # Source
/// `causal_conv1d_update` in Dao-AILab/causal-conv1d.
pub fn causal_conv1d_update(args: &CausalConv1dUpdate) -> Result<Tensor> {
    let CausalConv1dUpdate { x, state, weight, bias, activation, layout, state_indices } = *args;
    let forward = args.forward();
    let Sizes { batch, dim, seqlen, width, .. } = forward.sizes(UPDATE_OP)?;
    let check = Checker::new(UPDATE_OP, "x", x)?;
    let states = check.states(state_indices, batch, state)?;
    check.state("state", state, &[states, ("dim", dim), ("width - 1", width - 1)])?;
    check.in_place(state, &[("x", Some(x)), ("weight", Some(weight)), ("bias", bias)])?;
    if !forward.fused() {
        let (y, next) = reference::update(args)?;
        host::replace(state, &next)?;
        return Ok(y);
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::update(args, Sizes { batch, dim, seqlen, width, sequences: batch });
    }
    // The rows that are no padding, and their states.
    let rows: Vec<(usize, usize)> = match state_indices {
        Some(indices) => {
            indices.states().iter().enumerate().filter_map(|(row, state)| Some((row, (*state)?))).collect()
        }
        None => (0..batch).map(|row| (row, row)).collect(),
    };
    let packing = Packing::some_rows(rows.iter().map(|(row, _)| *row), batch, seqlen);
    let (x, weight) = (host::read("x", x)?, host::read("weight", weight)?);
    let bias = host::read_opt("bias", bias)?;
    let conv = cpu::Conv {
        sizes: Sizes { batch, dim, seqlen, width, sequences: rows.len() },
        packing: &packing,
        layout,
        activation,
        x: &x,
        weight: &weight,
        bias: bias.as_deref(),
        initial_state: None,
    };
    let y = host::modify(UPDATE_OP, state, |state| {
        if seqlen == 1 {
            return Ok(cpu::step(&conv, Isa::current(), &rows, state)); // of one token both layouts are the same
        }
        let window = |index: usize| index * dim * (width - 1)..(index + 1) * dim * (width - 1);
        let initial_state: Vec<f32> =
            rows.iter().flat_map(|(_, index)| &state[window(*index)]).copied().collect();
        let conv = cpu::Conv { initial_state: Some(&initial_state), ..conv };
        let (y, next) = (cpu::forward(&conv, Isa::current()), cpu::final_state(&conv));
        for (i, (_, index)) in rows.iter().enumerate() {
            state[window(*index)].copy_from_slice(&next[window(i)]);
        }
        Ok(y)
    })?;
    host::tensor(y, args.x.shape().clone(), args.x.dtype())
}

impl Sizes {
    fn state_shape(&self) -> (usize, usize, usize) {
        (self.sequences, self.dim, self.width - 1)
    }
}

/// The dtype of the window for inputs of dtype `x`.
fn window_dtype(x: &Tensor) -> DType {
    args::state_dtype(x.dtype())
}
