//! The decoder in CPU memory: buffers that are made once, and what is computed of a token.
//!
//! Everything that is done to an output of a product alone is done where the product ends, on the thread that has just written it: bias
//! and scales, the step of the convolution, the step of the state of Mamba-1 with its gate, the sum with the stream.

mod attention;
mod gates;
mod mamba;
mod products;
mod scratch;
mod shared;

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Result, Storage, Tensor, bail};

use self::products::{Rows, Run};
use self::scratch::{Scratch, Work};
use super::check::check;
use super::prepared::prepared;
use super::states::check_states;
use super::{Layer, MAX_BATCH, Mixer, OP, Product, Stack, State, expect};
use crate::host::{SharedMut, Values, copied, on_threads, stored};
use crate::simd::Isa;

pub(super) struct Decoder {
    stack: Arc<Stack>,
    batch: usize,
    /// Made with the first token: forks that never read one are free.
    scratch: Option<Scratch>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("batch", &self.batch).finish_non_exhaustive()
    }
}

impl Decoder {
    pub(super) fn new(stack: &Stack, batch: usize) -> Result<Option<Self>> {
        let known = matches!(stack.embedding.dtype(), DType::F32 | DType::F16 | DType::BF16);
        if !known || !stack.embedding.device().is_cpu() || !(1..=MAX_BATCH).contains(&batch) || check(stack)?
        {
            return Ok(None);
        }
        Ok(Some(Self { stack: Arc::new(prepared(stack)?), batch, scratch: None }))
    }

    /// Another for as many sequences, with the same weights.
    pub(super) fn fork(&self) -> Self {
        Self { stack: self.stack.clone(), batch: self.batch, scratch: None }
    }

    pub(super) fn step(&mut self, ids: &Tensor, positions: &[usize], states: &[State]) -> Result<Tensor> {
        let Self { stack, batch, scratch } = self;
        expect("ids", ids, &[*batch])?;
        if positions.len() != *batch {
            bail!("{OP}: got {} positions, expected {batch}", positions.len());
        }
        let parts = || states.iter().flat_map(|state| state.conv.into_iter().chain(state.ssm));
        if parts().any(Tensor::track_op) {
            bail!("{OP}: a state tracks gradients, expected detached tensors: this op has no backward");
        }
        for (attention, rows) in check_states(stack, states, *batch)? {
            attention::check(attention, rows, positions, stack.embedding.dtype())?;
        }
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => scratch.insert(Scratch::new(stack, *batch)?),
        };
        read_ids(ids, &mut scratch.ids)?;
        let run = Run { isa: Isa::current(), batch: *batch };
        on_threads(|| token(run, stack, scratch, positions, states))?;
        copied(&scratch.logits, (*batch, stack.head.outputs()?), stack.embedding.dtype())
    }
}

/// The ids as they are, whether or not there are such rows of the embedding.
fn read_ids(ids: &Tensor, out: &mut [usize]) -> Result<()> {
    let (storage, layout) = ids.storage_and_layout();
    let (start, step) = (layout.start_offset(), layout.stride()[0]);
    let at = |i: usize| start + i * step;
    for (i, out) in out.iter_mut().enumerate() {
        *out = match &*storage {
            Storage::Cpu(CpuStorage::U32(ids)) => ids[at(i)] as usize,
            Storage::Cpu(CpuStorage::I64(ids)) => usize::try_from(ids[at(i)]).unwrap_or(usize::MAX),
            Storage::Cpu(CpuStorage::I32(ids)) => usize::try_from(ids[at(i)]).unwrap_or(usize::MAX),
            Storage::Cpu(_) => {
                bail!("{OP}: `ids` has dtype {}, expected u32, i64 or i32", ids.dtype().as_str())
            }
            _ => bail!("{OP}: ids are not in CPU memory"),
        };
    }
    Ok(())
}

/// From ids to logits.
fn token(
    run: Run,
    stack: &Stack,
    scratch: &mut Scratch,
    positions: &[usize],
    states: &[State],
) -> Result<()> {
    let d_model = stack.embedding.dim(1)?;
    embed(stack, scratch)?;
    if let Some(shared) = &mut scratch.shared {
        shared.embedding.copy_from_slice(&scratch.stream);
    }
    let mut states = states.iter();
    for layer in &stack.layers {
        run_layer(run, layer, scratch, positions, &mut states)?;
    }
    let Scratch { stream, normed, work, logits, .. } = scratch;
    run.norm(&stack.norm_f, Rows::new(stream, d_model), d_model, normed)?;
    let outputs = stack.head.outputs()?;
    let logits = SharedMut::new(logits);
    run.product(&stack.head, Rows::new(normed, d_model), &mut work.arranged, (&logits, outputs), |_, _| {})
}

/// `stream ← scale · embedding[ids]`, NaN for ids that there are none of.
fn embed(stack: &Stack, scratch: &mut Scratch) -> Result<()> {
    let (vocabulary, d_model) = stack.embedding.dims2()?;
    let scale = stack.embedding_scale as f32;
    let table = stored(&stack.embedding);
    let Some(table) = table.as_ref().and_then(|table| table.values()) else {
        bail!("{OP}: `embedding` cannot be read")
    };
    for (id, row) in scratch.ids.iter().zip(scratch.stream.chunks_exact_mut(d_model)) {
        if *id >= vocabulary {
            row.fill(f32::NAN);
            continue;
        }
        let range = id * d_model..(id + 1) * d_model;
        match table {
            Values::F32(x) => row.iter_mut().zip(&x[range]).for_each(|(y, x)| *y = scale * x),
            Values::F16(x) => row.iter_mut().zip(&x[range]).for_each(|(y, x)| *y = scale * x.to_f32()),
            Values::BF16(x) => row.iter_mut().zip(&x[range]).for_each(|(y, x)| *y = scale * x.to_f32()),
        }
    }
    Ok(())
}

/// `stream ← stream + Σ mixer(norm(x))`, with `x` the stream, or the stream and what a shared block gives.
fn run_layer<'a>(
    run: Run,
    layer: &Layer,
    scratch: &mut Scratch,
    positions: &[usize],
    states: &mut impl Iterator<Item = &'a State<'a>>,
) -> Result<()> {
    let Scratch { stream, normed, work, shared, .. } = scratch;
    let d_model = stream.len() / run.batch;
    match (&layer.shared, shared) {
        (Some(block), Some(buffers)) => {
            let state = next(states)?;
            shared::sum(run, block, stream, normed, work, buffers, positions, state)?;
            run.norm(&layer.norm, Rows::new(&buffers.sum, d_model), d_model, normed)?;
        }
        _ => run.norm(&layer.norm, Rows::new(stream, d_model), d_model, normed)?,
    }
    for (_, mixer) in &layer.mixers {
        let state = next(states)?;
        let out = before_last(run, mixer, Rows::new(normed, d_model), work, positions, state)?;
        let Work { arranged, inner, out: y, .. } = &mut *work;
        run.add(out, Rows::new(inner, out.inputs()?), arranged, y, stream)?;
    }
    Ok(())
}

/// What is there in `work.inner` before the last product of a mixer, and that product.
fn before_last<'a>(
    run: Run,
    mixer: &'a Mixer,
    x: Rows,
    work: &mut Work,
    positions: &[usize],
    state: &State,
) -> Result<&'a Product> {
    match mixer {
        Mixer::Mamba1(m) => mamba::mamba1(run, m, x, work, state).map(|()| &m.out_proj),
        Mixer::Mamba2(m) => mamba::mamba2(run, m, x, work, state).map(|()| &m.out_proj),
        Mixer::Attention(m) => {
            attention::attend(run, m, None, x, work, positions, state).map(|()| &m.out_proj)
        }
        Mixer::Mlp(m) => gates::mlp(run, m, None, x, work).map(|()| &m.down),
        Mixer::ShortConv(m) => gates::short_conv(run, m, x, work, state).map(|()| &m.out_proj),
    }
}

fn next<'a>(states: &mut impl Iterator<Item = &'a State<'a>>) -> Result<&'a State<'a>> {
    states.next().map_or_else(|| bail!("{OP}: a state is missing"), Ok)
}
