//! Parts and products of activations within fused blocks, outside of candle's graph.

use candle_core::{Result, Tensor};

use crate::reference::{part, zeros};

/// `x Wᵀ` over the last axis of `(batch, seqlen, in)`, in the dtype of `x`; `weight`: `(out, in)`.
pub(crate) fn project(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((batch, seqlen, _), d_out) = (x.dims3()?, weight.dim(0)?);
    if x.elem_count() == 0 {
        return zeros(&[batch, seqlen, d_out], x.dtype(), x.device());
    }
    // Candle has no product of columns of a wider matrix on a GPU, and on the CPU adds up in another order there.
    let weight = weight.to_dtype(x.dtype())?.contiguous()?;
    rows(x)?.matmul(&weight.t()?)?.reshape((batch, seqlen, d_out))
}

/// The gradient of `x` in [`project`], given that of its result.
pub(crate) fn project_backward(grad: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((batch, seqlen, _), d_in) = (grad.dims3()?, weight.dim(1)?);
    if grad.elem_count() == 0 {
        return zeros(&[batch, seqlen, d_in], grad.dtype(), grad.device());
    }
    rows(grad)?.matmul(&weight.to_dtype(grad.dtype())?.contiguous()?)?.reshape((batch, seqlen, d_in))
}

/// The gradient of `weight` in [`project`], in its dtype.
pub(crate) fn project_weight_backward(grad: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if grad.elem_count() == 0 || x.elem_count() == 0 {
        return weight.zeros_like();
    }
    rows(grad)?.t()?.matmul(&rows(x)?)?.to_dtype(weight.dtype())
}

/// The gradients of `x` and `weight` in [`project`], as far as they are needed.
pub(crate) fn project_both_backward(
    grad: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    [of_x, of_weight]: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    Ok([
        of_x.then(|| project_backward(grad, weight)).transpose()?,
        of_weight.then(|| project_weight_backward(grad, x, weight)).transpose()?,
    ])
}

/// The gradient of what a last projection takes, given that of its result, and of its weight, if it is needed; without a projection
/// the gradient passes through.
pub(crate) fn output_backward(
    grad: &Option<Tensor>,
    x: &Option<Tensor>,
    weight: &Option<Tensor>,
    of_weight: bool,
) -> Result<[Option<Tensor>; 2]> {
    match (grad, weight, x) {
        (Some(grad), Some(weight), Some(x)) => project_both_backward(grad, x, weight, [true, of_weight]),
        // Where the result is not used, neither is the weight.
        (grad, weight, _) => Ok([grad.clone(), weight.as_ref().map(Tensor::zeros_like).transpose()?]),
    }
}

/// `(batch · seqlen, channels)`.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.flatten_to(1)
}

/// The channels `[start, start + len)` of `(batch, seqlen, channels)`.
pub(crate) fn channels(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    part(x, 2, start, len)
}

/// The channels from `start` as `(batch, seqlen, count, size)`; a view where the channels before them divide so too.
pub(crate) fn groups(x: &Tensor, start: usize, count: usize, size: usize) -> Result<Tensor> {
    let (batch, seqlen, all) = x.dims3()?;
    let divides = size > 0 && all.is_multiple_of(size) && start.is_multiple_of(size);
    if divides && x.is_contiguous() && x.elem_count() > 0 {
        return x.reshape((batch, seqlen, all / size, size))?.narrow(2, start / size, count);
    }
    channels(x, start, count * size)?.reshape((batch, seqlen, count, size))
}

/// Parts that stand side by side; a missing one, of the given width, is 0.
pub(crate) fn side_by_side(parts: &[(Option<Tensor>, usize)], like: &Tensor) -> Result<Tensor> {
    let (batch, seqlen, _) = like.dims3()?;
    let part = |(part, width): &(Option<Tensor>, usize)| match part {
        Some(part) if part.elem_count() > 0 => part.reshape((batch, seqlen, *width)),
        _ => zeros(&[batch, seqlen, *width], like.dtype(), like.device()),
    };
    let parts = parts.iter().filter(|(_, width)| *width > 0).map(part).collect::<Result<Vec<_>>>()?;
    if like.elem_count() == 0 {
        return zeros(like.dims(), like.dtype(), like.device());
    }
    Tensor::cat(&parts, 2)
}
