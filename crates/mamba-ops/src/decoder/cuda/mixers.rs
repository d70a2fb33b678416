//! What is launched for the embedding, for each layer and for the head.

use candle_core::{DType, Result};

use super::arguments::{
    EmbedArgs, GATED_RMS, GELU, GELU_TANH, GateArgs, Mamba1Args, Mamba2Args, ProjectArgs, RELU2,
    RMS_OF_GATED, SILU,
};
use super::attention;
use super::calls::{Args, Call};
use super::products::{MODULE, Rows, THREADS, address, launches, project};
use super::scratch::{Scratch, SharedScratch, Slot, stride};
use super::tables::Tables;
use crate::decoder::{
    Attention, Layer, LowRank, MAX_BATCH, Mamba1, Mamba2, Mixer, Mlp, MlpActivation, MlpLayout, OP, Product,
    Shared, ShortConv, Stack,
};
use crate::device::{self, Buffer, Gpu, Kernel, Launch, Pointer, int};

/// As in the kernels: threads of an update, lanes of a channel, channels of a warp.
const UPDATE_THREADS: usize = 128;
const LANES: usize = 4;
const CHANNELS: usize = 4;

/// Where the states of a mixer lie, the window and that of the scan; 0 where there is none.
pub(super) type Addresses = [u64; 2];

/// The launches of a mixer: those that read the norm, those between, and those that add to the stream. Mixers side by side read
/// before any adds.
type Stages = [Vec<Call>; 3];

/// What has not been visited yet.
pub(super) struct Rest<'a> {
    pub(super) states: std::slice::Iter<'a, Addresses>,
    /// Attentions that were.
    pub(super) attentions: usize,
}

impl Rest<'_> {
    fn state(&mut self) -> Addresses {
        self.states.next().copied().unwrap_or_default()
    }

    fn attention(&mut self) -> usize {
        self.attentions += 1;
        self.attentions - 1
    }
}

impl Scratch {
    /// `residual ← scale · embedding[ids]`, twice if blocks are shared.
    pub(super) fn embed(&self, stack: &Stack, ids: Pointer, positions: &[usize]) -> Result<Call> {
        let (vocabulary, width) = stack.embedding.dims2()?;
        let mut position = [0; MAX_BATCH];
        for (to, from) in position.iter_mut().zip(positions) {
            *to = int(OP, *from)?;
        }
        let args = EmbedArgs {
            ids,
            embedding: device::views(OP, [Some(&stack.embedding)], |_, [x]| Ok(x))?,
            out: self.stream().at.address,
            positions: self.positions.pointer().address,
            stride: self.stream().stride as i64,
            vocabulary: int(OP, vocabulary)?,
            width: int(OP, width)?,
            copies: int(OP, self.copies())?,
            scale: stack.embedding_scale as f32,
            position,
        };
        let launch =
            Launch { blocks: [width.div_ceil(THREADS), self.batch, 1], threads: [THREADS, 1], shared: 0 };
        let kernel = Kernel { module: &MODULE, name: "decoder_embed", dtype: None };
        Ok(Call::Kernel(kernel, launch, Args::Embed(args)))
    }

    /// `logits = head · norm_f(residual)`.
    pub(super) fn head(&self, gpu: &Gpu, stack: &Stack, logits: &Buffer) -> Result<Vec<Call>> {
        let logits = Rows::new(logits.pointer(), stack.head.outputs()?);
        let args = project(&stack.head, self.batch, self.stream(), logits)?;
        self.product(gpu, &stack.head, args.before(&stack.norm_f)?)
    }

    /// The launches of a layer.
    pub(super) fn layer(
        &self,
        gpu: &Gpu,
        layer: &Layer,
        tables: &Tables,
        rest: &mut Rest,
    ) -> Result<Vec<Call>> {
        let (mut calls, mut x) = (vec![], self.stream());
        if let (Some(shared), Some(scratch)) = (&layer.shared, &self.shared) {
            calls = self.shared(gpu, shared, scratch, tables, rest)?;
            x.at = scratch.sum.pointer();
        }
        let mut stages = [calls, vec![], vec![]];
        for ((_, mixer), slot) in layer.mixers.iter().zip(&self.slots) {
            let states = rest.state();
            let into = |product: &Product| -> Result<ProjectArgs> {
                let y = Rows::new(slot.projected.pointer(), stride(product.outputs()?));
                project(product, self.batch, x, y)?.before(&layer.norm)
            };
            let of_mixer = match mixer {
                Mixer::Mamba1(m) => self.mamba1(gpu, m, slot, into(&m.in_proj)?, states)?,
                Mixer::Mamba2(m) => self.mamba2(gpu, m, slot, into(&m.in_proj)?, states)?,
                Mixer::Attention(m) => {
                    let number = rest.attention();
                    let out = self.out(&m.out_proj, slot.inner())?;
                    self.attention(gpu, m, slot, [into(&m.qkv)?, out], states, tables, number)?
                }
                Mixer::Mlp(m) => {
                    let out = self.out(&m.down, slot.inner())?;
                    self.mlp(gpu, m, slot, into(&m.up)?, out)?
                }
                Mixer::ShortConv(m) => self.short_conv(gpu, m, slot, into(&m.in_proj)?, states)?,
            };
            for (stage, calls) in stages.iter_mut().zip(of_mixer) {
                stage.extend(calls);
            }
        }
        Ok(stages.into_iter().flatten().collect())
    }

    fn mamba1(
        &self,
        gpu: &Gpu,
        m: &Mamba1,
        slot: &Slot,
        into: ProjectArgs,
        [window, state]: Addresses,
    ) -> Result<Stages> {
        let ((d_inner, d_state), dt_rank) = (m.a.dims2()?, m.dt_proj.dim(1)?);
        let (xz, dbc) = (into.y_stride, stride(dt_rank + 2 * d_state));
        let projected = slot.projected.pointer();
        let into = ProjectArgs { rounded: slot.rounded(), ..into.convolved(&m.conv, window, 0)? };
        let convolved = match slot.rounded() {
            0 => Rows::new(projected, xz as usize),
            _ => Rows::new(slot.inner(), d_inner),
        };
        let coefficients = project(&m.x_proj, self.batch, convolved, Rows::new(self.dbc.pointer(), dbc))?;
        let (eps, norms) = match &m.dt_bc_norms {
            Some((eps, [dt, b, c])) => {
                (*eps, [address(dt.as_ref())?, address(b.as_ref())?, address(c.as_ref())?])
            }
            None => (0.0, [0; 3]),
        };
        let args = Mamba1Args {
            dt_proj: address(Some(&m.dt_proj))?,
            xz: projected.address,
            dbc: self.dbc.pointer().address,
            state,
            y: slot.y().address,
            rounded: slot.rounded(),
            dt_bias: address(Some(&m.dt_bias))?,
            a: address(Some(&m.a))?,
            d: address(Some(&m.d))?,
            norms,
            xz_stride: xz,
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
        let out = self.out(&m.out_proj, slot.inner())?;
        Ok([self.product(gpu, &m.in_proj, into)?, between, self.product(gpu, &m.out_proj, out)?])
    }

    fn mamba2(
        &self,
        gpu: &Gpu,
        m: &Mamba2,
        slot: &Slot,
        into: ProjectArgs,
        [window, state]: Addresses,
    ) -> Result<Stages> {
        let nheads = m.a.dims1()?;
        let (d_inner, bc) = (nheads * m.headdim, m.ngroups * m.d_state);
        let row = into.y_stride;
        let into = into.convolved(&m.conv, window, d_inner)?;
        let projected = |start: usize| slot.projected.pointer().offset(start, DType::F32).address;
        let y = if m.norm.is_some() { slot.y() } else { slot.inner() };
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
            stride: row,
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
                z: projected(0),
                z_stride: row,
                norm_groups: int(OP, m.ngroups)?,
                ..out.before(norm)?
            };
        }
        let update = Call::Kernel(kernel, launch, Args::Mamba2(args));
        Ok([self.product(gpu, &m.in_proj, into)?, vec![update], self.product(gpu, &m.out_proj, out)?])
    }

    #[expect(clippy::too_many_arguments, reason = "what it is made of, and where it stands")]
    fn attention(
        &self,
        gpu: &Gpu,
        m: &Attention,
        slot: &Slot,
        [mut into, out]: [ProjectArgs; 2],
        [window, _]: Addresses,
        tables: &Tables,
        number: usize,
    ) -> Result<Stages> {
        if let Some(conv) = &m.conv {
            into = into.convolved(conv, window, 0)?;
        }
        let qkv = Rows::new(slot.projected.pointer(), into.y_stride as usize);
        let y = Rows::new(slot.inner(), m.out_proj.inputs()?);
        let mut between = self.attend(gpu, m, tables, number, [qkv, y])?;
        if m.mlp > 0 {
            let width = m.nheads * m.headdim;
            let up = qkv.from(m.qkv.outputs()? - 2 * m.mlp, DType::F32);
            let gate = up.from(m.mlp, DType::F32);
            let y = y.from(width, self.dtype_of(y.at));
            between.push(self.gate([gate, up, y], m.mlp, MlpActivation::Silu, 1.0)?);
        }
        Ok([self.product(gpu, &m.qkv, into)?, between, self.product(gpu, &m.out_proj, out)?])
    }

    fn mlp(&self, gpu: &Gpu, m: &Mlp, slot: &Slot, into: ProjectArgs, out: ProjectArgs) -> Result<Stages> {
        let gate = self.mlp_gate(m, slot)?;
        Ok([self.product(gpu, &m.up, into)?, vec![gate], self.product(gpu, &m.down, out)?])
    }

    /// What is between the products of an MLP.
    fn mlp_gate(&self, m: &Mlp, slot: &Slot) -> Result<Call> {
        let hidden = m.down.inputs()?;
        let first = Rows::new(slot.projected.pointer(), stride(m.up.outputs()?));
        let second = first.from(hidden, DType::F32);
        let nothing = Rows::new(Pointer::NULL, first.stride);
        let [gate, up] = match m.layout {
            MlpLayout::Plain => [first, nothing],
            MlpLayout::GateUp => [first, second],
            MlpLayout::UpGate => [second, first],
        };
        self.gate([gate, up, Rows::new(slot.inner(), hidden)], hidden, m.activation, m.gate_scale)
    }

    /// `y = f(scale · gate) · up`.
    fn gate(
        &self,
        [gate, up, y]: [Rows; 3],
        count: usize,
        activation: MlpActivation,
        scale: f64,
    ) -> Result<Call> {
        let args = GateArgs {
            gate: gate.at.address,
            up: up.at.address,
            y: y.at,
            stride: gate.stride as i64,
            y_stride: y.stride as i64,
            count: int(OP, count)?,
            activation: match activation {
                MlpActivation::Silu => SILU,
                MlpActivation::Gelu => GELU,
                MlpActivation::GeluTanh => GELU_TANH,
                MlpActivation::Relu2 => RELU2,
            },
            scale: scale as f32,
            _end: 0,
        };
        let kernel = Kernel { module: &attention::MODULE, name: "decoder_gate", dtype: None };
        Ok(Call::Kernel(kernel, self.elementwise(count), Args::Gate(args)))
    }

    fn short_conv(
        &self,
        gpu: &Gpu,
        m: &ShortConv,
        slot: &Slot,
        into: ProjectArgs,
        [window, _]: Addresses,
    ) -> Result<Stages> {
        let channels = m.out_proj.inputs()?;
        let bcx = Rows::new(slot.projected.pointer(), into.y_stride as usize);
        let y = Rows::new(slot.inner(), channels);
        let args = project(&m.out_proj, self.batch, bcx, y)?.convolved(&m.conv, window, 0)?;
        let kernel = Kernel { module: &attention::MODULE, name: "decoder_short_conv", dtype: None };
        let conv = Call::Kernel(kernel, self.elementwise(channels), Args::Project(args));
        let out = self.out(&m.out_proj, slot.inner())?;
        Ok([self.product(gpu, &m.in_proj, into)?, vec![conv], self.product(gpu, &m.out_proj, out)?])
    }

    /// `sum ← stream + linear(mlp(norm2(attention(norm([stream | embedding])))))`.
    fn shared(
        &self,
        gpu: &Gpu,
        m: &Shared,
        scratch: &SharedScratch,
        tables: &Tables,
        rest: &mut Rest,
    ) -> Result<Vec<Call>> {
        let Some(slot) = self.slots.first() else { return Ok(vec![]) };
        let (states, number) = (rest.state(), rest.attention());
        let d_model = m.linear.dim(0)?;
        let attended = Rows::new(scratch.attended.pointer(), stride(d_model));
        let last = Rows::new(scratch.last.pointer(), stride(d_model));
        let projected = |product: &Product| -> Result<Rows> {
            Ok(Rows::new(slot.projected.pointer(), stride(product.outputs()?)))
        };

        let qkv = projected(&m.attention.qkv)?;
        let into = project(&m.attention.qkv, self.batch, self.stream(), qkv)?.before(&m.norm)?;
        let inner = Rows::new(slot.inner(), m.attention.out_proj.inputs()?);
        let out = project(&m.attention.out_proj, self.batch, inner, attended)?;
        let [mut calls, between, out] =
            self.attention(gpu, &m.attention, slot, [into, out], states, tables, number)?;
        if let Some(adapters) = &m.qkv_adapters {
            let x = project(&Product::of(vec![]), self.batch, self.stream(), qkv)?.before(&m.norm)?;
            calls.extend(self.adapters(gpu, adapters, scratch, x)?);
        }
        calls.extend(between.into_iter().chain(out));

        let up = projected(&m.mlp.up)?;
        let into = project(&m.mlp.up, self.batch, attended, up)?.before(&m.norm2)?;
        let inner = Rows::new(slot.inner(), m.mlp.down.inputs()?);
        let out = project(&m.mlp.down, self.batch, inner, last)?;
        let [into, between, out] = self.mlp(gpu, &m.mlp, slot, into, out)?;
        calls.extend(into);
        if let Some(adapter) = &m.mlp_adapter {
            let x = project(&Product::of(vec![]), self.batch, attended, up)?.before(&m.norm2)?;
            calls.extend(self.adapters(gpu, std::slice::from_ref(adapter), scratch, x)?);
        }
        calls.extend(between.into_iter().chain(out));

        let linear = Product::new(m.linear.clone());
        let sum = Rows::new(scratch.sum.pointer(), self.stream().stride);
        let args = project(&linear, self.batch, last, sum)?.added_to(self.stream().at.address);
        calls.extend(self.product(gpu, &linear, args)?);
        Ok(calls)
    }

    /// Adds what adapters of one rank give, of the input and to the output of `like`, whose outputs theirs are one after another.
    fn adapters(
        &self,
        gpu: &Gpu,
        adapters: &[LowRank],
        scratch: &SharedScratch,
        like: ProjectArgs,
    ) -> Result<Vec<Call>> {
        let down = Product::of(adapters.iter().map(|adapter| adapter.down.clone()).collect());
        let low = Rows::new(scratch.low.pointer(), stride(down.outputs()?));
        let args = project(&down, self.batch, Rows::new(Pointer::NULL, like.x_stride as usize), low)?;
        let args = ProjectArgs {
            x: like.x,
            before: like.before,
            norm_weight: like.norm_weight,
            norm_bias: like.norm_bias,
            eps: like.eps,
            ..args
        };
        let mut calls = self.product(gpu, &down, args)?;
        let (mut low, mut y) = (low, Rows::new(like.y, like.y_stride as usize));
        for adapter in adapters {
            let up = Product::new(adapter.up.clone());
            let args = project(&up, self.batch, low, y)?.added_to(y.at.address);
            calls.extend(self.product(gpu, &up, args)?);
            low = low.from(adapter.down.dim(0)?, self.dtype_of(low.at));
            y = y.from(adapter.up.dim(0)?, DType::F32);
        }
        Ok(calls)
    }

    /// `residual ← residual + y Wᵀ`.
    fn out(&self, product: &Product, y: Pointer) -> Result<ProjectArgs> {
        let stream = self.stream();
        let y = Rows::new(y, product.inputs()?);
        Ok(project(product, self.batch, y, stream)?.added_to(stream.at.address))
    }

    fn product(&self, gpu: &Gpu, product: &Product, args: ProjectArgs) -> Result<Vec<Call>> {
        launches(gpu, product, self.normed.as_ref(), args)
    }

    /// A thread for each channel of each sequence.
    fn elementwise(&self, channels: usize) -> Launch {
        Launch { blocks: [channels.div_ceil(THREADS), self.batch, 1], threads: [THREADS, 1], shared: 0 }
    }

    /// Of what is f32 or in the dtype of the weights.
    fn dtype_of(&self, x: Pointer) -> DType {
        if x.is_f32() { DType::F32 } else { self.dtype }
    }
}
