//! The arguments of the kernels of the decoder, as the structs of `decoder.cuh` and `decoder.cu`.

use std::mem::size_of;

use crate::device::{Arguments, Pointer};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct EmbedArgs {
    pub(super) ids: Pointer,
    pub(super) embedding: Pointer,
    pub(super) out: u64,
    pub(super) vocabulary: i32,
    pub(super) width: i32,
}
const _: () = assert!(size_of::<EmbedArgs>() == 48);
// SAFETY: as `Embed` in `decoder.cu`.
unsafe impl Arguments for EmbedArgs {}

/// `Before` in `decoder.cu`.
pub(super) const PLAIN: i32 = 0;
pub(super) const RMS: i32 = 1;
pub(super) const LAYER: i32 = 2;
pub(super) const RMS_OF_GATED: i32 = 3;
pub(super) const GATED_RMS: i32 = 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ProjectArgs {
    pub(super) weight: u64,
    pub(super) x: u64,
    pub(super) z: u64,
    pub(super) norm_weight: u64,
    pub(super) norm_bias: u64,
    pub(super) bias: u64,
    pub(super) y: Pointer,
    pub(super) conv_weight: u64,
    pub(super) conv_bias: u64,
    pub(super) window: u64,
    pub(super) rounded: u64,
    pub(super) x_stride: i64,
    pub(super) z_stride: i64,
    pub(super) y_stride: i64,
    pub(super) rows: i32,
    pub(super) inputs: i32,
    pub(super) outputs: i32,
    pub(super) before: i32,
    pub(super) norm_groups: i32,
    pub(super) eps: f32,
    pub(super) add: i32,
    pub(super) conv_begin: i32,
    pub(super) conv_end: i32,
    pub(super) conv_width: i32,
    pub(super) split: i32,
}
const _: () = assert!(size_of::<ProjectArgs>() == 168);
// SAFETY: as `Project` in `decoder.cu`.
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
