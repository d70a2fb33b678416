//! How published checkpoints spell their configurations and their tensors: the only place that knows families.

pub(crate) mod gguf;
mod mamba;
mod mamba2;
mod state_spaces;

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::NameMap;
use crate::config::{Fields, ModelConfig};
use crate::{Error, Result};

/// A family of checkpoints, as data.
#[derive(Debug)]
pub struct Family {
    /// The `model_type` of its configurations; none for that of state-spaces.
    pub model_type: Option<&'static str>,
    /// How its files spell our names.
    pub names: NameMap,
    /// Reads a configuration.
    pub(crate) parse: fn(&Fields) -> Result<ModelConfig>,
    /// Writes a configuration, if the family has words for it.
    pub(crate) write: fn(&ModelConfig) -> Option<Value>,
}

/// Every family; to save a model, the first that has words for it is used.
pub static FAMILIES: [&Family; 3] = [&mamba::MAMBA, &mamba2::MAMBA2, &state_spaces::STATE_SPACES];

/// Finds the family of a configuration and reads it.
pub(crate) fn parse(text: &str, file: Option<&Path>) -> Result<(ModelConfig, &'static Family)> {
    let fields = Fields::parse(text, file)?;
    let model_type = fields.str_opt("model_type")?;
    let family = FAMILIES.into_iter().find(|family| family.model_type == model_type.as_deref());
    let family = family.ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().filter_map(|family| family.model_type).collect();
        let got = model_type.unwrap_or_default();
        fields.error(
            "model_type",
            format!("is \"{got}\", expected none (state-spaces) or one of {}", known.join(", ")),
        )
    })?;
    let config = (family.parse)(&fields)?;
    config.validate().map_err(|error| match error {
        Error::Config { field, message, .. } => fields.error(&field, message),
        other => other,
    })?;
    Ok((config, family))
}

/// `silu` under both of its names is the only activation that the blocks have.
fn require_silu(fields: &Fields, field: &str) -> Result<()> {
    match fields.str_opt(field)?.as_deref() {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => Err(fields.error(field, format!("is \"{other}\", expected silu"))),
    }
}
