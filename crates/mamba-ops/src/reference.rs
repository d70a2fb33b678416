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
