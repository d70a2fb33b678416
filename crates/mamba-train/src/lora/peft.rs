//! Adapters on disk as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use mamba_model::Model;
use mamba_model::families::{self, FAMILIES};
use serde_json::{Value, json};

use super::{Kind, LoraConfig, modules};
use crate::state::{write_json, write_tensors};
use crate::trainable::TrainableModel;
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// Before every name in the file.
const PREFIX: &str = "base_model.model.";

/// Writes the adapters of a model, and the parameters that were trained as they are, in PEFT's format; `base` says which model
/// they belong to.
///
/// PEFT itself reads adapters of `in_proj`, `x_proj`, embedding and head; it refuses those of `out_proj` and `conv1d`, which
/// its Mamba bypasses. Factors of `conv1d` are `(rank, width)` and `(channels, rank)`.
///
/// # Errors
/// If no published family has words for the model, or a file cannot be written.
pub fn save_adapter(model: &TrainableModel, config: &LoraConfig, base: &str, folder: &Path) -> Result<()> {
    let family = families::of(model.model().config())
        .ok_or_else(|| Error::Adapter("no format of checkpoints has words for the model".into()))?;
    let spelled =
        |name: &str| family.names.candidates(name).into_iter().next().unwrap_or_else(|| name.into());
    let mut tensors = BTreeMap::new();
    for parameter in model.parameters() {
        tensors.insert(format!("{PREFIX}{}", spelled(parameter.name())), parameter.value().detach());
    }
    let adapted: BTreeSet<String> = modules(model.model())
        .iter()
        .filter(|module| model.parameters().get(&module.factors()[0]).is_some())
        .filter_map(|module| Some(spelled(&module.name).rsplit('.').next()?.to_owned()))
        .collect();
    let mut summary = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": 0.0, "use_rslora": config.rank_stabilized, "use_dora": config.dora,
        "target_modules": adapted, "bias": "none", "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {},
    });
    if config.alpha.fract() == 0.0 {
        summary["lora_alpha"] = json!(config.alpha as i64);
    }
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    write_tensors(&folder.join(TENSORS), &tensors)?;
    write_json(&folder.join(CONFIG), &summary)
}

/// A model with the adapters of a folder beside its weights, which it shares with `model`; in its dtype.
///
/// Call [`Model::merged`] for one without adapters, and [`TrainableModel::only`] to train them on.
///
/// # Errors
/// If a file is missing or damaged, or has a tensor that does not fit the model.
pub fn load_adapter(model: &Model, folder: &Path) -> Result<Model> {
    let path = folder.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let config: Value =
        serde_json::from_str(&text).map_err(|e| Error::file(&path, format!("is not JSON: {e}")))?;
    let kind = config["peft_type"].as_str().unwrap_or_default();
    if kind != "LORA" {
        return Err(Error::file(&path, format!("has `peft_type` \"{kind}\", expected LORA")));
    }
    let path = folder.join(TENSORS);
    let loaded = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|e| Error::file(&path, format!("cannot be read: {}", mamba_model::Error::from(e))))?;
    let mut unread: BTreeMap<String, Tensor> = loaded.into_iter().collect();
    let mut values: HashMap<String, Tensor> = model.parameters().iter().cloned().collect();
    for module in modules(model) {
        let [a, b] = module.factors();
        let (Some((_, of_a)), Some((_, of_b))) = (take(&mut unread, &a), take(&mut unread, &b)) else {
            continue;
        };
        let rank = of_a.dims().first().copied().unwrap_or(0);
        let ((rows, columns), got) = (module.extents(), (of_a.dims().to_vec(), of_b.dims().to_vec()));
        if got != (vec![rank, columns], vec![rows, rank]) {
            let message = format!(
                "has factors of shapes {:?} and {:?} for `{}`, expected (rank, {columns}) and ({rows}, rank)",
                got.0, got.1, module.name
            );
            return Err(Error::file(&path, message));
        }
        let scale = scale(&config, &module.name, rank)
            .ok_or_else(|| Error::file(&folder.join(CONFIG), "has no number in `lora_alpha`"))?;
        values.insert(module.scale(), Tensor::new(scale as f32, &Device::Cpu)?);
        values.insert(a, of_a);
        values.insert(b, of_b);
        if module.kind != Kind::Embedding
            && let Some((_, magnitude)) = take(&mut unread, &module.magnitude())
        {
            values.insert(module.magnitude(), magnitude.flatten_all()?);
        }
    }
    for (name, value) in model.parameters() {
        if let Some((key, trained)) = take(&mut unread, name) {
            if trained.dims() != value.dims() {
                let (got, expected) = (trained.dims(), value.dims());
                let message = format!("has tensor `{key}` of shape {got:?}, expected {expected:?}");
                return Err(Error::file(&path, message));
            }
            values.insert(name.clone(), trained);
        }
    }
    // With an adapted embedding or head PEFT saves a copy of the base, which is here already.
    unread.retain(|name, _| !name.ends_with(".base_layer.weight"));
    if let Some(name) = unread.keys().next() {
        let message =
            format!("has {} tensors that the model has no place for, such as `{name}`", unread.len());
        return Err(Error::file(&path, message));
    }
    let values = values
        .into_iter()
        .map(|(name, x)| Ok((name, x.detach().to_device(model.device())?)))
        .collect::<Result<_>>()?;
    Ok(Model::new(model.config(), VarBuilder::from_tensors(values, model.dtype(), model.device()))?)
}

/// The tensor that belongs to one of our names, however its family spells it.
fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str) -> Option<(String, Tensor)> {
    let spelled = FAMILIES.iter().flat_map(|family| family.names.candidates(name)).chain([name.to_owned()]);
    let found = spelled.map(|name| format!("{PREFIX}{name}")).find(|key| tensors.contains_key(key))?;
    let tensor = tensors.remove(&found)?;
    let wide = if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Some((found, tensor.to_dtype(wide).ok()?))
}

/// The scale of a module's factors: patterns of the file speak of the ends of names.
fn scale(config: &Value, module: &str, rank: usize) -> Option<f64> {
    let patterns = config["alpha_pattern"].as_object();
    let spelled: Vec<String> = FAMILIES.iter().flat_map(|family| family.names.candidates(module)).collect();
    let means = |end: &str| spelled.iter().any(|name| super::means(end, name));
    let of_pattern = patterns.into_iter().flatten().find(|(end, _)| means(end));
    let alpha = of_pattern.map_or(&config["lora_alpha"], |(_, alpha)| alpha).as_f64()?;
    let rank = rank as f64;
    Some(alpha / if config["use_rslora"].as_bool() == Some(true) { rank.sqrt() } else { rank })
}
