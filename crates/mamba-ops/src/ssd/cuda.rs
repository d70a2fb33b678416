//! The duality on a GPU: which of the kernels of `ssd_forward.cu` and `ssd_backward.cu` run, on chunks of what size.

use std::mem::size_of;

use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use super::autograd::{A, B, C, D, DT, DT_BIAS, INITIAL_STATE, Node, SLOTS, X, Z};
use super::{OP, Sizes};
use crate::autograd::Forward;
use crate::device::{self, Arguments, Buffer, Cut, Gpu, Kernel, Launch, Module, Pointer, Table, int, module};
use crate::host;

static FORWARD: Module = module!("ssd_forward");
static BACKWARD: Module = module!("ssd_backward");

/// Threads of a block of each file's kernels.
const FORWARD_THREADS: usize = 256;
const BACKWARD_THREADS: usize = 512;

/// Tokens of a chunk: as many as shared memory has room for. The caller's `chunk_size` is a hint for caches of CPUs.
const CHUNKS: [usize; 3] = [64, 32, 16];

/// Channels of a block that walks over chunks.
const CHANNELS: [usize; 3] = [64, 32, 16];

/// Elements of a matrix that a block can keep in registers.
const KEPT: usize = 8192;

/// Matrices in shared memory: how many bf16 terms make up an input, and how many what is computed.
#[derive(Clone, Copy)]
struct Terms {
    input: usize,
    computed: usize,
}

impl Terms {
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Self { input: 1, computed: 2 },
            DType::F16 => Self { input: 2, computed: 2 },
            _ => Self { input: 3, computed: 3 },
        }
    }

    /// In the scan, whose terms are f16 beside f16.
    fn of_scan(dtype: DType) -> Self {
        if dtype == DType::F16 { Self { input: 1, computed: 2 } } else { Self::of(dtype) }
    }
}

/// Extents in shared memory.
#[derive(Clone, Copy)]
struct Extents {
    terms: Terms,
    /// Tokens of a chunk.
    tokens: usize,
    /// Channels, padded.
    channels: usize,
    /// States, padded.
    states: usize,
}

/// Bytes of a matrix of bf16 terms, whose rows are padded.
fn matrix(terms: usize, rows: usize, columns: usize) -> usize {
    2 * terms * rows * (columns + 8)
}

impl Extents {
    fn new(sizes: Sizes, terms: Terms, tokens: usize, channels: usize) -> Self {
        let channels = channels.min(sizes.headdim).next_multiple_of(16);
        Self { terms, tokens, channels, states: sizes.d_state.next_multiple_of(16) }
    }

    /// Numbers of the steps of a chunk.
    fn steps(self) -> usize {
        4 * self.tokens
    }

    fn of_scan(self) -> usize {
        let Self { terms, tokens, channels, states } = self;
        3 * matrix(terms.input, tokens, states)
            + matrix(terms.input, tokens, channels)
            + matrix(terms.computed, channels, states)
            + matrix(terms.computed, tokens, tokens.max(channels))
            + size_of::<f32>() * self.steps()
    }

    fn of_states(self) -> usize {
        let Self { terms, tokens, channels, states } = self;
        2 * matrix(terms.input, tokens, states)
            + matrix(terms.computed, tokens, channels)
            + size_of::<f32>() * self.steps()
    }

    fn of_gradients(self, gated: bool) -> usize {
        let Self { terms, tokens, channels, states } = self;
        let numbers = tokens * (2 * (tokens / 16) + 2 * states.div_ceil(32) + channels / 16 + 1)
            + tokens / 16 * channels
            + BACKWARD_THREADS / 32;
        2 * matrix(terms.input, tokens, states)
            + matrix(terms.input, tokens, channels)
            + matrix(if gated { terms.computed } else { terms.input }, tokens, channels)
            + 2 * matrix(terms.computed, channels, states)
            + matrix(terms.computed, tokens, tokens)
            + size_of::<f32>() * (self.steps() + numbers)
    }

    /// Whether a block has registers for a matrix with a row for each of these rows and a column for each state.
    fn keeps(self, rows: usize) -> bool {
        rows * self.states.next_multiple_of(32) <= KEPT
    }
}

/// How the kernels divide the work.
#[derive(Clone, Copy)]
struct Plan {
    /// Walks over the chunks; the channels are those of a block.
    scan: Extents,
    /// The kernel of gradients; the channels are those of a head.
    gradients: Extents,
}

impl Plan {
    /// None if not even the smallest tiles have room.
    fn new(device: &CudaDevice, sizes: Sizes, dtype: DType) -> Option<Self> {
        let multiprocessors = device::multiprocessors(device);
        // Of what a multiprocessor has, the system takes so much for each block.
        const RESERVED: usize = 1 << 10;
        let room = device::shared_memory(device);
        let scans = CHUNKS.into_iter().flat_map(|tokens| CHANNELS.map(|channels| (tokens, channels)));
        let scans =
            scans.map(|(tokens, channels)| Extents::new(sizes, Terms::of_scan(dtype), tokens, channels));
        let fits =
            |extents: &Extents, room: usize| extents.keeps(extents.channels) && extents.of_scan() <= room;
        // A multiprocessor that holds two blocks computes in one while the other waits for memory.
        let half = |extents: &Extents| extents.tokens >= 32 && fits(extents, room / 2 - RESERVED / 2);
        let wide = scans.clone().find(half).or_else(|| scans.clone().find(|extents| fits(extents, room)))?;
        // Narrower blocks do some work twice, but are better than idle multiprocessors; not than kernels that know their sizes.
        let usual = (wide.tokens, sizes.headdim, sizes.d_state) == (64, 64, 128);
        let blocks = |channels: usize| sizes.sequences * sizes.nheads * sizes.headdim.div_ceil(channels);
        let scan = match blocks(wide.channels) < multiprocessors && wide.channels > 32 && !usual {
            true => Extents { channels: 32, ..wide },
            false => wide,
        };
        let gradients = CHUNKS.into_iter().find_map(|tokens| {
            let extents = Extents::new(sizes, Terms::of(dtype), tokens, sizes.headdim);
            let walk = Extents { channels: extents.channels.min(scan.channels), ..extents };
            let fits = extents.of_gradients(true) <= room && walk.of_states() <= room;
            (extents.keeps(tokens) && fits).then_some(extents)
        })?;
        Some(Self { scan, gradients })
    }
}

/// Whether there are kernels for these sizes.
pub(super) fn fits(device: &Device, sizes: Sizes, dtype: DType) -> bool {
    let Device::Cuda(device) = device else { return false };
    sizes.headdim > 0 && sizes.d_state > 0 && Plan::new(device, sizes, dtype).is_some()
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Ssd {
    x: u64,
    dt: u64,
    b: u64,
    c: u64,
    z: u64,
    grad_y: u64,
    a: u64,
    d: u64,
    dt_bias: u64,
    initial_state: u64,
    grad_state: u64,
    y: u64,
    y_ungated: u64,
    final_state: u64,
    steps: u64,
    states: u64,
    grad_states: u64,
    grad_x: u64,
    grad_dt: u64,
    grad_z: u64,
    grad_initial_state: u64,
    grad_b_rows: u64,
    grad_c_rows: u64,
    grad_a_rows: u64,
    grad_dt_bias_rows: u64,
    grad_d_rows: u64,
    sequences: u64,
    pieces: u64,
    x_stride: [i64; 3],
    z_stride: [i64; 3],
    grad_y_stride: [i64; 3],
    b_stride: [i64; 3],
    c_stride: [i64; 3],
    dt_stride: [i64; 3],
    batch: i32,
    seqlen: i32,
    nheads: i32,
    headdim: i32,
    ngroups: i32,
    d_state: i32,
    q: i32,
    chunks: i32,
    p_tile: i32,
    splits: i32,
    d_per_channel: i32,
    dt_softplus: i32,
    dt_low: f32,
    dt_high: f32,
    aligned: i32,
    count: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Sum {
    rows: [u64; 2],
    out: [u64; 2],
    columns: i64,
    count: i64,
}

const _: () = assert!(size_of::<Ssd>() == 432);
const _: () = assert!(size_of::<Sum>() == 48);
// SAFETY: as `Ssd` in `ssd.cuh`.
unsafe impl Arguments for Ssd {}
// SAFETY: as `SsdSum` in `ssd_backward.cu`.
unsafe impl Arguments for Sum {}

/// The inputs as kernels read them: activations with neighbouring channels next to one another, else as they lie in memory;
/// everything else contiguous and f32.
fn prepare(inputs: &[Option<Tensor>; SLOTS]) -> Result<[Option<Tensor>; SLOTS]> {
    let mut prepared = inputs.clone();
    for (slot, x) in prepared.iter_mut().enumerate() {
        *x = match (slot, x.take()) {
            (X | B | C | Z, Some(x)) => Some(rows_in_order(&x)?),
            (DT, x) | (_, x @ None) => x,
            (_, Some(x)) => Some(device::parameter(&x)?),
        };
    }
    Ok(prepared)
}

fn rows_in_order(x: &Tensor) -> Result<Tensor> {
    if x.stride().last() == Some(&1) { Ok(x.clone()) } else { x.contiguous() }
}

fn strides(x: Option<&Tensor>) -> [i64; 3] {
    let stride = |axis: usize| x.and_then(|x| x.stride().get(axis)).map_or(0, |&n| n as i64);
    [stride(0), stride(1), stride(2)]
}

/// Whether 16 bytes can be read at once from every row.
fn aligned(x: Option<&Tensor>, pointer: Pointer) -> bool {
    let bytes = |stride: &i64| stride * x.map_or(0, |x| x.dtype().size_in_bytes() as i64);
    pointer.address.is_multiple_of(16) && strides(x).iter().all(|stride| bytes(stride) % 16 == 0)
}

/// The chunks of all sequences.
struct Chunks {
    /// Packed sequences, and their chunks.
    sequences: Option<Table>,
    pieces: Option<Table>,
    /// How many there are, and room for how many there is.
    count: usize,
    room: usize,
}

impl Chunks {
    fn new(gpu: &Gpu, node: &Node, tokens: usize) -> Result<Self> {
        let Sizes { batch, seqlen, sequences, .. } = node.sizes;
        let pieces = gpu.pieces(&node.packing, Cut::Tokens(tokens))?;
        let (count, room) = match &pieces {
            // At most so many, as the kernels count them.
            Some(pieces) => (pieces.rows(), batch * seqlen / tokens + sequences),
            None => (batch * seqlen.div_ceil(tokens), batch * seqlen.div_ceil(tokens)),
        };
        Ok(Self { sequences: gpu.pieces(&node.packing, Cut::Whole)?, pieces, count, room })
    }

    /// Rows of sums, one a chunk.
    fn rows(&self, gpu: &Gpu, columns: usize) -> Result<Buffer> {
        let rows = if self.room > self.count { Gpu::zeros } else { Gpu::buffer };
        rows(gpu, DType::F32, self.room * columns)
    }
}

fn arguments(
    node: &Node,
    extents: Extents,
    p_tile: usize,
    chunks: &Chunks,
    inputs: &[Option<Tensor>; SLOTS],
    pointers: &[Pointer],
) -> Result<Ssd> {
    let Sizes { batch, seqlen, nheads, headdim, ngroups, d_state, .. } = node.sizes;
    let address = |slot: usize| pointers[slot].address;
    let stride = |slot: usize| strides(inputs[slot].as_ref());
    Ok(Ssd {
        x: address(X),
        dt: address(DT),
        b: address(B),
        c: address(C),
        z: address(Z),
        a: address(A),
        d: address(D),
        dt_bias: address(DT_BIAS),
        initial_state: address(INITIAL_STATE),
        sequences: chunks.sequences.as_ref().map_or(0, Table::address),
        pieces: chunks.pieces.as_ref().map_or(0, Table::address),
        x_stride: stride(X),
        z_stride: stride(Z),
        b_stride: stride(B),
        c_stride: stride(C),
        dt_stride: stride(DT),
        batch: int(OP, batch)?,
        seqlen: int(OP, seqlen)?,
        nheads: int(OP, nheads)?,
        headdim: int(OP, headdim)?,
        ngroups: int(OP, ngroups)?,
        d_state: int(OP, d_state)?,
        q: int(OP, extents.tokens)?,
        chunks: int(OP, seqlen.div_ceil(extents.tokens))?,
        p_tile: int(OP, p_tile)?,
        splits: 1,
        d_per_channel: i32::from(inputs[D].as_ref().is_some_and(|d| d.rank() == 2)),
        dt_softplus: i32::from(node.dt_softplus),
        dt_low: node.dt_limit.0,
        dt_high: node.dt_limit.1,
        aligned: i32::from([X, B, C, Z].iter().all(|&i| aligned(inputs[i].as_ref(), pointers[i]))),
        count: int(OP, chunks.count)?,
        ..Ssd::default()
    })
}

fn plan(x: &Tensor, sizes: Sizes) -> Result<Plan> {
    let Device::Cuda(device) = x.device() else { bail!("{OP}: `x` is not on a GPU") };
    Plan::new(device, sizes, x.dtype()).map_or_else(
        || {
            bail!(
                "{OP}: a state of ({}, {}) has no room in the shared memory of a block",
                sizes.headdim,
                sizes.d_state
            )
        },
        Ok,
    )
}

/// Whether the arguments are those that kernels of their own know, as `known` in `ssd.cuh`; there are none in f32, whose chunks
/// are shorter.
fn usual(args: &Ssd, dtype: DType) -> bool {
    let known = (args.q, args.headdim, args.p_tile, args.d_state, args.aligned) == (64, 64, 64, 128, 1);
    known && dtype != DType::F32
}

/// Makes the steps of all chunks, `(chunks, nheads, tokens)` of four numbers, and has `args` point to them.
fn with_steps(gpu: &Gpu, dtype: DType, chunks: &Chunks, args: &mut Ssd) -> Result<Buffer> {
    let nheads = args.nheads as usize;
    let steps = gpu.buffer(DType::F32, chunks.room * nheads * args.q as usize * 4)?;
    args.steps = steps.pointer().address;
    let blocks = [(chunks.count * nheads).div_ceil(FORWARD_THREADS / 32), 1, 1];
    let launch = Launch { blocks, threads: [FORWARD_THREADS, 1], shared: 0 };
    let kernel = Kernel { module: &FORWARD, name: "ssd_steps", dtype: Some(dtype) };
    // SAFETY: a warp for each chunk of each head; the inputs have the shapes that `sizes` checked.
    unsafe { gpu.launch(kernel, launch, *args) }?;
    Ok(steps)
}

/// Blocks that walk over the chunks.
fn walks(sizes: Sizes, p_tile: usize) -> usize {
    sizes.sequences * sizes.nheads * sizes.headdim.div_ceil(p_tile)
}

/// The scan; to `y_ungated`, if given, instead of `y`.
fn scan(gpu: &Gpu, dtype: DType, sizes: Sizes, plan: Plan, chunks: &Chunks, mut args: Ssd) -> Result<()> {
    let _steps = with_steps(gpu, dtype, chunks, &mut args)?;
    let blocks = [walks(sizes, plan.scan.channels), 1, 1];
    let launch = Launch { blocks, threads: [FORWARD_THREADS, 1], shared: plan.scan.of_scan() };
    let name = if usual(&args, dtype) { "ssd_scan_usual" } else { "ssd_scan" };
    let kernel = Kernel { module: &FORWARD, name, dtype: Some(dtype) };
    // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
    unsafe { gpu.launch(kernel, launch, args) }
}

pub(super) fn forward(node: &Node, inputs: &[Option<Tensor>; SLOTS]) -> Result<Forward<2>> {
    let inputs = prepare(inputs)?;
    let x = host::slot(OP, &inputs, X)?;
    let plan = plan(x, node.sizes)?;
    let Sizes { nheads, headdim, d_state, sequences, .. } = node.sizes;
    device::views(OP, inputs.each_ref().map(Option::as_ref), |gpu, pointers| {
        let y = gpu.room(x.dtype(), x.elem_count(), &node.packing)?;
        let final_state = gpu.buffer(DType::F32, sequences * nheads * headdim * d_state)?;
        let chunks = Chunks::new(gpu, node, plan.scan.tokens)?;
        let args = Ssd {
            y: y.pointer().address,
            final_state: final_state.pointer().address,
            ..arguments(node, plan.scan, plan.scan.channels, &chunks, &inputs, &pointers)?
        };
        scan(gpu, x.dtype(), node.sizes, plan, &chunks, args)?;
        Ok(Forward {
            outputs: [y.output(x.shape().clone())?, final_state.output(node.sizes.state_shape())?],
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
    let prepared = prepare(inputs)?;
    let x = host::slot(OP, &prepared, X)?;
    let dtype = x.dtype();
    let plan = plan(x, node.sizes)?;
    let Sizes { batch, seqlen, nheads, headdim, ngroups, d_state, sequences } = node.sizes;
    let grad_y = grads[0].as_ref().map(rows_in_order).transpose()?;
    let grad_state = grads[1].as_ref().map(Tensor::contiguous).transpose()?;
    let [x_, dt, a, b, c, d, z, bias, state] = prepared.each_ref().map(Option::as_ref);
    let tensors = [x_, dt, a, b, c, d, z, bias, state, grad_y.as_ref(), grad_state.as_ref()];
    device::views(OP, tensors, |gpu, pointers| {
        let floats = |len: usize| gpu.buffer(DType::F32, len);
        // The gradient of the gate needs what it was applied to.
        let ungated = prepared[Z].as_ref().map(|z| floats(z.elem_count())).transpose()?;
        if let Some(ungated) = &ungated {
            let chunks = Chunks::new(gpu, node, plan.scan.tokens)?;
            let args = Ssd {
                y_ungated: ungated.pointer().address,
                ..arguments(node, plan.scan, plan.scan.channels, &chunks, &prepared, &pointers)?
            };
            scan(gpu, dtype, node.sizes, plan, &chunks, args)?;
        }

        let chunks = Chunks::new(gpu, node, plan.gradients.tokens)?;
        let heads = nheads / ngroups;
        // Two blocks a multiprocessor, if there are so many heads.
        let splits =
            (2 * gpu.multiprocessors()).div_ceil((chunks.count * ngroups).max(1)).clamp(1, heads.max(1));
        let like = |slot: usize| gpu.buffer_like(inputs[slot].as_ref(), needs[slot]);
        let activation = |slot: usize| {
            let room = |x: &Tensor| gpu.room(x.dtype(), x.elem_count(), &node.packing);
            inputs[slot].as_ref().map(room).transpose()
        };
        let (grad_x, grad_dt, grad_z) = (activation(X)?, activation(DT)?, activation(Z)?);
        let initial_state = floats(sequences * nheads * headdim * d_state)?;
        let matrix = plan.gradients.terms.computed * plan.gradients.channels * plan.gradients.states;
        let states = || gpu.buffer(DType::BF16, chunks.room * nheads * matrix);
        let (states, grad_states) = (states()?, states()?);
        let coefficients = splits * batch * seqlen * ngroups * d_state;
        let of_coefficients = || gpu.room(DType::F32, coefficients, &node.packing);
        let (b_rows, c_rows) = (of_coefficients()?, of_coefficients()?);
        let (a_rows, bias_rows) = (chunks.rows(gpu, nheads)?, chunks.rows(gpu, nheads)?);
        let d_rows = prepared[D].as_ref().map(|_| chunks.rows(gpu, nheads * headdim)).transpose()?;

        let mut args = Ssd {
            grad_y: pointers[SLOTS].address,
            grad_y_stride: strides(grad_y.as_ref()),
            grad_state: pointers[SLOTS + 1].address,
            y_ungated: device::pointer(&ungated).address,
            states: states.pointer().address,
            grad_states: grad_states.pointer().address,
            grad_x: device::pointer(&grad_x).address,
            grad_dt: device::pointer(&grad_dt).address,
            grad_z: device::pointer(&grad_z).address,
            grad_initial_state: initial_state.pointer().address,
            grad_b_rows: b_rows.pointer().address,
            grad_c_rows: c_rows.pointer().address,
            grad_a_rows: a_rows.pointer().address,
            grad_dt_bias_rows: bias_rows.pointer().address,
            grad_d_rows: device::pointer(&d_rows).address,
            splits: int(OP, splits)?,
            ..arguments(node, plan.gradients, plan.scan.channels, &chunks, &prepared, &pointers)?
        };
        args.aligned &= i32::from(aligned(grad_y.as_ref(), pointers[SLOTS]));
        let _steps = with_steps(gpu, dtype, &chunks, &mut args)?;
        let channels = plan.gradients.channels.min(plan.scan.channels);
        let shared = Extents { channels, ..plan.gradients }.of_states();
        let blocks = [walks(node.sizes, plan.scan.channels), 2, 1];
        let launch = Launch { blocks, threads: [FORWARD_THREADS, 1], shared };
        let name = if usual(&args, dtype) { "ssd_states_usual" } else { "ssd_states" };
        let kernel = Kernel { module: &FORWARD, name, dtype: Some(dtype) };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, launch, args) }?;
        let gated = ungated.is_some();
        let blocks = [chunks.count * ngroups * splits, 1, 1];
        let shared = plan.gradients.of_gradients(gated);
        let launch = Launch { blocks, threads: [BACKWARD_THREADS, 1], shared };
        let name = match gated {
            true => "ssd_gradients_gated",
            // Channels are not divided among blocks here.
            false if usual(&Ssd { p_tile: args.headdim, ..args }, dtype) => "ssd_gradients_usual",
            false => "ssd_gradients",
        };
        let kernel = Kernel { module: &BACKWARD, name, dtype: Some(dtype) };
        // SAFETY: as above.
        unsafe { gpu.launch(kernel, launch, args) }?;

        let like_any = |slot: usize| gpu.buffer_like(inputs[slot].as_ref(), true);
        let (grad_b, grad_c) = (like_any(B)?, like_any(C)?);
        let columns = batch * seqlen * ngroups * d_state;
        let sum = Sum {
            rows: [b_rows.pointer().address, c_rows.pointer().address],
            out: [device::pointer(&grad_b).address, device::pointer(&grad_c).address],
            columns: columns as i64,
            count: splits as i64,
        };
        let blocks = [columns.div_ceil(BACKWARD_THREADS), 2, 1];
        let launch = Launch { blocks, threads: [BACKWARD_THREADS, 1], shared: 0 };
        let kernel = Kernel { module: &BACKWARD, name: "ssd_sum", dtype: Some(dtype) };
        // SAFETY: the rows are of that many columns, the outputs of one row each.
        unsafe { gpu.launch(kernel, launch, sum) }?;

        let over_chunks = |sums: &Buffer, slot: usize, columns: usize| {
            let out = like(slot)?;
            out.as_ref().map_or(Ok(()), |out| gpu.sum_rows(sums, chunks.room, columns, out))?;
            Ok::<_, candle_core::Error>(out)
        };
        let a = over_chunks(&a_rows, A, nheads)?;
        let bias = over_chunks(&bias_rows, DT_BIAS, nheads)?;
        let per_channel = prepared[D].as_ref().is_some_and(|d| d.rank() == 2);
        let d = match &d_rows {
            Some(d_rows) if per_channel => over_chunks(d_rows, D, nheads * headdim)?,
            // One a head: over channels too.
            Some(d_rows) => {
                let out = like(D)?;
                let heads = [nheads, headdim];
                out.as_ref().map_or(Ok(()), |out| gpu.sum_groups(d_rows, chunks.room, heads, out))?;
                out
            }
            None => None,
        };
        let if_needed = |slot: usize, buffer: Option<Buffer>| buffer.filter(|_| needs[slot]);
        let buffers = [
            if_needed(X, grad_x),
            if_needed(DT, grad_dt),
            a,
            if_needed(B, grad_b),
            if_needed(C, grad_c),
            d,
            if_needed(Z, grad_z),
            bias,
            if_needed(INITIAL_STATE, Some(initial_state)),
        ];
        device::gradients(inputs, buffers)
    })
}
