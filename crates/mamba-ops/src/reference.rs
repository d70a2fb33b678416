//! What the references are made of: elementwise functions, differentiable everywhere and free of overflow, and views that
//! candle can read.

use candle_core::{DType, Device, Result, Tensor};

/// An input in the dtype of the computation. An empty one is made anew: a view of nothing may begin past the end of its
/// storage, and candle then panics when it reads it.
pub(crate) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.elem_count() == 0 { zeros(x.dims(), dtype, x.device()) } else { x.to_dtype(dtype) }
}

/// The part `[start, start + len)` of an axis, which candle can read even if it is empty.
pub(crate) fn part(x: &Tensor, axis: usize, start: usize, len: usize) -> Result<Tensor> {
    if len > 0 && x.elem_count() > 0 {
        return x.narrow(axis, start, len);
    }
    let mut dims = x.dims().to_vec();
    dims[axis] = len;
    zeros(&dims, x.dtype(), x.device())
}

/// Zeros, perhaps none: on a GPU candle makes no empty tensor, but takes a part of another one.
pub(crate) fn zeros(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let some: Vec<usize> = dims.iter().map(|n| (*n).max(1)).collect();
    let empty = dims.iter().enumerate().filter(|(_, n)| **n == 0);
    empty.map(|(axis, _)| axis).try_fold(Tensor::zeros(some, dtype, device)?, |x, axis| x.narrow(axis, 0, 0))
}

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
