//! Draws on a GPU: a row a block. How to draw goes along with the launch, so that nothing is copied there before it.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::OP;
use crate::device::{self, Arguments, Kernel, Launch, Module, int, module};

static MODULE: Module = module!("sample");

/// Rows of a launch, as in the kernel: its arguments are 4 KiB at most.
const ROWS: usize = 64;
const THREADS: usize = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct Draw {
    top_p: f64,
    min_p: f64,
    uniform: f64,
    temperature: f32,
    top_k: i32,
}
const _: () = assert!(size_of::<Draw>() == 32);

impl Draw {
    fn new(draw: &super::Draw, vocab_size: usize) -> Result<Self> {
        Ok(Self {
            top_p: draw.top_p.unwrap_or(1.0),
            min_p: draw.min_p.map_or(f64::NEG_INFINITY, f64::ln),
            uniform: draw.uniform,
            temperature: draw.temperature,
            top_k: int(OP, draw.top_k.unwrap_or(vocab_size).min(vocab_size))?,
        })
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Sample {
    logits: u64,
    ids: u64,
    len: i64,
    draws: [Draw; ROWS],
}
const _: () = assert!(size_of::<Sample>() == 24 + 32 * ROWS);
// SAFETY: as `Sample` in `sample.cu`.
unsafe impl Arguments for Sample {}

pub(super) fn sample(args: &super::Sample) -> Result<Tensor> {
    let ((rows, vocab_size), dtype) = (args.logits.dims2()?, args.logits.dtype());
    let kernel = Kernel { module: &MODULE, name: "sample", dtype: Some(dtype) };
    device::pointers(OP, [Some(args.logits)], |gpu, [logits]| {
        let ids = gpu.buffer(DType::U32, rows)?;
        for first in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - first);
            let mut draws = [Draw::new(&super::Draw::GREEDY, vocab_size)?; ROWS];
            for (draw, given) in draws.iter_mut().zip(&args.draws[first..]) {
                *draw = Draw::new(given, vocab_size)?;
            }
            let args = Sample {
                logits: logits.address + (first * vocab_size * dtype.size_in_bytes()) as u64,
                ids: ids.pointer().address + (first * DType::U32.size_in_bytes()) as u64,
                len: vocab_size as i64,
                draws,
            };
            let launch = Launch { blocks: [count, 1, 1], threads: [THREADS, 1], shared: 0 };
            // SAFETY: `count` rows of `vocab_size` logits, and as many ids, begin at these addresses.
            unsafe { gpu.launch(kernel, launch, args) }?;
        }
        ids.tensor(rows)
    })
}
