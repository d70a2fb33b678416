//! The step on a GPU: which of the kernels of `selective_state_update.cu` run, on what grid.

use std::mem::size_of;

use candle_core::{Result, Tensor};

use super::{OP, SelectiveStateUpdate, Sizes};
use crate::device::{self, Arguments, Kernel, Launch, Module, Pointer, Table, int, module};

static MODULE: Module = module!("selective_state_update");

/// Threads of a block, as in the kernels.
const THREADS: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct Update {
    state: u64,
    states: u64,
    x: u64,
    dt: u64,
    b: u64,
    c: u64,
    z: u64,
    y: u64,
    a: Pointer,
    d: Pointer,
    dt_bias: Pointer,
    rows: i32,
    nheads: i32,
    headdim: i32,
    ngroups: i32,
    d_state: i32,
    dt_per_head: i32,
    a_per_head: i32,
    d_per_head: i32,
    bias_per_head: i32,
    dt_softplus: i32,
    low: f32,
    high: f32,
}

const _: () = assert!(size_of::<Update>() == 160);
// SAFETY: as the struct of `selective_state_update.cu`.
unsafe impl Arguments for Update {}

/// A kernel, the lanes that share a row in it, and the rows of a thread: neighbouring channels where decays are by head, else
/// those of one channel in several batch elements.
fn kernel(d_state: usize, packs: bool, many: bool, per_head: bool) -> (&'static str, usize, usize) {
    let lanes = if packs { d_state.div_ceil(4).next_power_of_two().clamp(4, 32) } else { 32 };
    let rows = if packs && many { 4 } else { 1 };
    let name = match (packs, lanes, many, per_head) {
        (false, _, _, true) => "selective_state_update_heads_32",
        (true, 4, false, true) => "selective_state_update_heads_4v1",
        (true, 4, true, true) => "selective_state_update_heads_4v4",
        (true, 8, false, true) => "selective_state_update_heads_8v1",
        (true, 8, true, true) => "selective_state_update_heads_8v4",
        (true, 16, false, true) => "selective_state_update_heads_16v1",
        (true, 16, true, true) => "selective_state_update_heads_16v4",
        (true, _, false, true) => "selective_state_update_heads_32v1",
        (true, _, true, true) => "selective_state_update_heads_32v4",
        (false, _, _, false) => "selective_state_update_channels_32",
        (true, 4, false, false) => "selective_state_update_channels_4v1",
        (true, 4, true, false) => "selective_state_update_channels_4v4",
        (true, 8, false, false) => "selective_state_update_channels_8v1",
        (true, 8, true, false) => "selective_state_update_channels_8v4",
        (true, 16, false, false) => "selective_state_update_channels_16v1",
        (true, 16, true, false) => "selective_state_update_channels_16v4",
        (true, _, false, false) => "selective_state_update_channels_32v1",
        (true, _, true, false) => "selective_state_update_channels_32v4",
    };
    (name, lanes, rows)
}

pub(super) fn update(args: &SelectiveStateUpdate, sizes: Sizes) -> Result<Tensor> {
    let Sizes { batch, nheads, headdim, ngroups, d_state, dt_per_head, a_per_head, .. } = sizes;
    let SelectiveStateUpdate { state, x, dt, a, b, c, d, z, dt_bias, dt_softplus, dt_limit, state_indices } =
        *args;
    let per_head = |x: Option<&Tensor>| i32::from(args.x.rank() == 3 && x.is_some_and(|x| x.rank() == 1));
    let inputs = [Some(x), Some(dt), Some(a), Some(b), Some(c), d, z, dt_bias];
    device::pointers(OP, inputs, |gpu, [px, pdt, pa, pb, pc, pd, pz, pbias]| {
        let rows = batch * nheads * headdim;
        let y = gpu.buffer(x.dtype(), rows)?;
        let states = state_indices.map(|indices| indices.on(OP, gpu)).transpose()?;
        device::modify(OP, state, |state| {
            let aligned = [state, pa.address, pb.address, pc.address].iter().all(|p| p.is_multiple_of(16));
            let packs = aligned && d_state.is_multiple_of(4);
            // A thread with several rows has more on its way, if that leaves enough threads.
            let warps = rows * d_state.next_power_of_two() / 128;
            let enough = if a_per_head { 64 } else { 16 };
            let many = warps >= gpu.multiprocessors() * enough;
            let (name, lanes, rows_of_thread) = kernel(d_state, packs, many, a_per_head);
            let update = Update {
                state,
                states: states.as_ref().map_or(0, Table::address),
                x: px.address,
                dt: pdt.address,
                b: pb.address,
                c: pc.address,
                z: pz.address,
                y: y.pointer().address,
                a: pa,
                d: pd,
                dt_bias: pbias,
                rows: int(OP, rows)?,
                nheads: int(OP, nheads)?,
                headdim: int(OP, headdim)?,
                ngroups: int(OP, ngroups)?,
                d_state: int(OP, d_state)?,
                dt_per_head: i32::from(dt_per_head),
                a_per_head: i32::from(a_per_head),
                d_per_head: per_head(d),
                bias_per_head: per_head(dt_bias),
                dt_softplus: i32::from(dt_softplus),
                low: dt_limit.0 as f32,
                high: dt_limit.1 as f32,
            };
            let blocks = match a_per_head {
                true => rows.div_ceil(THREADS / lanes * rows_of_thread),
                false => (nheads * headdim).div_ceil(THREADS / lanes) * batch.div_ceil(rows_of_thread),
            };
            let launch = Launch { blocks: [blocks, 1, 1], threads: [THREADS, 1], shared: 0 };
            let kernel = Kernel { module: &MODULE, name, dtype: Some(x.dtype()) };
            // SAFETY: the inputs have the shapes that `sizes` checked, `y` was made for them.
            unsafe { gpu.launch(kernel, launch, update) }
        })?;
        y.tensor(x.shape().clone())
    })
}
