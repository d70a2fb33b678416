//! How GGUF files spell models: architectures, which are to them what families are to a `config.json`.

mod mamba;
mod mamba2;

use std::path::Path;

use serde_json::{Map, Number, Value as Json};

use crate::checkpoint::gguf::{Metadata, Value};
use crate::checkpoint::{Checkpoint, Form, NameMap};
use crate::config::{Fields, LayerSpec, MixerSpec, MlpConfig, ModelConfig};
use crate::{Error, Result};

/// Keys below the name of an architecture.
type Keys = Vec<(&'static str, Value)>;

/// An architecture of GGUF files, as data.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// What files give as `general.architecture`; their keys stand behind it and a dot.
    pub name: &'static str,
    /// How files spell our names.
    pub names: NameMap,
    /// Reads the layers, and what else is particular, into a configuration with the rest.
    parse: fn(&Described, &mut ModelConfig) -> Result<()>,
    /// The keys below the name for a configuration, if the architecture has words for it.
    write: fn(&ModelConfig) -> Option<Keys>,
    /// How files keep a tensor, by its canonical name.
    pub form: fn(&ModelConfig, &str) -> Form,
}

static ARCHITECTURES: [&Architecture; 2] = [&mamba::MAMBA, &mamba2::MAMBA2];

/// What a GGUF file says about its model.
struct Described<'a> {
    checkpoint: &'a Checkpoint,
    /// The keys below the name of the architecture.
    fields: Fields<'a>,
}

impl Described<'_> {
    fn has(&self, tensor: &str) -> bool {
        self.checkpoint.contains(tensor)
    }
}

/// Reads the configuration of a GGUF checkpoint.
pub(crate) fn parse(
    checkpoint: &Checkpoint,
    metadata: &Metadata,
) -> Result<(ModelConfig, &'static Architecture)> {
    let file = Path::new(checkpoint.origin());
    let general = Fields::from_object(object(metadata, ""), Some(file), String::new());
    let key = "general.architecture";
    let name = general.str_opt(key)?.ok_or_else(|| general.error(key, "is missing"))?;
    let architecture = ARCHITECTURES.into_iter().find(|known| known.name == name).ok_or_else(|| {
        let known: Vec<_> = ARCHITECTURES.iter().map(|known| known.name).collect();
        general.error(key, format!("is \"{name}\", expected one of {}", known.join(", ")))
    })?;
    let prefix = format!("{name}.");
    let fields = Fields::from_object(object(metadata, &prefix), Some(file), prefix);
    let described = Described { checkpoint, fields };
    let mut config = common(&described, metadata)?;
    (architecture.parse)(&described, &mut config)?;
    config.validate().map_err(|error| match error {
        Error::Config { field, message, .. } => described.fields.error(&field, message),
        other => other,
    })?;
    Ok((config, architecture))
}

/// What all architectures say in the same way; layers are to follow.
fn common(described: &Described, metadata: &Metadata) -> Result<ModelConfig> {
    let Described { checkpoint, fields } = described;
    let embedding = "token_embd.weight";
    let rows = match checkpoint.info(embedding).map(|info| info.shape) {
        Some([rows, _]) => *rows,
        Some([_]) => 1,
        _ => {
            return Err(Error::NoSuchTensor {
                origin: checkpoint.origin().into(),
                tensor: format!("`{embedding}`"),
            });
        }
    };
    let said = fields.usize_opt("vocab_size")?.unwrap_or(rows);
    let vocab_size = known_tokens(metadata).unwrap_or(rows).min(said).min(rows);
    let layers = fields.layers("block_count")?;
    let eos = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let mut eos: Vec<u32> = eos.iter().filter_map(|key| metadata.u64(key)?.try_into().ok()).collect();
    eos.dedup();
    Ok(ModelConfig {
        padded_vocab_size: rows,
        norm_eps: fields.f64_or("attention.layer_norm_rms_epsilon", 1e-5)?,
        tie_embeddings: !checkpoint.contains("output.weight"),
        eos_token_ids: eos,
        layers: vec![LayerSpec::new([]); layers],
        ..ModelConfig::uniform(
            vocab_size,
            fields.usize("embedding_length")?,
            0,
            MixerSpec::Mlp(MlpConfig::new(1)),
        )
    })
}

/// The number of tokens in the vocabulary, without those at its end that only fill it up.
fn known_tokens(metadata: &Metadata) -> Option<usize> {
    const UNUSED: u64 = 5;
    let tokens = metadata.strings("tokenizer.ggml.tokens")?;
    let unused = |index: usize| {
        let kind = metadata.array("tokenizer.ggml.token_type").and_then(|kinds| kinds.get(index));
        kind.and_then(|kind| kind.as_u64()) == Some(UNUSED)
    };
    (0..tokens.len()).rev().find(|index| !unused(*index)).map(|last| last + 1)
}

/// The keys behind a prefix as a JSON object; long arrays, which are vocabularies, are left out.
fn object(metadata: &Metadata, prefix: &str) -> Map<String, Json> {
    const LONGEST: usize = 10_000;
    let json = |value: &Value| match value {
        Value::Array(array) if array.len() > LONGEST => None,
        Value::Array(array) => Some(array.iter().map(|value| scalar(&value)).collect()),
        scalar_value => Some(scalar(scalar_value)),
    };
    let below = |(key, value): (&str, &Value)| Some((key.strip_prefix(prefix)?.to_string(), json(value)?));
    metadata.iter().filter_map(below).collect()
}

fn scalar(value: &Value) -> Json {
    match value {
        Value::String(text) => Json::String(text.clone()),
        Value::Bool(value) => Json::Bool(*value),
        Value::F32(_) | Value::F64(_) => {
            let number = value.as_f64().unwrap_or(f64::NAN);
            Number::from_f64(number).map_or_else(|| Json::String(number.to_string()), Json::Number)
        }
        Value::Array(_) => Json::Null,
        _ => match value.as_u64() {
            Some(number) => number.into(),
            None => Json::from(value.as_f64().unwrap_or(f64::NAN) as i64),
        },
    }
}

/// The keys and values that describe a model, with its architecture; `None` if no architecture has words for it.
pub(crate) fn describe(config: &ModelConfig) -> Option<(&'static Architecture, Metadata)> {
    let (architecture, keys) = ARCHITECTURES
        .into_iter()
        .find_map(|architecture| Some((architecture, (architecture.write)(config)?)))?;
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", Value::String(architecture.name.into()));
    for (key, value) in keys {
        metadata.set(format!("{}.{key}", architecture.name), value);
    }
    Some((architecture, metadata))
}

/// A count as files have it.
fn count(n: usize) -> Option<Value> {
    Some(Value::U32(n.try_into().ok()?))
}

/// The keys that all architectures have.
fn write_common(config: &ModelConfig) -> Option<Keys> {
    if (config.embedding_scale, config.logits_scale) != (1.0, 1.0) {
        return None;
    }
    Some(vec![
        // State space models have no limit; llama.cpp's converter writes this.
        ("context_length", Value::U32(1 << 20)),
        ("embedding_length", count(config.d_model)?),
        ("block_count", count(config.layers.len())?),
        ("vocab_size", count(config.vocab_size)?),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32)),
    ])
}
