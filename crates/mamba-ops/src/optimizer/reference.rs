//! The same in plain tensor operations, for any device and dtype.

use candle_core::{DType, Result, Tensor};

use super::{AdamWUpdate, Numbers};
use crate::host;

/// As [`adamw_update`](super::adamw_update).
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`adamw_update`](super::adamw_update).
pub fn adamw_update(args: &AdamWUpdate) -> Result<()> {
    let Numbers { factor, keep, rate, correction } = args.numbers();
    let [value, first, second] = [args.value, args.first, args.second].map(Tensor::detach);
    let grad = (args.grad.detach().to_dtype(value.dtype())? * factor)?;
    let next_first = ((first * args.beta1)? + (&grad * (1.0 - args.beta1))?)?;
    let next_second = ((second * args.beta2)? + (grad.sqr()? * (1.0 - args.beta2))?)?;
    let denominator = ((next_second.sqrt()? / correction)? + args.eps)?;
    let next = ((&value * keep)? - (next_first.div(&denominator)? * rate)?)?;
    for (x, next) in [(args.value, &next), (args.first, &next_first), (args.second, &next_second)] {
        host::replace(&x.detach().flatten_all()?, &next.flatten_all()?)?;
    }
    match args.rounded {
        Some(rounded) => {
            host::replace(&rounded.detach().flatten_all()?, &next.to_dtype(rounded.dtype())?.flatten_all()?)
        }
        None => Ok(()),
    }
}

/// `Σ x²`, in `f64`.
///
/// # Errors
/// If candle refuses an operation.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    x.detach().to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()
}
