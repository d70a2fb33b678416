//! All of a Mamba-2 block between its two projections, as one node of the graph.

mod autograd;

use candle_core::{Result, Tensor, bail};

use crate::args::{Checker, Dim};
use crate::packing::Packing;

const OP: &str = "mamba2_split_conv1d_scan";

/// Arguments of [`mamba2_split_conv1d_scan`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct Mamba2SplitConv1dScan<'a> {
    /// What the first projection gives, `[z | x | B | C | dt]`:
    /// `(batch, seqlen, 2 · d_ssm + 2 · ngroups · d_state + nheads)`; or what it takes, if it is given.
    pub zxbcdt: &'a Tensor,
    /// The first projection, by `d_model`: then `zxbcdt` is `(batch, seqlen, d_model)`.
    pub in_proj: Option<&'a Tensor>,
    /// One filter for each channel of `[x | B | C]`, `(conv_dim, width)`.
    pub conv_weight: &'a Tensor,
    /// `(conv_dim,)`.
    pub conv_bias: Option<&'a Tensor>,
    /// Added to `dt` first, `(nheads,)`.
    pub dt_bias: Option<&'a Tensor>,
    /// One a head, `(nheads,)`; negative in a stable system.
    pub a: &'a Tensor,
    /// The skip connection, `(nheads,)` or `(nheads, headdim)`.
    pub d: Option<&'a Tensor>,
    /// The norm with its gate; without it the gate alone, `y · silu(z)`.
    pub norm: Option<GatedRmsNorm<'a>>,
    /// The second projection, `(d_model, d_ssm)`.
    pub out_proj: Option<&'a Tensor>,
    /// Channels of a head.
    pub headdim: usize,
    /// Groups of heads that share `B` and `C`.
    pub ngroups: usize,
    /// Whether `dt` goes through a softplus.
    pub dt_softplus: bool,
    /// The bounds that `dt` is clamped to at last.
    pub dt_limit: (f64, f64),
    /// Tokens of a chunk, at least 1: a hint for speed.
    pub chunk_size: usize,
    /// The `width - 1` inputs of the convolution before the first, `(batch, conv_dim, width - 1)`; zeros if absent.
    pub initial_conv_state: Option<&'a Tensor>,
    /// The state before the first token, `(batch, nheads, headdim, d_state)`; zeros if absent.
    pub initial_ssm_state: Option<&'a Tensor>,
    /// Where sequences lie in the batch; each row is one if absent.
    pub packing: Option<&'a Packing>,
    /// Whether `backward()` computes everything in between again; else it is kept.
    pub recompute: bool,
}

/// The norm of [`Mamba2SplitConv1dScan`]: an RMSNorm gated by `silu(z)`.
#[derive(Debug, Clone, Copy)]
pub struct GatedRmsNorm<'a> {
    /// `(d_ssm,)`.
    pub weight: &'a Tensor,
    /// Added to the mean square.
    pub eps: f64,
    /// How many neighbouring channels share their mean square, a divisor of `d_ssm`; all of them if absent.
    pub group_size: Option<usize>,
    /// Whether the gate multiplies what the norm gives, else what it takes.
    pub norm_before_gate: bool,
}

impl<'a> Mamba2SplitConv1dScan<'a> {
    /// The required arguments; everything else absent, but the softplus, one group, chunks of 64; nothing is kept.
    pub fn new(zxbcdt: &'a Tensor, conv_weight: &'a Tensor, a: &'a Tensor, headdim: usize) -> Self {
        Self {
            zxbcdt,
            in_proj: None,
            conv_weight,
            conv_bias: None,
            dt_bias: None,
            a,
            d: None,
            norm: None,
            out_proj: None,
            headdim,
            ngroups: 1,
            dt_softplus: true,
            dt_limit: (0.0, f64::INFINITY),
            chunk_size: 64,
            initial_conv_state: None,
            initial_ssm_state: None,
            packing: None,
            recompute: true,
        }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "zxbcdt", self.zxbcdt)?;
        let [batch, seqlen, width] = check.main_dims(["batch", "seqlen", "channels"])?;
        let (name, whole, channels) = match self.in_proj {
            None => ("zxbcdt", self.zxbcdt, width),
            Some(in_proj) => {
                let channels = in_proj.dims().first().copied().unwrap_or(0);
                check.parameter("in_proj", in_proj, &[("channels", channels), ("d_model", width)])?;
                ("in_proj", in_proj, channels)
            }
        };
        let nheads = self.a.dims().first().copied().unwrap_or(0);
        let h: Dim = ("nheads", nheads);
        check.parameter("a", self.a, &[h])?;
        let (headdim, ngroups) = (self.headdim, self.ngroups);
        check.require(ngroups > 0 && nheads.is_multiple_of(ngroups), || {
            format!("`ngroups` is {ngroups}, expected a divisor of nheads {nheads}")
        })?;
        let too_large = || format!("`headdim` is {headdim}, too large for {nheads} heads");
        let Some(d_ssm) = nheads.checked_mul(headdim) else { bail!("{OP}: {}", too_large()) };
        // What is left of the channels is B and C.
        let rest =
            d_ssm.checked_mul(2).and_then(|z_and_x| channels.checked_sub(z_and_x)?.checked_sub(nheads));
        let Some(bc) = rest.filter(|rest| rest.is_multiple_of(2 * ngroups)) else {
            bail!(
                "{OP}: `{name}` has shape {:?}, expected ({}2 d_ssm + 2 ngroups d_state + nheads{}) with \
                 d_ssm {nheads} · {headdim}, ngroups {ngroups}, nheads {nheads}",
                whole.dims(),
                if self.in_proj.is_none() { "batch, seqlen, " } else { "" },
                if self.in_proj.is_none() { "" } else { ", d_model" }
            )
        };
        let d_state = bc / (2 * ngroups);
        let width = self.conv_weight.dims().last().copied().unwrap_or(0);
        let conv_dim: Dim = ("conv_dim", d_ssm + bc);
        check.parameter("conv_weight", self.conv_weight, &[conv_dim, ("width", width)])?;
        check.require(width > 0, || "`conv_weight` has width 0, expected at least 1".into())?;
        let parameter = |name, x: Option<&Tensor>, dims: &[Dim]| match x {
            Some(x) => check.parameter(name, x, dims),
            None => Ok(()),
        };
        parameter("conv_bias", self.conv_bias, &[conv_dim])?;
        parameter("dt_bias", self.dt_bias, &[h])?;
        let d_rank = if self.d.is_some_and(|d| d.rank() != 1) { 2 } else { 1 };
        parameter("d", self.d, &[h, ("headdim", headdim)][..d_rank])?;
        if let Some(GatedRmsNorm { weight, eps, group_size, .. }) = self.norm {
            check.parameter("norm.weight", weight, &[("d_ssm", d_ssm)])?;
            check.require(eps.is_finite() && eps >= 0.0, || {
                format!("`norm.eps` is {eps}, expected a finite number of at least 0")
            })?;
            check.require(group_size.is_none_or(|n| n > 0 && d_ssm.is_multiple_of(n)), || {
                format!(
                    "`norm.group_size` is {}, expected a divisor of d_ssm {d_ssm}",
                    group_size.unwrap_or(0)
                )
            })?;
        }
        if let Some(out_proj) = self.out_proj {
            let d_model = out_proj.dims().first().copied().unwrap_or(0);
            check.parameter("out_proj", out_proj, &[("d_model", d_model), ("d_ssm", d_ssm)])?;
        }
        check.dt_limit(self.dt_limit)?;
        check.require(self.chunk_size > 0, || "`chunk_size` is 0, expected at least 1".into())?;
        let sequences = check.packing(self.packing, batch, seqlen)?;
        if let Some(state) = self.initial_conv_state {
            check.state("initial_conv_state", state, &[sequences, conv_dim, ("width - 1", width - 1)])?;
        }
        if let Some(state) = self.initial_ssm_state {
            let expected = [sequences, h, ("headdim", headdim), ("d_state", d_state)];
            check.state("initial_ssm_state", state, &expected)?;
        }
        Ok(Sizes { batch, seqlen, nheads, headdim, ngroups, d_state })
    }
}

/// What [`mamba2_split_conv1d_scan`] returns.
#[derive(Debug, Clone)]
pub struct Mamba2SplitConv1dScanOutput {
    /// `(batch, seqlen, d_ssm)`, or `(batch, seqlen, d_model)` with `out_proj`, in the dtype of `zxbcdt`.
    pub y: Tensor,
    /// The window of the convolution after the last token, `(batch, conv_dim, width - 1)`, `f32`.
    pub final_conv_state: Tensor,
    /// The state after the last token, `(batch, nheads, headdim, d_state)`, `f32`.
    pub final_ssm_state: Tensor,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    seqlen: usize,
    nheads: usize,
    headdim: usize,
    ngroups: usize,
    d_state: usize,
}

/// Runs a Mamba-2 block from its first projection on: convolution, scan, gate and norm, and the second projection if
/// given.
///
/// `[z | x | B | C | dt] = zxbcdt`, or `zxbcdt · in_projᵀ`; `[x | B | C] ← silu(conv([x | B | C]))` as [`causal_conv1d`](fn@crate::causal_conv1d); `y` is what
/// [`ssd_chunk_scan`](fn@crate::ssd_chunk_scan) makes of them; then `y ← rms_norm(y, silu(z))` as [`norm`](fn@crate::norm) does, or `y · silu(z)` without a norm,
/// and `y ← y Wᵀ` with `out_proj`. The same as calling these ops one after another, but one node of the graph. While
/// training nothing in between is kept, `backward()` computes it again, or with `recompute` off all of it is, but for `f64`,
/// which has no kernels and is computed again all the same.
///
/// # Shapes
/// `zxbcdt`: `(batch, seqlen, channels)` with `channels = 2 · d_ssm + 2 · ngroups · d_state + nheads` and
/// `d_ssm = nheads · headdim`, or `(batch, seqlen, d_model)` with `in_proj`, `(channels, d_model)`; f32, f16, bf16 or f64, which is the dtype of `y` too · `conv_weight`: `(conv_dim, width)`, `conv_bias`: `(conv_dim,)` with
/// `conv_dim = d_ssm + 2 · ngroups · d_state` · `a`, `dt_bias`: `(nheads,)` · `d`: `(nheads,)` or `(nheads, headdim)` ·
/// `norm.weight`: `(d_ssm,)` · `out_proj`: `(d_model, d_ssm)` · `initial_conv_state`, `final_conv_state`:
/// `(batch, conv_dim, width - 1)` · `initial_ssm_state`, `final_ssm_state`: `(batch, nheads, headdim, d_state)`, both
/// always `f32` (`f64` if `zxbcdt` is), and by sequence instead of batch with [`packing`](Packing).
/// # Gradients
/// For every input, through every output.
/// # Errors
/// If a shape, dtype, device or the packing disagrees with `zxbcdt`, or an option makes no sense.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use mamba_ops::{GatedRmsNorm, Mamba2SplitConv1dScan, mamba2_split_conv1d_scan};
/// # fn main() -> candle_core::Result<()> {
/// let (batch, seqlen, nheads, headdim, d_state, width) = (2, 20, 3, 4, 8, 4);
/// let (d_ssm, conv_dim) = (nheads * headdim, nheads * headdim + 2 * d_state);
/// let zxbcdt = Var::randn(0f32, 1.0, (batch, seqlen, d_ssm + conv_dim + nheads), &Device::Cpu)?;
/// let conv_weight = Var::randn(0f32, 0.5, (conv_dim, width), &Device::Cpu)?;
/// let a = Tensor::rand(-16f32, -1.0, nheads, &Device::Cpu)?;
/// let weight = Tensor::ones(d_ssm, DType::F32, &Device::Cpu)?;
/// let norm = GatedRmsNorm { weight: &weight, eps: 1e-5, group_size: None, norm_before_gate: false };
/// let output = mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan {
///     norm: Some(norm),
///     ..Mamba2SplitConv1dScan::new(&zxbcdt, &conv_weight, &a, headdim)
/// })?;
/// assert_eq!(output.y.dims(), [batch, seqlen, d_ssm]);
/// let grads = output.y.sqr()?.sum_all()?.backward()?;
/// assert!(grads.get(&zxbcdt).is_some() && grads.get(&conv_weight).is_some());
/// # Ok(()) }
/// ```
/// # Source
/// `mamba_split_conv1d_scan_combined` in state-spaces/mamba.
pub fn mamba2_split_conv1d_scan(args: &Mamba2SplitConv1dScan) -> Result<Mamba2SplitConv1dScanOutput> {
    let sizes = args.sizes()?;
    let [y, final_conv_state, final_ssm_state] = autograd::apply(args, sizes)?;
    Ok(Mamba2SplitConv1dScanOutput { y, final_conv_state, final_ssm_state })
}
