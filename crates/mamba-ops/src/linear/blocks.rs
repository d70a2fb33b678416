//! Many rows against a weight in `f16` or `bf16`: block by block in `f32`, so that sums are not rounded on the way and there
//! is never a copy of the whole weight.

use candle_core::{Result, Tensor};
use gemm::{Parallelism, gemm};

use super::{Linear, Sizes};
use crate::host;

/// About how many elements of the weight are converted at once.
const ELEMENTS: usize = 1 << 20;

/// `x Wᵀ + bias`, where none of the extents is 0.
pub(super) fn forward(args: &Linear, sizes: Sizes) -> Result<Tensor> {
    let Sizes { rows, d_in, d_out } = sizes;
    let x = host::read("x", args.x)?;
    let columns = (ELEMENTS / d_in).clamp(1, d_out);
    let mut y = host::uninit(rows * d_out);
    for first in (0..d_out).step_by(columns) {
        let count = columns.min(d_out - first);
        let block = args.weight.narrow(0, first, count)?;
        let block = host::read("weight", &block)?;
        multiply(&x, &block, &mut y[first..], Sizes { d_out: count, ..sizes }, d_out);
    }
    if let Some(bias) = args.bias {
        let bias = host::read("bias", bias)?;
        for y in y.chunks_exact_mut(d_out) {
            y.iter_mut().zip(&*bias).for_each(|(y, bias)| *y += bias);
        }
    }
    host::tensor(y, args.shape(), args.x.dtype())
}

/// `x Wᵀ`, to rows of `y` that are `stride` apart.
fn multiply(x: &[f32], weight: &[f32], y: &mut [f32], sizes: Sizes, stride: usize) {
    let Sizes { rows, d_in, d_out } = sizes;
    assert!(x.len() == rows * d_in && weight.len() == d_out * d_in && (rows - 1) * stride + d_out <= y.len());
    let threads = Parallelism::Rayon(rayon::current_num_threads());
    let (lhs, rhs, dst) = (x.as_ptr(), weight.as_ptr(), y.as_mut_ptr());
    let (row, out_row) = (d_in as isize, stride as isize);
    // SAFETY: by the assertion, rows of all three lie within their slices; what is there of `dst` is not read.
    unsafe {
        gemm(
            rows, d_out, d_in, dst, 1, out_row, false, lhs, 1, row, rhs, row, 1, 0.0, 1.0, false, false,
            false, threads,
        );
    }
}
