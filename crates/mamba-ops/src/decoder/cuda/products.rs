//! Products, with what surrounds them: which kernels run, on what grid.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::arguments::{LAYER, PLAIN, ProjectArgs, RMS};
use super::calls::{Args, Call};
use crate::decoder::{Conv, Norm, OP, Product};
use crate::device::{self, Buffer, Factor, Gemm, Gpu, Kernel, Launch, Module, Pointer, int, module};
use crate::norm::NormKind;

pub(super) static MODULE: Module = module!("decoder");
pub(super) static BATCH_MODULE: Module = module!("decoder_batch");

/// As in the kernels: threads of a product, its warps and its outputs for a warp at once.
pub(super) const THREADS: usize = 256;
const WARPS: usize = 8;
const PAIR: usize = 2;

/// Outputs of a warp in products of batches, its inputs at once, and the most eights of sequences that these are faster for than cuBLAS.
const M: usize = 16;
const DEPTH: usize = 32;
const MOST_TILES: usize = 2;

/// Rows in GPU memory, so many elements apart.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) at: Pointer,
    pub(super) stride: usize,
}

impl Rows {
    pub(super) fn new(at: Pointer, stride: usize) -> Self {
        Self { at, stride }
    }

    /// The same from an element on.
    pub(super) fn from(self, element: usize, dtype: DType) -> Self {
        Self { at: self.at.offset(element, dtype), ..self }
    }
}

/// Whether a batch goes through the products for batches.
pub(super) fn is_wide(batch: usize, dtype: DType) -> bool {
    batch > 2 && dtype != DType::F32
}

/// Whether a block has room for the inputs of a product.
pub(super) fn fits(gpu: &Gpu, inputs: usize, batch: usize, dtype: DType) -> bool {
    // The kernel has some shared memory of its own.
    inputs > 0 && shared(inputs, batch, dtype) + 1024 <= gpu.shared_memory()
}

/// The shared memory of a product, for the inputs of all sequences, or of a norm, for those of one.
fn shared(inputs: usize, batch: usize, dtype: DType) -> usize {
    let rows = if is_wide(batch, dtype) { 1 } else { batch.next_power_of_two() };
    rows * inputs * size_of::<f32>()
}

/// `y = x Wᵀ` and so on, of a batch.
pub(super) fn project(product: &Product, batch: usize, x: Rows, y: Rows) -> Result<ProjectArgs> {
    let outputs = product.outputs()?;
    let mut args = ProjectArgs {
        weights: [0; 3],
        x: x.at.address,
        z: 0,
        norm_weight: 0,
        norm_bias: 0,
        scales: address(product.scales.as_ref())?,
        bias: address(product.bias.as_ref())?,
        base: 0,
        y: y.at,
        conv_weight: 0,
        conv_bias: 0,
        window: 0,
        rounded: 0,
        x_stride: x.stride as i64,
        z_stride: 0,
        y_stride: y.stride as i64,
        ends: [int(OP, outputs)?; 2],
        rows: int(OP, batch)?,
        inputs: int(OP, product.inputs()?)?,
        outputs: int(OP, outputs)?,
        before: PLAIN,
        norm_groups: 1,
        eps: 0.0,
        scale: product.scale as f32,
        conv_begin: 0,
        conv_end: 0,
        conv_width: 1,
        conv_silu: 0,
        split: 1,
    };
    let mut end = 0;
    for (i, weight) in product.weights.iter().enumerate() {
        args.weights[i] = address(Some(weight))?;
        if i > 0 {
            args.ends[i - 1] = int(OP, end)?;
        }
        end += weight.dim(0)?;
    }
    Ok(args)
}

impl ProjectArgs {
    /// The same, of the norm of `x`.
    pub(super) fn before(self, norm: &Norm) -> Result<Self> {
        Ok(Self {
            before: match norm.kind {
                NormKind::Rms => RMS,
                NormKind::Layer => LAYER,
            },
            norm_weight: address(Some(&norm.weight))?,
            norm_bias: address(norm.bias.as_ref())?,
            eps: norm.eps as f32,
            ..self
        })
    }

    /// The same, with a step of the convolution of outputs from `begin` on.
    pub(super) fn convolved(self, conv: &Conv, window: u64, begin: usize) -> Result<Self> {
        let (channels, width) = conv.weight.dims2()?;
        Ok(Self {
            conv_weight: address(Some(&conv.weight))?,
            conv_bias: address(conv.bias.as_ref())?,
            window,
            conv_begin: int(OP, begin)?,
            conv_end: int(OP, begin + channels)?,
            conv_width: int(OP, width)?,
            conv_silu: i32::from(conv.silu),
            ..self
        })
    }

    /// The same, added to what is at `base`, rows of which are as far apart as those of `y`.
    pub(super) fn added_to(self, base: u64) -> Self {
        Self { base, ..self }
    }
}

/// The launches of a product; `normed`, if the batch goes through the products for batches, is for its inputs.
pub(super) fn launches(
    gpu: &Gpu,
    product: &Product,
    normed: Option<&Buffer>,
    args: ProjectArgs,
) -> Result<Vec<Call>> {
    match normed {
        None => Ok(vec![narrow(gpu, product, args)?]),
        Some(normed) => wide(gpu, product, normed.pointer(), args),
    }
}

/// A product with all that surrounds it.
fn narrow(gpu: &Gpu, product: &Product, args: ProjectArgs) -> Result<Call> {
    let (batch, dtype) = (args.rows as usize, product.weights[0].dtype());
    let name = match batch.next_power_of_two() {
        1 => "decoder_project_1",
        2 => "decoder_project_2",
        4 => "decoder_project_4",
        _ => "decoder_project_8",
    };
    let kernel = Kernel { module: &MODULE, name, dtype: Some(dtype) };
    let shared = shared(args.inputs as usize, batch, dtype);
    let outputs = args.outputs as usize;
    on_all_multiprocessors(gpu, kernel, shared, args, |split| outputs.div_ceil(PAIR * WARPS / split))
}

/// A norm, and a product with a convolution, each as far as there is one.
fn wide(gpu: &Gpu, product: &Product, normed: Pointer, mut args: ProjectArgs) -> Result<Vec<Call>> {
    let (batch, dtype) = (args.rows as usize, product.weights[0].dtype());
    let (inputs, outputs) = (args.inputs as usize, args.outputs as usize);
    let kernel = |name: &'static str| Kernel { module: &BATCH_MODULE, name, dtype: Some(dtype) };
    let mut calls = vec![];
    if args.before != PLAIN {
        let norm = ProjectArgs { y: normed, y_stride: inputs as i64, ..args };
        let shared = shared(inputs, batch, dtype);
        let launch = Launch { blocks: [batch, 1, 1], threads: [THREADS, 1], shared };
        calls.push(Call::Kernel(kernel("decoder_norm"), launch, Args::Project(norm)));
        args = ProjectArgs { x: normed.address, x_stride: inputs as i64, before: PLAIN, ..args };
    }
    let tiles = batch.div_ceil(8).next_power_of_two();
    let in_place = args.base == 0 || args.base == args.y.address;
    if tiles <= MOST_TILES || args.bias != 0 || args.scales != 0 || !in_place {
        let sums = WARPS * M * (8 * tiles + 1) * size_of::<f32>();
        let staged = sums + batch * (inputs.div_ceil(DEPTH) | 1) * DEPTH * dtype.size_in_bytes();
        let (name, shared) = match (staged + 1024 <= gpu.shared_memory(), tiles) {
            (true, 1) => ("decoder_staged_1", staged),
            (true, 2) => ("decoder_staged_2", staged),
            (true, 4) => ("decoder_staged_4", staged),
            (_, 1) => ("decoder_product_1", sums),
            (_, 2) => ("decoder_product_2", sums),
            (_, 4) => ("decoder_product_4", sums),
            _ => ("decoder_product_8", sums),
        };
        let blocks = |split: usize| outputs.div_ceil(M * WARPS / split);
        calls.push(on_all_multiprocessors(gpu, kernel(name), shared, args, blocks)?);
        return Ok(calls);
    }
    let mut y = args.y;
    for weight in &product.weights {
        let columns = weight.dim(0)?;
        calls.push(Call::Product(Gemm {
            a: Factor { address: args.x, stride: args.x_stride as usize, transposed: false },
            b: Factor { address: address(Some(weight))?, stride: inputs, transposed: true },
            y,
            y_stride: args.y_stride as usize,
            rows: batch,
            inner: inputs,
            columns,
            dtype,
            scale: args.scale,
            add: args.base != 0,
        }));
        y = y.offset(columns, if y.is_f32() { DType::F32 } else { dtype });
    }
    if args.window != 0 {
        let channels = (args.conv_end - args.conv_begin) as usize;
        let launch =
            Launch { blocks: [channels.div_ceil(THREADS), batch, 1], threads: [THREADS, 1], shared: 0 };
        calls.push(Call::Kernel(kernel("decoder_conv"), launch, Args::Project(args)));
    }
    Ok(calls)
}

/// The launch of a product whose outputs need so many blocks if so many warps share one: as few as give every multiprocessor work.
fn on_all_multiprocessors(
    gpu: &Gpu,
    kernel: Kernel,
    shared: usize,
    args: ProjectArgs,
    blocks: impl Fn(usize) -> usize,
) -> Result<Call> {
    let multiprocessors = gpu.multiprocessors();
    let split = [1, 2, 4].into_iter().find(|&split| blocks(split) >= multiprocessors).unwrap_or(WARPS);
    let at_once = gpu.blocks_at_once(kernel, [THREADS, 1], shared)?;
    let launch = Launch { blocks: [blocks(split).min(at_once), 1, 1], threads: [THREADS, 1], shared };
    Ok(Call::Kernel(kernel, launch, Args::Project(ProjectArgs { split: int(OP, split)?, ..args })))
}

/// Where a weight lies; 0 if there is none.
pub(super) fn address(x: Option<&Tensor>) -> Result<u64> {
    x.map_or(Ok(0), |x| device::views(OP, [Some(x)], |_, [x]| Ok(x.address)))
}
