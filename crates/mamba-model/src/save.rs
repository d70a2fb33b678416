//! Writes models in the layout that Hugging Face libraries read, and small files atomically.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use candle_core::DType;
use candle_core::Tensor;

use crate::families::FAMILIES;
use crate::{Error, Model, Result};

impl Model {
    /// Writes `config.json` and `model.safetensors` into a folder, which is made if need be.
    ///
    /// The configuration is that of the first family that has words for it: transformers' `mamba` or `mamba2` where
    /// possible, else that of state-spaces. Weights are written in the dtype `dtype`, but those that are `f32` in any
    /// model (`A_log`, `D`, `dt_bias`) as `f32` unless `dtype` holds their values exactly. Each file is complete
    /// under its name or not there.
    ///
    /// # Errors
    /// If no family can express the configuration, the model has adapters, or a file cannot be written.
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device};
    /// use mamba_model::{Model, checkpoint::LocalDir};
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let model = Model::random(&config, 0, &Device::Cpu)?;
    /// let folder = tempfile::tempdir()?;
    /// model.save_pretrained(folder.path(), DType::F32)?;
    /// let again = Model::from_pretrained(&LocalDir::new(folder.path())?, DType::F32, &Device::Cpu)?;
    /// assert_eq!(again.config(), model.config());
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_pretrained(&self, folder: impl AsRef<Path>, dtype: DType) -> Result<()> {
        if self.has_adapters() {
            return Err(Error::Input("the model has adapters: save what `merged` gives".into()));
        }
        let folder = folder.as_ref();
        let written = FAMILIES.iter().find_map(|family| Some((family, family.words(self.config())?)));
        let (family, config) = written.ok_or_else(|| Error::Config {
            file: None,
            field: "layers".into(),
            message: "is a combination that no format of checkpoints has words for".into(),
        })?;
        std::fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
        let tensors: Vec<(String, Tensor)> = self
            .parameters()
            .iter()
            .map(|(name, x)| {
                let narrowed = x.to_dtype(dtype)?;
                let exact = || -> Result<bool> {
                    let gap = (narrowed.to_dtype(x.dtype())? - x)?.abs()?.sum_all()?;
                    Ok(gap.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
                };
                let keep =
                    x.dtype() == DType::F32 && self.dtype_is_narrow(dtype) && is_sensitive(name) && !exact()?;
                let name = family.names.candidates(name).into_iter().next().unwrap_or_else(|| name.clone());
                Ok((name, if keep { x.clone() } else { narrowed }))
            })
            .collect::<Result<_>>()?;
        let notes = [("format".to_owned(), "pt".to_owned())].into(); // what transformers asks for
        write_safetensors(&folder.join("model.safetensors"), &tensors, notes)?;
        let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
        let path = folder.join("config.json");
        write_atomically(&path, text.as_bytes()).map_err(|source| Error::Io { path, source })
    }

    fn dtype_is_narrow(&self, dtype: DType) -> bool {
        dtype.size_in_bytes() < DType::F32.size_in_bytes()
    }
}

/// Parameters that the state depends on exponentially, or that decide between experts.
fn is_sensitive(name: &str) -> bool {
    ["A_log", "D", "dt_bias", "dt_proj.bias", "init_states", "correction_bias"]
        .iter()
        .any(|leaf| name.ends_with(&format!(".{leaf}")))
}

/// Writes tensors in safetensors format.
pub(crate) fn write_safetensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    notes: HashMap<String, String>,
) -> Result<()> {
    let bytes = safetensors_bytes(tensors, notes).map_err(|error| match error {
        Error::Checkpoint { message, .. } => Error::checkpoint(path, message),
        other => other,
    })?;
    write_atomically(path, &bytes).map_err(|source| Error::io(path, source))
}

/// Tensors in safetensors format.
pub(crate) fn safetensors_bytes(
    tensors: &[(String, Tensor)],
    notes: HashMap<String, String>,
) -> Result<Vec<u8>> {
    let tensors: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, x)| Ok((name.as_str(), x.contiguous()?))).collect::<Result<_>>()?;
    safetensors::serialize(tensors, Some(notes))
        .map_err(|error| Error::checkpoint(Path::new("tensors"), format!("cannot be written: {error}")))
}

/// Writes a file beside the one that is wanted, has the disk take it, then moves it into place: a full disk or a crash
/// leaves what was there before, and never half a file.
///
/// # Errors
/// What the operating system says; what was written beside is removed then.
///
/// # Example
/// ```
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("notes");
/// mamba_model::write_atomically(&path, b"one")?;
/// mamba_model::write_atomically(&path, b"two")?;
/// assert_eq!(std::fs::read(&path)?, b"two");
/// # Ok::<_, std::io::Error>(())
/// ```
pub fn write_atomically(path: impl AsRef<Path>, bytes: &[u8]) -> std::io::Result<()> {
    let path = path.as_ref();
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&beside); // the first error is the one that matters
    })
}
