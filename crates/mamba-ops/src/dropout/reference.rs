//! The op in plain tensor operations.

use candle_core::{Result, Tensor};

use super::{Dropout, philox};
use crate::args::state_dtype;
use crate::reference::cast;

/// `x · mask`, for any device and dtype; differentiable. The mask comes from the host.
///
/// # Errors
/// If `rate` cannot be, or candle refuses an operation.
pub fn forward(args: &Dropout) -> Result<Tensor> {
    let (x, mask) = (args.x, args.mask()?);
    let factor = |i: usize| {
        let word = philox::words(mask.seed, mask.stream, i as u64 / 4)[i % 4];
        if word >= mask.threshold { mask.scale } else { 0.0 }
    };
    let dtype = state_dtype(x.dtype());
    let factors: Vec<f64> = (0..x.elem_count()).map(factor).collect();
    let factors = Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(dtype)?;
    (cast(x, dtype)? * factors)?.to_dtype(x.dtype())
}
