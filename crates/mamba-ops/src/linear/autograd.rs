//! The product as a node of candle's graph, with the gradients of those factors only that track: candle's own computes
//! both, and that of a frozen weight costs as much as that of a trained one.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{Linear, OP, Sizes};
use crate::args::state_dtype;

/// `x Wᵀ + bias` with a graph, where none of the extents is 0. The dtypes are those of the reference.
pub(super) fn apply(args: &Linear, sizes: Sizes) -> Result<Tensor> {
    let Linear { x, weight, bias } = *args;
    let dtype = if weight.dtype() == x.dtype() { x.dtype() } else { state_dtype(x.dtype()) };
    let rows = x.to_dtype(dtype)?.reshape((sizes.rows, sizes.d_in))?;
    let mut y = rows.apply_op2(&weight.to_dtype(dtype)?, Product)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(dtype)?)?;
    }
    y.reshape(args.shape())?.to_dtype(x.dtype())
}

/// `(rows, in) · (out, in)ᵀ`.
struct Product;

fn product<S: BackendStorage>(x: &S, x_at: &Layout, weight: &S, weight_at: &Layout) -> Result<(S, Shape)> {
    let ((rows, d_in), (d_out, _)) = (x_at.shape().dims2()?, weight_at.shape().dims2()?);
    let y = x.matmul(weight, (1, rows, d_out, d_in), x_at, &weight_at.transpose(0, 1)?)?;
    Ok((y, Shape::from((rows, d_out))))
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        weight: &CpuStorage,
        weight_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        product(x, x_at, weight, weight_at)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        weight: &CudaStorage,
        weight_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        product(x, x_at, weight, weight_at)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let of_x = x.track_op().then(|| grad.matmul(&weight.detach()));
        let of_weight = weight.track_op().then(|| grad.t()?.matmul(&x.detach()));
        Ok((of_x.transpose()?, of_weight.transpose()?))
    }
}
