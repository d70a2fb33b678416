//! Caches as bytes, in safetensors format.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::state::StateShape;
use super::{InferenceCache, KvCache, MixerState, fingerprint, shapes};
use crate::config::ModelConfig;
use crate::{Error, Result};

const CONV: &str = "conv_state";
const SSM: &str = "ssm_state";
const KEYS: &str = "keys";
const VALUES: &str = "values";
const VERSION: &str = "2";

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
            let named = [(CONV, &state.conv), (SSM, &state.ssm)];
            tensors
                .extend(named.into_iter().filter_map(|(name, x)| Some((format!("{i}.{name}"), x.clone()?))));
            for (row, kv) in state.kv.iter().flatten().enumerate() {
                let (keys, values) = kv.blocks()?;
                if !keys.is_empty() {
                    tensors.push((format!("{i}.{KEYS}.{row}"), Tensor::cat(&keys, 1)?));
                    tensors.push((format!("{i}.{VALUES}.{row}"), Tensor::cat(&values, 1)?));
                }
            }
        }
        let positions: Vec<String> = self.positions.iter().map(usize::to_string).collect();
        let notes = [
            ("format", "mamba-model cache".to_owned()),
            ("version", VERSION.to_owned()),
            ("positions", positions.join(" ")),
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
        let positions = note("positions").unwrap_or_default().split_whitespace().map(|n| n.parse().ok());
        let positions: Option<Vec<usize>> = positions.collect();
        let positions = positions.ok_or_else(|| bad("says no positions".into()))?;
        let mut tensors = Tensors(candle_core::safetensors::load_buffer(bytes, device)?);
        let states = shapes(config).into_iter().enumerate();
        let states = states.map(|(i, shape)| tensors.state(i, &shape, &positions));
        Ok(Self::of(states.collect::<Result<_>>()?, positions, fingerprint(config)))
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

/// What was read, by name.
struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    fn state(&mut self, i: usize, shape: &StateShape, positions: &[usize]) -> Result<MixerState> {
        let batch = positions.len();
        let mut state = |name: &str, shape: Vec<usize>| self.read(&format!("{i}.{name}"), &shape, true);
        let conv = shape.conv.map(|(dim, window)| state(CONV, vec![batch, dim, window])).transpose()?;
        let ssm =
            shape.ssm.as_ref().map(|shape| state(SSM, [&[batch], shape.as_slice()].concat())).transpose()?;
        let Some((nheads_kv, headdim, window)) = shape.kv else {
            return Ok(MixerState { conv, ssm, kv: None });
        };
        let mut rows = vec![];
        for (row, position) in positions.iter().enumerate() {
            let mut kv = KvCache::new(nheads_kv, headdim, window);
            let [keys, values] = [KEYS, VALUES].map(|name| format!("{i}.{name}.{row}"));
            if *position > 0 {
                // With a window, what is out of sight may be missing.
                let kept = self.0.get(&keys).and_then(|x| x.dims().get(1)).copied().unwrap_or(0);
                let needed = window.map_or(*position, |window| window.min(*position + 1) - 1);
                if !(needed..=*position).contains(&kept) {
                    return Err(Error::Cache(format!("`{keys}` has {kept} tokens of {position}")));
                }
                let shape = [1, kept, nheads_kv, headdim];
                kv.append(&self.read(&keys, &shape, false)?, &self.read(&values, &shape, false)?)?;
            }
            rows.push(kv);
        }
        Ok(MixerState { conv, ssm, kv: Some(rows) })
    }

    /// The tensor of this name and shape; states are never rounded, keys and values have the dtype of the model.
    fn read(&mut self, name: &str, shape: &[usize], exact: bool) -> Result<Tensor> {
        let Some(tensor) = self.0.remove(name) else {
            return Err(Error::Cache(format!("holds no `{name}`")));
        };
        let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
        let allowed = if exact { &dtypes[..2] } else { &dtypes[..] };
        match tensor.dims() == shape && allowed.contains(&tensor.dtype()) {
            true => Ok(tensor),
            false => Err(Error::Cache(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.dims()))),
        }
    }
}
