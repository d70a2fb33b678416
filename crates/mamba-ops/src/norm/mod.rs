//! RMSNorm and layer norm, with the residual stream, a gate and groups.

mod autograd;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{DType, Result, Tensor};

use crate::args::{self, Checker, Dim};
use crate::checkpoint;
use crate::part::Part;

const OP: &str = "norm";

/// What a group is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NormKind {
    /// Its root mean square.
    #[default]
    Rms,
    /// Its standard deviation, after its mean is subtracted.
    Layer,
}

/// Arguments of [`norm`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// The input, `(.., dim)`.
    pub x: &'a Tensor,
    /// Multiplies the normalised values, `(dim,)`.
    pub weight: Option<&'a Tensor>,
    /// Added after the weight, `(dim,)`.
    pub bias: Option<&'a Tensor>,
    /// The residual stream, shaped as `x`: added to it before anything else.
    pub residual: Option<&'a Tensor>,
    /// The gate, shaped as `x`.
    pub z: Option<&'a Tensor>,
    /// What is computed.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub eps: f64,
    /// How many neighbouring channels share their statistics, a divisor of `dim`; all of them if absent.
    pub group_size: Option<usize>,
    /// Whether the gate multiplies what the norm gives, `norm(x) · silu(z)`, or what it takes, `norm(x · silu(z))`.
    pub norm_before_gate: bool,
    /// Whether the residual stream that comes out is `f32` even where what goes in is not.
    pub residual_in_f32: bool,
}

impl<'a> Norm<'a> {
    /// The required arguments; everything else absent, the gate before the norm.
    pub fn new(x: &'a Tensor, kind: NormKind, eps: f64) -> Self {
        Self {
            x,
            weight: None,
            bias: None,
            residual: None,
            z: None,
            kind,
            eps,
            group_size: None,
            norm_before_gate: false,
            residual_in_f32: false,
        }
    }

    /// RMSNorm with a weight.
    pub fn rms(x: &'a Tensor, weight: &'a Tensor, eps: f64) -> Self {
        Self { weight: Some(weight), ..Self::new(x, NormKind::Rms, eps) }
    }

    /// Layer norm with a weight.
    pub fn layer(x: &'a Tensor, weight: &'a Tensor, eps: f64) -> Self {
        Self { weight: Some(weight), ..Self::new(x, NormKind::Layer, eps) }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "x", self.x)?;
        let [leading @ .., dim] = self.x.dims() else {
            candle_core::bail!("{OP}: `x` is a scalar, expected (.., dim)")
        };
        let activation: Vec<Dim> = leading.iter().map(|n| ("batch", *n)).chain([("dim", *dim)]).collect();
        for (name, parameter) in [("weight", self.weight), ("bias", self.bias)] {
            if let Some(parameter) = parameter {
                check.parameter(name, parameter, &[("dim", *dim)])?;
            }
        }
        if let Some(residual) = self.residual {
            check.parameter("residual", residual, &activation)?;
            let (got, x) = (residual.dtype(), self.x.dtype());
            let wide = args::state_dtype(x);
            check.require(got == x || got == wide, || {
                let [got, x, wide] = [got, x, wide].map(|dtype| dtype.as_str());
                format!("`residual` has dtype {got}, expected {x} as `x`, or {wide}")
            })?;
        }
        if let Some(z) = self.z {
            check.activation("z", z, &activation)?;
        }
        check.require(self.eps.is_finite() && self.eps >= 0.0, || {
            format!("`eps` is {}, expected a finite number of at least 0", self.eps)
        })?;
        let group_size = self.group_size.unwrap_or(*dim);
        check.require(self.group_size.is_none_or(|n| n > 0 && dim.is_multiple_of(n)), || {
            format!("`group_size` is {group_size}, expected a divisor of dim {dim}")
        })?;
        Ok(Sizes { rows: self.x.elem_count() / (*dim).max(1), dim: *dim, group_size })
    }

    /// The dtype of the residual stream that comes out.
    fn residual_dtype(&self) -> DType {
        let wide = args::state_dtype(self.x.dtype());
        let keeps = self.residual.is_some_and(|residual| residual.dtype() == wide);
        if self.residual_in_f32 || keeps { wide } else { self.x.dtype() }
    }
}

/// What [`norm`] returns.
#[derive(Debug, Clone)]
pub struct NormOutput {
    /// The shape and dtype of `x`.
    pub y: Tensor,
    /// `x + residual`, or `x` itself if there is no residual: what the next block adds to.
    pub residual: Tensor,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// The product of all extents but the last.
    pub rows: usize,
    pub dim: usize,
    pub group_size: usize,
}

impl Norm<'_> {
    /// The op without a residual as a part of a fused block, with `y`.
    pub(crate) fn part(&self, tracked: bool) -> Result<(Part, [Tensor; 1])> {
        let (sizes, inputs) = (self.sizes()?, autograd::inputs(self));
        if sizes.fused(self.x) {
            return Part::fused(autograd::Node::new(self, sizes), &inputs, tracked);
        }
        let Norm { kind, eps, group_size, norm_before_gate, .. } = *self;
        checkpoint::part(OP, &inputs, tracked, move |inputs: [Option<&Tensor>; autograd::SLOTS]| {
            let [Some(x), weight, bias, residual, z] = inputs else { return Ok(None) };
            let args = Norm { weight, bias, residual, z, ..Norm::new(x, kind, eps) };
            Ok(Some([norm(&Norm { group_size, norm_before_gate, ..args })?.y]))
        })
    }
}

impl Sizes {
    /// Whether there are fused kernels; those for GPUs keep a group in registers.
    fn fused(self, x: &Tensor) -> bool {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() && self.group_size > cuda::LARGEST_GROUP {
            return false;
        }
        args::fused(x)
    }
}

/// Adds to the residual stream and normalises it, in groups of channels, with a gate before or after.
///
/// With `r = x + residual` and, for each group of `n` channels, `u = r · silu(z)` (`u = r` if the gate comes after or
/// is absent): `y = (u - m) / √(Σ (u - m)² / n + eps) · weight + bias`, where `m` is the mean of `u` for
/// [`NormKind::Layer`] and 0 for [`NormKind::Rms`]; if `norm_before_gate`, `y` is then multiplied by `silu(z)`.
///
/// # Shapes
/// `x`, `residual`, `z` and both outputs: `(.., dim)`, any rank from 1 · `weight`, `bias`: `(dim,)`. `x` is f32, f16,
/// bf16 or f64, `z` and `y` have its dtype, `residual` too or it is `f32`. The residual that comes out is `f32` if
/// `residual_in_f32` or if the one that goes in is, else it has the dtype of `x`; what is normalised is the sum before
/// that rounding. Arithmetic is `f32` (for `f64` everything is `f64`).
/// # Gradients
/// For `x`, `weight`, `bias`, `residual` and `z`, through `y` and through `residual`.
/// # Errors
/// If a shape, dtype or device disagrees with `x`, `group_size` does not divide `dim`, or `eps` is negative or not
/// finite.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{Norm, NormOutput, norm};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?.to_dtype(DType::BF16)?;
/// let stream = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// let weight = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// // Before a block of Mamba: what the last block gave joins the stream, which stays f32.
/// let NormOutput { y, residual } =
///     norm(&Norm { residual: Some(&stream), ..Norm::rms(&x, &weight, 1e-5) })?;
/// assert_eq!((y.dtype(), residual.dtype()), (DType::BF16, DType::F32));
/// // Within a block of Mamba-2: a gate, and 2 groups of 4 channels.
/// let gated = norm(&Norm { z: Some(&x), group_size: Some(4), ..Norm::rms(&y, &weight, 1e-5) })?;
/// assert_eq!(gated.y.dims(), [2, 5, 8]);
/// # Ok(()) }
/// ```
/// # Source
/// Zhang and Sennrich, 2019; `layer_norm_fn` and, gated, `layernorm_fn` in state-spaces/mamba (`mamba_ssm/ops/triton`).
pub fn norm(args: &Norm) -> Result<NormOutput> {
    let sizes = args.sizes()?;
    if sizes.fused(args.x) { autograd::apply(args, sizes) } else { reference::forward(args) }
}
