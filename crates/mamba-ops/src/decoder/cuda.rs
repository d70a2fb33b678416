//! The decoder on a GPU: buffers that are made once, what is launched for a token, and the graph of it.

mod arguments;
mod calls;

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};

use self::calls::{Call, Scratch};
use super::{Layer, MAX_BATCH, MAX_BATCH_F32, Mixer, OP, Stack, State, expect};
use crate::args::Checker;
use crate::device::{self, Gpu, Graph};
use crate::norm::NormKind;

/// The widest convolution that the kernels take.
const WIDEST: usize = 4;

pub(super) struct Decoder {
    stack: Arc<Stack>,
    batch: usize,
    gpu: Gpu,
    scratch: Scratch,
    /// Where the states of the token before lay.
    addresses: Vec<[u64; 2]>,
    /// What the layers launch for states that lie there.
    layers: Vec<Call>,
    /// The same as a graph, from the second token on.
    graph: Option<Graph>,
    captures: bool,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let captured = self.graph.is_some();
        f.debug_struct("Decoder")
            .field("batch", &self.batch)
            .field("captured", &captured)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    pub(super) fn new(stack: Stack, batch: usize) -> Result<Option<Self>> {
        let dtype = stack.embedding.dtype();
        let known = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        let most = if dtype == DType::F32 { MAX_BATCH_F32 } else { MAX_BATCH };
        if !known || !stack.embedding.device().is_cuda() || !(1..=most).contains(&batch) {
            return Ok(None);
        }
        let trained = check(&stack)?;
        if trained || !runs(&stack, batch)? {
            return Ok(None);
        }
        Self::of(Arc::new(prepared(&stack)?), batch).map(Some)
    }

    /// Another for as many sequences, with the same weights.
    pub(super) fn fork(&self) -> Result<Self> {
        Self::of(self.stack.clone(), self.batch)
    }

    fn of(stack: Arc<Stack>, batch: usize) -> Result<Self> {
        let gpu = Gpu::of(OP, &[Some(&stack.embedding)])?;
        let scratch = Scratch::new(&gpu, &stack, batch)?;
        let captures = std::env::var("MAMBA_CUDA_GRAPHS").map_or(true, |value| value != "0");
        Ok(Self { stack, batch, gpu, scratch, addresses: vec![], layers: vec![], graph: None, captures })
    }

    pub(super) fn step(&mut self, ids: &Tensor, states: &[State]) -> Result<Tensor> {
        expect("ids", ids, &[self.batch])?;
        if states.len() != self.stack.layers.len() {
            bail!("{OP}: got {} states, expected {}", states.len(), self.stack.layers.len());
        }
        self.check_places(ids, states)?;
        for (layer, state) in self.stack.layers.iter().zip(states) {
            check_state(layer, state, self.batch)?;
        }
        let addresses: Vec<_> = states.iter().map(|state| self.addresses_of(state)).collect::<Result<_>>()?;
        let settled = addresses == self.addresses;
        if !settled {
            let calls = self.stack.layers.iter().zip(&addresses);
            let calls = calls.map(|(layer, at)| self.scratch.layer(&self.gpu, layer, *at));
            self.layers = calls.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
            (self.graph, self.addresses) = (None, addresses);
        }
        let logits = self.gpu.buffer(self.stack.embedding.dtype(), self.batch * self.stack.head.dim(0)?)?;
        let head = self.scratch.head(&self.gpu, &self.stack, &logits)?;
        let ids = ids.contiguous()?;
        device::views(OP, [Some(&ids)], |gpu, [ids]| {
            self.scratch.embed(&self.stack, ids)?.launch(gpu)?;
            if settled && self.captures && self.graph.is_none() && !self.layers.is_empty() {
                self.graph = gpu.capture(|| self.layers.iter().try_for_each(|call| call.launch(gpu)))?;
                self.captures = self.graph.is_some();
            }
            match &mut self.graph {
                Some(graph) => graph.launch()?,
                None => self.layers.iter().try_for_each(|call| call.launch(gpu))?,
            }
            head.iter().try_for_each(|call| call.launch(gpu))
        })?;
        // On several streams, others wait for what was changed.
        states.iter().try_for_each(|state| self.addresses_of(state).map(drop))?;
        logits.tensor((self.batch, self.stack.head.dim(0)?))
    }

    /// Checks that everything is on the GPU of the weights, and ids are of a kind that the kernel reads.
    fn check_places(&self, ids: &Tensor, states: &[State]) -> Result<()> {
        if !matches!(ids.dtype(), DType::U32 | DType::I64 | DType::I32) {
            bail!("{OP}: `ids` has dtype {}, expected u32, i64 or i32", ids.dtype().as_str());
        }
        // As every op without a backward, it changes nothing that tracks.
        if states.iter().any(|state| state.conv.track_op() || state.ssm.track_op()) {
            bail!("{OP}: a state tracks gradients, expected detached tensors: this op has no backward");
        }
        let here = |x: &Tensor| x.device().same_device(self.stack.embedding.device());
        if !here(ids) || !states.iter().all(|state| here(state.conv) && here(state.ssm)) {
            bail!("{OP}: ids or states are not on the GPU of the weights");
        }
        Ok(())
    }

    fn addresses_of(&self, state: &State) -> Result<[u64; 2]> {
        let (conv, ssm) = (device::modify(OP, state.conv, Ok)?, device::modify(OP, state.ssm, Ok)?);
        if !ssm.is_multiple_of(16) {
            bail!("{OP}: `state.ssm` is a view that does not begin at a multiple of 16 bytes");
        }
        Ok([conv, ssm])
    }
}

/// Whether the kernels are for these sizes; the matrices are read 16 bytes at once.
fn runs(stack: &Stack, batch: usize) -> Result<bool> {
    let pack = 16 / stack.embedding.dtype().size_in_bytes();
    let gpu = Gpu::of(OP, &[Some(&stack.embedding)])?;
    let product = |weight: &Tensor| -> Result<bool> {
        let inputs = weight.dim(1)?;
        Ok(inputs % pack == 0 && inputs > 0 && Scratch::fits(&gpu, inputs, batch, weight.dtype()))
    };
    let mut runs = product(&stack.head)?;
    for layer in &stack.layers {
        runs &= match &layer.mixer {
            Mixer::Mamba1(m) => {
                product(&m.in_proj.weight)?
                    && product(&m.x_proj.weight)?
                    && product(&m.out_proj.weight)?
                    && (2..=WIDEST).contains(&m.conv.weight.dim(1)?)
                    && m.a.dim(1)? % 4 == 0
                    && Scratch::fits(&gpu, m.x_proj.weight.dim(0)?, 1, DType::F32)
            }
            Mixer::Mamba2(m) => {
                product(&m.in_proj.weight)?
                    && product(&m.out_proj.weight)?
                    && (2..=WIDEST).contains(&m.conv.weight.dim(1)?)
                    && m.d_state % 4 == 0
                    && m.out_proj.weight.dim(1)? % (4 * m.ngroups) == 0
            }
        };
    }
    Ok(runs)
}

/// Checks that the weights fit one another; whether some are trained, that is, may be others at the next token.
fn check(stack: &Stack) -> Result<bool> {
    let trained = Cell::new(false);
    let checker = Checker::new(OP, "embedding", &stack.embedding)?;
    let [_, d_model] = checker.main_dims(["vocabulary", "d_model"])?;
    trained.set(stack.embedding.track_op());
    let matrix = |name, x: &Tensor, outputs: usize, inputs: usize| {
        trained.set(trained.get() || x.track_op());
        checker.activation(name, x, &[("outputs", outputs), ("inputs", inputs)])
    };
    let table = |name, x: &Tensor, rows: usize, columns: usize| {
        trained.set(trained.get() || x.track_op());
        checker.parameter(name, x, &[("channels", rows), ("columns", columns)])
    };
    let vector = |name, x: &Tensor, len: usize| {
        trained.set(trained.get() || x.track_op());
        checker.parameter(name, x, &[("channels", len)])
    };
    let optional = |name, x: &Option<Tensor>, len: usize| x.iter().try_for_each(|x| vector(name, x, len));
    let norm = |norm: &super::Norm, len: usize| {
        vector("norm.weight", &norm.weight, len)?;
        optional("norm.bias", &norm.bias, len)
    };
    let product = |name, product: &super::Product, outputs: usize, inputs: usize| {
        matrix(name, &product.weight, outputs, inputs)?;
        optional(name, &product.bias, outputs)
    };
    let conv = |conv: &super::Conv, channels: usize| {
        table("conv.weight", &conv.weight, channels, conv.weight.dim(1)?)?;
        optional("conv.bias", &conv.bias, channels)
    };
    for layer in &stack.layers {
        norm(&layer.norm, d_model)?;
        match &layer.mixer {
            Mixer::Mamba1(m) => {
                let ((d_inner, d_state), dt_rank) = (m.a.dims2()?, m.dt_proj.dim(1)?);
                table("a", &m.a, d_inner, d_state)?;
                product("in_proj", &m.in_proj, 2 * d_inner, d_model)?;
                conv(&m.conv, d_inner)?;
                product("x_proj", &m.x_proj, dt_rank + 2 * d_state, d_inner)?;
                matrix("dt_proj", &m.dt_proj, d_inner, dt_rank)?;
                for (weights, len) in
                    m.dt_bc_norms.iter().map(|(_, weights)| (weights, [dt_rank, d_state, d_state]))
                {
                    weights.iter().zip(len).try_for_each(|(x, len)| optional("dt_bc_norms", x, len))?;
                }
                vector("dt_bias", &m.dt_bias, d_inner)?;
                vector("d", &m.d, d_inner)?;
                product("out_proj", &m.out_proj, d_model, d_inner)?;
            }
            Mixer::Mamba2(m) => {
                let nheads = m.a.dims1()?;
                let (d_inner, bc) = (nheads * m.headdim, m.ngroups * m.d_state);
                if m.ngroups == 0 || nheads % m.ngroups != 0 {
                    bail!("{OP}: `ngroups` is {}, expected a divisor of {nheads} heads", m.ngroups);
                }
                product("in_proj", &m.in_proj, 2 * d_inner + 2 * bc + nheads, d_model)?;
                conv(&m.conv, d_inner + 2 * bc)?;
                vector("a", &m.a, nheads)?;
                vector("dt_bias", &m.dt_bias, nheads)?;
                checker.dt_limit(m.dt_limit)?;
                if m.norm.as_ref().is_some_and(|norm| norm.kind != NormKind::Rms) {
                    bail!("{OP}: `norm` of Mamba-2 is a layer norm, expected an RMSNorm");
                }
                vector("d", &m.d, if m.d.elem_count() == nheads { nheads } else { d_inner })?;
                m.norm.iter().try_for_each(|n| norm(n, d_inner))?;
                product("out_proj", &m.out_proj, d_model, d_inner)?;
            }
        }
    }
    norm(&stack.norm_f, d_model)?;
    matrix("head", &stack.head, stack.head.dim(0)?, d_model)?;
    Ok(trained.get())
}

fn check_state(layer: &Layer, state: &State, batch: usize) -> Result<()> {
    match &layer.mixer {
        Mixer::Mamba1(m) => {
            let (channels, width) = m.conv.weight.dims2()?;
            expect("state.conv", state.conv, &[batch, channels, width - 1])?;
            expect("state.ssm", state.ssm, &[batch, channels, m.a.dim(1)?])
        }
        Mixer::Mamba2(m) => {
            let (channels, width) = m.conv.weight.dims2()?;
            expect("state.conv", state.conv, &[batch, channels, width - 1])?;
            expect("state.ssm", state.ssm, &[batch, m.a.dim(0)?, m.headdim, m.d_state])
        }
    }
}

/// The same weights as the kernels read them: matrices at addresses of 16 bytes, everything else in f32; what is so already is
/// shared.
fn prepared(stack: &Stack) -> Result<Stack> {
    let aligned = |x: &Tensor| -> Result<Tensor> {
        let x = x.contiguous()?;
        let address = device::views(OP, [Some(&x)], |_, [x]| Ok(x.address))?;
        if address.is_multiple_of(16) { Ok(x) } else { x.copy() }
    };
    let vector = |x: &Tensor| aligned(&x.to_dtype(DType::F32)?);
    let some = |x: &Option<Tensor>| x.as_ref().map(vector).transpose();
    let norm = |n: &super::Norm| -> Result<super::Norm> {
        Ok(super::Norm { weight: vector(&n.weight)?, bias: some(&n.bias)?, ..n.clone() })
    };
    let product = |p: &super::Product| -> Result<super::Product> {
        Ok(super::Product { weight: aligned(&p.weight)?, bias: some(&p.bias)? })
    };
    let conv = |c: &super::Conv| -> Result<super::Conv> {
        Ok(super::Conv { weight: vector(&c.weight)?, bias: some(&c.bias)? })
    };
    let layer = |layer: &Layer| -> Result<Layer> {
        let mixer = match &layer.mixer {
            Mixer::Mamba1(m) => Mixer::Mamba1(super::Mamba1 {
                in_proj: product(&m.in_proj)?,
                conv: conv(&m.conv)?,
                x_proj: product(&m.x_proj)?,
                dt_bc_norms: match &m.dt_bc_norms {
                    Some((eps, [dt, b, c])) => Some((*eps, [some(dt)?, some(b)?, some(c)?])),
                    None => None,
                },
                dt_proj: aligned(&m.dt_proj)?,
                dt_bias: vector(&m.dt_bias)?,
                a: vector(&m.a)?,
                d: vector(&m.d)?,
                out_proj: product(&m.out_proj)?,
            }),
            Mixer::Mamba2(m) => Mixer::Mamba2(super::Mamba2 {
                in_proj: product(&m.in_proj)?,
                conv: conv(&m.conv)?,
                dt_bias: vector(&m.dt_bias)?,
                a: vector(&m.a)?,
                d: vector(&m.d)?,
                norm: m.norm.as_ref().map(norm).transpose()?,
                out_proj: product(&m.out_proj)?,
                ..m.clone()
            }),
        };
        Ok(Layer { norm: norm(&layer.norm)?, mixer })
    };
    Ok(Stack {
        embedding: aligned(&stack.embedding)?,
        layers: stack.layers.iter().map(layer).collect::<Result<_>>()?,
        norm_f: norm(&stack.norm_f)?,
        head: aligned(&stack.head)?,
    })
}
