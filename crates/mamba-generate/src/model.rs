//! The models of this workspace as language models to generate from.

use candle_core::{DType, Tensor};
use mamba_model::{InferenceCache, Model};

use crate::error::BoxError;
use crate::lm::CausalLm;

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
        let last = Model::prefill(self, &ids, cache)?.squeeze(0)?.to_dtype(DType::F32)?;
        logits.clear();
        logits.extend(last.to_vec1::<f32>()?);
        Ok(())
    }

    fn step(&self, id: u32, cache: &mut InferenceCache, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        CausalLm::prefill(self, &[id], cache, logits)
    }
}
