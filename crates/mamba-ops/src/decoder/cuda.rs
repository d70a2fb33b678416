//! The decoder on a GPU: buffers that are made once, what is launched for a token, and the graph of it.

mod arguments;
mod attention;
mod calls;
mod mixers;
mod products;
mod scratch;
mod sizes;
mod tables;

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, bail};

use self::calls::Call;
use self::mixers::{Addresses, Rest};
use self::scratch::Scratch;
use self::tables::Tables;
use super::check::check;
use super::prepared::prepared;
use super::states::{attentions, check_states};
use super::{Attention, KeysValues, MAX_BATCH, MAX_BATCH_F32, OP, Stack, State, expect};
use crate::device::{self, Gpu, Graph};

pub(super) struct Decoder {
    stack: Arc<Stack>,
    batch: usize,
    gpu: Gpu,
    scratch: Scratch,
    /// Where keys and values lie.
    tables: Tables,
    /// Where the states of the token before lay.
    addresses: Vec<Addresses>,
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
        if trained || !sizes::runs(&stack, batch)? {
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
        let tables = Tables::new(&gpu, attentions(&stack).len(), batch)?;
        let captures = std::env::var("MAMBA_CUDA_GRAPHS").map_or(true, |value| value != "0");
        Ok(Self {
            stack,
            batch,
            gpu,
            scratch,
            tables,
            addresses: vec![],
            layers: vec![],
            graph: None,
            captures,
        })
    }

    pub(super) fn step(&mut self, ids: &Tensor, positions: &[usize], states: &[State]) -> Result<Tensor> {
        expect("ids", ids, &[self.batch])?;
        if positions.len() != self.batch {
            bail!("{OP}: got {} positions, expected {}", positions.len(), self.batch);
        }
        self.check_places(ids, states)?;
        let attentions = check_states(&self.stack, states, self.batch)?;
        let addresses: Vec<_> = states.iter().map(addresses_of).collect::<Result<_>>()?;
        touch(&self.gpu, &attentions)?;
        let moved = self.tables.update(&self.gpu, positions, &attentions, self.stack.embedding.dtype())?;
        let settled = !moved && addresses == self.addresses;
        if !settled {
            let mut rest = Rest { states: addresses.iter(), attentions: 0 };
            self.layers.clear();
            for layer in &self.stack.layers {
                self.layers.extend(self.scratch.layer(&self.gpu, layer, &self.tables, &mut rest)?);
            }
            (self.graph, self.addresses) = (None, addresses);
        }
        let outputs = self.stack.head.outputs()?;
        let logits = self.gpu.buffer(self.stack.embedding.dtype(), self.batch * outputs)?;
        let head = self.scratch.head(&self.gpu, &self.stack, &logits)?;
        let ids = ids.contiguous()?;
        device::views(OP, [Some(&ids)], |gpu, [ids]| {
            self.scratch.embed(&self.stack, ids, positions)?.launch(gpu)?;
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
        states.iter().try_for_each(|state| addresses_of(state).map(drop))?;
        touch(&self.gpu, &attentions)?;
        logits.tensor((self.batch, outputs))
    }

    /// Checks that everything is on the GPU of the weights, and ids are of a kind that the kernel reads.
    fn check_places(&self, ids: &Tensor, states: &[State]) -> Result<()> {
        if !matches!(ids.dtype(), DType::U32 | DType::I64 | DType::I32) {
            bail!("{OP}: `ids` has dtype {}, expected u32, i64 or i32", ids.dtype().as_str());
        }
        // As every op without a backward, it changes nothing that tracks.
        let parts = || states.iter().flat_map(|state| state.conv.into_iter().chain(state.ssm));
        if parts().any(Tensor::track_op) {
            bail!("{OP}: a state tracks gradients, expected detached tensors: this op has no backward");
        }
        let here = |x: &Tensor| x.device().same_device(self.stack.embedding.device());
        let blocks = || states.iter().flat_map(|state| &state.kv).flat_map(|kv| kv.blocks.iter().flatten());
        if !here(ids) || !parts().all(here) || !blocks().all(|x| here(x)) {
            bail!("{OP}: ids or states are not on the GPU of the weights");
        }
        Ok(())
    }
}

fn addresses_of(state: &State) -> Result<Addresses> {
    let address = |x: Option<&Tensor>| x.map_or(Ok(0), |x| device::modify(OP, x, Ok));
    let (conv, ssm) = (address(state.conv)?, address(state.ssm)?);
    if !ssm.is_multiple_of(16) {
        bail!("{OP}: `state.ssm` is a view that does not begin at a multiple of 16 bytes");
    }
    Ok([conv, ssm])
}

/// Says that blocks of keys and values are used here, where other streams may use them too: the last one is written.
fn touch(gpu: &Gpu, attentions: &[(&Attention, &[KeysValues])]) -> Result<()> {
    if gpu.has_several_streams() {
        let rows = attentions.iter().flat_map(|(_, rows)| *rows);
        for x in rows.flat_map(|kv| kv.blocks.iter().flatten()) {
            device::modify_any(OP, x, |_| Ok(()))?;
        }
    }
    Ok(())
}
