//! State-space duality of Mamba-2: a recurrence with one decay a head, computed chunk by chunk with matrix products.

mod autograd;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{Result, Tensor};

use crate::args::{self, Checker, Dim};
use crate::checkpoint;
use crate::packing::Packing;
use crate::part::Part;

const OP: &str = "ssd_chunk_scan";

/// Arguments of [`ssd_chunk_scan`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct SsdChunkScan<'a> {
    /// The input, `(batch, seqlen, nheads, headdim)`.
    pub x: &'a Tensor,
    /// The step size, one a head, `(batch, seqlen, nheads)`.
    pub dt: &'a Tensor,
    /// One a head, `(nheads,)`; negative in a stable system.
    pub a: &'a Tensor,
    /// What the input writes into the state, `(batch, seqlen, ngroups, d_state)`.
    pub b: &'a Tensor,
    /// What the output reads from the state, `(batch, seqlen, ngroups, d_state)`.
    pub c: &'a Tensor,
    /// The skip connection, `(nheads,)` or `(nheads, headdim)`.
    pub d: Option<&'a Tensor>,
    /// The gate, laid out as `x`.
    pub z: Option<&'a Tensor>,
    /// Added to `dt` first, `(nheads,)`.
    pub dt_bias: Option<&'a Tensor>,
    /// Whether `dt` then goes through a softplus.
    pub dt_softplus: bool,
    /// The bounds that `dt` is clamped to at last.
    pub dt_limit: (f64, f64),
    /// Tokens of a chunk, at least 1: a hint for speed, on which results do not depend beyond rounding.
    pub chunk_size: usize,
    /// The state before the first token, `(batch, nheads, headdim, d_state)`; zeros if absent.
    pub initial_state: Option<&'a Tensor>,
    /// Where sequences lie in the batch; each row is one if absent.
    pub packing: Option<&'a Packing>,
}

impl<'a> SsdChunkScan<'a> {
    /// The required arguments; everything else absent, `dt` taken as it is where it is not negative, chunks of 64.
    pub fn new(x: &'a Tensor, dt: &'a Tensor, a: &'a Tensor, b: &'a Tensor, c: &'a Tensor) -> Self {
        Self {
            x,
            dt,
            a,
            b,
            c,
            d: None,
            z: None,
            dt_bias: None,
            dt_softplus: false,
            dt_limit: (0.0, f64::INFINITY),
            chunk_size: 64,
            initial_state: None,
            packing: None,
        }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "x", self.x)?;
        let [batch, seqlen, nheads, headdim] = check.main_dims(["batch", "seqlen", "nheads", "headdim"])?;
        let (b, l, h, p): (Dim, Dim, Dim, Dim) =
            (("batch", batch), ("seqlen", seqlen), ("nheads", nheads), ("headdim", headdim));
        check.activation("dt", self.dt, &[b, l, h])?;
        check.parameter("a", self.a, &[h])?;
        let ngroups = self.b.dims().get(2).copied().unwrap_or(0);
        let d_state = self.b.dims().last().copied().unwrap_or(0);
        let (g, n) = (("ngroups", ngroups), ("d_state", d_state));
        check.activation("b", self.b, &[b, l, g, n])?;
        check.activation("c", self.c, &[b, l, g, n])?;
        check.require(ngroups > 0 && nheads.is_multiple_of(ngroups), || {
            format!("`b` has {ngroups} groups, expected a divisor of nheads {nheads}")
        })?;
        if let Some(d) = self.d {
            let rank = if d.rank() == 1 { 1 } else { 2 };
            check.parameter("d", d, &[h, p][..rank])?;
        }
        if let Some(z) = self.z {
            check.activation("z", z, &[b, l, h, p])?;
        }
        if let Some(bias) = self.dt_bias {
            check.parameter("dt_bias", bias, &[h])?;
        }
        let sequences = check.packing(self.packing, batch, seqlen)?;
        if let Some(state) = self.initial_state {
            check.state("initial_state", state, &[sequences, h, p, n])?;
        }
        check.dt_limit(self.dt_limit)?;
        check.require(self.chunk_size > 0, || "`chunk_size` is 0, expected at least 1".into())?;
        Ok(Sizes { batch, seqlen, nheads, headdim, ngroups, d_state, sequences: sequences.1 })
    }
}

/// What [`ssd_chunk_scan`] returns.
#[derive(Debug, Clone)]
pub struct SsdChunkScanOutput {
    /// The shape and dtype of `x`.
    pub y: Tensor,
    /// The state after the last token of each sequence, `(batch, nheads, headdim, d_state)`, `f32`.
    pub final_state: Tensor,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    seqlen: usize,
    nheads: usize,
    headdim: usize,
    ngroups: usize,
    d_state: usize,
    /// As many as there are states: the batch, unless it is packed.
    sequences: usize,
}

impl SsdChunkScan<'_> {
    /// The op as a part of a fused block, with its outputs.
    pub(crate) fn part(&self, tracked: bool) -> Result<(Part, [Tensor; 2])> {
        let (sizes, inputs) = (self.sizes()?, autograd::inputs(self));
        if sizes.fused(self) {
            return Part::fused(autograd::Node::new(self, sizes), &inputs, tracked);
        }
        let SsdChunkScan { dt_softplus, dt_limit, chunk_size, .. } = *self;
        let packing = self.packing.cloned();
        checkpoint::part(OP, &inputs, tracked, move |inputs: [Option<&Tensor>; autograd::SLOTS]| {
            let [Some(x), Some(dt), Some(a), Some(b), Some(c), d, z, dt_bias, initial_state] = inputs else {
                return Ok(None);
            };
            let args = SsdChunkScan { d, z, dt_bias, initial_state, ..SsdChunkScan::new(x, dt, a, b, c) };
            let args = SsdChunkScan { dt_softplus, dt_limit, chunk_size, packing: packing.as_ref(), ..args };
            let output = ssd_chunk_scan(&args)?;
            Ok(Some([output.y, output.final_state]))
        })
    }
}

impl Sizes {
    /// Whether there are fused kernels; those for GPUs need room for a state.
    fn fused(self, args: &SsdChunkScan) -> bool {
        #[cfg(feature = "cuda")]
        if args.x.device().is_cuda() && !cuda::fits(args.x.device(), self, args.x.dtype()) {
            return false;
        }
        args::fused(args.x)
    }

    fn state_shape(&self) -> (usize, usize, usize, usize) {
        (self.sequences, self.nheads, self.headdim, self.d_state)
    }
}

/// Runs the state-space duality of Mamba-2 over a sequence.
///
/// `h_t = exp(Δ_t · A) h_{t-1} + Δ_t · x_t ⊗ B_t`, `y_t = h_t C_t + D · x_t`, gated by `silu(z)` if given, where
/// `Δ = dt + dt_bias`, through a softplus if asked for, then clamped to `dt_limit`.
///
/// # Shapes
/// `x`, `z`, `y`: `(batch, seqlen, nheads, headdim)` · `dt`: `(batch, seqlen, nheads)` · `a`, `dt_bias`: `(nheads,)` ·
/// `b`, `c`: `(batch, seqlen, ngroups, d_state)`, where `ngroups` divides `nheads` and neighbouring heads share a group ·
/// `d`: `(nheads,)` or `(nheads, headdim)` · `initial_state`, `final_state`: `(batch, nheads, headdim, d_state)`, or
/// `(sequences, nheads, headdim, d_state)` with [`packing`](Packing), always `f32` (`f64` if `x` is). `x` is f32, f16, bf16 or f64 and `y` has its dtype; arithmetic is `f32` (`f64` for `f64`).
/// # Gradients
/// For every input, through `y` and through `final_state`; none for a `dt` beyond `dt_limit`. The backward pass
/// recomputes everything from the states kept before each chunk; on a GPU, from the inputs alone.
/// # Errors
/// If a shape, dtype, device or the packing disagrees with `x`, or `ngroups`, `dt_limit` or `chunk_size` make no sense.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{SsdChunkScan, SsdChunkScanOutput, ssd_chunk_scan};
/// # fn main() -> candle_core::Result<()> {
/// let (batch, seqlen, nheads, headdim, ngroups, d_state) = (2, 100, 4, 8, 2, 16);
/// let x = Tensor::randn(0f32, 1.0, (batch, seqlen, nheads, headdim), &Device::Cpu)?;
/// let dt = Tensor::randn(-3f32, 1.0, (batch, seqlen, nheads), &Device::Cpu)?;
/// let a = Tensor::rand(-16f32, -1.0, nheads, &Device::Cpu)?;
/// let b = Tensor::randn(0f32, 1.0, (batch, seqlen, ngroups, d_state), &Device::Cpu)?;
/// let c = Tensor::randn(0f32, 1.0, (batch, seqlen, ngroups, d_state), &Device::Cpu)?;
/// let d = Tensor::ones(nheads, DType::F32, &Device::Cpu)?;
/// let SsdChunkScanOutput { y, final_state } = ssd_chunk_scan(&SsdChunkScan {
///     d: Some(&d),
///     dt_softplus: true,
///     ..SsdChunkScan::new(&x, &dt, &a, &b, &c)
/// })?;
/// assert_eq!(y.dims(), [batch, seqlen, nheads, headdim]);
/// assert_eq!(final_state.dims(), [batch, nheads, headdim, d_state]);
/// # Ok(()) }
/// ```
/// # Source
/// Dao and Gu, 2024, Listing 1; `mamba_chunk_scan_combined` in state-spaces/mamba. The derivation is in this
/// folder's `README.md`.
pub fn ssd_chunk_scan(args: &SsdChunkScan) -> Result<SsdChunkScanOutput> {
    let sizes = args.sizes()?;
    if sizes.fused(args) { autograd::apply(args, sizes) } else { reference::forward(args) }
}
