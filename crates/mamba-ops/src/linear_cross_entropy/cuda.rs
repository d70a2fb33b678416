//! Losses and gradients on a GPU: products of cuBLAS whose logits stay in f32, and one kernel between them.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::chunks::{Needs, Sums};
use super::{LinearCrossEntropy, OP, Sizes};
use crate::device::{self, Arguments, Factor, Gemm, Kernel, Launch, Module, int, module};

static MODULE: Module = module!("cross_entropy");

/// Logits that exist at once, about: enough rows for products at full speed.
const ELEMENTS: usize = 1 << 26;
/// Rows at least.
const ROWS: usize = 128;
/// Rows of logits begin at multiples of this: vocabularies are of any size, and products are twice as fast where rows are aligned.
const ALIGNED: usize = 64;
/// As in the kernel.
const THREADS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct CrossEntropy {
    logits: u64,
    targets: u64,
    grad: u64,
    losses: u64,
    ignore_index: i64,
    classes: i32,
    stride: i32,
    scale: f32,
    _end: i32,
}
const _: () = assert!(size_of::<CrossEntropy>() == 56);
// SAFETY: as `CrossEntropy` in `cross_entropy.cu`.
unsafe impl Arguments for CrossEntropy {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Scaled {
    x: u64,
    factor: u64,
    y: u64,
    len: i64,
}
const _: () = assert!(size_of::<Scaled>() == 32);
// SAFETY: as `Scaled` in `cross_entropy.cu`.
unsafe impl Arguments for Scaled {}

/// Numbers of a thread that scales.
const PACK: usize = 8;

/// A tensor, part of which there is, times a factor on the GPU, rounded once.
pub(super) fn scaled(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    let factor = factor.to_dtype(DType::F32)?;
    device::pointers(OP, [Some(x), Some(&factor)], |gpu, [from, factor]| {
        let (dtype, len) = (x.dtype(), x.elem_count());
        let y = gpu.buffer(dtype, len)?;
        let kernel = Kernel { module: &MODULE, name: "scaled", dtype: Some(dtype) };
        let blocks = [len.div_ceil(THREADS * PACK), 1, 1];
        let launch = Launch { blocks, threads: [THREADS, 1], shared: 0 };
        let args =
            Scaled { x: from.address, factor: factor.address, y: y.pointer().address, len: len as i64 };
        // SAFETY: both are of that length; the factor is one number.
        unsafe { gpu.launch(kernel, launch, args) }?;
        y.tensor(x.shape().clone())
    })
}

/// Everything at once, of detached arguments, some rows of which there are.
pub(super) fn run(args: &LinearCrossEntropy, sizes: Sizes, needs: Needs) -> Result<Sums> {
    let Sizes { rows, dim, classes } = sizes;
    let dtype = args.x.dtype();
    let weight = args.weight.to_dtype(dtype)?;
    let stride = classes.next_multiple_of(ALIGNED);
    let chunk = args.chunk_rows.unwrap_or((ELEMENTS / classes).max(ROWS)).min(rows);
    device::pointers(OP, [Some(args.x), Some(&weight), Some(args.targets)], |gpu, [x, weight, targets]| {
        let losses = gpu.buffer(DType::F32, rows)?;
        let logits = gpu.buffer(DType::F32, chunk * stride)?;
        let differentiated = needs.x || needs.weight;
        // In f32 the gradient takes the place of the logits.
        let narrow = match dtype {
            DType::F32 => None,
            _ => differentiated.then(|| gpu.buffer(dtype, chunk * stride)).transpose()?,
        };
        let of_logits = narrow.as_ref().unwrap_or(&logits).pointer();
        let of_x = needs.x.then(|| gpu.buffer(dtype, rows * dim)).transpose()?;
        let of_weight = needs.weight.then(|| gpu.buffer(DType::F32, classes * dim)).transpose()?;
        let plain = |address, stride| Factor { address, stride, transposed: false };
        let turned = |address, stride| Factor { address, stride, transposed: true };
        for start in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - start);
            let x = x.offset(start * dim, dtype).address;
            let kernel = Kernel { module: &MODULE, name: "cross_entropy", dtype: Some(dtype) };
            let launch = Launch { blocks: [count, 1, 1], threads: [THREADS, 1], shared: 0 };
            // SAFETY: the factors have the sizes that were checked, the buffers room for `chunk` rows or all of them.
            unsafe {
                gpu.gemm(Gemm {
                    a: plain(x, dim),
                    b: turned(weight.address, dim),
                    y: logits.pointer(),
                    y_stride: stride,
                    rows: count,
                    inner: dim,
                    columns: classes,
                    dtype,
                    scale: 1.0,
                    add: false,
                })?;
                let args = CrossEntropy {
                    logits: logits.pointer().address,
                    targets: targets.offset(start, DType::I64).address,
                    grad: if differentiated { of_logits.address } else { 0 },
                    losses: losses.pointer().offset(start, DType::F32).address,
                    ignore_index: args.ignore_index,
                    classes: int(OP, classes)?,
                    stride: int(OP, stride)?,
                    scale: args.logit_scale as f32,
                    _end: 0,
                };
                gpu.launch(kernel, launch, args)?;
                if let Some(of_x) = &of_x {
                    gpu.gemm(Gemm {
                        a: plain(of_logits.address, stride),
                        b: plain(weight.address, dim),
                        y: of_x.pointer().offset(start * dim, dtype),
                        y_stride: dim,
                        rows: count,
                        inner: classes,
                        columns: dim,
                        dtype,
                        scale: 1.0,
                        add: false,
                    })?;
                }
                if let Some(of_weight) = &of_weight {
                    gpu.gemm(Gemm {
                        a: turned(of_logits.address, stride),
                        b: plain(x, dim),
                        y: of_weight.pointer(),
                        y_stride: dim,
                        rows: classes,
                        inner: count,
                        columns: dim,
                        dtype,
                        scale: 1.0,
                        add: start > 0,
                    })?;
                }
            }
        }
        let of_weight = of_weight.map(|grad| grad.tensor((classes, dim))?.to_dtype(args.weight.dtype()));
        let loss = gpu.buffer(DType::F32, 1)?;
        gpu.sum_groups(&losses, 1, [1, rows], &loss)?;
        Ok(Sums {
            loss: loss.tensor(())?,
            x: of_x.map(|grad| grad.tensor((rows, dim))).transpose()?,
            weight: of_weight.transpose()?,
        })
    })
}
