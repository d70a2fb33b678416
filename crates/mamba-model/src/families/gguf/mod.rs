//! How GGUF files spell models: architectures, which are to them what families are to a `config.json`.

mod described;
mod falcon_h1;
mod forms;
mod granitehybrid;
mod jamba;
mod keys;
mod lfm2;
mod mamba;
mod mamba2;
mod names;
mod nemotron_h;
mod words;

use std::path::Path;

use serde_json::{Map, Number, Value as Json};

use self::described::{Described, Shapes};
use self::keys::Keys;
use crate::checkpoint::gguf::{Metadata, Value};
use crate::checkpoint::{Checkpoint, Form, NameMap};
use crate::config::{Fields, LayerSpec, ModelConfig};
use crate::{Error, Result};

/// An architecture of GGUF files, as data.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// What files give as `general.architecture`; their keys stand behind it and a dot.
    pub name: &'static str,
    /// How files spell our names.
    pub names: NameMap,
    /// Reads the layers, and what else is particular, into a configuration with the rest.
    parse: fn(&Described, &mut ModelConfig) -> Result<()>,
    /// The keys below the name for a configuration, beside those that all architectures have. What they say is read again
    /// and must give the configuration, so that this need not look for what has no words.
    write: fn(&ModelConfig) -> Option<Keys>,
    /// How files keep a tensor, by its canonical name.
    pub form: fn(&ModelConfig, &str) -> Form,
    /// How multipliers go into the weights, if files have no words for them.
    pub folding: Option<Folding>,
}

/// How multipliers go into the weights.
#[derive(Debug)]
pub(crate) struct Folding {
    /// Makes a configuration that of the multiplied weights.
    without: fn(&mut ModelConfig),
    /// What the rows of a tensor are multiplied by, by its canonical name; empty if it stays as it is.
    pub factors: fn(&ModelConfig, &str) -> Vec<f64>,
}

static ARCHITECTURES: [&Architecture; 8] = [
    &mamba::MAMBA,
    &mamba2::MAMBA2,
    &jamba::JAMBA,
    &granitehybrid::GRANITE_HYBRID,
    &falcon_h1::FALCON_H1,
    &nemotron_h::NEMOTRON_H,
    &nemotron_h::NEMOTRON_H_MOE,
    &lfm2::LFM2,
];

impl Architecture {
    /// The configuration as files of this architecture hold it: without multipliers that go into the weights.
    pub fn stored(&self, config: &ModelConfig) -> ModelConfig {
        let mut config = config.clone();
        if let Some(folding) = &self.folding {
            (folding.without)(&mut config);
        }
        config
    }
}

/// A model as a GGUF file describes it.
pub(crate) struct Parsed {
    pub config: ModelConfig,
    pub architecture: &'static Architecture,
    /// The names, and which tensors may stay unread.
    pub names: NameMap,
}

/// Reads the configuration of a GGUF checkpoint.
pub(crate) fn parse(checkpoint: &Checkpoint, metadata: &Metadata) -> Result<Parsed> {
    read(checkpoint.origin(), metadata, &|name| Some(checkpoint.info(name)?.shape.to_vec()))
}

fn read(origin: &str, metadata: &Metadata, shapes: Shapes) -> Result<Parsed> {
    let file = Path::new(origin);
    let general = Fields::from_object(object(metadata, ""), Some(file), String::new());
    let key = "general.architecture";
    let name = general.str_opt(key)?.ok_or_else(|| general.error(key, "is missing"))?;
    let architecture = ARCHITECTURES.into_iter().find(|known| known.name == name).ok_or_else(|| {
        let known: Vec<_> = ARCHITECTURES.iter().map(|known| known.name).collect();
        general.error(key, format!("is \"{name}\", expected one of {}", known.join(", ")))
    })?;
    let prefix = format!("{name}.");
    let fields = Fields::from_object(object(metadata, &prefix), Some(file), prefix);
    let described = Described { origin, fields, shapes };
    let mut config = common(&described, metadata)?;
    (architecture.parse)(&described, &mut config)?;
    config.validate().map_err(|error| match error {
        Error::Config { field, message, .. } => described.fields.error(&field, message),
        other => other,
    })?;
    let names = match described.predicting_layers()? {
        0 => architecture.names,
        _ => architecture.names.with_unread_from("blk.{l}", config.layers.len()),
    };
    Ok(Parsed { config, architecture, names })
}

/// What all architectures say in the same way; layers are to follow.
fn common(described: &Described, metadata: &Metadata) -> Result<ModelConfig> {
    let fields = &described.fields;
    let rows = described.rows("token_embd.weight")?;
    let said = fields.usize_opt("vocab_size")?.unwrap_or(rows);
    let vocab_size = known_tokens(metadata).unwrap_or(rows).min(said).min(rows);
    let layers = fields.layers("block_count")?.saturating_sub(described.predicting_layers()?);
    let layers = vec![LayerSpec::new([]); layers];
    Ok(ModelConfig {
        padded_vocab_size: rows,
        norm_eps: fields.f64_or("attention.layer_norm_rms_epsilon", 1e-5)?,
        tie_embeddings: (described.shapes)("output.weight").is_none(),
        eos_token_ids: ends(metadata),
        ..ModelConfig::of_layers(vocab_size, fields.usize("embedding_length")?, layers)
    })
}

/// The keys for tokens at which generation ends: those of a text, of a turn and of a message.
const ENDS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The tokens at which generation ends, each once.
fn ends(metadata: &Metadata) -> Vec<u32> {
    let mut ends = vec![];
    for id in ENDS.iter().filter_map(|key| metadata.u64(key)?.try_into().ok()) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    ends
}

/// Adds tokens at which generation ends, as far as there are keys left for them.
pub(crate) fn set_ends(metadata: &mut Metadata, ids: &[u32]) {
    for &id in ids {
        let free = ENDS.into_iter().find(|key| metadata.get(key).is_none());
        if let (false, Some(key)) = (ends(metadata).contains(&id), free) {
            metadata.set(key, Value::U32(id));
        }
    }
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

/// The first architecture that has words for a model, and those words. `shapes` are those of the tensors in a file of an
/// architecture, by their names in it.
pub(crate) fn describe<S: Fn(&str) -> Option<Vec<usize>>>(
    config: &ModelConfig,
    shapes: impl Fn(&'static Architecture) -> S,
) -> Option<(&'static Architecture, Metadata)> {
    ARCHITECTURES.into_iter().find_map(|architecture| {
        let keys = (architecture.write)(config)?;
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", Value::String(architecture.name.into()));
        for (key, value) in keys::common(config)?.into_iter().chain(keys) {
            metadata.set(format!("{}.{key}", architecture.name), value);
        }
        let again = read("", &metadata, &shapes(architecture)).ok()?.config;
        (words::sayable(again) == words::sayable(architecture.stored(config)))
            .then_some((architecture, metadata))
    })
}
