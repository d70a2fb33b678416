//! The arguments of the kernels of the decoder, as the structs of `decoder.cuh`, `decoder.cu` and `decoder_attention.cu`.

use std::mem::size_of;

use crate::decoder::MAX_BATCH;
use crate::device::{Arguments, Pointer};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedArgs {
    pub(super) ids: Pointer,
    pub(super) embedding: Pointer,
    pub(super) out: u64,
    pub(super) positions: u64,
    pub(super) stride: i64,
    pub(super) vocabulary: i32,
    pub(super) width: i32,
    pub(super) copies: i32,
    pub(super) scale: f32,
    pub(super) position: [i32; MAX_BATCH],
}
const _: () = assert!(size_of::<EmbedArgs>() == 328);
// SAFETY: as `Embed` in `decoder.cu`.
unsafe impl Arguments for EmbedArgs {}

/// `Before` in `decoder.cuh`.
pub(super) const PLAIN: i32 = 0;
pub(super) const RMS: i32 = 1;
pub(super) const LAYER: i32 = 2;
pub(super) const RMS_OF_GATED: i32 = 3;
pub(super) const GATED_RMS: i32 = 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ProjectArgs {
    pub(super) weights: [u64; 3],
    pub(super) x: u64,
    pub(super) z: u64,
    pub(super) norm_weight: u64,
    pub(super) norm_bias: u64,
    pub(super) scales: u64,
    pub(super) bias: u64,
    pub(super) base: u64,
    pub(super) y: Pointer,
    pub(super) conv_weight: u64,
    pub(super) conv_bias: u64,
    pub(super) window: u64,
    pub(super) rounded: u64,
    pub(super) x_stride: i64,
    pub(super) z_stride: i64,
    pub(super) y_stride: i64,
    pub(super) ends: [i32; 2],
    pub(super) rows: i32,
    pub(super) inputs: i32,
    pub(super) outputs: i32,
    pub(super) before: i32,
    pub(super) norm_groups: i32,
    pub(super) eps: f32,
    pub(super) scale: f32,
    pub(super) conv_begin: i32,
    pub(super) conv_end: i32,
    pub(super) conv_width: i32,
    pub(super) conv_silu: i32,
    pub(super) split: i32,
}
const _: () = assert!(size_of::<ProjectArgs>() == 208);
// SAFETY: as `Project` in `decoder.cuh`.
unsafe impl Arguments for ProjectArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Mamba1Args {
    pub(super) dt_proj: u64,
    pub(super) xz: u64,
    pub(super) dbc: u64,
    pub(super) state: u64,
    pub(super) y: u64,
    pub(super) rounded: u64,
    pub(super) dt_bias: u64,
    pub(super) a: u64,
    pub(super) d: u64,
    pub(super) norms: [u64; 3],
    pub(super) xz_stride: i64,
    pub(super) dbc_stride: i64,
    pub(super) d_inner: i32,
    pub(super) d_state: i32,
    pub(super) dt_rank: i32,
    pub(super) normed: i32,
    pub(super) eps: f32,
    pub(super) _end: i32,
}
const _: () = assert!(size_of::<Mamba1Args>() == 136);
// SAFETY: as `Mamba1` in `decoder.cu`.
unsafe impl Arguments for Mamba1Args {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Mamba2Args {
    pub(super) x: u64,
    pub(super) b: u64,
    pub(super) c: u64,
    pub(super) dt: u64,
    pub(super) z: u64,
    pub(super) state: u64,
    pub(super) y: Pointer,
    pub(super) dt_bias: u64,
    pub(super) a: u64,
    pub(super) d: u64,
    pub(super) stride: i64,
    pub(super) nheads: i32,
    pub(super) headdim: i32,
    pub(super) ngroups: i32,
    pub(super) d_state: i32,
    pub(super) d_per_head: i32,
    pub(super) low: f32,
    pub(super) high: f32,
    pub(super) _end: i32,
}
const _: () = assert!(size_of::<Mamba2Args>() == 128);
// SAFETY: as `Mamba2` in `decoder.cu`.
unsafe impl Arguments for Mamba2Args {}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct AttentionArgs {
    pub(super) qkv: u64,
    pub(super) y: Pointer,
    pub(super) positions: u64,
    pub(super) table: u64,
    pub(super) parts: u64,
    pub(super) done: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) turns: u64,
    pub(super) stride: i64,
    pub(super) y_stride: i64,
    pub(super) nheads: i32,
    pub(super) nheads_kv: i32,
    pub(super) headdim: i32,
    pub(super) most: i32,
    pub(super) pairs: i32,
    pub(super) interleaved: i32,
    pub(super) window: i32,
    pub(super) scale: f32,
    pub(super) key_scale: f32,
    pub(super) eps: f32,
    pub(super) turned_by: f32,
    pub(super) table_row: i32,
}
const _: () = assert!(size_of::<AttentionArgs>() == 144);
// SAFETY: as `Attention` in `decoder_attention.cu`.
unsafe impl Arguments for AttentionArgs {}

/// `Activation` in `decoder_attention.cu`.
pub(super) const SILU: i32 = 0;
pub(super) const GELU: i32 = 1;
pub(super) const GELU_TANH: i32 = 2;
pub(super) const RELU2: i32 = 3;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct GateArgs {
    pub(super) gate: u64,
    pub(super) up: u64,
    pub(super) y: Pointer,
    pub(super) stride: i64,
    pub(super) y_stride: i64,
    pub(super) count: i32,
    pub(super) activation: i32,
    pub(super) scale: f32,
    pub(super) _end: i32,
}
const _: () = assert!(size_of::<GateArgs>() == 64);
// SAFETY: as `Gate` in `decoder_attention.cu`.
unsafe impl Arguments for GateArgs {}
