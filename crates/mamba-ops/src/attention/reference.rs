//! Attention in plain tensor operations: the meaning of the op, and its gradients by candle's autograd.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

use super::Attention;
use crate::args::state_dtype;

/// Queries at a time: bounds the matrix of scores.
const QUERIES: usize = 512;

/// `softmax(scale · q kᵀ) v` over what each query sees, for any device and dtype; differentiable.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`attention`](super::attention).
pub fn forward(args: &Attention) -> Result<Tensor> {
    let (batch, seqlen, nheads, headdim) = args.q.dims4()?;
    let dtype = state_dtype(args.q.dtype());
    // Candle cannot concatenate or multiply nothing; blocks without positions have no gradient to give.
    let blocks = |blocks: &[Tensor]| -> Result<Option<Tensor>> {
        let blocks: Vec<&Tensor> = blocks.iter().filter(|x| x.elem_count() > 0).collect();
        if blocks.is_empty() {
            return Ok(None);
        }
        Ok(Some(Tensor::cat(&blocks, 1)?.to_dtype(dtype)?.transpose(1, 2)?))
    };
    let (Some(k), Some(v)) = (blocks(args.keys)?, blocks(args.values)?) else {
        return args.q.zeros_like();
    };
    if args.q.elem_count() == 0 {
        return args.q.zeros_like();
    }
    let (_, nheads_kv, kv_len, _) = k.dims4()?;
    let group = nheads / nheads_kv;
    // The heads of a group stand among the rows, beside the positions: (batch, nheads_kv, seqlen · group, headdim).
    let q = args.q.to_dtype(dtype)?.reshape((batch, seqlen, nheads_kv, group, headdim))?.transpose(1, 2)?;
    let k = k.transpose(2, 3)?.contiguous()?;
    let v = v.contiguous()?;
    let mut pieces = vec![];
    for first in (0..seqlen).step_by(QUERIES) {
        let count = QUERIES.min(seqlen - first);
        let rows = q.narrow(2, first, count)?.reshape((batch, nheads_kv, count * group, headdim))?;
        let scores = (rows.contiguous()?.matmul(&k)? * args.scale)?;
        let scores = match mask(args, first, count, group, kv_len)? {
            Some(mask) => scores.broadcast_add(&mask.to_dtype(dtype)?)?,
            None => scores,
        };
        let weights = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let y = weights.matmul(&v)?.reshape((batch, nheads_kv, count, group, headdim))?;
        pieces.push(y.transpose(1, 2)?.reshape((batch, count, nheads, headdim))?);
    }
    Tensor::cat(&pieces, 1)?.to_dtype(args.q.dtype())
}

/// 0 where a query sees a key, else minus infinity, `(count · group, kv_len)`; none if every query sees every key.
fn mask(args: &Attention, first: usize, count: usize, group: usize, kv_len: usize) -> Result<Option<Tensor>> {
    let seqlen = args.q.dim(1)?;
    let visible = |i: usize| args.options().visible((kv_len + i).saturating_sub(seqlen), kv_len);
    if (first..first + count).all(|i| visible(i) == (0..kv_len)) {
        return Ok(None);
    }
    // Of each row the keys from one number to another, compared where the scores are: a mask of numbers made here would have to go there.
    let device = args.q.device();
    let bound = |of: fn(Range<usize>) -> usize| {
        let rows = (first * group..(first + count) * group).map(|row| of(visible(row / group)) as u32);
        Tensor::from_vec(rows.collect::<Vec<_>>(), (count * group, 1), device)
    };
    let keys = Tensor::arange(0, kv_len as u32, device)?.unsqueeze(0)?;
    let seen =
        (keys.broadcast_ge(&bound(|seen| seen.start)?)? * keys.broadcast_lt(&bound(|seen| seen.end)?)?)?;
    Ok(Some(seen.to_dtype(DType::F32)?.log()?))
}
