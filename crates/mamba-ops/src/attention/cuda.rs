//! Attention on a GPU: 16-bit inputs go through the kernel of `attention.cu`, everything else through the reference.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::{Attention, OP, Sizes};
use crate::device::{self, Arguments, Kernel, Launch, Module, int, module};

static MODULE: Module = module!("attention");

/// Of a block, and queries and keys at a time, as in the kernel.
const THREADS: usize = 128;
const QUERIES: usize = 64;
const KEYS: usize = 64;

/// Elements that are read at once.
const PACK: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct Forward {
    q: u64,
    k: u64,
    v: u64,
    y: u64,
    seqlen: i32,
    nheads: i32,
    headdim: i32,
    nheads_kv: i32,
    kv_len: i32,
    causal: i32,
    window: i32,
    scale: f32,
}
const _: () = assert!(size_of::<Forward>() == 64);
// SAFETY: as `Attention` in `attention.cu`.
unsafe impl Arguments for Forward {}

/// The kernel for heads of this width, and its width.
fn kernel(headdim: usize) -> Option<(&'static str, usize)> {
    match headdim {
        1..=32 => Some(("attention_fwd_32", 32)),
        33..=64 => Some(("attention_fwd_64", 64)),
        65..=128 => Some(("attention_fwd_128", 128)),
        129..=256 => Some(("attention_fwd_256", 256)),
        _ => None,
    }
}

/// Whether there is a kernel.
pub(super) fn fits(q: &Tensor, sizes: Sizes) -> bool {
    let sixteen_bits = matches!(q.dtype(), DType::F16 | DType::BF16);
    q.device().is_cuda()
        && sixteen_bits
        && sizes.headdim.is_multiple_of(PACK)
        && kernel(sizes.headdim).is_some()
        && sizes.kv_len > 0
        && q.elem_count() > 0
}

/// In row-major order, beginning where packs do.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    if x.layout().start_offset().is_multiple_of(PACK) { Ok(x) } else { x.copy() }
}

pub(super) fn forward(args: &Attention, sizes: Sizes) -> Result<Tensor> {
    let Sizes { batch, seqlen, nheads, headdim, nheads_kv, kv_len } = sizes;
    let Some((name, width)) = kernel(headdim) else { return super::reference::forward(args) };
    let joined = |blocks: &[Tensor]| aligned(&Tensor::cat(blocks, 1)?);
    let (q, k, v) = (aligned(args.q)?, joined(args.keys)?, joined(args.values)?);
    device::pointers(OP, [Some(&q), Some(&k), Some(&v)], |gpu, [pq, pk, pv]| {
        let y = gpu.buffer(q.dtype(), q.elem_count())?;
        let all = kv_len + seqlen;
        let args = Forward {
            q: pq.address,
            k: pk.address,
            v: pv.address,
            y: y.pointer().address,
            seqlen: int(OP, seqlen)?,
            nheads: int(OP, nheads)?,
            headdim: int(OP, headdim)?,
            nheads_kv: int(OP, nheads_kv)?,
            kv_len: int(OP, kv_len)?,
            causal: i32::from(args.causal),
            window: int(OP, args.window.map_or(all, |window| window.min(all)))?,
            scale: (args.scale * std::f64::consts::LOG2_E) as f32,
        };
        let shared = (QUERIES + 2 * KEYS) * (width + PACK) * q.dtype().size_in_bytes();
        let blocks = [batch * nheads * seqlen.div_ceil(QUERIES), 1, 1];
        let launch = Launch { blocks, threads: [THREADS, 1], shared };
        let kernel = Kernel { module: &MODULE, name, dtype: Some(q.dtype()) };
        // SAFETY: the inputs have the shapes that `sizes` checked, `y` is as `q`.
        unsafe { gpu.launch(kernel, launch, args) }?;
        y.tensor(q.shape().clone())
    })
}
