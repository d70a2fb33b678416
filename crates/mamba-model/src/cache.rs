//! What a model remembers of the tokens it has read: per mixer a window of inputs and a state, in `f32`.

mod bytes;
mod rows;

use candle_core::{DType, Device, Tensor};

use crate::config::{MixerSpec, ModelConfig};
use crate::{Error, Result};

/// The state of a model after some tokens, for a batch of sequences.
///
/// Its size does not depend on the number of tokens read. Steps change it in place, so it is no `Clone`:
/// [`fork`](Self::fork) says that the numbers are copied.
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
    batch: usize,
    position: usize,
    fingerprint: String,
}

/// The state of one mixer.
#[derive(Debug)]
pub(crate) enum MixerState {
    /// A mixer that looks at one token at a time.
    None,
    /// A mixer with a convolution and a state space model.
    Recurrent {
        /// The last inputs of the convolution, `(batch, conv_dim, d_conv - 1)`.
        conv: Tensor,
        /// `(batch, d_inner, d_state)` or `(batch, nheads, headdim, d_state)`.
        ssm: Tensor,
    },
}

impl InferenceCache {
    /// The state before the first token.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new(config: &ModelConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let zeros = |shape: Vec<usize>| Tensor::zeros(shape, dtype, device);
        let states = mixers(config).map(|mixer| {
            Ok(match state_shapes(mixer, batch) {
                Some([conv, ssm]) => MixerState::Recurrent { conv: zeros(conv)?, ssm: zeros(ssm)? },
                None => MixerState::None,
            })
        });
        Ok(Self {
            states: states.collect::<Result<_>>()?,
            batch,
            position: 0,
            fingerprint: fingerprint(config),
        })
    }

    /// Sequences of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens that each sequence has read.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Memory of the states, in bytes.
    pub fn bytes(&self) -> usize {
        self.tensors().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }

    /// Forgets every token, keeping the memory.
    ///
    /// # Errors
    /// If candle refuses.
    pub fn reset(&mut self) -> Result<()> {
        for x in self.tensors() {
            x.zero_set()?;
        }
        self.position = 0;
        Ok(())
    }

    /// A copy that goes its own way from here.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn fork(&self) -> Result<Self> {
        let states = self.states.iter().map(|state| {
            Ok(match state {
                MixerState::None => MixerState::None,
                MixerState::Recurrent { conv, ssm } => {
                    MixerState::Recurrent { conv: conv.copy()?, ssm: ssm.copy()? }
                }
            })
        });
        let fingerprint = self.fingerprint.clone();
        Ok(Self {
            states: states.collect::<Result<_>>()?,
            batch: self.batch,
            position: self.position,
            fingerprint,
        })
    }

    /// Checks that the cache fits a model and a batch.
    pub(crate) fn check(&self, mixers: usize, batch: usize) -> Result<()> {
        if self.states.len() != mixers {
            let message = format!("has states for {} mixers, the model has {mixers}", self.states.len());
            return Err(Error::Cache(message));
        }
        if self.batch != batch {
            return Err(Error::Cache(format!("holds {} sequences, the input has {batch}", self.batch)));
        }
        Ok(())
    }

    pub(crate) fn states_mut(&mut self) -> impl Iterator<Item = &mut MixerState> {
        self.states.iter_mut()
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.states.iter().flat_map(|state| match state {
            MixerState::None => vec![],
            MixerState::Recurrent { conv, ssm } => vec![conv, ssm],
        })
    }
}

fn mixers(config: &ModelConfig) -> impl Iterator<Item = &MixerSpec> {
    config.layers.iter().flat_map(|layer| &layer.branches).flat_map(|branch| &branch.mixers)
}

/// Shapes of the window and of the state.
fn state_shapes(mixer: &MixerSpec, batch: usize) -> Option<[Vec<usize>; 2]> {
    match mixer {
        MixerSpec::Mamba1(c) => {
            Some([vec![batch, c.d_inner, c.d_conv - 1], vec![batch, c.d_inner, c.d_state]])
        }
        MixerSpec::Mamba2(c) => {
            Some([vec![batch, c.conv_dim(), c.d_conv - 1], vec![batch, c.nheads(), c.headdim, c.d_state]])
        }
        MixerSpec::Mlp(_) => None,
    }
}

/// The sizes that a state belongs to.
fn fingerprint(config: &ModelConfig) -> String {
    let shapes: Vec<String> = mixers(config).map(|mixer| format!("{:?}", state_shapes(mixer, 1))).collect();
    format!("d_model {} vocab {} states {}", config.d_model, config.vocab_size, shapes.join(" "))
}
