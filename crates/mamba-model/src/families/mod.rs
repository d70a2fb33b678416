//! How published checkpoints spell their configurations and their tensors: the only place that knows families.

mod bamba;
mod falcon_h1;
mod falcon_mamba;
pub(crate) mod gguf;
mod granitemoehybrid;
mod jamba;
mod layer_types;
mod lfm2;
mod mamba;
mod mamba2;
mod mamba2_fields;
mod nemotron_h;
mod parts;
mod state_spaces;
mod transformer;
mod zamba;
mod zamba2;

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

impl Family {
    /// What it goes by: its `model_type`, or `state-spaces`.
    pub fn name(&self) -> &'static str {
        self.model_type.unwrap_or("state-spaces")
    }

    /// The family that goes by a name.
    pub fn named(name: &str) -> Option<&'static Self> {
        FAMILIES.into_iter().find(|family| family.name() == name)
    }

    /// Reads a configuration, and whether it is that of a model without a head: what transformers saves of its classes `*Model`.
    fn read(&self, fields: &Fields) -> Result<ModelConfig> {
        let config = (self.parse)(fields)?;
        let is_base = |name: &String| name.ends_with("Model") && !name.ends_with("LMHeadModel");
        let base = fields.strs_opt("architectures")?.is_some_and(|names| names.iter().any(is_base));
        // Where the head would be the embedding, there is one as soon as somebody asks for it.
        Ok(ModelConfig { has_head: config.tie_embeddings || !base, ..config })
    }

    /// The configuration in the words of this family, if reading them gives the same model again.
    pub(crate) fn words(&self, config: &ModelConfig) -> Option<Value> {
        let written = (self.write)(config)?;
        let text = serde_json::to_string(&written).ok()?;
        let mut again = self.read(&Fields::parse(&text, None).ok()?).ok()?;
        again.validate().ok()?;
        if again.vocab_size == config.padded_vocab_size {
            // Most families cannot say that some ids exist for alignment only.
            (again.vocab_size, again.padded_vocab_size) = (config.vocab_size, config.padded_vocab_size);
        }
        if self.model_type.is_none() {
            again.eos_token_ids.clone_from(&config.eos_token_ids); // they stand in a file of their own
        }
        (again == *config).then_some(written)
    }
}

/// Every family; to save a model, the first that has words for it is used.
pub static FAMILIES: [&Family; 12] = [
    &mamba::MAMBA,
    &mamba2::MAMBA2,
    &falcon_mamba::FALCON_MAMBA,
    &state_spaces::STATE_SPACES,
    &jamba::JAMBA,
    &bamba::BAMBA,
    &granitemoehybrid::GRANITE_MOE_HYBRID,
    &nemotron_h::NEMOTRON_H,
    &falcon_h1::FALCON_H1,
    &lfm2::LFM2,
    &zamba2::ZAMBA2,
    &zamba::ZAMBA,
];

/// The family that [`Model::save_pretrained`](crate::Model::save_pretrained) writes a configuration in: the first that has
/// words for it.
pub fn of(config: &ModelConfig) -> Option<&'static Family> {
    FAMILIES.into_iter().find(|family| family.words(config).is_some())
}

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
    let config = family.read(&fields)?;
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
