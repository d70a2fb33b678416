//! Caches as bytes, in safetensors format.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device};

use super::{InferenceCache, MixerState, fingerprint, mixers, state_shapes};
use crate::config::ModelConfig;
use crate::{Error, Result};

const CONV: &str = "conv_state";
const SSM: &str = "ssm_state";
const VERSION: &str = "1";

impl InferenceCache {
    /// The state in safetensors format, with the sizes of the model it belongs to.
    ///
    /// # Errors
    /// If the numbers cannot be read from the device.
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
    /// let again = InferenceCache::from_bytes(&cache.to_bytes()?, &config, &Device::Cpu)?;
    /// assert_eq!(again.position(), 3);
    /// # Ok::<_, mamba_model::Error>(())
    /// ```
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors = vec![];
        for (i, state) in self.states.iter().enumerate() {
            if let MixerState::Recurrent { conv, ssm } = state {
                tensors.push((format!("{i}.{CONV}"), conv.clone()));
                tensors.push((format!("{i}.{SSM}"), ssm.clone()));
            }
        }
        let notes = [
            ("format", "mamba-model cache".to_owned()),
            ("version", VERSION.to_owned()),
            ("position", self.position.to_string()),
            ("batch", self.batch.to_string()),
            ("model", self.fingerprint.clone()),
        ];
        let notes: HashMap<String, String> = notes.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        crate::save::safetensors_bytes(&tensors, notes)
    }

    /// Reads a state that [`to_bytes`](Self::to_bytes) gave, for a model of this configuration.
    ///
    /// # Errors
    /// If the bytes are damaged, or belong to a model of other sizes.
    pub fn from_bytes(bytes: &[u8], config: &ModelConfig, device: &Device) -> Result<Self> {
        let notes = crate::checkpoint::safetensors::notes(Path::new("cache"), bytes)?;
        let note = |name: &str| notes.get(name).map(String::as_str);
        let bad = |message: String| Error::Cache(message);
        if note("version") != Some(VERSION) {
            return Err(bad("is not a saved cache of this version".into()));
        }
        if note("model") != Some(fingerprint(config).as_str()) {
            return Err(bad("belongs to a model of other sizes".into()));
        }
        let number = |name: &str| {
            let number = note(name).and_then(|n| n.parse::<usize>().ok());
            number.ok_or_else(|| bad(format!("says no {name}")))
        };
        let (batch, position) = (number("batch")?, number("position")?);
        let mut tensors = candle_core::safetensors::load_buffer(bytes, device)?;
        let mut read = |i: usize, name: &str, shape: Vec<usize>| {
            let name = format!("{i}.{name}");
            let tensor = tensors.remove(&name).ok_or_else(|| bad(format!("holds no `{name}`")))?;
            match tensor.dims() == shape && matches!(tensor.dtype(), DType::F32 | DType::F64) {
                true => Ok(tensor),
                false => Err(bad(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.dims()))),
            }
        };
        let mut states = vec![];
        for (i, mixer) in mixers(config).enumerate() {
            states.push(match state_shapes(mixer, batch) {
                Some([conv, ssm]) => {
                    MixerState::Recurrent { conv: read(i, CONV, conv)?, ssm: read(i, SSM, ssm)? }
                }
                None => MixerState::None,
            });
        }
        Ok(Self { states, batch, position, fingerprint: fingerprint(config) })
    }

    /// Writes the state to a file in safetensors format, with the sizes of the model it belongs to.
    ///
    /// # Errors
    /// If the file cannot be written; one that was there stays as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        crate::write_atomically(path, &self.to_bytes()?).map_err(|source| Error::io(path, source))
    }

    /// Reads a state that [`save`](Self::save) wrote for a model of this configuration.
    ///
    /// # Errors
    /// If the file is damaged, or belongs to a model of other sizes.
    pub fn load(path: impl AsRef<Path>, config: &ModelConfig, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::io(path, source))?;
        Self::from_bytes(&bytes, config, device).map_err(|error| match error {
            Error::Cache(message) => Error::Cache(format!("{}: {message}", path.display())),
            Error::Checkpoint { message, .. } => Error::checkpoint(path, message),
            other => other,
        })
    }
}
