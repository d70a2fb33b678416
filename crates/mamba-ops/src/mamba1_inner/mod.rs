//! All of a Mamba block between its first and its last projection, as one node of the graph.

mod autograd;

use candle_core::{Result, Tensor};

use crate::args::{Checker, Dim};
use crate::packing::Packing;

const OP: &str = "mamba1_inner";

/// Arguments of [`mamba1_inner`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct Mamba1Inner<'a> {
    /// What the first projection gives, `[x | z]`: `(batch, seqlen, 2 · dim)`; or what it takes, if it is given.
    pub xz: &'a Tensor,
    /// The first projection, `(2 · dim, d_model)`: then `xz` is `(batch, seqlen, d_model)`.
    pub in_proj: Option<&'a Tensor>,
    /// One filter a channel, `(dim, width)`.
    pub conv_weight: &'a Tensor,
    /// `(dim,)`.
    pub conv_bias: Option<&'a Tensor>,
    /// From `x` to `[dt | B | C]`, `(dt_rank + 2 · d_state, dim)`.
    pub x_proj: &'a Tensor,
    /// From `dt` to the step size of each channel, `(dim, dt_rank)`.
    pub dt_proj: &'a Tensor,
    /// Added to the step size first, `(dim,)`: the bias of `dt_proj`.
    pub delta_bias: Option<&'a Tensor>,
    /// `(dim, d_state)`; negative in a stable system.
    pub a: &'a Tensor,
    /// The skip connection, `(dim,)`.
    pub d: Option<&'a Tensor>,
    /// The last projection, `(d_model, dim)`.
    pub out_proj: Option<&'a Tensor>,
    /// Whether the step size goes through a softplus.
    pub delta_softplus: bool,
    /// The `width - 1` inputs of the convolution before the first, `(batch, dim, width - 1)`; zeros if absent.
    pub initial_conv_state: Option<&'a Tensor>,
    /// The state before the first token, `(batch, dim, d_state)`; zeros if absent.
    pub initial_ssm_state: Option<&'a Tensor>,
    /// Where sequences lie in the batch; each row is one if absent.
    pub packing: Option<&'a Packing>,
    /// Whether `backward()` computes everything in between again; else it is kept.
    pub recompute: bool,
}

impl<'a> Mamba1Inner<'a> {
    /// The required arguments; everything else absent, but the softplus; nothing is kept.
    pub fn new(
        xz: &'a Tensor,
        conv_weight: &'a Tensor,
        x_proj: &'a Tensor,
        dt_proj: &'a Tensor,
        a: &'a Tensor,
    ) -> Self {
        Self {
            xz,
            in_proj: None,
            conv_weight,
            conv_bias: None,
            x_proj,
            dt_proj,
            delta_bias: None,
            a,
            d: None,
            out_proj: None,
            delta_softplus: true,
            initial_conv_state: None,
            initial_ssm_state: None,
            packing: None,
            recompute: true,
        }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "xz", self.xz)?;
        let [batch, seqlen, width] = check.main_dims(["batch", "seqlen", "2 dim"])?;
        let (name, channels) = match self.in_proj {
            None => ("xz", width),
            Some(in_proj) => {
                let channels = in_proj.dims().first().copied().unwrap_or(0);
                check.parameter("in_proj", in_proj, &[("2 dim", channels), ("d_model", width)])?;
                ("in_proj", channels)
            }
        };
        check.require(channels.is_multiple_of(2), || {
            let (whole, rest) = match self.in_proj {
                None => (self.xz, "batch, seqlen, 2 dim"),
                Some(in_proj) => (in_proj, "2 dim, d_model"),
            };
            format!("`{name}` has shape {:?}, expected ({rest})", whole.dims())
        })?;
        let dim = channels / 2;
        let last = |x: &Tensor| x.dims().last().copied().unwrap_or(0);
        let (width, dt_rank, d_state) = (last(self.conv_weight), last(self.dt_proj), last(self.a));
        let (d, n): (Dim, Dim) = (("dim", dim), ("d_state", d_state));
        check.parameter("a", self.a, &[d, n])?;
        check.parameter("conv_weight", self.conv_weight, &[d, ("width", width)])?;
        check.require(width > 0, || "`conv_weight` has width 0, expected at least 1".into())?;
        check.parameter("dt_proj", self.dt_proj, &[d, ("dt_rank", dt_rank)])?;
        check.require(dt_rank > 0, || "`dt_proj` has rank 0, expected at least 1".into())?;
        check.parameter("x_proj", self.x_proj, &[("dt_rank + 2 d_state", dt_rank + 2 * d_state), d])?;
        for (name, x) in [("conv_bias", self.conv_bias), ("delta_bias", self.delta_bias), ("d", self.d)] {
            if let Some(x) = x {
                check.parameter(name, x, &[d])?;
            }
        }
        if let Some(out_proj) = self.out_proj {
            let d_model = out_proj.dims().first().copied().unwrap_or(0);
            check.parameter("out_proj", out_proj, &[("d_model", d_model), d])?;
        }
        let sequences = check.packing(self.packing, batch, seqlen)?;
        if let Some(state) = self.initial_conv_state {
            check.state("initial_conv_state", state, &[sequences, d, ("width - 1", width - 1)])?;
        }
        if let Some(state) = self.initial_ssm_state {
            check.state("initial_ssm_state", state, &[sequences, d, n])?;
        }
        Ok(Sizes { dim, d_state, dt_rank })
    }
}

/// What [`mamba1_inner`] returns.
#[derive(Debug, Clone)]
pub struct Mamba1InnerOutput {
    /// `(batch, seqlen, dim)`, or `(batch, seqlen, d_model)` with `out_proj`, in the dtype of `xz`.
    pub y: Tensor,
    /// The window of the convolution after the last token, `(batch, dim, width - 1)`, `f32`.
    pub final_conv_state: Tensor,
    /// The state after the last token, `(batch, dim, d_state)`, `f32`.
    pub final_ssm_state: Tensor,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    dim: usize,
    d_state: usize,
    dt_rank: usize,
}

/// Runs a Mamba block from its first projection on: convolution, projections to `dt`, `B` and `C`, scan and gate, and
/// the last projection if given.
///
/// `[x | z] = xz`, or `xz · in_projᵀ`; `x ← silu(conv(x))` as [`causal_conv1d`](fn@crate::causal_conv1d); `[dt | B | C] = x · x_projᵀ`; `delta = dt · dt_projᵀ`; `y` is
/// what [`selective_scan`](fn@crate::selective_scan) makes of them, gated by `silu(z)`, and `y ← y Wᵀ` with `out_proj`. The same as calling these
/// ops one after another, but one node of the graph. While training nothing in between is kept, `backward()` computes it
/// again, or with `recompute` off all of it is, but for `f64`, which has no kernels and is computed again all the same.
///
/// # Shapes
/// `xz`: `(batch, seqlen, 2 · dim)`, or `(batch, seqlen, d_model)` with `in_proj`, `(2 · dim, d_model)`; f32, f16, bf16 or f64, which is the dtype of `y` and of the matrix products too ·
/// `conv_weight`: `(dim, width)` · `x_proj`: `(dt_rank + 2 · d_state, dim)` · `dt_proj`: `(dim, dt_rank)` · `a`:
/// `(dim, d_state)` · `conv_bias`, `delta_bias`, `d`: `(dim,)` · `out_proj`: `(d_model, dim)` · `initial_conv_state`,
/// `final_conv_state`: `(batch, dim, width - 1)` · `initial_ssm_state`, `final_ssm_state`: `(batch, dim, d_state)`, both
/// always `f32` (`f64` if `xz` is), and by sequence instead of batch with [`packing`](Packing).
/// # Gradients
/// For every input, through every output.
/// # Errors
/// If a shape, dtype, device or the packing disagrees with `xz`.
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_ops::{Mamba1Inner, mamba1_inner};
/// # fn main() -> candle_core::Result<()> {
/// let (batch, seqlen, dim, d_state, dt_rank, width) = (2, 20, 8, 16, 2, 4);
/// let xz = Var::randn(0f32, 1.0, (batch, seqlen, 2 * dim), &Device::Cpu)?;
/// let conv_weight = Tensor::randn(0f32, 0.5, (dim, width), &Device::Cpu)?;
/// let x_proj = Tensor::randn(0f32, 0.3, (dt_rank + 2 * d_state, dim), &Device::Cpu)?;
/// let dt_proj = Var::randn(0f32, 0.3, (dim, dt_rank), &Device::Cpu)?;
/// let a = Tensor::rand(-16f32, -1.0, (dim, d_state), &Device::Cpu)?;
/// let output = mamba1_inner(&Mamba1Inner::new(&xz, &conv_weight, &x_proj, &dt_proj, &a))?;
/// assert_eq!(output.y.dims(), [batch, seqlen, dim]);
/// let grads = output.y.sqr()?.sum_all()?.backward()?;
/// assert!(grads.get(&xz).is_some() && grads.get(&dt_proj).is_some());
/// # Ok(()) }
/// ```
/// # Source
/// `mamba_inner_fn` in state-spaces/mamba.
pub fn mamba1_inner(args: &Mamba1Inner) -> Result<Mamba1InnerOutput> {
    let sizes = args.sizes()?;
    let [y, final_conv_state, final_ssm_state] = autograd::apply(args, sizes)?;
    Ok(Mamba1InnerOutput { y, final_conv_state, final_ssm_state })
}
