//! The scan on a GPU: which of the kernels of `selective_scan_*.cu` run, on what grid.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::autograd::{A, B, C, D, DELTA, DELTA_BIAS, INITIAL_STATE, Node, SLOTS, U, Z};
use super::{OP, Sizes};
use crate::autograd::Forward;
use crate::device::{self, Arguments, Buffer, Cut, Gpu, Kernel, Launch, Module, Pointer, Table, int, module};
use crate::host;
use crate::layout::SequenceLayout;
use crate::packing::Packing;

static FORWARD: Module = module!("selective_scan_forward");
static BACKWARD: Module = module!("selective_scan_backward");

/// The largest state that there are kernels for.
pub(super) const LARGEST_STATE: usize = 256;

/// Tokens of a tile: the states before each are kept for the backward pass.
const TILE: usize = 32;

/// How a kernel spreads states and channels over threads.
#[derive(Clone, Copy)]
struct Shape {
    /// The kernel, and that of the pass before it that finds what each split adds.
    forward: [&'static str; 2],
    backward: [&'static str; 2],
    states_of_thread: usize,
    lanes: usize,
    warps: usize,
    /// Tokens that the backward pass has in registers at once.
    piece: usize,
}

const NARROW_16: Shape = Shape {
    forward: ["selective_scan_fwd_narrow16", "selective_scan_ends_narrow16"],
    backward: ["selective_scan_bwd_narrow16", "selective_scan_bwd_ends_narrow16"],
    states_of_thread: 2,
    lanes: 8,
    warps: 4,
    piece: 8,
};
const WIDE_16: Shape = Shape {
    forward: ["selective_scan_fwd_wide16", "selective_scan_ends_wide16"],
    backward: ["selective_scan_bwd_wide16", "selective_scan_bwd_ends_wide16"],
    states_of_thread: 4,
    lanes: 4,
    warps: 8,
    piece: 4,
};
const WIDE_64: Shape = Shape {
    forward: ["selective_scan_fwd_wide64", "selective_scan_ends_wide64"],
    backward: ["selective_scan_bwd_wide64", "selective_scan_bwd_ends_wide64"],
    states_of_thread: 4,
    lanes: 16,
    warps: 4,
    piece: 4,
};
const WIDE_256: Shape = Shape {
    forward: ["selective_scan_fwd_wide256", "selective_scan_ends_wide256"],
    backward: ["selective_scan_bwd_wide256", "selective_scan_bwd_ends_wide256"],
    states_of_thread: 8,
    lanes: 32,
    warps: 2,
    piece: 4,
};

impl Shape {
    /// With a thread for every state.
    fn wide(sizes: Sizes) -> Self {
        match sizes.d_state {
            0..=16 => WIDE_16,
            17..=64 => WIDE_64,
            _ => WIDE_256,
        }
    }

    fn states(self) -> usize {
        self.states_of_thread * self.lanes
    }

    fn threads(self) -> usize {
        self.warps * 32
    }

    fn channels(self) -> usize {
        self.threads() / self.lanes
    }

    /// Numbers in shared memory: tiles of `b` and `c`, or the constants of each channel, with padded rows.
    fn coefficients(self) -> usize {
        2 * TILE.max(self.channels()) * (self.states() + 4)
    }

    fn shared_forward(self) -> usize {
        let activations = self.channels() * (TILE + 4);
        size_of::<f32>() * (2 * activations + 2 * self.channels().next_multiple_of(4) + self.coefficients())
    }

    /// Of the passes that find what each split adds, whatever their direction.
    fn shared_ends(self) -> usize {
        self.shared_forward()
    }

    fn shared_backward(self) -> usize {
        let activations = self.channels() * (TILE + 4);
        let kept = TILE / self.piece * self.states_of_thread * self.threads();
        let sums = 2 * self.warps * self.piece * 2 * self.states();
        let activations = 4 * activations + activations.next_multiple_of(4);
        size_of::<f32>() * (activations + self.coefficients() + kept + sums + self.channels())
    }

    fn launch(self, sizes: Sizes, splits: &Splits, shared: usize) -> Launch {
        let [x, y] = match &splits.pieces {
            Some(pieces) => [pieces.rows(), 1],
            None => [sizes.batch, splits.count],
        };
        Launch { blocks: [x * self.blocks(sizes), y, 1], threads: [self.threads(), 1], shared }
    }

    /// Blocks of one sequence: the channels of each have one group of `b` and one of `c`.
    fn blocks(self, sizes: Sizes) -> usize {
        let unit = unit(sizes);
        sizes.dim.checked_div(unit).map_or(0, |units| units * unit.div_ceil(self.channels()))
    }
}

/// The largest number of neighbouring channels that share groups throughout.
fn unit(sizes: Sizes) -> usize {
    let (mut a, mut b) = (group_len(sizes, sizes.b_groups), group_len(sizes, sizes.c_groups));
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

fn group_len(sizes: Sizes, groups: Option<usize>) -> usize {
    sizes.dim / groups.unwrap_or(1)
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Scan {
    u: u64,
    delta: u64,
    z: u64,
    b: u64,
    c: u64,
    grad_y: u64,
    a: u64,
    d: u64,
    delta_bias: u64,
    initial_state: u64,
    grad_state: u64,
    b_constant: u64,
    c_constant: u64,
    y: u64,
    grad_u: u64,
    grad_delta: u64,
    grad_z: u64,
    final_state: u64,
    checkpoints: u64,
    grad_initial_state: u64,
    grad_a: u64,
    grad_b_constant: u64,
    grad_c_constant: u64,
    grad_d: u64,
    grad_delta_bias: u64,
    partials: u64,
    ends: u64,
    spans: u64,
    pieces: u64,
    u_stride: [i64; 3],
    delta_stride: [i64; 3],
    z_stride: [i64; 3],
    grad_y_stride: [i64; 3],
    y_stride: [i64; 3],
    b_stride: [i64; 4],
    c_stride: [i64; 4],
    batch: i32,
    dim: i32,
    seqlen: i32,
    d_state: i32,
    unit: i32,
    blocks: i32,
    b_group_len: i32,
    c_group_len: i32,
    delta_softplus: i32,
    splits: i32,
    split_tiles: i32,
    packs: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Sum {
    partials: u64,
    out: u64,
    out_stride: [i64; 4],
    batch: i32,
    groups: i32,
    seqlen: i32,
    d_state: i32,
    blocks: i32,
    states: i32,
    which: i32,
    padding: i32,
}

const _: () = assert!(size_of::<Scan>() == 464);
const _: () = assert!(size_of::<Sum>() == 80);
// SAFETY: as `SelectiveScan` in `selective_scan.cuh`.
unsafe impl Arguments for Scan {}
// SAFETY: as `SelectiveScanSum` in `selective_scan_backward.cu`.
unsafe impl Arguments for Sum {}

/// The strides of an activation by batch, channel, token.
fn activation(x: &Tensor, layout: SequenceLayout) -> [i64; 3] {
    match (x.stride(), layout) {
        (&[batch, dim, time], SequenceLayout::ChannelsFirst)
        | (&[batch, time, dim], SequenceLayout::ChannelsLast) => [batch, dim, time].map(|n| n as i64),
        _ => [0; 3],
    }
}

/// The strides of a varying coefficient by batch, group, state, token; its groups may be left out.
fn coefficient(x: &Tensor, layout: SequenceLayout) -> [i64; 4] {
    match (x.stride(), layout) {
        (&[batch, state, time], SequenceLayout::ChannelsFirst)
        | (&[batch, time, state], SequenceLayout::ChannelsLast) => [batch, 0, state, time].map(|n| n as i64),
        (&[batch, group, state, time], SequenceLayout::ChannelsFirst)
        | (&[batch, time, group, state], SequenceLayout::ChannelsLast) => {
            [batch, group, state, time].map(|n| n as i64)
        }
        _ => [0; 4],
    }
}

/// The strides of an activation that lies in memory row by row.
fn contiguous_activation(sizes: Sizes, layout: SequenceLayout) -> [i64; 3] {
    let Sizes { dim, seqlen, .. } = sizes;
    let strides = match layout {
        SequenceLayout::ChannelsFirst => [dim * seqlen, seqlen, 1],
        SequenceLayout::ChannelsLast => [dim * seqlen, 1, dim],
    };
    strides.map(|n| n as i64)
}

/// The strides of a varying coefficient that lies in memory row by row.
fn contiguous_coefficient(sizes: Sizes, groups: usize, layout: SequenceLayout) -> [i64; 4] {
    let Sizes { seqlen, d_state, .. } = sizes;
    let strides = match layout {
        SequenceLayout::ChannelsFirst => [groups * d_state * seqlen, d_state * seqlen, seqlen, 1],
        SequenceLayout::ChannelsLast => [groups * d_state * seqlen, d_state, 1, groups * d_state],
    };
    strides.map(|n| n as i64)
}

/// Whether every row of a tensor begins at a multiple of 16 bytes and is contiguous.
fn in_packs(x: Option<&Tensor>, pointer: Pointer) -> bool {
    let Some(x) = x else { return true };
    let [outer @ .., last] = x.stride() else { return false };
    pointer.address.is_multiple_of(16) && *last == 1 && outer.iter().all(|stride| stride % 8 == 0)
}

/// The inputs as kernels read them: activations as they lie in memory, everything else contiguous and f32.
fn prepare(node: &Node, inputs: &[Option<Tensor>; SLOTS]) -> Result<[Option<Tensor>; SLOTS]> {
    let mut prepared = inputs.clone();
    for (slot, x) in prepared.iter_mut().enumerate() {
        let varies = match slot {
            U | DELTA | Z => true,
            B => node.sizes.b_groups.is_some(),
            C => node.sizes.c_groups.is_some(),
            _ => false,
        };
        if let (false, Some(parameter)) = (varies, &x) {
            *x = Some(device::parameter(parameter)?);
        }
    }
    Ok(prepared)
}

/// How sequences are cut into parts that different blocks go through.
struct Splits {
    /// Of the longest.
    count: usize,
    /// Tiles of each but the last of a sequence.
    tiles: usize,
    /// Those of packed sequences.
    pieces: Option<Table>,
}

impl Splits {
    /// Into this many of the longest sequence.
    fn new(gpu: &Gpu, packing: &Packing, wanted: usize) -> Result<Self> {
        let longest = packing.longest().div_ceil(TILE).max(1);
        let tiles = longest.div_ceil(wanted);
        let pieces = gpu.pieces(packing, Cut::Pieces(tiles * TILE))?;
        Ok(Self { count: longest.div_ceil(tiles), tiles, pieces })
    }

    /// Of all sequences.
    fn rows(&self, sizes: Sizes) -> usize {
        self.pieces.as_ref().map_or(sizes.batch * self.count, Table::rows)
    }
}

/// Tiles of all sequences; packed, at most so many, as the kernels count them.
fn tiles(node: &Node) -> usize {
    let Sizes { batch, seqlen, sequences, .. } = node.sizes;
    match node.packing.is_of_rows() {
        true => batch * seqlen.div_ceil(TILE),
        false => batch * seqlen / TILE + sequences,
    }
}

/// Blocks of a wide shape that a multiprocessor computes at once.
const BLOCKS_AT_ONCE: usize = 2;

/// How to fill the GPU: with splits where there would be at least so many; else, where channels are too few, with a narrower shape.
fn divide(gpu: &Gpu, node: &Node, least: usize) -> Result<(Shape, Splits)> {
    const SHORTEST: usize = 4; // shorter splits do not pay for the pass before
    const MOST: usize = 64; // each block goes through the ends of all before it
    const WARPS_TO_FILL: usize = 8;
    let (sizes, wide) = (node.sizes, Shape::wide(node.sizes));
    // Sequences of uneven lengths fill the GPU as this many of the longest would.
    let longest = node.packing.longest().div_ceil(TILE).max(1);
    let tiles: usize = node.packing.sequences().iter().map(|sequence| sequence.len.div_ceil(TILE)).sum();
    let blocks = (tiles * wide.blocks(sizes)).max(1);
    let fill = gpu.multiprocessors() * BLOCKS_AT_ONCE * longest / blocks;
    let splits = Splits::new(gpu, &node.packing, fill.min(longest / SHORTEST).clamp(1, MOST))?;
    if splits.count >= least {
        return Ok((wide, splits));
    }
    let few = blocks * wide.warps < gpu.multiprocessors() * WARPS_TO_FILL * longest;
    let shape = if few && sizes.d_state <= 16 { NARROW_16 } else { wide };
    Ok((shape, Splits::new(gpu, &node.packing, 1)?))
}

/// Where the pass before leaves what each split adds, if there are several.
struct Ends {
    states: Buffer,
    spans: Buffer,
}

impl Ends {
    /// Runs the pass before.
    fn find(
        gpu: &Gpu,
        kernel: Kernel,
        shape: Shape,
        sizes: Sizes,
        splits: &Splits,
        args: &mut Scan,
    ) -> Result<Option<Self>> {
        if splits.count < 2 {
            return Ok(None);
        }
        let rows = splits.rows(sizes) * sizes.dim;
        let ends = Self {
            states: gpu.buffer(DType::F32, rows * sizes.d_state)?,
            spans: gpu.buffer(DType::F32, rows)?,
        };
        (args.ends, args.spans) = (ends.states.pointer().address, ends.spans.pointer().address);
        // SAFETY: the inputs have the shapes that `sizes` checked, the ends were made for them.
        unsafe { gpu.launch(kernel, shape.launch(sizes, splits, shape.shared_ends()), *args) }?;
        Ok(Some(ends))
    }
}

fn arguments(
    node: &Node,
    shape: Shape,
    splits: &Splits,
    inputs: &[Option<Tensor>; SLOTS],
    pointers: &[Pointer],
) -> Result<Scan> {
    let Sizes { batch, dim, seqlen, d_state, b_groups, c_groups, .. } = node.sizes;
    let address = |slot: usize| pointers[slot].address;
    let only = |condition: bool, slot: usize| if condition { address(slot) } else { 0 };
    let strides = |slot: usize| inputs[slot].as_ref().map_or([0; 3], |x| activation(x, node.layout));
    let coefficient = |slot: usize| inputs[slot].as_ref().map_or([0; 4], |x| coefficient(x, node.layout));
    let varies = |slot: usize| match slot {
        B => b_groups.is_some(),
        C => c_groups.is_some(),
        _ => true,
    };
    // Channels last, blocks begin at multiples of what shares groups; channels first, with their sequences.
    let begin = match node.layout {
        SequenceLayout::ChannelsFirst => {
            seqlen % 8 == 0 && node.packing.sequences().iter().all(|sequence| sequence.start % 8 == 0)
        }
        SequenceLayout::ChannelsLast => unit(node.sizes).is_multiple_of(8),
    };
    let mut in_rows = [U, DELTA, Z, B, C].into_iter().filter(|&slot| varies(slot));
    let packs = begin && in_rows.all(|slot| in_packs(inputs[slot].as_ref(), pointers[slot]));
    Ok(Scan {
        u: address(U),
        delta: address(DELTA),
        z: address(Z),
        b: only(b_groups.is_some(), B),
        c: only(c_groups.is_some(), C),
        b_constant: only(b_groups.is_none(), B),
        c_constant: only(c_groups.is_none(), C),
        a: address(A),
        d: address(D),
        delta_bias: address(DELTA_BIAS),
        initial_state: address(INITIAL_STATE),
        pieces: splits.pieces.as_ref().map_or(0, Table::address),
        u_stride: strides(U),
        delta_stride: strides(DELTA),
        z_stride: strides(Z),
        y_stride: contiguous_activation(node.sizes, node.layout),
        b_stride: coefficient(B),
        c_stride: coefficient(C),
        batch: int(OP, batch)?,
        dim: int(OP, dim)?,
        seqlen: int(OP, seqlen)?,
        d_state: int(OP, d_state)?,
        unit: int(OP, unit(node.sizes))?,
        blocks: int(OP, shape.blocks(node.sizes))?,
        b_group_len: int(OP, group_len(node.sizes, b_groups))?,
        c_group_len: int(OP, group_len(node.sizes, c_groups))?,
        delta_softplus: i32::from(node.delta_softplus),
        splits: int(OP, splits.count)?,
        split_tiles: int(OP, splits.tiles)?,
        packs: i32::from(packs),
        ..Scan::default()
    })
}

pub(super) fn forward(node: &Node, inputs: &[Option<Tensor>; SLOTS], tracked: bool) -> Result<Forward<2>> {
    let inputs = prepare(node, inputs)?;
    let u = host::slot(OP, &inputs, U)?;
    let Sizes { dim, d_state, sequences, .. } = node.sizes;
    device::views(OP, inputs.each_ref().map(Option::as_ref), |gpu, pointers| {
        // The pass before takes half as long as the scan itself: fewer splits do not make up for it.
        let (shape, splits) = divide(gpu, node, 6)?;
        let y = gpu.room(u.dtype(), u.elem_count(), &node.packing)?;
        let final_state = gpu.buffer(DType::F32, sequences * dim * d_state)?;
        let checkpoints = match tracked {
            true => Some(gpu.buffer(DType::F32, tiles(node) * dim * d_state)?),
            false => None,
        };
        let mut args = Scan {
            y: y.pointer().address,
            final_state: final_state.pointer().address,
            checkpoints: device::pointer(&checkpoints).address,
            ..arguments(node, shape, &splits, &inputs, &pointers)?
        };
        let [kernel, ends] =
            shape.forward.map(|name| Kernel { module: &FORWARD, name, dtype: Some(u.dtype()) });
        let _ends = Ends::find(gpu, ends, shape, node.sizes, &splits, &mut args)?;
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, shape.launch(node.sizes, &splits, shape.shared_forward()), args) }?;
        let kept = |x: Buffer| x.tensor((tiles(node), dim, d_state));
        Ok(Forward {
            outputs: [y.output(u.shape().clone())?, final_state.output(node.sizes.state_shape())?],
            saved: checkpoints.map(kept).transpose()?.into_iter().collect(),
        })
    })
}

pub(super) fn backward(
    node: &Node,
    inputs: &[Option<Tensor>; SLOTS],
    needs: &[bool; SLOTS],
    saved: &[Tensor],
    grads: &[Option<Tensor>; 2],
) -> Result<[Option<Tensor>; SLOTS]> {
    let prepared = prepare(node, inputs)?;
    let u = host::slot(OP, inputs, U)?;
    let Sizes { batch, dim, seqlen, d_state, b_groups, c_groups, sequences } = node.sizes;
    let grad_state = grads[1].as_ref().map(Tensor::contiguous).transpose()?;
    let [u_, delta, a, b, c, d, z, bias, state] = prepared.each_ref().map(Option::as_ref);
    let tensors =
        [u_, delta, a, b, c, d, z, bias, state, saved.first(), grads[0].as_ref(), grad_state.as_ref()];
    device::views(OP, tensors, |gpu, pointers| {
        let (shape, splits) = divide(gpu, node, 2)?;
        let blocks = shape.blocks(node.sizes);
        let row_count = splits.rows(node.sizes);
        let split_rows = |len: usize| gpu.buffer(DType::F32, row_count * len);
        let activation = || gpu.room(u.dtype(), u.elem_count(), &node.packing);
        let (grad_u, grad_delta) = (activation()?, activation()?);
        let grad_z = inputs[Z].as_ref().map(|_| activation()).transpose()?;
        let initial_state = gpu.buffer(DType::F32, sequences * dim * d_state)?;
        let (a_rows, d_rows, bias_rows) = (split_rows(dim * d_state)?, split_rows(dim)?, split_rows(dim)?);
        let constant =
            |groups: Option<usize>| groups.is_none().then(|| split_rows(dim * d_state)).transpose();
        let (b_rows, c_rows) = (constant(b_groups)?, constant(c_groups)?);
        let partials = match (b_groups, c_groups) {
            (None, None) => None,
            _ => Some(gpu.room(DType::F32, batch * blocks * seqlen * 2 * shape.states(), &node.packing)?),
        };
        let inputs_of_kernel = arguments(node, shape, &splits, &prepared, &pointers)?;
        let packs = in_packs(grads[0].as_ref(), pointers[SLOTS + 1]);
        let mut args = Scan {
            packs: inputs_of_kernel.packs & i32::from(packs),
            checkpoints: pointers[SLOTS].address,
            grad_y: pointers[SLOTS + 1].address,
            grad_y_stride: grads[0].as_ref().map_or([0; 3], |x| self::activation(x, node.layout)),
            grad_state: pointers[SLOTS + 2].address,
            grad_u: grad_u.pointer().address,
            grad_delta: grad_delta.pointer().address,
            grad_z: device::pointer(&grad_z).address,
            grad_initial_state: initial_state.pointer().address,
            grad_a: a_rows.pointer().address,
            grad_b_constant: device::pointer(&b_rows).address,
            grad_c_constant: device::pointer(&c_rows).address,
            grad_d: d_rows.pointer().address,
            grad_delta_bias: bias_rows.pointer().address,
            partials: device::pointer(&partials).address,
            ..inputs_of_kernel
        };
        let [kernel, ends] =
            shape.backward.map(|name| Kernel { module: &BACKWARD, name, dtype: Some(u.dtype()) });
        let _ends = Ends::find(gpu, ends, shape, node.sizes, &splits, &mut args)?;
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, shape.launch(node.sizes, &splits, shape.shared_backward()), args) }?;

        let like = |slot: usize| gpu.buffer_like(inputs[slot].as_ref(), needs[slot]);
        let over_rows = |sums: &Buffer, slot: usize, columns: usize| {
            let out = like(slot)?;
            out.as_ref().map_or(Ok(()), |out| gpu.sum_rows(sums, row_count, columns, out))?;
            Ok::<_, candle_core::Error>(out)
        };
        let coefficient = |slot: usize, groups: Option<usize>, rows: &Option<Buffer>, which: i32| {
            let (Some(groups), Some(partials)) = (groups, &partials) else {
                return rows.as_ref().map_or(Ok(None), |rows| over_rows(rows, slot, dim * d_state));
            };
            let (Some(out), Some(x)) = (like(slot)?, &inputs[slot]) else { return Ok(None) };
            let args = Sum {
                partials: partials.pointer().address,
                out: out.pointer().address,
                out_stride: contiguous_coefficient(node.sizes, groups, node.layout),
                batch: int(OP, batch)?,
                groups: int(OP, groups)?,
                seqlen: int(OP, seqlen)?,
                d_state: int(OP, d_state)?,
                blocks: int(OP, blocks)?,
                states: int(OP, shape.states())?,
                which,
                padding: 0,
            };
            const THREADS: usize = 256;
            let blocks = [x.elem_count().div_ceil(THREADS), 1, 1];
            let launch = Launch { blocks, threads: [THREADS, 1], shared: 0 };
            let kernel = Kernel { module: &BACKWARD, name: "selective_scan_sum", dtype: Some(x.dtype()) };
            // SAFETY: the partial sums were made for these sizes, `out` for `x`.
            unsafe { gpu.launch(kernel, launch, args) }?;
            Ok(Some(out))
        };
        let (b, c) = (coefficient(B, b_groups, &b_rows, 0)?, coefficient(C, c_groups, &c_rows, 1)?);
        let a = over_rows(&a_rows, A, dim * d_state)?;
        let d = over_rows(&d_rows, D, dim)?;
        let bias = over_rows(&bias_rows, DELTA_BIAS, dim)?;
        let if_needed = |slot: usize, buffer| Some(buffer).filter(|_| needs[slot]);
        let grads = [
            if_needed(U, grad_u),
            if_needed(DELTA, grad_delta),
            a,
            b,
            c,
            d,
            grad_z.filter(|_| needs[Z]),
            bias,
            if_needed(INITIAL_STATE, initial_state),
        ];
        device::gradients(inputs, grads)
    })
}
