//! The product in plain tensor operations: the meaning of the op, and its gradients by candle's autograd.

use candle_core::{Result, Tensor};

use super::Linear;
use crate::args::state_dtype;

/// `y = x Wᵀ + bias`, for any device and dtype; differentiable. In the dtype of `x` if `weight` has it too, else in
/// `f32` or `f64`.
///
/// # Errors
/// If candle refuses an operation; shapes are checked by [`linear`](super::linear).
pub fn forward(args: &Linear) -> Result<Tensor> {
    let Linear { x, weight, bias } = *args;
    let dtype = if weight.dtype() == x.dtype() { x.dtype() } else { state_dtype(x.dtype()) };
    let (d_out, d_in) = weight.dims2()?;
    let rows = x.dims().iter().rev().skip(1).product::<usize>();
    let rows_of_x = x.to_dtype(dtype)?.reshape((rows, d_in))?;
    let mut y = if rows == 0 || d_in == 0 || d_out == 0 {
        // Candle has no product of nothing; this keeps the graph.
        let zeros = Tensor::zeros((rows, d_out), dtype, x.device())?;
        let nothing = (rows_of_x.sum_all()? + weight.to_dtype(dtype)?.sum_all()?)?;
        zeros.broadcast_mul(&nothing)?
    } else {
        rows_of_x.matmul(&weight.to_dtype(dtype)?.t()?)?
    };
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(dtype)?)?;
    }
    y.reshape(args.shape())?.to_dtype(x.dtype())
}
