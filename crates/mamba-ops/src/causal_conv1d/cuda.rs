//! The convolution on a GPU: which of the kernels of `causal_conv1d.cu` run, on what grid.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::autograd::{BIAS, INITIAL_STATE, Node, SLOTS, WEIGHT, X};
use super::{CausalConv1dUpdate, OP, Sizes, UPDATE_OP};
use crate::autograd::Forward;
use crate::device::{self, Arguments, Buffer, Gpu, Kernel, Launch, Module, Pointer, int, module};
use crate::host;
use crate::layout::Activation;
use crate::layout::SequenceLayout::{self, ChannelsFirst, ChannelsLast};
use crate::packing::PackedSequence;

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
    row_stride: i64,
    token_stride: i64,
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

const _: () = assert!(size_of::<Conv>() == 88);
const _: () = assert!(size_of::<ConvForward>() == 104);
const _: () = assert!(size_of::<ConvBackward>() == 152);
const _: () = assert!(size_of::<ConvUpdate>() == 96);
// SAFETY: as the structs of `causal_conv1d.cu`.
unsafe impl Arguments for ConvForward {}
// SAFETY: as above.
unsafe impl Arguments for ConvBackward {}
// SAFETY: as above.
unsafe impl Arguments for ConvUpdate {}

/// What one launch handles: the whole batch, or a packed sequence of it.
#[derive(Clone, Copy)]
struct Segment {
    /// Its sizes; `sequences` is not used.
    sizes: Sizes,
    /// Its first element in `x`, `y` and their gradients.
    start: usize,
    /// Its first sequence, whose place in the states it has.
    sequence: usize,
}

fn segments(node: &Node) -> Vec<Segment> {
    let Sizes { batch, dim, seqlen, .. } = node.sizes;
    let sequences = node.packing.sequences();
    let rows = (0..batch).map(|row| PackedSequence { row, start: 0, len: seqlen });
    if sequences.len() == batch && rows.zip(sequences).all(|(row, sequence)| row == *sequence) {
        return vec![Segment { sizes: node.sizes, start: 0, sequence: 0 }];
    }
    let segment = |(sequence, at): (usize, &PackedSequence)| Segment {
        sizes: Sizes { batch: 1, seqlen: at.len, ..node.sizes },
        start: at.row * seqlen * dim + at.start * if node.layout == ChannelsLast { dim } else { 1 },
        sequence,
    };
    sequences.iter().enumerate().map(segment).collect()
}

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

/// Where an element further on is; of no tensor, nowhere.
fn from(pointer: Pointer, elements: usize, dtype: DType) -> u64 {
    pointer.offset(elements, dtype).address
}

/// How a thread reads its elements.
#[derive(Clone, Copy)]
struct Shape {
    taps: usize,
    /// Whether it reads packs of several, for which rows must be aligned.
    packs: bool,
}

impl Shape {
    fn new(
        node: &Node,
        token_stride: usize,
        segments: &[Segment],
        dtype: DType,
        pointers: &[Pointer],
    ) -> Self {
        let aligned = |n: usize| n > 0 && n.is_multiple_of(8);
        let rows = match node.layout {
            ChannelsFirst => {
                let within = |s: &Segment| aligned(s.sizes.seqlen) && s.start.is_multiple_of(8);
                aligned(node.sizes.seqlen) && segments.iter().all(within)
            }
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
fn run(gpu: &Gpu, sizes: Sizes, packs: usize, threads: usize, longest: usize) -> usize {
    let sequences = sizes.batch.max(1) * packs.max(1);
    let runs = (gpu.multiprocessors() * threads).div_ceil(sequences);
    sizes.seqlen.div_ceil(runs).clamp(16, longest).next_multiple_of(4)
}

/// The arguments that forward and backward share, of one segment.
fn arguments(
    node: &Node,
    segment: &Segment,
    token_stride: usize,
    dtype: DType,
    [x, weight, bias, initial_state]: [Pointer; SLOTS],
    run: usize,
) -> Result<Conv> {
    let Sizes { batch, dim, seqlen, width, .. } = segment.sizes;
    let start = match node.layout {
        ChannelsFirst => segment.start,
        ChannelsLast => segment.start / dim.max(1) * token_stride,
    };
    Ok(Conv {
        x: from(x, start, dtype),
        weight,
        bias,
        initial_state: from(initial_state, segment.states(), DType::F32),
        row_stride: node.sizes.seqlen as i64,
        token_stride: token_stride as i64,
        batch: int(OP, batch)?,
        dim: int(OP, dim)?,
        seqlen: int(OP, seqlen)?,
        width: int(OP, width)?,
        silu: i32::from(node.activation == Activation::Silu),
        run: run as i32,
    })
}

impl Segment {
    /// Its first element in the states.
    fn states(&self) -> usize {
        self.sequence * self.sizes.dim * (self.sizes.width - 1)
    }
}

/// The grid of a forward, and the tokens of a thread, channels last.
fn forward_grid(gpu: &Gpu, layout: SequenceLayout, sizes: Sizes, shape: Shape) -> (Launch, usize) {
    let Sizes { batch, dim, seqlen, .. } = sizes;
    match layout {
        ChannelsFirst => {
            let threads = threads(seqlen.div_ceil(STEPS));
            // A block goes through a long row in several steps, unless there are few rows.
            let rows = batch * dim;
            let steps = if rows < gpu.multiprocessors() * 16 { 1 } else { 4 };
            let splits = seqlen.div_ceil(threads * STEPS * steps).clamp(1, 65535);
            (Launch { blocks: [rows, splits, 1], threads: [threads, 1], shared: 0 }, 0)
        }
        ChannelsLast => {
            let packs = dim.div_ceil(if shape.packs { 4 } else { 1 });
            let (run, threads) = (run(gpu, sizes, packs, 2048, 24), threads(packs));
            let runs = seqlen.div_ceil(run).max(1);
            let blocks = [batch * runs, packs.div_ceil(threads), 1];
            (Launch { blocks, threads: [threads, 1], shared: 0 }, run)
        }
    }
}

/// The grid of a backward, the tokens of a thread, channels last, and into how many sums those of a parameter are split.
fn backward_grid(
    gpu: &Gpu,
    layout: SequenceLayout,
    sizes: Sizes,
    shape: Shape,
) -> Result<(Launch, usize, usize)> {
    let Sizes { batch, dim, seqlen, .. } = sizes;
    Ok(match layout {
        ChannelsFirst => {
            let pieces = batch * seqlen.div_ceil(STEPS).max(1);
            int(OP, pieces)?;
            let threads = threads(pieces);
            let fill = (gpu.multiprocessors() * 16).div_ceil(dim.max(1));
            let splits = pieces.div_ceil(threads).clamp(1, fill.min(65535));
            (Launch { blocks: [dim, splits, 1], threads: [threads, 1], shared: 0 }, 0, splits)
        }
        ChannelsLast => {
            let packs = dim.div_ceil(if shape.packs { 4 } else { 1 });
            let run = run(gpu, sizes, packs, 1024, 64);
            let splits = (batch * seqlen.div_ceil(run).max(1)).div_ceil(RUNS).max(1);
            (Launch { blocks: [splits, packs.div_ceil(32), 1], threads: [32, RUNS], shared: 0 }, run, splits)
        }
    })
}

pub(super) fn forward(node: &Node, inputs: &[Option<Tensor>; SLOTS]) -> Result<Forward<2>> {
    let x = host::slot(OP, inputs, X)?;
    let dtype = x.dtype();
    let (prepared, token_stride) = prepare(node, inputs)?;
    device::views(OP, prepared.each_ref().map(Option::as_ref), |gpu, pointers| {
        let y = gpu.room(dtype, x.elem_count(), &node.packing)?;
        let (sequences, dim, window) = node.sizes.state_shape();
        let final_state = gpu.buffer(DType::F32, sequences * dim * window)?;
        let segments = segments(node);
        let shape = Shape::new(node, token_stride, &segments, dtype, &[pointers[X], y.pointer()]);
        let kernel = Kernel {
            module: &MODULE,
            name: symbol(false, node.layout, node.sizes.width, shape),
            dtype: Some(dtype),
        };
        for segment in &segments {
            let (launch, run) = forward_grid(gpu, node.layout, segment.sizes, shape);
            let args = ConvForward {
                conv: arguments(node, segment, token_stride, dtype, pointers, run)?,
                y: from(y.pointer(), segment.start, dtype),
                final_state: from(final_state.pointer(), segment.states(), DType::F32),
            };
            // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
            unsafe { gpu.launch(kernel, launch, args) }?;
        }
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

        let segments = segments(node);
        let shape = Shape::new(node, token_stride, &segments, dtype, &[px, grad_y, pdx]);
        let kernel = Kernel {
            module: &MODULE,
            name: symbol(true, node.layout, node.sizes.width, shape),
            dtype: Some(dtype),
        };
        let grid = |segment: &Segment| backward_grid(gpu, node.layout, segment.sizes, shape);
        let grids = segments.iter().map(grid).collect::<Result<Vec<_>>>()?;
        // Each block sums over some of the tokens of a channel; one alone writes what is wanted.
        let parts: usize = grids.iter().map(|(_, _, splits)| splits).sum();
        let sums = |out: &Option<Buffer>, columns: usize| {
            (out.is_some() && parts != 1).then(|| gpu.buffer(DType::F32, parts * columns)).transpose()
        };
        let (weight_sums, bias_sums) = (sums(&dweight, dim * width)?, sums(&dbias, dim)?);
        let place = |sums: &Option<Buffer>, out: &Option<Buffer>, elements: usize| match sums {
            Some(sums) => sums.pointer().offset(elements, DType::F32),
            None => device::pointer(out),
        };
        let mut part = 0;
        for (segment, (launch, run, splits)) in segments.iter().zip(grids) {
            let args = ConvBackward {
                conv: arguments(node, segment, token_stride, dtype, [px, weight, bias, initial_state], run)?,
                grad_y: from(grad_y, segment.start, dtype),
                grad_state: from(grad_state, segment.states(), DType::F32),
                dx: from(pdx, segment.start, dtype),
                dinitial: from(pdinitial, segment.states(), DType::F32),
                dweight: place(&weight_sums, &dweight, part * dim * width),
                dbias: place(&bias_sums, &dbias, part * dim),
            };
            // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
            unsafe { gpu.launch(kernel, launch, args) }?;
            part += splits;
        }
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
    let CausalConv1dUpdate { x, state, weight, bias, activation, layout, .. } = *args;
    device::pointers(UPDATE_OP, [Some(x), Some(weight), bias], |gpu, [px, weight, bias]| {
        let y = gpu.buffer(x.dtype(), x.elem_count())?;
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
