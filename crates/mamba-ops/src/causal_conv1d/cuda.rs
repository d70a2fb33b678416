//! The convolution on a GPU: which of the kernels of `causal_conv1d.cu` run, on what grid.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::autograd::{BIAS, INITIAL_STATE, Node, SLOTS, WEIGHT, X};
use super::{CausalConv1dUpdate, OP, Sizes, UPDATE_OP};
use crate::autograd::Forward;
use crate::device::{self, Arguments, Buffer, Cut, Gpu, Kernel, Launch, Module, Pointer, Table, int, module};
use crate::host;
use crate::layout::Activation;
use crate::layout::SequenceLayout::{self, ChannelsFirst, ChannelsLast};

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
    pieces: u64,
    token_stride: i64,
    batch: i32,
    dim: i32,
    seqlen: i32,
    width: i32,
    silu: i32,
    run: i32,
    count: i32,
    padding: i32,
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
    states: u64,
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

const _: () = assert!(size_of::<Conv>() == 96);
const _: () = assert!(size_of::<ConvForward>() == 112);
const _: () = assert!(size_of::<ConvBackward>() == 160);
const _: () = assert!(size_of::<ConvUpdate>() == 104);
// SAFETY: as the structs of `causal_conv1d.cu`.
unsafe impl Arguments for ConvForward {}
// SAFETY: as above.
unsafe impl Arguments for ConvBackward {}
// SAFETY: as above.
unsafe impl Arguments for ConvUpdate {}

/// The inputs as kernels read them, contiguous but for tokens of `x`, channels last, which may lie further apart; how far.
fn prepare(node: &Node, inputs: &[Option<Tensor>; SLOTS]) -> Result<([Option<Tensor>; SLOTS], usize)> {
    let Sizes { batch, dim, seqlen, .. } = node.sizes;
    let mut prepared = inputs.clone();
    let mut token_stride = dim;
    for (slot, x) in prepared.iter_mut().enumerate() {
        let Some(input) = x.as_ref().filter(|x| x.elem_count() > 0) else { continue };
        let apart = match (node.layout, input.stride()) {
            (ChannelsLast, &[rows, tokens, 1]) if slot == X => {
                ((batch == 1 || rows == seqlen * tokens) && tokens >= dim).then_some(tokens)
            }
            _ => None,
        };
        match apart {
            Some(stride) => token_stride = stride,
            None => *x = Some(input.contiguous()?),
        }
    }
    Ok((prepared, token_stride))
}

/// How a thread reads its elements.
#[derive(Clone, Copy)]
struct Shape {
    taps: usize,
    /// Whether it reads packs of several, for which rows must be aligned.
    packs: bool,
}

impl Shape {
    fn new(node: &Node, token_stride: usize, dtype: DType, pointers: &[Pointer]) -> Self {
        let aligned = |n: usize| n > 0 && n.is_multiple_of(8);
        let rows = match node.layout {
            ChannelsFirst => aligned(node.sizes.seqlen) && node.packing.is_of_rows(),
            ChannelsLast => aligned(node.sizes.dim) && aligned(token_stride),
        };
        let starts =
            pointers.iter().all(|pointer| pointer.address.is_multiple_of(8 * dtype.size_in_bytes() as u64));
        let taps = if node.sizes.width <= 4 { 4 } else { WIDEST };
        Self { taps, packs: taps == 4 && rows && starts }
    }
}

/// The symbol of a kernel for sequences.
fn symbol(backward: bool, layout: SequenceLayout, width: usize, shape: Shape) -> &'static str {
    match (backward, layout, shape.taps, shape.packs) {
        (false, ChannelsFirst, 4, true) => "causal_conv1d_fwd_first4v",
        (false, ChannelsFirst, 4, false) => "causal_conv1d_fwd_first4",
        (false, ChannelsFirst, ..) => "causal_conv1d_fwd_first8",
        (false, ChannelsLast, 4, true) if width == 4 => "causal_conv1d_fwd_last4v",
        (false, ChannelsLast, 4, true) => "causal_conv1d_fwd_last3v",
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

/// Tokens of a run, channels last: few enough to fill the GPU with so many threads a multiprocessor, many enough that the window
/// costs little.
fn run(gpu: &Gpu, node: &Node, packs: usize, threads: usize, longest: usize) -> usize {
    // Packed, all sequences are cut as if they were one.
    let (rows, tokens) = match node.packing.is_of_rows() {
        true => (node.sizes.batch, node.sizes.seqlen),
        false => (1, node.packing.tokens()),
    };
    let runs = (gpu.multiprocessors() * threads).div_ceil(rows.max(1) * packs.max(1));
    tokens.div_ceil(runs).clamp(16, longest).next_multiple_of(4)
}

/// How a kernel is launched.
struct Grid {
    launch: Launch,
    /// Tokens of a thread, channels last.
    run: usize,
    /// The sequences, if they are not rows.
    pieces: Option<Table>,
    /// Pieces of them, packed or not.
    count: usize,
}

impl Grid {
    /// Of a forward.
    fn forward(gpu: &Gpu, node: &Node, shape: Shape) -> Result<Self> {
        let Sizes { batch, dim, seqlen, sequences, .. } = node.sizes;
        match node.layout {
            ChannelsFirst => {
                let longest = node.packing.longest();
                let threads = threads(longest.div_ceil(STEPS));
                // A block goes through a long row in several steps, unless there are few rows.
                let rows = sequences * dim;
                let steps = if rows < gpu.multiprocessors() * 16 { 1 } else { 4 };
                let splits = longest.div_ceil(threads * STEPS * steps).clamp(1, 65535);
                let launch = Launch { blocks: [rows, splits, 1], threads: [threads, 1], shared: 0 };
                Ok(Self { launch, run: 0, pieces: gpu.pieces(&node.packing, Cut::Whole)?, count: sequences })
            }
            ChannelsLast => {
                let packs = dim.div_ceil(if shape.packs { 4 } else { 1 });
                let (run, threads) = (run(gpu, node, packs, 2048, 24), threads(packs));
                let pieces = gpu.pieces(&node.packing, Cut::Pieces(run))?;
                let count = pieces.as_ref().map_or_else(|| batch * seqlen.div_ceil(run).max(1), Table::rows);
                let blocks = [count, packs.div_ceil(threads), 1];
                Ok(Self { launch: Launch { blocks, threads: [threads, 1], shared: 0 }, run, pieces, count })
            }
        }
    }

    /// Of a backward, whose second or first axis, channels last, are the sums into which those of a parameter are split.
    fn backward(gpu: &Gpu, node: &Node, shape: Shape) -> Result<Self> {
        let Sizes { batch, dim, seqlen, .. } = node.sizes;
        match node.layout {
            ChannelsFirst => {
                let pieces = gpu.pieces(&node.packing, Cut::Pieces(STEPS))?;
                let count =
                    pieces.as_ref().map_or_else(|| batch * seqlen.div_ceil(STEPS).max(1), Table::rows);
                let threads = threads(count);
                let fill = (gpu.multiprocessors() * 16).div_ceil(dim.max(1));
                let splits = count.div_ceil(threads).clamp(1, fill.min(65535));
                let launch = Launch { blocks: [dim, splits, 1], threads: [threads, 1], shared: 0 };
                Ok(Self { launch, run: 0, pieces, count })
            }
            ChannelsLast => {
                let packs = dim.div_ceil(if shape.packs { 4 } else { 1 });
                let run = run(gpu, node, packs, 1024, 64);
                let pieces = gpu.pieces(&node.packing, Cut::Pieces(run))?;
                let count = pieces.as_ref().map_or_else(|| batch * seqlen.div_ceil(run).max(1), Table::rows);
                let blocks = [count.div_ceil(RUNS).max(1), packs.div_ceil(32), 1];
                Ok(Self { launch: Launch { blocks, threads: [32, RUNS], shared: 0 }, run, pieces, count })
            }
        }
    }

    /// The arguments that forward and backward share.
    fn arguments(
        &self,
        node: &Node,
        token_stride: usize,
        [x, weight, bias, initial_state]: [Pointer; SLOTS],
    ) -> Result<Conv> {
        let Sizes { batch, dim, seqlen, width, .. } = node.sizes;
        Ok(Conv {
            x: x.address,
            weight,
            bias,
            initial_state: initial_state.address,
            pieces: self.pieces.as_ref().map_or(0, Table::address),
            token_stride: token_stride as i64,
            batch: int(OP, batch)?,
            dim: int(OP, dim)?,
            seqlen: int(OP, seqlen)?,
            width: int(OP, width)?,
            silu: i32::from(node.activation == Activation::Silu),
            run: int(OP, self.run)?,
            count: int(OP, self.count)?,
            padding: 0,
        })
    }
}

pub(super) fn forward(node: &Node, inputs: &[Option<Tensor>; SLOTS]) -> Result<Forward<2>> {
    let x = host::slot(OP, inputs, X)?;
    let dtype = x.dtype();
    let (prepared, token_stride) = prepare(node, inputs)?;
    device::views(OP, prepared.each_ref().map(Option::as_ref), |gpu, pointers| {
        let y = gpu.room(dtype, x.elem_count(), &node.packing)?;
        let (sequences, dim, window) = node.sizes.state_shape();
        let final_state = gpu.buffer(DType::F32, sequences * dim * window)?;
        let shape = Shape::new(node, token_stride, dtype, &[pointers[X], y.pointer()]);
        let kernel = Kernel {
            module: &MODULE,
            name: symbol(false, node.layout, node.sizes.width, shape),
            dtype: Some(dtype),
        };
        let grid = Grid::forward(gpu, node, shape)?;
        let args = ConvForward {
            conv: grid.arguments(node, token_stride, pointers)?,
            y: y.pointer().address,
            final_state: final_state.pointer().address,
        };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, grid.launch, args) }?;
        let state = final_state.output(node.sizes.state_shape())?;
        Ok(Forward { outputs: [y.output(x.shape().clone())?, state], saved: vec![] })
    })
}

pub(super) fn backward(
    node: &Node,
    inputs: &[Option<Tensor>; SLOTS],
    needs: &[bool; SLOTS],
    grads: &[Option<Tensor>; 2],
) -> Result<[Option<Tensor>; SLOTS]> {
    let x = host::slot(OP, inputs, X)?;
    let (dtype, Sizes { dim, width, .. }) = (x.dtype(), node.sizes);
    let (prepared, token_stride) = prepare(node, inputs)?;
    let [a, b, c, d] = prepared.each_ref().map(Option::as_ref);
    let contiguous = |grad: &Option<Tensor>| grad.as_ref().map(Tensor::contiguous).transpose();
    let (grad_y, grad_state) = (contiguous(&grads[0])?, contiguous(&grads[1])?);
    device::views(OP, [a, b, c, d, grad_y.as_ref(), grad_state.as_ref()], |gpu, pointers| {
        let [px, weight, bias, initial_state, grad_y, grad_state] = pointers;
        let like = |slot: usize| gpu.buffer_like(inputs[slot].as_ref(), needs[slot]);
        let dx = needs[X].then(|| gpu.room(dtype, x.elem_count(), &node.packing)).transpose()?;
        let (dinitial, dweight, dbias) = (like(INITIAL_STATE)?, like(WEIGHT)?, like(BIAS)?);
        let [pdx, pdinitial] = [&dx, &dinitial].map(device::pointer);

        let shape = Shape::new(node, token_stride, dtype, &[px, grad_y, pdx]);
        let kernel = Kernel {
            module: &MODULE,
            name: symbol(true, node.layout, node.sizes.width, shape),
            dtype: Some(dtype),
        };
        let grid = Grid::backward(gpu, node, shape)?;
        // Each block sums over some of the tokens of a channel; one alone writes what is wanted.
        let parts = grid.launch.blocks[if node.layout == ChannelsFirst { 1 } else { 0 }];
        let sums = |out: &Option<Buffer>, columns: usize| {
            (out.is_some() && parts > 1).then(|| gpu.buffer(DType::F32, parts * columns)).transpose()
        };
        let (weight_sums, bias_sums) = (sums(&dweight, dim * width)?, sums(&dbias, dim)?);
        let args = ConvBackward {
            conv: grid.arguments(node, token_stride, [px, weight, bias, initial_state])?,
            grad_y: grad_y.address,
            grad_state: grad_state.address,
            dx: pdx.address,
            dinitial: pdinitial.address,
            dweight: device::pointer(if weight_sums.is_some() { &weight_sums } else { &dweight }),
            dbias: device::pointer(if bias_sums.is_some() { &bias_sums } else { &dbias }),
        };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, grid.launch, args) }?;
        for (sums, out, columns) in [(weight_sums, &dweight, dim * width), (bias_sums, &dbias, dim)] {
            if let (Some(sums), Some(out)) = (sums, out) {
                gpu.sum_rows(&sums, parts, columns, out)?;
            }
        }
        device::gradients(inputs, [dx, dweight, dbias, dinitial])
    })
}

pub(super) fn update(args: &CausalConv1dUpdate, sizes: Sizes) -> Result<Tensor> {
    let Sizes { batch, dim, seqlen, width, .. } = sizes;
    let CausalConv1dUpdate { x, state, weight, bias, activation, layout, state_indices } = *args;
    device::pointers(UPDATE_OP, [Some(x), Some(weight), bias], |gpu, [px, weight, bias]| {
        let y = gpu.buffer(x.dtype(), x.elem_count())?;
        let states = state_indices.map(|indices| indices.on(UPDATE_OP, gpu)).transpose()?;
        let name = if width <= 4 { "causal_conv1d_update4" } else { "causal_conv1d_update8" };
        let kernel = Kernel { module: &MODULE, name, dtype: Some(x.dtype()) };
        let (token_stride, channel_stride) = match layout {
            ChannelsFirst => (1, seqlen),
            ChannelsLast => (dim, 1),
        };
        device::modify(UPDATE_OP, state, |state| {
            let args = ConvUpdate {
                x: px.address,
                y: y.pointer().address,
                state,
                states: states.as_ref().map_or(0, Table::address),
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
