//! Elementwise functions of the references, differentiable everywhere and free of overflow.

use candle_core::{Result, Tensor};

/// `x · sigmoid(x)`.
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    x.silu()
}

/// `ln(1 + e^x)` as `m + ln(e^(x-m) + e^-m)` with `m = max(x, 0)` held constant: its derivative is the sigmoid
/// everywhere, at 0 too.
pub(crate) fn softplus(x: &Tensor) -> Result<Tensor> {
    let m = x.relu()?.detach();
    let sum = ((x - &m)?.exp()? + m.neg()?.exp()?)?;
    sum.log()? + m
}

/// `min(max(x, low), high)`, with derivative 1 from `low` to `high` and 0 beyond; NaN stays NaN.
pub(crate) fn clamp(x: &Tensor, (low, high): (f64, f64)) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return Ok(x.clone()); // candle panics on some empty tensors
    }
    let bound = |value: f64| Tensor::full(value, x.shape(), x.device())?.to_dtype(x.dtype());
    let x = if low > f64::NEG_INFINITY { x.lt(low)?.where_cond(&bound(low)?, x)? } else { x.clone() };
    if high < f64::INFINITY { x.gt(high)?.where_cond(&bound(high)?, &x) } else { Ok(x) }
}

/// The sum over the last axis, which stays as an axis of 1; of nothing it is 0, where candle panics.
pub(crate) fn sum_last(x: &Tensor) -> Result<Tensor> {
    let (last, mut shape) = (x.rank() - 1, x.dims().to_vec());
    if x.elem_count() > 0 {
        return x.sum_keepdim(last);
    }
    shape[last] = 1;
    Tensor::zeros(shape, x.dtype(), x.device())
}
