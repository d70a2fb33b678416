//! The product as a node of candle's graph, with the gradients of those factors only that track: candle's own computes
//! both, and that of a frozen weight costs as much as that of a trained one.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor, op};

use super::{Linear, OP, Sizes};
use crate::args::state_dtype;

/// `x Wᵀ + bias` with a graph, where none of the extents is 0. The dtypes are those of the reference.
pub(super) fn apply(args: &Linear, _: Sizes) -> Result<Tensor> {
    let Linear { x, weight, bias } = *args;
    let dtype = if weight.dtype() == x.dtype() { x.dtype() } else { state_dtype(x.dtype()) };
    let mut y = x.to_dtype(dtype)?.contiguous()?.apply_op2(&weight.to_dtype(dtype)?, Product)?;
    if let Some(bias) = bias {
        y = y.apply_op2(&bias.to_dtype(dtype)?.contiguous()?, Sum)?;
    }
    y.to_dtype(x.dtype())
}

/// `(.., in) · (out, in)ᵀ`, of contiguous rows.
struct Product;

fn product<S: BackendStorage>(x: &S, x_at: &Layout, weight: &S, weight_at: &Layout) -> Result<(S, Shape)> {
    let (d_out, d_in) = weight_at.shape().dims2()?;
    let rows = x_at.shape().elem_count() / d_in;
    let x_rows = Layout::contiguous_with_offset((rows, d_in), x_at.start_offset());
    let y = x.matmul(weight, (1, rows, d_out, d_in), &x_rows, &weight_at.transpose(0, 1)?)?;
    let mut shape = x_at.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = d_out;
    }
    Ok((y, Shape::from(shape)))
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
        let rows = |x: &Tensor| -> Result<Tensor> {
            let d = x.dims().last().copied().unwrap_or(1);
            x.detach().contiguous()?.reshape(((), d))
        };
        let grad = rows(grad)?;
        let of_x = x.track_op().then(|| grad.matmul(&weight.detach())?.reshape(x.shape()));
        let of_weight = weight.track_op().then(|| grad.t()?.matmul(&rows(x)?));
        Ok((of_x.transpose()?, of_weight.transpose()?))
    }
}

/// A sum with a bias, whose gradient is a sum over all rows: in `f32`, where candle's would be in the dtype of the rows.
struct Sum;

fn sum<S: BackendStorage>(x: &S, x_at: &Layout, bias: &S, bias_at: &Layout) -> Result<(S, Shape)> {
    let y = x.binary_impl::<op::Add>(bias, x_at, &bias_at.broadcast_as(x_at.shape())?)?;
    Ok((y, x_at.shape().clone()))
}

impl CustomOp2 for Sum {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        bias: &CpuStorage,
        bias_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        sum(x, x_at, bias, bias_at)
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        bias: &CudaStorage,
        bias_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        sum(x, x_at, bias, bias_at)
    }

    fn bwd(
        &self,
        x: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_bias = || -> Result<Tensor> {
            let rows = grad.detach().to_dtype(state_dtype(grad.dtype()))?.reshape(((), bias.elem_count()))?;
            rows.sum(0)?.to_dtype(bias.dtype())
        };
        Ok((x.track_op().then(|| grad.clone()), bias.track_op().then(of_bias).transpose()?))
    }
}
