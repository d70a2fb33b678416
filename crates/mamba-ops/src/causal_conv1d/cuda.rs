//! The convolution on a GPU: which of the kernels of `causal_conv1d.cu` run, on what grid.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::autograd::{BIAS, INITIAL_STATE, Node, SLOTS, WEIGHT, X};
use super::{CausalConv1dUpdate, OP, Sizes, UPDATE_OP};
use crate::autograd::Forward;
use crate::device::{self, Arguments, Gpu, Kernel, Launch, Module, Pointer, int, module};
use crate::host;
use crate::layout::{Activation, SequenceLayout};

static MODULE: Module = module!("causal_conv1d");

/// The widest filter that there are kernels for.
pub(super) const WIDEST: usize = 8;

/// Threads of a block, tokens of a thread (channels first), and runs of a block (backward, channels last), as in the kernels.
const THREADS: usize = 128;
const STEPS: usize = 8;
const RUNS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct Conv {
    x: u64,
    weight: Pointer,
    bias: Pointer,
    initial_state: u64,
    batch: i32,
    dim: i32,
    seqlen: i32,
    width: i32,
    silu: i32,
    run: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ConvForward {
    conv: Conv,
    y: u64,
    final_state: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ConvBackward {
    conv: Conv,
    grad_y: u64,
    grad_state: u64,
    dx: u64,
    dinitial: u64,
    dweight: Pointer,
    dbias: Pointer,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ConvUpdate {
    x: u64,
    y: u64,
    state: u64,
    weight: Pointer,
    bias: Pointer,
    token_stride: i64,
    channel_stride: i64,
    batch: i32,
    dim: i32,
    seqlen: i32,
    width: i32,
    silu: i32,
    padding: i32,
}

const _: () = assert!(size_of::<Conv>() == 72);
const _: () = assert!(size_of::<ConvForward>() == 88);
const _: () = assert!(size_of::<ConvBackward>() == 136);
const _: () = assert!(size_of::<ConvUpdate>() == 96);
// SAFETY: as the structs of `causal_conv1d.cu`.
unsafe impl Arguments for ConvForward {}
// SAFETY: as above.
unsafe impl Arguments for ConvBackward {}
// SAFETY: as above.
unsafe impl Arguments for ConvUpdate {}

/// How a thread reads its elements.
#[derive(Clone, Copy)]
struct Shape {
    taps: usize,
    /// Whether it reads packs of several, for which rows must be aligned.
    packs: bool,
}

impl Shape {
    fn new(sizes: Sizes, layout: SequenceLayout, pointers: &[Pointer]) -> Self {
        let neighbours = match layout {
            SequenceLayout::ChannelsFirst => sizes.seqlen,
            SequenceLayout::ChannelsLast => sizes.dim,
        };
        let aligned = pointers.iter().all(|pointer| pointer.address.is_multiple_of(16));
        let taps = if sizes.width <= 4 { 4 } else { WIDEST };
        Self { taps, packs: taps == 4 && aligned && neighbours.is_multiple_of(8) }
    }
}

/// The symbol of a kernel for sequences.
fn symbol(backward: bool, layout: SequenceLayout, shape: Shape) -> &'static str {
    use SequenceLayout::{ChannelsFirst, ChannelsLast};
    match (backward, layout, shape.taps, shape.packs) {
        (false, ChannelsFirst, 4, true) => "causal_conv1d_fwd_first4v",
        (false, ChannelsFirst, 4, false) => "causal_conv1d_fwd_first4",
        (false, ChannelsFirst, ..) => "causal_conv1d_fwd_first8",
        (false, ChannelsLast, 4, true) => "causal_conv1d_fwd_last4v",
        (false, ChannelsLast, 4, false) => "causal_conv1d_fwd_last4",
        (false, ChannelsLast, ..) => "causal_conv1d_fwd_last8",
        (true, ChannelsFirst, 4, true) => "causal_conv1d_bwd_first4v",
        (true, ChannelsFirst, 4, false) => "causal_conv1d_bwd_first4",
        (true, ChannelsFirst, ..) => "causal_conv1d_bwd_first8",
        (true, ChannelsLast, 4, true) => "causal_conv1d_bwd_last4v",
        (true, ChannelsLast, 4, false) => "causal_conv1d_bwd_last4",
        (true, ChannelsLast, ..) => "causal_conv1d_bwd_last8",
    }
}

/// The smallest number of whole warps for `count` threads, at most a block.
fn threads(count: usize) -> usize {
    (count.div_ceil(32) * 32).clamp(32, THREADS)
}

/// Tokens of a run, channels last: few enough to fill the GPU, many enough that the window costs little.
fn run(gpu: &Gpu, sizes: Sizes, packs: usize, longest: usize) -> usize {
    const THREADS_TO_FILL: usize = 1024;
    let sequences = sizes.batch.max(1) * packs.max(1);
    let runs = (gpu.multiprocessors() * THREADS_TO_FILL).div_ceil(sequences);
    sizes.seqlen.div_ceil(runs).clamp(16, longest).next_multiple_of(4)
}

fn arguments(node: &Node, [x, weight, bias, initial_state]: [Pointer; SLOTS], run: usize) -> Result<Conv> {
    let Sizes { batch, dim, seqlen, width, .. } = node.sizes;
    let [batch, dim, seqlen, width] = [int(OP, batch)?, int(OP, dim)?, int(OP, seqlen)?, int(OP, width)?];
    let silu = i32::from(node.activation == Activation::Silu);
    let (x, initial_state, run) = (x.address, initial_state.address, run as i32);
    Ok(Conv { x, weight, bias, initial_state, batch, dim, seqlen, width, silu, run })
}

pub(super) fn forward(node: &Node, inputs: &[Option<Tensor>; SLOTS]) -> Result<Forward<2>> {
    let x = host::slot(OP, inputs, X)?;
    let Sizes { batch, dim, seqlen, .. } = node.sizes;
    device::pointers(OP, inputs.each_ref().map(Option::as_ref), |gpu, pointers| {
        let y = gpu.buffer(x.dtype(), x.elem_count())?;
        let state_shape = node.sizes.state_shape();
        let final_state = gpu.buffer(DType::F32, state_shape.0 * state_shape.1 * state_shape.2)?;
        let shape = Shape::new(node.sizes, node.layout, &[pointers[X], y.pointer()]);
        let kernel =
            Kernel { module: &MODULE, name: symbol(false, node.layout, shape), dtype: Some(x.dtype()) };
        let (launch, run) = match node.layout {
            SequenceLayout::ChannelsFirst => {
                let threads = threads(seqlen.div_ceil(STEPS));
                // A block goes through a long row in several steps, unless there are few rows.
                let rows = batch * dim;
                let steps = if rows < gpu.multiprocessors() * 16 { 1 } else { 4 };
                let splits = seqlen.div_ceil(threads * STEPS * steps).clamp(1, 65535);
                (Launch { blocks: [rows, splits, 1], threads: [threads, 1], shared: 0 }, 0)
            }
            SequenceLayout::ChannelsLast => {
                let channels = match (shape.packs, x.dtype()) {
                    (false, _) => 1,
                    (true, DType::F32) => 4,
                    (true, _) => 8,
                };
                let packs = dim.div_ceil(channels);
                let (run, threads) = (run(gpu, node.sizes, packs, 32), threads(packs));
                let runs = seqlen.div_ceil(run).max(1);
                (
                    Launch {
                        blocks: [batch * runs, packs.div_ceil(threads), 1],
                        threads: [threads, 1],
                        shared: 0,
                    },
                    run,
                )
            }
        };
        let args = ConvForward {
            conv: arguments(node, pointers, run)?,
            y: y.pointer().address,
            final_state: final_state.pointer().address,
        };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, launch, args) }?;
        Ok(Forward {
            outputs: [y.output(x.shape().clone())?, final_state.output(state_shape)?],
            saved: vec![],
        })
    })
}

pub(super) fn backward(
    node: &Node,
    inputs: &[Option<Tensor>; SLOTS],
    needs: &[bool; SLOTS],
    grads: &[Option<Tensor>; 2],
) -> Result<[Option<Tensor>; SLOTS]> {
    let x = host::slot(OP, inputs, X)?;
    let Sizes { batch, dim, seqlen, width, .. } = node.sizes;
    let [a, b, c, d] = inputs.each_ref().map(Option::as_ref);
    device::pointers(OP, [a, b, c, d, grads[0].as_ref(), grads[1].as_ref()], |gpu, pointers| {
        let [px, weight, bias, initial_state, grad_y, grad_state] = pointers;
        let like = |slot: usize| gpu.buffer_like(inputs[slot].as_ref(), needs[slot]);
        let (dx, dinitial) = (like(X)?, like(INITIAL_STATE)?);
        let (dweight, dbias) = (like(WEIGHT)?, like(BIAS)?);

        let shape = Shape::new(node.sizes, node.layout, &[px, grad_y, device::pointer(&dx)]);
        let kernel =
            Kernel { module: &MODULE, name: symbol(true, node.layout, shape), dtype: Some(x.dtype()) };
        // `partial` blocks each sum over some of the tokens of a channel.
        let (launch, run, partial) = match node.layout {
            SequenceLayout::ChannelsFirst => {
                let pieces = batch * seqlen.div_ceil(STEPS);
                int(OP, pieces)?;
                let threads = threads(pieces);
                let blocks = (gpu.multiprocessors() * 16).div_ceil(dim.max(1));
                let splits = pieces.div_ceil(threads).clamp(1, blocks.min(65535));
                (Launch { blocks: [dim, splits, 1], threads: [threads, 1], shared: 0 }, 0, splits)
            }
            SequenceLayout::ChannelsLast => {
                let channels = if shape.packs { 4 } else { 1 };
                let packs = dim.div_ceil(channels);
                let run = run(gpu, node.sizes, packs, 64);
                let splits = (batch * seqlen.div_ceil(run).max(1)).div_ceil(RUNS);
                (
                    Launch { blocks: [splits, packs.div_ceil(32), 1], threads: [32, RUNS], shared: 0 },
                    run,
                    splits,
                )
            }
        };
        let sums = |needed: bool, columns: usize| {
            (needed && partial > 1).then(|| gpu.buffer(DType::F32, partial * columns)).transpose()
        };
        let (weight_sums, bias_sums) = (sums(dweight.is_some(), dim * width)?, sums(dbias.is_some(), dim)?);
        let args = ConvBackward {
            conv: arguments(node, [px, weight, bias, initial_state], run)?,
            grad_y: grad_y.address,
            grad_state: grad_state.address,
            dx: device::pointer(&dx).address,
            dinitial: device::pointer(&dinitial).address,
            dweight: device::pointer(if weight_sums.is_some() { &weight_sums } else { &dweight }),
            dbias: device::pointer(if bias_sums.is_some() { &bias_sums } else { &dbias }),
        };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, launch, args) }?;
        for (sums, out, columns) in [(weight_sums, &dweight, dim * width), (bias_sums, &dbias, dim)] {
            if let (Some(sums), Some(out)) = (sums, out) {
                gpu.sum_rows(&sums, partial, columns, out)?;
            }
        }
        device::gradients(inputs, [dx, dweight, dbias, dinitial])
    })
}

pub(super) fn update(args: &CausalConv1dUpdate, sizes: Sizes) -> Result<Tensor> {
    let Sizes { batch, dim, seqlen, width, .. } = sizes;
    let CausalConv1dUpdate { x, state, weight, bias, activation, layout } = *args;
    device::pointers(UPDATE_OP, [Some(x), Some(weight), bias], |gpu, [px, weight, bias]| {
        let y = gpu.buffer(x.dtype(), x.elem_count())?;
        let name = if width <= 4 { "causal_conv1d_update4" } else { "causal_conv1d_update8" };
        let kernel = Kernel { module: &MODULE, name, dtype: Some(x.dtype()) };
        let (token_stride, channel_stride) = match layout {
            SequenceLayout::ChannelsFirst => (1, seqlen),
            SequenceLayout::ChannelsLast => (dim, 1),
        };
        device::modify(UPDATE_OP, state, |state| {
            let args = ConvUpdate {
                x: px.address,
                y: y.pointer().address,
                state,
                weight,
                bias,
                token_stride: token_stride as i64,
                channel_stride: channel_stride as i64,
                batch: int(UPDATE_OP, batch)?,
                dim: int(UPDATE_OP, dim)?,
                seqlen: int(UPDATE_OP, seqlen)?,
                width: int(UPDATE_OP, width)?,
                silu: i32::from(activation == Activation::Silu),
                padding: 0,
            };
            let launch =
                Launch { blocks: [(batch * dim).div_ceil(THREADS), 1, 1], threads: [THREADS, 1], shared: 0 };
            // SAFETY: the inputs have the shapes that `sizes` checked, `y` was made for them.
            unsafe { gpu.launch(kernel, launch, args) }
        })?;
        y.tensor(x.shape().clone())
    })
}
