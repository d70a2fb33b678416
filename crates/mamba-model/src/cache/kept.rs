//! The decoder that a cache keeps.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use mamba_ops::decoder::{Decoder, State};

use super::{InferenceCache, KvCache, MixerState};
use crate::Result;

/// What reads single tokens, for the model that last did.
#[derive(Debug)]
pub(super) struct KeptDecoder {
    model: Arc<()>,
    /// None if that model has none.
    decoder: Option<Decoder>,
}

impl KeptDecoder {
    pub(super) fn fork(&self) -> Result<Self> {
        let decoder = self.decoder.as_ref().map(Decoder::fork).transpose()?;
        Ok(Self { model: self.model.clone(), decoder })
    }
}

impl InferenceCache {
    /// Reads a token of each sequence through the decoder of a model, which `make` makes; none if it has none, or if keys and values
    /// lie as it does not take them. `dtype` is that of the model.
    pub(crate) fn decode(
        &mut self,
        model: &Arc<()>,
        make: impl FnOnce(usize) -> Result<Option<Decoder>>,
        ids: &Tensor,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        let batch = self.batch();
        let kept = match self.decoder.take().filter(|kept| Arc::ptr_eq(&kept.model, model)) {
            Some(kept) => kept,
            None => KeptDecoder { model: model.clone(), decoder: make(batch)? },
        };
        let Some(decoder) = &mut self.decoder.insert(kept).decoder else { return Ok(None) };
        for kv in self.states.iter_mut().flat_map(|state| state.kv.iter_mut().flatten()) {
            if !kv.reserve(dtype, ids.device())? {
                return Ok(None);
            }
        }
        let states: Vec<State> = self.states.iter().map(state).collect();
        let logits = decoder.step(ids, &self.positions, &states)?;
        self.states.iter_mut().flat_map(|state| state.kv.iter_mut().flatten()).for_each(KvCache::grow);
        Ok(Some(logits))
    }
}

/// What a mixer remembers, for a decoder.
fn state(state: &MixerState) -> State<'_> {
    State {
        conv: state.conv.as_ref(),
        ssm: state.ssm.as_ref(),
        kv: state.kv.iter().flatten().map(KvCache::keys_values).collect(),
    }
}
