//! Many rows against a weight in `f16` or `bf16`: block by block in `f32`, so that sums are not rounded on the way and there
//! is never a copy of the whole weight.

use candle_core::{DType, Result, Tensor};

use super::{Linear, Sizes};
use crate::host;

/// About how many elements of the weight are converted at once.
const ELEMENTS: usize = 1 << 20;

/// `x Wᵀ + bias`, where none of the extents is 0.
pub(super) fn forward(args: &Linear, sizes: Sizes) -> Result<Tensor> {
    let Sizes { rows, d_in, d_out } = sizes;
    let x = args.x.to_dtype(DType::F32)?.reshape((rows, d_in))?;
    let columns = (ELEMENTS / d_in).clamp(1, d_out);
    let mut y = host::uninit(rows * d_out);
    for first in (0..d_out).step_by(columns) {
        let count = columns.min(d_out - first);
        let block = host::read("weight", &args.weight.narrow(0, first, count)?)?.to_vec();
        let block = host::tensor(block, (count, d_in), DType::F32)?;
        let part = x.matmul(&block.t()?)?;
        let part = host::read("y", &part)?;
        for (y, part) in y.chunks_exact_mut(d_out).zip(part.chunks_exact(count)) {
            y[first..first + count].copy_from_slice(part);
        }
    }
    if let Some(bias) = args.bias {
        let bias = host::read("bias", bias)?;
        for y in y.chunks_exact_mut(d_out) {
            y.iter_mut().zip(&*bias).for_each(|(y, bias)| *y += bias);
        }
    }
    host::tensor(y, args.shape(), args.x.dtype())
}
