//! What a model remembers of the tokens it has read: per mixer a window of inputs, a state in `f32`, keys and values.

mod bytes;
mod kept;
mod kv;
mod rows;
mod state;

use candle_core::{DType, Device};

use self::kept::KeptDecoder;
use crate::batch::Sequences;
use crate::config::{ModelConfig, SharedBlockUse};
use crate::{Error, Result};

pub(crate) use kv::KvCache;
pub(crate) use state::{MixerState, StateShape};

/// The state of a model after some tokens, for a batch of sequences.
///
/// What state space mixers remember does not grow with the number of tokens read; attention keeps keys and values of
/// each, in blocks that are not moved when there are more. Steps change it in place, so it is no `Clone`:
/// [`fork`](Self::fork) says that the numbers are copied (keys and values are shared, and copied where two write behind them).
/// A cache that has taken steps keeps what took them, and with it the weights of the model.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_model::{InferenceCache, Model};
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let mut cache = model.new_cache(1)?;
/// model.prefill(&Tensor::new(&[[3u32, 1, 4]], &Device::Cpu)?, &mut cache)?;
/// let mut other = cache.fork()?; // both go on from the same three tokens
/// model.step(&Tensor::new(&[1u32], &Device::Cpu)?, &mut cache)?;
/// model.step(&Tensor::new(&[5u32], &Device::Cpu)?, &mut other)?;
/// assert_eq!((cache.position(), other.position()), (4, 4));
/// // Two layers, each with 32 channels of 16 states and a window of 3 inputs.
/// assert_eq!(cache.bytes(), 2 * 32 * (16 + 3) * 4);
/// # Ok::<_, mamba_model::Error>(())
/// ```
#[derive(Debug)]
pub struct InferenceCache {
    states: Vec<MixerState>,
    positions: Vec<usize>,
    fingerprint: String,
    /// What read the last tokens, one at a time.
    decoder: Option<KeptDecoder>,
}

impl InferenceCache {
    /// The state before the first token.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new(config: &ModelConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let states = shapes(config).into_iter().map(|shape| MixerState::new(&shape, batch, dtype, device));
        Ok(Self::of(states.collect::<Result<_>>()?, vec![0; batch], fingerprint(config)))
    }

    fn of(states: Vec<MixerState>, positions: Vec<usize>, fingerprint: String) -> Self {
        Self { states, positions, fingerprint, decoder: None }
    }

    /// Sequences of the batch.
    pub fn batch(&self) -> usize {
        self.positions.len()
    }

    /// Tokens that the longest sequence has read; all have read as many if no input was padded.
    pub fn position(&self) -> usize {
        self.positions.iter().copied().max().unwrap_or(0)
    }

    /// Tokens that each sequence has read.
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Memory of the states, in bytes, as if they were alone: keys and values that forks share count in each of them. What
    /// several caches take together follows from [`shared_blocks`](Self::shared_blocks).
    pub fn bytes(&self) -> usize {
        self.states.iter().map(MixerState::bytes).sum()
    }

    /// What of its memory a cache may share with its forks: blocks of keys and values, each by a number that no other block
    /// has as long as this cache holds it, and its bytes.
    ///
    /// # Example
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use mamba_model::{Model, config::{AttentionConfig, MixerSpec, ModelConfig}};
    ///
    /// let attention = MixerSpec::Attention(AttentionConfig::new(2, 1, 8));
    /// let model = Model::random(&ModelConfig::uniform(50, 16, 1, attention), 0, &Device::Cpu)?;
    /// let mut cache = model.new_cache(1)?;
    /// model.prefill(&Tensor::new(&[[3u32, 1, 4]], &Device::Cpu)?, &mut cache)?;
    /// let mut fork = cache.fork()?;
    /// assert_eq!(cache.shared_blocks(), fork.shared_blocks());
    /// assert_eq!(cache.shared_blocks()[0].1, cache.bytes());
    /// // The first to go on writes behind what both see, the other one into a copy.
    /// for cache in [&mut cache, &mut fork] {
    ///     model.step(&Tensor::new(&[5u32], &Device::Cpu)?, cache)?;
    /// }
    /// assert_ne!(cache.shared_blocks(), fork.shared_blocks());
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn shared_blocks(&self) -> Vec<(usize, usize)> {
        let rows = self.states.iter().flat_map(|state| state.kv.iter().flatten());
        rows.flat_map(KvCache::shared_blocks).collect()
    }

    /// Forgets every token, keeping the memory of what does not grow.
    ///
    /// # Errors
    /// If candle refuses.
    pub fn reset(&mut self) -> Result<()> {
        self.positions.fill(0);
        self.states.iter_mut().try_for_each(MixerState::reset)
    }

    /// A copy that goes its own way from here.
    ///
    /// It costs as much as the states of the state space mixers, however many tokens were read. If it is given up again, as one that has
    /// read wrong guesses, nothing of keys and values was copied or need be.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn fork(&self) -> Result<Self> {
        let states = self.states.iter().map(MixerState::fork).collect::<Result<_>>()?;
        let decoder = self.decoder.as_ref().map(KeptDecoder::fork).transpose()?;
        Ok(Self { decoder, ..Self::of(states, self.positions.clone(), self.fingerprint.clone()) })
    }

    /// Checks that the cache fits a model and what it is to read, and says where its sequences are.
    pub(crate) fn check(&self, fingerprint: &str, sequences: &mut Sequences) -> Result<()> {
        if self.fingerprint != fingerprint {
            return Err(Error::Cache("belongs to a model of other sizes".into()));
        }
        let (got, expected) = (self.batch(), sequences.count());
        if got != expected {
            return Err(Error::Cache(format!("holds {got} sequences, the input has {expected}")));
        }
        sequences.positions.clone_from(&self.positions);
        Ok(())
    }

    pub(crate) fn states_mut(&mut self) -> impl Iterator<Item = &mut MixerState> {
        self.states.iter_mut()
    }

    pub(crate) fn advance(&mut self, sequences: &Sequences) {
        for (position, len) in self.positions.iter_mut().zip(&sequences.lengths) {
            *position += len;
        }
    }
}

/// What each mixer remembers, in the order in which the model runs them.
fn shapes(config: &ModelConfig) -> Vec<StateShape> {
    let mut shapes = vec![];
    for layer in &config.layers {
        if let Some(SharedBlockUse { block, .. }) = layer.shared
            && let Some(block) = config.shared_blocks.get(block)
        {
            shapes.push(StateShape::of_attention(&block.attention));
        }
        let mixers = layer.branches.iter().flat_map(|branch| &branch.mixers);
        shapes.extend(mixers.map(|(_, mixer)| StateShape::of(mixer, config.d_model)));
    }
    shapes
}

/// The sizes that a state belongs to.
pub(crate) fn fingerprint(config: &ModelConfig) -> String {
    let shapes: Vec<String> = shapes(config).iter().map(|shape| format!("{shape:?}")).collect();
    format!("d_model {} vocab {} states {}", config.d_model, config.vocab_size, shapes.join(" "))
}
