//! The same on a GPU.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::{AdamWUpdate, Numbers, OP, SQUARES};
use crate::device::{self, Arguments, Gpu, Kernel, Launch, Module, Pointer, module};

static MODULE: Module = module!("optimizer");

/// As in the kernels.
const THREADS: usize = 256;
const V: usize = 4;
/// The most blocks that share a sum.
const SUMS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct AdamW {
    value: u64,
    first: u64,
    second: u64,
    grad: Pointer,
    rounded: Pointer,
    len: i64,
    factor: f32,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    eps: f32,
    keep: f32,
    rate: f32,
    correction: f32,
    vector: i32,
}
const _: () = assert!(size_of::<AdamW>() == 104);
// SAFETY: as `AdamW` in `optimizer.cu`.
unsafe impl Arguments for AdamW {}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumOfSquares {
    x: Pointer,
    sums: u64,
    len: i64,
}
const _: () = assert!(size_of::<SumOfSquares>() == 32);
// SAFETY: as `SumOfSquares` in `optimizer.cu`.
unsafe impl Arguments for SumOfSquares {}

/// Of an `f32` parameter that is not empty.
pub(super) fn adamw_update(args: &AdamWUpdate) -> Result<()> {
    let len = args.value.elem_count();
    let Numbers { factor, keep, rate, correction } = args.numbers();
    device::pointers(OP, [Some(args.grad)], |gpu, [grad]| {
        device::modify(OP, args.value, |value| {
            device::modify(OP, args.first, |first| {
                device::modify(OP, args.second, |second| {
                    let launch = |rounded: Pointer| {
                        let addresses = [value, first, second, grad.address, rounded.address];
                        let args = AdamW {
                            value,
                            first,
                            second,
                            grad,
                            rounded,
                            len: len as i64,
                            factor: factor as f32,
                            beta1: args.beta1 as f32,
                            beta2: args.beta2 as f32,
                            rest1: (1.0 - args.beta1) as f32,
                            rest2: (1.0 - args.beta2) as f32,
                            eps: args.eps as f32,
                            keep: keep as f32,
                            rate: rate as f32,
                            correction: (1.0 / correction) as f32,
                            vector: i32::from(addresses.iter().all(|address| address.is_multiple_of(16))),
                        };
                        let kernel = Kernel { module: &MODULE, name: "adamw", dtype: None };
                        let blocks = [len.div_ceil(THREADS * V), 1, 1];
                        // SAFETY: all tensors are of `len` elements.
                        unsafe {
                            gpu.launch(kernel, Launch { blocks, threads: [THREADS, 1], shared: 0 }, args)
                        }
                    };
                    match args.rounded {
                        Some(rounded) => device::modify_any(OP, rounded, launch),
                        None => launch(Pointer::NULL),
                    }
                })
            })
        })
    })
}

pub(super) fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    let blocks = |x: &Tensor| x.elem_count().div_ceil(THREADS).min(SUMS);
    let all: usize = tensors.iter().map(|x| blocks(x)).sum();
    if all == 0 {
        return Ok(0.0);
    }
    let sums = Gpu::of(SQUARES, &[tensors.first().copied()])?.buffer(DType::F64, all)?;
    let mut start = 0;
    for x in tensors {
        let blocks = blocks(x);
        device::pointers(SQUARES, [Some(*x)], |gpu, [pointer]| {
            let sums = sums.pointer().offset(start, DType::F64).address;
            let args = SumOfSquares { x: pointer, sums, len: x.elem_count() as i64 };
            let kernel = Kernel { module: &MODULE, name: "sum_of_squares", dtype: None };
            // SAFETY: the tensor has that many elements, and each block a sum of its own.
            unsafe {
                gpu.launch(kernel, Launch { blocks: [blocks, 1, 1], threads: [THREADS, 1], shared: 0 }, args)
            }
        })?;
        start += blocks;
    }
    Ok(sums.tensor(all)?.to_vec1::<f64>()?.into_iter().sum())
}
