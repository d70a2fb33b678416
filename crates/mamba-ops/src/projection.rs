//! Parts and products of activations within fused blocks, which run in a checkpoint.

use candle_core::{Result, Tensor};

use crate::reference::part;

/// `x Wᵀ` over the last axis of `(batch, seqlen, in)`, in the dtype of `x`; `weight`: `(out, in)`.
pub(crate) fn project(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((batch, seqlen, d_in), d_out) = (x.dims3()?, weight.dim(0)?);
    if x.elem_count() == 0 {
        // Nothing depends on nothing: a checkpoint gives the gradients, 0.
        return Tensor::zeros((batch, seqlen, d_out), x.dtype(), x.device());
    }
    let weight = weight.to_dtype(x.dtype())?;
    x.reshape((batch * seqlen, d_in))?.matmul(&weight.t()?)?.reshape((batch, seqlen, d_out))
}

/// The channels `[start, start + len)` of `(batch, seqlen, channels)`.
pub(crate) fn channels(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    part(x, 2, start, len)
}
