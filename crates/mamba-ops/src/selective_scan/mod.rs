//! The selective scan of Mamba-1: a diagonal linear recurrence whose coefficients depend on the input.

mod autograd;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Result, Tensor};

use crate::args::{self, Checker, Dim};
use crate::checkpoint;
use crate::layout::SequenceLayout;
use crate::packing::Packing;
use crate::part::Part;

const OP: &str = "selective_scan";

/// Arguments of [`selective_scan`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveScan<'a> {
    /// The input, `(batch, dim, seqlen)` or, channels last, `(batch, seqlen, dim)`.
    pub u: &'a Tensor,
    /// The step size, laid out as `u`.
    pub delta: &'a Tensor,
    /// `(dim, d_state)`; negative in a stable system.
    pub a: &'a Tensor,
    /// What the input writes into the state: constant or varying in time.
    pub b: &'a Tensor,
    /// What the output reads from the state: constant or varying in time.
    pub c: &'a Tensor,
    /// The skip connection, `(dim,)`.
    pub d: Option<&'a Tensor>,
    /// The gate, laid out as `u`.
    pub z: Option<&'a Tensor>,
    /// Added to `delta` first, `(dim,)`.
    pub delta_bias: Option<&'a Tensor>,
    /// Whether `delta` then goes through a softplus.
    pub delta_softplus: bool,
    /// The state before the first token, `(batch, dim, d_state)`; zeros if absent.
    pub initial_state: Option<&'a Tensor>,
    /// How `u`, `delta`, `z`, `y` and varying `b`, `c` are laid out.
    pub layout: SequenceLayout,
    /// Where sequences lie in the batch; each row is one if absent.
    pub packing: Option<&'a Packing>,
}

impl<'a> SelectiveScan<'a> {
    /// The required arguments; everything else absent, `delta` taken as it is, channels first.
    pub fn new(u: &'a Tensor, delta: &'a Tensor, a: &'a Tensor, b: &'a Tensor, c: &'a Tensor) -> Self {
        Self {
            u,
            delta,
            a,
            b,
            c,
            d: None,
            z: None,
            delta_bias: None,
            delta_softplus: false,
            initial_state: None,
            layout: SequenceLayout::default(),
            packing: None,
        }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "u", self.u)?;
        let [batch, x, y] = check.main_dims(match self.layout {
            SequenceLayout::ChannelsFirst => ["batch", "dim", "seqlen"],
            SequenceLayout::ChannelsLast => ["batch", "seqlen", "dim"],
        })?;
        let (dim, seqlen) = self.layout.dim_and_seqlen([x, y]);
        let [first, last] = self.layout.order(("dim", dim), ("seqlen", seqlen));
        let activation: [Dim; 3] = [("batch", batch), first, last];
        check.activation("delta", self.delta, &activation)?;
        let d_state = self.a.dims().last().copied().unwrap_or(0);
        check.parameter("a", self.a, &[("dim", dim), ("d_state", d_state)])?;
        let b_groups = self.coefficient(&check, "b", self.b, [batch, dim, seqlen, d_state])?;
        let c_groups = self.coefficient(&check, "c", self.c, [batch, dim, seqlen, d_state])?;
        for (name, parameter) in [("d", self.d), ("delta_bias", self.delta_bias)] {
            if let Some(parameter) = parameter {
                check.parameter(name, parameter, &[("dim", dim)])?;
            }
        }
        if let Some(z) = self.z {
            check.activation("z", z, &activation)?;
        }
        let sequences = check.packing(self.packing, batch, seqlen)?;
        if let Some(state) = self.initial_state {
            check.state("initial_state", state, &[sequences, ("dim", dim), ("d_state", d_state)])?;
        }
        Ok(Sizes { batch, dim, seqlen, d_state, b_groups, c_groups, sequences: sequences.1 })
    }

    /// Checks `b` or `c`; its number of groups, or none if it is constant.
    fn coefficient(
        &self,
        check: &Checker,
        name: &'static str,
        x: &Tensor,
        [batch, dim, seqlen, d_state]: [usize; 4],
    ) -> Result<Option<usize>> {
        let (n, l) = (("d_state", d_state), ("seqlen", seqlen));
        if x.rank() == 2 {
            check.parameter(name, x, &[("dim", dim), n])?;
            return Ok(None);
        }
        if x.rank() == 3 {
            let expected = match self.layout {
                SequenceLayout::ChannelsFirst => [("batch", batch), n, l],
                SequenceLayout::ChannelsLast => [("batch", batch), l, n],
            };
            check.activation(name, x, &expected)?;
            return Ok(Some(1));
        }
        let axis = match self.layout {
            SequenceLayout::ChannelsFirst => 1,
            SequenceLayout::ChannelsLast => 2,
        };
        let groups = x.dims().get(axis).copied().unwrap_or(0);
        let expected = match self.layout {
            SequenceLayout::ChannelsFirst => [("batch", batch), ("ngroups", groups), n, l],
            SequenceLayout::ChannelsLast => [("batch", batch), l, ("ngroups", groups), n],
        };
        check.activation(name, x, &expected)?;
        check.require(groups > 0 && dim.is_multiple_of(groups), || {
            format!("`{name}` has {groups} groups, expected a divisor of dim {dim}")
        })?;
        Ok(Some(groups))
    }
}

/// What [`selective_scan`] returns.
#[derive(Debug, Clone)]
pub struct SelectiveScanOutput {
    /// The shape and dtype of `u`.
    pub y: Tensor,
    /// The state after the last token of each sequence, `(batch, dim, d_state)`, `f32`.
    pub final_state: Tensor,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    dim: usize,
    seqlen: usize,
    d_state: usize,
    /// Groups of a varying `b`.
    b_groups: Option<usize>,
    /// Groups of a varying `c`.
    c_groups: Option<usize>,
    /// As many as there are states: the batch, unless it is packed.
    sequences: usize,
}

impl SelectiveScan<'_> {
    /// The op as a part of a fused block, with its outputs.
    pub(crate) fn part(&self, tracked: bool) -> Result<(Part, [Tensor; 2])> {
        let (sizes, inputs) = (self.sizes()?, autograd::inputs(self));
        if sizes.fused(self) {
            return Part::fused(autograd::Node::new(self, sizes), &inputs, tracked);
        }
        let (delta_softplus, layout, packing) = (self.delta_softplus, self.layout, self.packing.cloned());
        checkpoint::part(OP, &inputs, tracked, move |inputs: [Option<&Tensor>; autograd::SLOTS]| {
            let [Some(u), Some(delta), Some(a), Some(b), Some(c), d, z, delta_bias, initial_state] = inputs
            else {
                return Ok(None);
            };
            let args =
                SelectiveScan { d, z, delta_bias, initial_state, ..SelectiveScan::new(u, delta, a, b, c) };
            let args = SelectiveScan { delta_softplus, layout, packing: packing.as_ref(), ..args };
            let output = selective_scan(&args)?;
            Ok(Some([output.y, output.final_state]))
        })
    }
}

impl Sizes {
    /// Whether there are fused kernels; those for GPUs take states that are not large.
    fn fused(self, args: &SelectiveScan) -> bool {
        #[cfg(feature = "cuda")]
        if args.u.device().is_cuda() && self.d_state > cuda::LARGEST_STATE {
            return false;
        }
        args::fused(args.u)
    }

    fn state_shape(&self) -> (usize, usize, usize) {
        (self.sequences, self.dim, self.d_state)
    }
}

/// Runs the selective scan of Mamba over a sequence.
///
/// `h_t = exp(Δ_t · A) h_{t-1} + Δ_t · B_t · u_t`, `y_t = C_t · h_t + D · u_t`, gated by `silu(z)` if given, where
/// `Δ = delta + delta_bias`, through a softplus if asked for.
///
/// # Shapes
/// `u`, `delta`, `z`, `y`: `(batch, dim, seqlen)`, or `(batch, seqlen, dim)` with [`SequenceLayout::ChannelsLast`] ·
/// `a`: `(dim, d_state)` · `b`, `c`: constant `(dim, d_state)`, or varying `(batch, ngroups, d_state, seqlen)`,
/// channels last `(batch, seqlen, ngroups, d_state)`; `ngroups` divides `dim` and may be left out where it is 1 ·
/// `d`, `delta_bias`: `(dim,)` · `initial_state`, `final_state`: `(batch, dim, d_state)`, or
/// `(sequences, dim, d_state)` with [`packing`](Packing), always `f32` (`f64` if `u` is). `u` is f32, f16, bf16 or f64 and `y` has its dtype; arithmetic is `f32` (`f64` for `f64`).
/// # Gradients
/// For every input, through `y` and through `final_state`. The backward pass recomputes states from those kept
/// every 64 tokens (32 on a GPU).
/// # Errors
/// If a shape, dtype, device or the packing disagrees with `u`.
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_ops::{SelectiveScan, SelectiveScanOutput, selective_scan};
/// # fn main() -> candle_core::Result<()> {
/// let (batch, dim, d_state, seqlen) = (2, 6, 16, 32);
/// let u = Tensor::randn(0f32, 1.0, (batch, dim, seqlen), &Device::Cpu)?;
/// let delta = Tensor::rand(0f32, 0.1, (batch, dim, seqlen), &Device::Cpu)?;
/// let a = Tensor::rand(-16f32, -1.0, (dim, d_state), &Device::Cpu)?;
/// let b = Tensor::randn(0f32, 1.0, (batch, 2, d_state, seqlen), &Device::Cpu)?; // 2 groups of 3 channels
/// let c = Tensor::randn(0f32, 1.0, (batch, 2, d_state, seqlen), &Device::Cpu)?;
/// let d = Tensor::ones(dim, candle_core::DType::F32, &Device::Cpu)?;
/// let SelectiveScanOutput { y, final_state } =
///     selective_scan(&SelectiveScan { d: Some(&d), ..SelectiveScan::new(&u, &delta, &a, &b, &c) })?;
/// assert_eq!(y.dims(), [batch, dim, seqlen]);
/// assert_eq!(final_state.dims(), [batch, dim, d_state]);
/// # Ok(()) }
/// ```
/// # Source
/// Gu and Dao, 2023, Algorithm 2; `selective_scan_ref` in state-spaces/mamba.
pub fn selective_scan(args: &SelectiveScan) -> Result<SelectiveScanOutput> {
    let sizes = args.sizes()?;
    if sizes.fused(args) { autograd::apply(args, sizes) } else { reference::forward(args) }
}
