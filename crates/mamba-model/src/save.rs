//! Writes models in the layout that Hugging Face libraries read.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};

use crate::checkpoint::{Outgoing, TensorInfo, pickle, safetensors};
use crate::families::{self, Family};
use crate::{AtomicFile, Error, Model, Result, write_atomically};

/// Where the tokens at which texts end stand beside a configuration that has no place for them.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

impl Model {
    /// Writes `config.json` and `model.safetensors` into a folder, which is made if need be; in the layout of state-spaces,
    /// which knows no other, `pytorch_model.bin`.
    ///
    /// The configuration is that of the first of [`FAMILIES`](families::FAMILIES) that has words for it: transformers' `mamba`, `mamba2` or
    /// `falcon_mamba` where possible, else that of state-spaces, else one of the hybrids of transformers. Weights are
    /// written in the dtype `dtype`, but those that are `f32` in any model (`A_log`, `D`, `dt_bias`) as `f32` unless
    /// `dtype` holds their values exactly. Each file is complete under its name or not there, and one tensor at a time is there beside
    /// the model.
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
        let family = families::of(self.config()).ok_or_else(|| Error::Config {
            file: None,
            field: "layers".into(),
            message: "is a combination that no format of checkpoints has words for".into(),
        })?;
        self.save_pretrained_as(family, folder, dtype)
    }

    /// The same in the layout of one of [`FAMILIES`](families::FAMILIES), such as that of state-spaces for a Mamba-2 that came from
    /// transformers.
    ///
    /// # Errors
    /// If the family cannot express the configuration; otherwise as [`save_pretrained`](Self::save_pretrained).
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device};
    /// use mamba_model::Model;
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    /// use mamba_model::families::Family;
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let model = Model::random(&config, 0, &Device::Cpu)?;
    /// let folder = tempfile::tempdir()?;
    /// let family = Family::named("state-spaces").ok_or("no such family")?;
    /// model.save_pretrained_as(family, folder.path(), DType::F32)?;
    /// let text = std::fs::read_to_string(folder.path().join("config.json"))?;
    /// assert!(text.contains("ssm_cfg"));
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_pretrained_as(&self, family: &Family, folder: impl AsRef<Path>, dtype: DType) -> Result<()> {
        self.save_pretrained_with(family, folder, dtype, |_, _| {})
    }

    /// The same, telling `report` of each tensor when it is written: what the file calls it, its type there and its shape.
    ///
    /// # Errors
    /// As [`save_pretrained_as`](Self::save_pretrained_as).
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device};
    /// use mamba_model::{Model, families};
    /// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    ///
    /// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
    /// let model = Model::random(&config, 0, &Device::Cpu)?;
    /// let folder = tempfile::tempdir()?;
    /// let family = families::of(&config).ok_or("no such family")?;
    /// let mut names = vec![];
    /// model.save_pretrained_with(family, folder.path(), DType::F32, |name, _| names.push(name.to_owned()))?;
    /// assert!(names.len() == model.parameters().len() && names.contains(&"backbone.norm_f.weight".to_owned()));
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_pretrained_with(
        &self,
        family: &Family,
        folder: impl AsRef<Path>,
        dtype: DType,
        report: impl FnMut(&str, TensorInfo),
    ) -> Result<()> {
        self.require_no_adapters()?;
        let folder = folder.as_ref();
        let config = family.words(self.config()).ok_or_else(|| Error::Config {
            file: None,
            field: "layers".into(),
            message: format!("is a combination that the layout of {} has no words for", family.name()),
        })?;
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let outgoing = |(name, tensor): &(String, Tensor)| -> Result<Outgoing> {
            let keep = tensor.dtype() == DType::F32
                && self.dtype_is_narrow(dtype)
                && is_sensitive(name)
                && !is_exact(tensor, dtype)?;
            let name = family.names.candidates(name).into_iter().next().unwrap_or_else(|| name.clone());
            Ok(Outgoing { name, tensor: tensor.clone(), dtype: if keep { tensor.dtype() } else { dtype } })
        };
        let tensors = self.parameters().iter().map(outgoing).collect::<Result<Vec<_>>>()?;
        let create = |name: &str| {
            let path = folder.join(name);
            AtomicFile::create(&path).map_err(|e| Error::io(&path, e))
        };
        match family.model_type {
            Some(_) => {
                let notes = [("format".to_owned(), "pt".to_owned())].into(); // what transformers asks for
                safetensors::write(create("model.safetensors")?, tensors, notes, report)?;
            }
            None => {
                pickle::write(create("pytorch_model.bin")?, &self.with_tied_head(family, tensors), report)?;
                self.write_ends(folder)?;
            }
        }
        let path = folder.join("config.json");
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::io(&path, e.into()))? + "\n";
        write_atomically(&path, text.as_bytes()).map_err(|e| Error::io(&path, e))
    }

    /// As mamba_ssm wants it: a tied head is there again.
    fn with_tied_head(&self, family: &Family, mut tensors: Vec<Outgoing>) -> Vec<Outgoing> {
        let embedding = family.names.candidates("embedding.weight").into_iter().next();
        let tied = tensors.iter().find(|tensor| Some(&tensor.name) == embedding.as_ref());
        if let (true, Some(embedding)) = (self.config().tie_embeddings, tied.cloned()) {
            tensors.push(Outgoing { name: "lm_head.weight".into(), ..embedding });
        }
        tensors
    }

    /// Where texts end, for which the configuration of state-spaces has no place.
    fn write_ends(&self, folder: &Path) -> Result<()> {
        let (ends, path) = (&self.config().eos_token_ids, folder.join(GENERATION_CONFIG));
        if ends.is_empty() {
            return Ok(());
        }
        let text = serde_json::json!({ "eos_token_id": ends }).to_string();
        write_atomically(&path, text.as_bytes()).map_err(|e| Error::io(&path, e))
    }

    /// Formats of whole models have no place for adapters.
    pub(crate) fn require_no_adapters(&self) -> Result<()> {
        match self.has_adapters() {
            true => Err(Error::Input("the model has adapters: save what `merged` gives".into())),
            false => Ok(()),
        }
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

/// Whether a type holds all values of a tensor.
fn is_exact(tensor: &Tensor, dtype: DType) -> Result<bool> {
    let gap = (tensor.to_dtype(dtype)?.to_dtype(tensor.dtype())? - tensor)?.abs()?.sum_all()?;
    Ok(gap.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}

/// Tensors in safetensors format.
pub(crate) fn safetensors_bytes(
    tensors: &[(String, Tensor)],
    notes: HashMap<String, String>,
) -> Result<Vec<u8>> {
    let tensors: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, x)| Ok((name.as_str(), x.contiguous()?))).collect::<Result<_>>()?;
    ::safetensors::serialize(tensors, Some(notes))
        .map_err(|error| Error::checkpoint(Path::new("tensors"), format!("cannot be written: {error}")))
}
