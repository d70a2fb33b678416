//! The models of this workspace as language models to generate from.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use mamba_model::{InferenceCache, Model};
use mamba_ops::{Draw, NO_TOKEN, Sample, sample};

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

    fn draws(&self) -> bool {
        !self.device().is_cpu()
    }

    fn step_and_draw(
        &self,
        id: u32,
        cache: &mut InferenceCache,
        draw: &Draw,
        logits: &mut Vec<f32>,
    ) -> Result<Option<u32>, BoxError> {
        let drawn = self.step_batch_and_draw(&[id], cache, &[*draw], logits)?;
        Ok(drawn.first().copied().flatten())
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

    fn step_batch_and_draw(
        &self,
        ids: &[u32],
        cache: &mut InferenceCache,
        draws: &[Draw],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Option<u32>>, BoxError> {
        let ids = Tensor::from_slice(ids, ids.len(), self.device())?;
        let all = Model::step(self, &ids, cache)?;
        // All that comes back from a GPU, unless something is wrong.
        let drawn = sample(&Sample::new(&all, draws))?.to_vec1::<u32>()?;
        let drawn: Vec<_> = drawn.into_iter().map(|id| (id != NO_TOKEN).then_some(id)).collect();
        if drawn.contains(&None) {
            read(&all, logits)?;
        }
        Ok(drawn)
    }

    fn concat(&self, caches: &[&InferenceCache]) -> Result<InferenceCache, BoxError> {
        Ok(InferenceCache::concat(caches)?)
    }

    fn select(&self, cache: &InferenceCache, rows: &[usize]) -> Result<InferenceCache, BoxError> {
        Ok(cache.select(rows)?)
    }
}

/// All logits of a tensor, in order; what is in CPU memory is copied once, into the memory that is kept.
fn read(tensor: &Tensor, logits: &mut Vec<f32>) -> Result<(), BoxError> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    logits.resize(tensor.elem_count(), 0.0);
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(x)), Some((start, end))) => logits.copy_from_slice(&x[start..end]),
        (Storage::Cpu(CpuStorage::F16(x)), Some((start, end))) => x[start..end].convert_to_f32_slice(logits),
        (Storage::Cpu(CpuStorage::BF16(x)), Some((start, end))) => x[start..end].convert_to_f32_slice(logits),
        _ => logits.copy_from_slice(&tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?),
    }
    Ok(())
}
