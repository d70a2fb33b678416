//! The norm on a GPU: which of the kernels of `norm.cu` run, on what grid.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::autograd::{BIAS, Node, RESIDUAL, SLOTS, WEIGHT, X, Z};
use super::{NormKind, OP, Sizes};
use crate::autograd::Output;
use crate::device::{self, Arguments, Gpu, Kernel, Launch, Module, Pointer, module};
use crate::host;

static MODULE: Module = module!("norm");

/// Neighbours that a thread reads at once, and most threads of a block, as in the kernels.
const PACK: usize = 8;
const THREADS: usize = 512;

/// The largest group that there are kernels for: a group stays in the registers of a block.
pub(super) const LARGEST_GROUP: usize = 4 * PACK * THREADS;

#[repr(C)]
#[derive(Clone, Copy)]
struct Norm {
    x: u64,
    z: u64,
    weight: Pointer,
    bias: Pointer,
    residual: Pointer,
    rows: i64,
    dim: i32,
    group_size: i32,
    eps: f32,
    layer: i32,
    gate: i32,
    padding: i32,
    z_stride: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormForward {
    norm: Norm,
    y: u64,
    sum: Pointer,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NormBackward {
    norm: Norm,
    grad_y: u64,
    grad_sum: Pointer,
    dresidual: Pointer,
    dx: u64,
    dz: u64,
    dweight: u64,
    dbias: u64,
}

const _: () = assert!(size_of::<Norm>() == 104);
const _: () = assert!(size_of::<NormForward>() == 128);
const _: () = assert!(size_of::<NormBackward>() == 176);
// SAFETY: as the structs of `norm.cu`.
unsafe impl Arguments for NormForward {}
// SAFETY: as above.
unsafe impl Arguments for NormBackward {}

/// Which kernel is wanted.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
    /// A backward of an RMS norm without bias, of a gated input or of a sum with a residual.
    PlainBackward,
}

/// A kernel, the threads that share a group in it, and the groups of a block.
struct Shape {
    name: &'static str,
    threads: [usize; 2],
    /// Bytes of shared memory of a block: in a backward the weights that its threads use.
    shared: usize,
}

impl Shape {
    fn new(sizes: Sizes, pass: Pass, pointers: &[Pointer], z_stride: usize) -> Self {
        let packs = sizes.group_size.div_ceil(PACK).max(1);
        let aligned = pointers.iter().all(|pointer| pointer.address.is_multiple_of(16));
        let vector = aligned && [sizes.group_size, z_stride].iter().all(|n| n.is_multiple_of(PACK));
        let packs_of_thread = match packs.div_ceil(THREADS) {
            _ if !vector => 4,
            // Fewer threads, each with more on its way: 173 µs in place of 184 for 16384 rows of 2560 on an H100, where a copy takes 171.
            1 if pass == Pass::Forward && packs > THREADS / 2 => 2,
            1 => 1,
            2 => 2,
            _ => 4,
        };
        let threads = packs.div_ceil(packs_of_thread).next_multiple_of(32);
        let plain = pass == Pass::PlainBackward;
        let name = match (pass, vector, packs_of_thread) {
            (Pass::Forward, true, 1) => "norm_fwd_1v",
            (Pass::Forward, true, 2) => "norm_fwd_2v",
            (Pass::Forward, true, _) => "norm_fwd_4v",
            (Pass::Forward, false, _) => "norm_fwd_4",
            (_, true, 1) if plain => "norm_bwd_plain1v",
            (_, true, 2) if plain => "norm_bwd_plain2v",
            (_, true, 1) => "norm_bwd_1v",
            (_, true, 2) => "norm_bwd_2v",
            (_, true, _) => "norm_bwd_4v",
            (_, false, _) => "norm_bwd_4",
        };
        let threads = [threads, if threads == 32 { 4 } else { 1 }];
        let weights = packs_of_thread * PACK * threads[0] * threads[1] * size_of::<f32>();
        Self { name, threads, shared: if pass == Pass::Forward { 0 } else { weights } }
    }
}

/// The inputs as kernels read them: contiguous, but for `z`, whose rows may be parts of wider ones, so far apart.
fn prepare(inputs: &[Option<Tensor>; SLOTS]) -> Result<([Option<Tensor>; SLOTS], usize)> {
    let mut prepared = [const { None }; SLOTS];
    for (slot, to) in prepared.iter_mut().enumerate() {
        *to = match &inputs[slot] {
            Some(z) if slot == Z && device::row_stride(z).is_some() => Some(z.clone()),
            x => device::contiguous(x.as_ref())?,
        };
    }
    let z_stride = prepared[Z].as_ref().and_then(device::row_stride).unwrap_or(0);
    Ok((prepared, z_stride))
}

fn arguments(node: &Node, [x, weight, bias, residual, z]: [Pointer; SLOTS], z_stride: usize) -> Result<Norm> {
    let Sizes { rows, dim, group_size } = node.sizes;
    Ok(Norm {
        z_stride: z_stride as i64,
        x: x.address,
        z: z.address,
        weight,
        bias,
        residual,
        rows: rows as i64,
        dim: device::int(OP, dim)?,
        group_size: device::int(OP, group_size)?,
        eps: node.eps as f32,
        layer: i32::from(node.kind == NormKind::Layer),
        gate: match (z.address, node.norm_before_gate) {
            (0, _) => 0,
            (_, false) => 1,
            (_, true) => 2,
        },
        padding: 0,
    })
}

/// `y` and, if asked for, the sum with the residual.
pub(super) fn forward(node: &Node, inputs: &[Option<Tensor>; SLOTS], with_sum: bool) -> Result<Vec<Output>> {
    let x = host::slot(OP, inputs, X)?;
    let Sizes { rows, dim, group_size } = node.sizes;
    let (prepared, z_stride) = prepare(inputs)?;
    device::views(OP, prepared.each_ref().map(Option::as_ref), |gpu, pointers| {
        let y = gpu.buffer(x.dtype(), x.elem_count())?;
        let sum = with_sum.then(|| gpu.buffer(node.residual_dtype, x.elem_count())).transpose()?;
        let [px, weight, bias, residual, z] = pointers;
        let shape = Shape::new(
            node.sizes,
            Pass::Forward,
            &[px, weight, bias, residual, z, y.pointer(), device::pointer(&sum)],
            z_stride,
        );
        let args = NormForward {
            norm: arguments(node, pointers, z_stride)?,
            y: y.pointer().address,
            sum: device::pointer(&sum),
        };
        let groups = if x.elem_count() == 0 { 0 } else { rows * (dim / group_size) };
        let launch =
            Launch { blocks: [groups.div_ceil(shape.threads[1]), 1, 1], threads: shape.threads, shared: 0 };
        let kernel = Kernel { module: &MODULE, name: shape.name, dtype: Some(x.dtype()) };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, launch, args) }?;
        let mut outputs = vec![y.output(x.shape().clone())?];
        if let Some(sum) = sum {
            outputs.push(sum.output(x.shape().clone())?);
        }
        Ok(outputs)
    })
}

pub(super) fn backward(
    node: &Node,
    inputs: &[Option<Tensor>; SLOTS],
    needs: &[bool; SLOTS],
    [grad_y, grad_sum]: [Option<&Tensor>; 2],
) -> Result<[Option<Tensor>; SLOTS]> {
    let x = host::slot(OP, inputs, X)?;
    let (prepared, z_stride) = prepare(inputs)?;
    let [a, b, c, d, e] = prepared.each_ref().map(Option::as_ref);
    let (grad_y, grad_sum) = (device::contiguous(grad_y)?, device::contiguous(grad_sum)?);
    device::views(OP, [a, b, c, d, e, grad_y.as_ref(), grad_sum.as_ref()], |gpu, pointers| {
        let [px, weight, bias, residual, z, grad_y, grad_sum] = pointers;
        let like = |slot: usize| gpu.buffer_like(inputs[slot].as_ref(), needs[slot]);
        let (dx, dresidual, dz) = (like(X)?, like(RESIDUAL)?, like(Z)?);
        let (dweight, dbias) = (like(WEIGHT)?, like(BIAS)?);
        let [pdx, pdresidual, pdz] = [&dx, &dresidual, &dz].map(device::pointer);
        let all = [px, weight, bias, residual, z, grad_y, grad_sum, pdx, pdresidual, pdz];
        let plain = node.kind == NormKind::Rms
            && inputs[BIAS].is_none()
            && (inputs[Z].is_none() || inputs[RESIDUAL].is_none() && grad_sum.address == 0);
        let pass = if plain { Pass::PlainBackward } else { Pass::Backward };
        let shape = Shape::new(node.sizes, pass, &all, z_stride);
        let kernel = Kernel { module: &MODULE, name: shape.name, dtype: Some(x.dtype()) };
        let launch = launch(gpu, node.sizes, kernel, &shape, x.elem_count() == 0)?;
        let parts = launch.blocks[0] * shape.threads[1];
        let dim = node.sizes.dim;
        let sums = |needed: bool| needed.then(|| gpu.buffer(DType::F32, parts * dim)).transpose();
        let (weight_sums, bias_sums) = (sums(dweight.is_some())?, sums(dbias.is_some())?);
        let args = NormBackward {
            norm: arguments(node, [px, weight, bias, residual, z], z_stride)?,
            grad_y: grad_y.address,
            grad_sum,
            dresidual: pdresidual,
            dx: pdx.address,
            dz: pdz.address,
            dweight: device::pointer(&weight_sums).address,
            dbias: device::pointer(&bias_sums).address,
        };
        // SAFETY: the inputs have the shapes that `sizes` checked, the outputs were made for them.
        unsafe { gpu.launch(kernel, launch, args) }?;
        for (sums, out) in [(weight_sums, &dweight), (bias_sums, &dbias)] {
            if let (Some(sums), Some(out)) = (sums, out) {
                gpu.sum_rows(&sums, parts, dim, out)?;
            }
        }
        device::gradients(inputs, [dx, dweight, dbias, dresidual, dz])
    })
}

/// The grid of a backward: the blocks that the GPU runs at once, each going through several rows, so that few sums are left.
fn launch(gpu: &Gpu, sizes: Sizes, kernel: Kernel, shape: &Shape, empty: bool) -> Result<Launch> {
    let Shape { threads, shared, .. } = *shape;
    let groups = if empty { 0 } else { sizes.dim / sizes.group_size };
    let fill = gpu.blocks_at_once(kernel, threads, shared)?.div_ceil(groups.max(1));
    let blocks = if empty { 0 } else { sizes.rows.div_ceil(threads[1]).min(fill) };
    Ok(Launch { blocks: [blocks, groups, 1], threads, shared })
}
