//! The op in plain tensor operations, all logits at once.

use candle_core::{DType, Result, Tensor};

use super::LinearCrossEntropy;
use crate::args::state_dtype;

/// The loss, for any device and dtype; differentiable.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`linear_cross_entropy`](super::linear_cross_entropy).
pub fn forward(args: &LinearCrossEntropy) -> Result<Tensor> {
    let dtype = state_dtype(args.x.dtype());
    let logits = args.x.to_dtype(dtype)?.matmul(&args.weight.to_dtype(dtype)?.t()?)?;
    let logits = (logits * args.logit_scale)?;
    let targets = args.targets.to_dtype(DType::I64)?;
    let ignored = targets.eq(args.ignore_index)?;
    let classes = ignored.where_cond(&targets.zeros_like()?, &targets)?;
    let max = logits.max_keepdim(1)?.detach();
    let log_sum = (logits.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?;
    let losses = (log_sum - logits.gather(&classes.unsqueeze(1)?, 1)?)?.squeeze(1)?;
    let counted = (1.0 - ignored.to_dtype(dtype)?)?;
    (losses * counted)?.sum_all()
}
