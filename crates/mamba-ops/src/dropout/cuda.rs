//! Dropout on a GPU: four neighbours a thread, by the words of one counter.

use std::mem::size_of;

use candle_core::{Result, Tensor};

use super::{Mask, OP};
use crate::autograd::Output;
use crate::device::{self, Arguments, Kernel, Launch, Module, module};

static MODULE: Module = module!("dropout");

/// Elements of a block, as in the kernel.
const ELEMENTS: usize = 4 * 256;

#[repr(C)]
#[derive(Clone, Copy)]
struct Dropout {
    x: u64,
    y: u64,
    len: i64,
    seed: u64,
    stream: u64,
    threshold: u32,
    scale: f32,
}
const _: () = assert!(size_of::<Dropout>() == 48);
// SAFETY: as `Dropout` in `dropout.cu`.
unsafe impl Arguments for Dropout {}

pub(super) fn apply(mask: Mask, x: &Tensor) -> Result<Output> {
    device::pointers(OP, [Some(x)], |gpu, [px]| {
        let len = x.elem_count();
        let y = gpu.buffer(x.dtype(), len)?;
        let args = Dropout {
            x: px.address,
            y: y.pointer().address,
            len: len as i64,
            seed: mask.seed,
            stream: mask.stream,
            threshold: mask.threshold,
            scale: mask.scale as f32,
        };
        let kernel = Kernel { module: &MODULE, name: "dropout", dtype: Some(x.dtype()) };
        let launch = Launch { blocks: [len.div_ceil(ELEMENTS), 1, 1], threads: [256, 1], shared: 0 };
        // SAFETY: both are of `len` elements.
        unsafe { gpu.launch(kernel, launch, args) }?;
        y.output(x.shape().clone())
    })
}
