//! States as files in safetensors format.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::state::{MixerState, StateShape};
use super::{InferenceCache, KvCache, fingerprint, shapes};
use crate::checkpoint::{Checkpoint, LocalDir};
use crate::config::ModelConfig;
use crate::{Error, Result};

const CONV: &str = "conv_state";
const SSM: &str = "ssm_state";
const KEYS: &str = "keys";
const VALUES: &str = "values";
const VERSION: &str = "2";

impl InferenceCache {
    /// Writes the state to a file in safetensors format, with the sizes of the model it belongs to.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
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
        crate::save::write_safetensors(path, &tensors, notes)
    }

    /// Reads a state that [`save`](Self::save) wrote for a model of this configuration.
    ///
    /// # Errors
    /// If the file is damaged, or belongs to a model of other sizes.
    pub fn load(path: impl AsRef<Path>, config: &ModelConfig, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let notes = crate::checkpoint::safetensors::notes(path, &bytes)?;
        let note = |name: &str| notes.get(name).map(String::as_str);
        let bad = |message: String| Error::Cache(format!("{}: {message}", path.display()));
        if note("version") != Some(VERSION) {
            return Err(bad("is not a saved cache of this version".into()));
        }
        if note("model") != Some(fingerprint(config).as_str()) {
            return Err(bad("belongs to a model of other sizes".into()));
        }
        let positions = note("positions").unwrap_or_default().split_whitespace().map(|n| n.parse().ok());
        let positions: Option<Vec<usize>> = positions.collect();
        let positions = positions.ok_or_else(|| bad("says no positions".into()))?;
        let file = File { path, checkpoint: Checkpoint::open(&LocalDir::new(path)?)?, device };
        let states = shapes(config).into_iter().enumerate();
        let states = states.map(|(i, shape)| file.state(i, &shape, &positions));
        Ok(Self { states: states.collect::<Result<_>>()?, positions, fingerprint: fingerprint(config) })
    }
}

struct File<'a> {
    path: &'a Path,
    checkpoint: Checkpoint,
    device: &'a Device,
}

impl File<'_> {
    fn state(&self, i: usize, shape: &StateShape, positions: &[usize]) -> Result<MixerState> {
        let batch = positions.len();
        let state = |name: &str, shape: Vec<usize>| {
            self.read(&format!("{i}.{name}"), &shape, &[DType::F32, DType::F64])
        };
        let conv = shape.conv.map(|(dim, window)| state(CONV, vec![batch, dim, window])).transpose()?;
        let ssm =
            shape.ssm.as_ref().map(|shape| state(SSM, [&[batch], shape.as_slice()].concat())).transpose()?;
        let Some((nheads_kv, headdim, window)) = shape.kv else {
            return Ok(MixerState { conv, ssm, kv: None });
        };
        let floats = [DType::F32, DType::F64, DType::F16, DType::BF16];
        let row = |(row, position): (usize, &usize)| {
            let mut kv = KvCache::new(window);
            let names = [KEYS, VALUES].map(|name| format!("{i}.{name}.{row}"));
            if *position > 0 {
                // With a window, what is out of sight may be missing.
                let kept =
                    self.checkpoint.info(&names[0]).map_or(0, |info| info.shape.get(1).copied().unwrap_or(0));
                let enough =
                    kept <= *position && kept >= window.map_or(*position, |w| w.min(*position + 1) - 1);
                if !enough {
                    let message = format!("`{}` has {kept} tokens of {position}", names[0]);
                    return Err(Error::Cache(format!("{}: {message}", self.path.display())));
                }
                let shape = [1, kept, nheads_kv, headdim];
                kv.append(&self.read(&names[0], &shape, &floats)?, &self.read(&names[1], &shape, &floats)?)?;
            }
            Ok(kv)
        };
        let kv = positions.iter().enumerate().map(row).collect::<Result<_>>()?;
        Ok(MixerState { conv, ssm, kv: Some(kv) })
    }

    fn read(&self, name: &str, shape: &[usize], dtypes: &[DType]) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(name, self.device)?;
        match tensor.dims() == shape && dtypes.contains(&tensor.dtype()) {
            true => Ok(tensor),
            false => {
                let message = format!("`{name}` has shape {:?}, expected {shape:?}", tensor.dims());
                Err(Error::Cache(format!("{}: {message}", self.path.display())))
            }
        }
    }
}
