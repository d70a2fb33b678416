//! The models of this workspace as language models to generate from.

use candle_core::{DType, Tensor};
use mamba_model::{InferenceCache, Model};

use crate::error::BoxError;
use crate::lm::{BatchLm, CausalLm, StateLm};

/// One sequence at a time; the cache is an [`InferenceCache`] for a batch of one.
impl CausalLm for Model {
    type Cache = InferenceCache;

    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn new_cache(&self) -> Result<InferenceCache, BoxError> {
        Ok(Model::new_cache(self, 1)?)
    }

    fn prefill(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        logits: &mut Vec<f32>,
    ) -> Result<(), BoxError> {
        let ids = Tensor::from_slice(ids, (1, ids.len()), self.device())?;
        read(&Model::prefill(self, &ids, cache)?, logits)
    }

    fn step(&self, id: u32, cache: &mut InferenceCache, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        let id = Tensor::from_slice(&[id], 1, self.device())?;
        read(&Model::step(self, &id, cache)?, logits)
    }

    fn forward(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        logits: &mut Vec<f32>,
    ) -> Result<(), BoxError> {
        let ids = Tensor::from_slice(ids, (1, ids.len()), self.device())?;
        read(&Model::forward(self, &ids, Some(cache))?, logits)
    }
}

impl StateLm for Model {
    fn fork(&self, cache: &InferenceCache) -> Result<InferenceCache, BoxError> {
        Ok(cache.fork()?)
    }

    fn cache_bytes(&self, cache: &InferenceCache) -> usize {
        cache.bytes()
    }

    fn shared_memory(&self, cache: &InferenceCache) -> Vec<(usize, usize)> {
        cache.shared_blocks()
    }

    fn fingerprint(&self) -> Result<String, BoxError> {
        Ok(Model::fingerprint(self)?)
    }

    fn save_cache(&self, cache: &InferenceCache) -> Result<Vec<u8>, BoxError> {
        Ok(cache.to_bytes()?)
    }

    fn load_cache(&self, bytes: &[u8]) -> Result<InferenceCache, BoxError> {
        Ok(InferenceCache::from_bytes(bytes, self.config(), self.device())?)
    }
}

impl BatchLm for Model {
    fn step_batch(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        logits: &mut Vec<f32>,
    ) -> Result<(), BoxError> {
        let ids = Tensor::from_slice(ids, ids.len(), self.device())?;
        read(&Model::step(self, &ids, cache)?, logits)
    }

    fn concat(&self, caches: &[&InferenceCache]) -> Result<InferenceCache, BoxError> {
        Ok(InferenceCache::concat(caches)?)
    }

    fn select(&self, cache: &InferenceCache, rows: &[usize]) -> Result<InferenceCache, BoxError> {
        Ok(cache.select(rows)?)
    }
}

/// All logits of a tensor, in order.
fn read(tensor: &Tensor, logits: &mut Vec<f32>) -> Result<(), BoxError> {
    logits.clear();
    logits.extend(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?);
    Ok(())
}
