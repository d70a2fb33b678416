//! Which kernels of `decoder.cu` run for a token, on what grid, with what arguments.

use std::mem::size_of;

use candle_core::{DType, Result, Tensor};

use super::arguments::{
    EmbedArgs, GATED_RMS, LAYER, Mamba1Args, Mamba2Args, PLAIN, ProjectArgs, RMS, RMS_OF_GATED,
};
use crate::decoder::{Conv, Layer, Mamba1, Mamba2, Mixer, Norm, OP, Product, Stack};
use crate::device::{self, Buffer, Factor, Gemm, Gpu, Kernel, Launch, Module, Pointer, int, module};
use crate::norm::NormKind;

static MODULE: Module = module!("decoder");
static BATCH_MODULE: Module = module!("decoder_batch");

/// As in the kernels: threads of a product and of an update, warps of a product and its outputs for a warp at once, lanes of
/// a channel, channels of a warp.
const THREADS: usize = 256;
const WARPS: usize = 8;
const PAIR: usize = 2;
const UPDATE_THREADS: usize = 128;
const LANES: usize = 4;
const CHANNELS: usize = 4;

/// Outputs of a warp in products of batches, and the most eights of sequences that these are faster for than cuBLAS.
const M: usize = 16;
const MOST_TILES: usize = 2;

/// Work for the GPU. It holds the addresses of weights and buffers that the decoder keeps, and of states that lie where they did when
/// it was made.
pub(super) enum Call {
    Kernel(Kernel, Launch, Args),
    /// A product of cuBLAS.
    Product(Gemm),
}

#[derive(Clone, Copy)]
pub(super) enum Args {
    Embed(EmbedArgs),
    Project(ProjectArgs),
    Mamba1(Mamba1Args),
    Mamba2(Mamba2Args),
}

impl Call {
    pub(super) fn launch(&self, gpu: &Gpu) -> Result<()> {
        // SAFETY: the shapes of weights and states were checked, and the buffers made for them. What kernels read before they wait,
        // weights and the states of their layer, is written by no kernel between the embedding, which waits for the token before,
        // and them.
        unsafe {
            match *self {
                Self::Kernel(kernel, launch, args) => match args {
                    Args::Embed(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Project(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Mamba1(args) => gpu.launch_overlapping(kernel, launch, args),
                    Args::Mamba2(args) => gpu.launch_overlapping(kernel, launch, args),
                },
                Self::Product(gemm) => gpu.gemm(gemm),
            }
        }
    }
}

/// What stands between kernels, `f32`; rows are a multiple of four apart.
pub(super) struct Scratch {
    residual: Buffer,
    projected: Buffer,
    dbc: Buffer,
    y: Buffer,
    batch: usize,
    wide: Option<Wide>,
}

/// Inputs of products, in the dtype of the weights, where those are for batches: of a norm, and of what is between projections.
struct Wide {
    normed: Buffer,
    inner: Buffer,
}

/// The next multiple of four.
fn stride(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// Whether a batch goes through the products for batches.
fn is_wide(batch: usize, dtype: DType) -> bool {
    batch > 2 && dtype != DType::F32
}

/// The shared memory of a product, for the inputs of all sequences, or of a norm, for those of one.
fn shared(inputs: usize, batch: usize, dtype: DType) -> usize {
    let rows = if is_wide(batch, dtype) { 1 } else { batch.next_power_of_two() };
    rows * inputs * size_of::<f32>()
}

impl Scratch {
    /// Whether a block has room for the inputs of a product.
    pub(super) fn fits(gpu: &Gpu, inputs: usize, batch: usize, dtype: DType) -> bool {
        // The kernel has some shared memory of its own.
        shared(inputs, batch, dtype) + 1024 <= gpu.shared_memory()
    }

    pub(super) fn new(gpu: &Gpu, stack: &Stack, batch: usize) -> Result<Self> {
        let (mut projected, mut dbc, mut inner) = (0, 0, 0);
        for layer in &stack.layers {
            let (in_proj, out_proj) = match &layer.mixer {
                Mixer::Mamba1(m) => {
                    dbc = dbc.max(m.x_proj.weight.dim(0)?);
                    (&m.in_proj, &m.out_proj)
                }
                Mixer::Mamba2(m) => (&m.in_proj, &m.out_proj),
            };
            projected = projected.max(in_proj.weight.dim(0)?);
            inner = inner.max(out_proj.weight.dim(1)?);
        }
        let (d_model, dtype) = (stack.embedding.dim(1)?, stack.embedding.dtype());
        let buffer = |len: usize| gpu.buffer(DType::F32, batch * stride(len));
        let rounded = |len: usize| gpu.buffer(dtype, batch * len);
        let wide = match is_wide(batch, dtype) {
            true => Some(Wide { normed: rounded(d_model.max(inner))?, inner: rounded(inner)? }),
            false => None,
        };
        let (residual, projected, dbc, y) =
            (buffer(d_model)?, buffer(projected)?, buffer(dbc)?, buffer(inner)?);
        Ok(Self { residual, projected, dbc, y, batch, wide })
    }

    /// `residual ← embedding[ids]`.
    pub(super) fn embed(&self, stack: &Stack, ids: Pointer) -> Result<Call> {
        let (vocabulary, width) = stack.embedding.dims2()?;
        let args = EmbedArgs {
            ids,
            embedding: device::views(OP, [Some(&stack.embedding)], |_, [x]| Ok(x))?,
            out: self.residual.pointer().address,
            vocabulary: int(OP, vocabulary)?,
            width: int(OP, width)?,
        };
        let launch =
            Launch { blocks: [width.div_ceil(THREADS), self.batch, 1], threads: [THREADS, 1], shared: 0 };
        let kernel = Kernel { module: &MODULE, name: "decoder_embed", dtype: None };
        Ok(Call::Kernel(kernel, launch, Args::Embed(args)))
    }

    /// `logits = head · norm_f(residual)`.
    pub(super) fn head(&self, gpu: &Gpu, stack: &Stack, logits: &Buffer) -> Result<Vec<Call>> {
        let head = Product { weight: stack.head.clone(), bias: None };
        let args = self.project(&head, self.residual.pointer(), logits.pointer(), stack.head.dim(0)?)?;
        self.product(gpu, &head, before(args, &stack.norm_f)?)
    }

    /// The launches of a layer whose states, window and scan, lie at `states`.
    pub(super) fn layer(&self, gpu: &Gpu, layer: &Layer, states: [u64; 2]) -> Result<Vec<Call>> {
        let [into, between, out] = match &layer.mixer {
            Mixer::Mamba1(m) => self.mamba1(gpu, &layer.norm, m, states)?,
            Mixer::Mamba2(m) => self.mamba2(gpu, &layer.norm, m, states)?,
        };
        Ok([into, between, out].into_iter().flatten().collect())
    }

    /// Where what is between projections goes to be read by a product: rounded if it is for batches, and if nothing reads it first.
    fn inner(&self) -> Pointer {
        self.wide.as_ref().map_or(self.y.pointer(), |wide| wide.inner.pointer())
    }

    fn rounded(&self) -> u64 {
        self.wide.as_ref().map_or(0, |wide| wide.inner.pointer().address)
    }

    fn mamba1(
        &self,
        gpu: &Gpu,
        norm: &Norm,
        m: &Mamba1,
        [window, state]: [u64; 2],
    ) -> Result<[Vec<Call>; 3]> {
        let ((d_inner, d_state), dt_rank) = (m.a.dims2()?, m.dt_proj.dim(1)?);
        let (xz, dbc) = (stride(2 * d_inner), stride(dt_rank + 2 * d_state));
        let into = self.project(&m.in_proj, self.residual.pointer(), self.projected.pointer(), xz)?;
        let into = convolved(before(into, norm)?, &m.conv, window, 0)?;
        let into = ProjectArgs { rounded: self.rounded(), ..into };
        let (convolved, convolved_stride) = match &self.wide {
            Some(wide) => (wide.inner.pointer(), d_inner),
            None => (self.projected.pointer(), xz),
        };
        let coefficients = self.project(&m.x_proj, convolved, self.dbc.pointer(), dbc)?;
        let coefficients = ProjectArgs { x_stride: convolved_stride as i64, ..coefficients };
        let (eps, norms) = match &m.dt_bc_norms {
            Some((eps, [dt, b, c])) => {
                (*eps, [address(dt.as_ref())?, address(b.as_ref())?, address(c.as_ref())?])
            }
            None => (0.0, [0; 3]),
        };
        let args = Mamba1Args {
            dt_proj: address(Some(&m.dt_proj))?,
            xz: self.projected.pointer().address,
            dbc: self.dbc.pointer().address,
            state,
            y: self.y.pointer().address,
            rounded: self.rounded(),
            dt_bias: address(Some(&m.dt_bias))?,
            a: address(Some(&m.a))?,
            d: address(Some(&m.d))?,
            norms,
            xz_stride: xz as i64,
            dbc_stride: dbc as i64,
            d_inner: int(OP, d_inner)?,
            d_state: int(OP, d_state)?,
            dt_rank: int(OP, dt_rank)?,
            normed: i32::from(m.dt_bc_norms.is_some()),
            eps: eps as f32,
            _end: 0,
        };
        let launch = Launch {
            blocks: [d_inner.div_ceil(UPDATE_THREADS / LANES), self.batch, 1],
            threads: [UPDATE_THREADS, 1],
            shared: (dt_rank + 2 * d_state) * size_of::<f32>(),
        };
        let kernel = Kernel { module: &MODULE, name: "decoder_mamba1", dtype: Some(m.dt_proj.dtype()) };
        let mut between = self.product(gpu, &m.x_proj, coefficients)?;
        between.push(Call::Kernel(kernel, launch, Args::Mamba1(args)));
        let out = self.out(&m.out_proj, self.inner())?;
        Ok([self.product(gpu, &m.in_proj, into)?, between, self.product(gpu, &m.out_proj, out)?])
    }

    fn mamba2(
        &self,
        gpu: &Gpu,
        norm: &Norm,
        m: &Mamba2,
        [window, state]: [u64; 2],
    ) -> Result<[Vec<Call>; 3]> {
        let nheads = m.a.dims1()?;
        let (d_inner, bc) = (nheads * m.headdim, m.ngroups * m.d_state);
        let row = stride(2 * d_inner + 2 * bc + nheads);
        let into = self.project(&m.in_proj, self.residual.pointer(), self.projected.pointer(), row)?;
        let into = convolved(before(into, norm)?, &m.conv, window, d_inner)?;
        let projected = |start: usize| self.projected.pointer().offset(start, DType::F32).address;
        let y = if m.norm.is_some() { self.y.pointer() } else { self.inner() };
        let args = Mamba2Args {
            z: if m.norm.is_none() { projected(0) } else { 0 },
            x: projected(d_inner),
            b: projected(2 * d_inner),
            c: projected(2 * d_inner + bc),
            dt: projected(2 * d_inner + 2 * bc),
            state,
            y,
            dt_bias: address(Some(&m.dt_bias))?,
            a: address(Some(&m.a))?,
            d: address(Some(&m.d))?,
            stride: row as i64,
            nheads: int(OP, nheads)?,
            headdim: int(OP, m.headdim)?,
            ngroups: int(OP, m.ngroups)?,
            d_state: int(OP, m.d_state)?,
            d_per_head: i32::from(m.d.elem_count() == nheads),
            low: m.dt_limit.0 as f32,
            high: m.dt_limit.1 as f32,
            _end: 0,
        };
        let launch = Launch {
            blocks: [m.headdim.div_ceil(UPDATE_THREADS / 32 * CHANNELS), nheads, self.batch],
            threads: [UPDATE_THREADS, 1],
            shared: 0,
        };
        let kernel = Kernel { module: &MODULE, name: "decoder_mamba2", dtype: None };
        let mut out = self.out(&m.out_proj, y)?;
        if let Some(norm) = &m.norm {
            out = ProjectArgs {
                before: if m.norm_before_gate { GATED_RMS } else { RMS_OF_GATED },
                z: self.projected.pointer().address,
                z_stride: row as i64,
                norm_groups: int(OP, m.ngroups)?,
                ..before(out, norm)?
            };
        }
        let update = Call::Kernel(kernel, launch, Args::Mamba2(args));
        Ok([self.product(gpu, &m.in_proj, into)?, vec![update], self.product(gpu, &m.out_proj, out)?])
    }

    /// `residual ← residual + y Wᵀ`.
    fn out(&self, product: &Product, y: Pointer) -> Result<ProjectArgs> {
        let args = self.project(product, y, self.residual.pointer(), product.weight.dim(0)?)?;
        Ok(ProjectArgs { add: 1, ..args })
    }

    /// `y = x Wᵀ + bias`, with rows of `x` one after another and of `y` `y_stride` apart.
    fn project(&self, product: &Product, x: Pointer, y: Pointer, y_stride: usize) -> Result<ProjectArgs> {
        let (outputs, inputs) = product.weight.dims2()?;
        Ok(ProjectArgs {
            weight: address(Some(&product.weight))?,
            x: x.address,
            z: 0,
            norm_weight: 0,
            norm_bias: 0,
            bias: address(product.bias.as_ref())?,
            y,
            conv_weight: 0,
            conv_bias: 0,
            window: 0,
            rounded: 0,
            x_stride: inputs as i64,
            z_stride: 0,
            y_stride: y_stride as i64,
            rows: int(OP, self.batch)?,
            inputs: int(OP, inputs)?,
            outputs: int(OP, outputs)?,
            before: PLAIN,
            norm_groups: 1,
            eps: 0.0,
            add: 0,
            conv_begin: 0,
            conv_end: 0,
            conv_width: 1,
            split: 1,
        })
    }

    /// The launches of a product.
    fn product(&self, gpu: &Gpu, product: &Product, args: ProjectArgs) -> Result<Vec<Call>> {
        match &self.wide {
            None => Ok(vec![self.narrow_product(gpu, product, args)?]),
            Some(wide) => self.wide_product(gpu, wide, product, args),
        }
    }

    /// A product with all that surrounds it.
    fn narrow_product(&self, gpu: &Gpu, product: &Product, args: ProjectArgs) -> Result<Call> {
        let ((outputs, inputs), dtype) = (product.weight.dims2()?, product.weight.dtype());
        let name = match self.batch.next_power_of_two() {
            1 => "decoder_project_1",
            2 => "decoder_project_2",
            4 => "decoder_project_4",
            _ => "decoder_project_8",
        };
        let kernel = Kernel { module: &MODULE, name, dtype: Some(dtype) };
        let shared = shared(inputs, self.batch, dtype);
        on_all_multiprocessors(gpu, kernel, shared, args, |split| outputs.div_ceil(PAIR * WARPS / split))
    }

    /// A norm, a product, a convolution, each as far as there is one.
    fn wide_product(
        &self,
        gpu: &Gpu,
        wide: &Wide,
        product: &Product,
        mut args: ProjectArgs,
    ) -> Result<Vec<Call>> {
        let ((outputs, inputs), dtype) = (product.weight.dims2()?, product.weight.dtype());
        let kernel = |name: &'static str| Kernel { module: &BATCH_MODULE, name, dtype: Some(dtype) };
        let mut calls = vec![];
        if args.before != PLAIN {
            let normed = wide.normed.pointer();
            let norm = ProjectArgs { y: normed, y_stride: inputs as i64, ..args };
            let shared = shared(inputs, self.batch, dtype);
            let launch = Launch { blocks: [self.batch, 1, 1], threads: [THREADS, 1], shared };
            calls.push(Call::Kernel(kernel("decoder_norm"), launch, Args::Project(norm)));
            args = ProjectArgs { x: normed.address, x_stride: inputs as i64, before: PLAIN, ..args };
        }
        if self.batch > MOST_TILES * 8 && args.bias == 0 {
            let gemm = Gemm {
                a: Factor { address: args.x, stride: args.x_stride as usize, transposed: false },
                b: Factor { address: args.weight, stride: inputs, transposed: true },
                y: args.y,
                y_stride: args.y_stride as usize,
                rows: self.batch,
                inner: inputs,
                columns: outputs,
                dtype,
                add: args.add != 0,
            };
            calls.push(Call::Product(gemm));
        } else {
            let tiles = self.batch.div_ceil(8).next_power_of_two();
            let name = match tiles {
                1 => "decoder_product_1",
                2 => "decoder_product_2",
                4 => "decoder_product_4",
                _ => "decoder_product_8",
            };
            let shared = WARPS * M * (8 * tiles + 1) * size_of::<f32>();
            let blocks = |split: usize| outputs.div_ceil(M * WARPS / split);
            calls.push(on_all_multiprocessors(gpu, kernel(name), shared, args, blocks)?);
        }
        if args.window != 0 {
            let channels = (args.conv_end - args.conv_begin) as usize;
            let launch = Launch {
                blocks: [channels.div_ceil(THREADS), self.batch, 1],
                threads: [THREADS, 1],
                shared: 0,
            };
            calls.push(Call::Kernel(kernel("decoder_conv"), launch, Args::Project(args)));
        }
        Ok(calls)
    }
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

/// The same, of the norm of `x`.
fn before(args: ProjectArgs, norm: &Norm) -> Result<ProjectArgs> {
    Ok(ProjectArgs {
        before: match norm.kind {
            NormKind::Rms => RMS,
            NormKind::Layer => LAYER,
        },
        norm_weight: address(Some(&norm.weight))?,
        norm_bias: address(norm.bias.as_ref())?,
        eps: norm.eps as f32,
        ..args
    })
}

/// The same, with a step of the convolution of outputs from `begin` on.
fn convolved(args: ProjectArgs, conv: &Conv, window: u64, begin: usize) -> Result<ProjectArgs> {
    let (channels, width) = conv.weight.dims2()?;
    Ok(ProjectArgs {
        conv_weight: address(Some(&conv.weight))?,
        conv_bias: address(conv.bias.as_ref())?,
        window,
        conv_begin: int(OP, begin)?,
        conv_end: int(OP, begin + channels)?,
        conv_width: int(OP, width)?,
        ..args
    })
}

/// Where a weight lies; 0 if there is none.
fn address(x: Option<&Tensor>) -> Result<u64> {
    x.map_or(Ok(0), |x| device::views(OP, [Some(x)], |_, [x]| Ok(x.address)))
}
