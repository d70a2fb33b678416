//! What a configuration is made of, for the families that write it down: one block of each kind, and where they are.
//!
//! A writer need not look whether all blocks of a kind are alike: what it writes is read again, and must give the same.

use serde_json::{Map, Value, json};

use super::layer_types::LayerType;
use crate::config::{
    AttentionConfig, Mamba1Config, Mamba2Config, MixerSpec, MlpConfig, ModelConfig, MoeConfig,
    ShortConvConfig,
};

/// The first block of each kind.
#[derive(Default)]
pub(super) struct Parts<'a> {
    pub mamba1: Option<&'a Mamba1Config>,
    pub mamba2: Option<&'a Mamba2Config>,
    pub attention: Option<&'a AttentionConfig>,
    pub short_conv: Option<&'a ShortConvConfig>,
    pub mlp: Option<&'a MlpConfig>,
    pub moe: Option<&'a MoeConfig>,
}

impl<'a> Parts<'a> {
    pub(super) fn of(config: &'a ModelConfig) -> Self {
        let mut parts = Self::default();
        for mixer in config.mixers() {
            match mixer {
                MixerSpec::Mamba1(c) => _ = parts.mamba1.get_or_insert(c),
                MixerSpec::Mamba2(c) => _ = parts.mamba2.get_or_insert(c),
                MixerSpec::Attention(c) => _ = parts.attention.get_or_insert(c),
                MixerSpec::ShortConv(c) => _ = parts.short_conv.get_or_insert(c),
                MixerSpec::Mlp(c) => _ = parts.mlp.get_or_insert(c),
                MixerSpec::Moe(c) => _ = parts.moe.get_or_insert(c),
            }
        }
        parts
    }
}

/// What each layer is built around: its first mixer.
pub(super) fn types(config: &ModelConfig) -> Option<Vec<LayerType>> {
    let kind = |mixer: &MixerSpec| match mixer {
        MixerSpec::Mamba1(_) | MixerSpec::Mamba2(_) => LayerType::Mamba,
        MixerSpec::Attention(_) => LayerType::Attention,
        MixerSpec::ShortConv(_) => LayerType::Conv,
        MixerSpec::Mlp(_) => LayerType::Mlp,
        MixerSpec::Moe(_) => LayerType::Moe,
    };
    let layers = config.layers.iter().map(|layer| {
        let (_, mixer) = layer.branches.first()?.mixers.first()?;
        Some(if layer.shared.is_some() { LayerType::Hybrid } else { kind(mixer) })
    });
    layers.collect()
}

/// The layers of a kind.
pub(super) fn layers_of(types: &[LayerType], kind: LayerType) -> Vec<usize> {
    (0..types.len()).filter(|i| types[*i] == kind).collect()
}

/// The scale of the first mixer of a branch of the first layer.
pub(super) fn scale(config: &ModelConfig, branch: usize, mixer: usize) -> Option<f64> {
    Some(config.layers.first()?.branches.get(branch)?.mixers.get(mixer)?.0)
}

/// What every configuration of transformers says, and more.
pub(super) fn object(config: &ModelConfig, model_type: &str, architecture: &str, more: &[Value]) -> Value {
    let eos = match config.eos_token_ids.as_slice() {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    };
    let architecture = match config.has_head {
        true => architecture.to_owned(),
        false => architecture.replace("ForCausalLM", "Model"),
    };
    let mut object = Map::new();
    let common = json!({
        "architectures": [architecture], "model_type": model_type, "vocab_size": config.padded_vocab_size,
        "hidden_size": config.d_model, "num_hidden_layers": config.layers.len(),
        "tie_word_embeddings": config.tie_embeddings, "eos_token_id": eos,
    });
    for part in [&common].into_iter().chain(more) {
        for (field, value) in part.as_object().into_iter().flatten() {
            object.insert(field.clone(), value.clone());
        }
    }
    Value::Object(object)
}

/// Bounds of the step size; JSON knows no infinity, but transformers writes it so.
pub(super) fn range((low, high): (f64, f64)) -> Value {
    json!([low, if high.is_finite() { json!(high) } else { json!({"__float__": "Infinity"}) }])
}

/// The number whose inverse is this one.
pub(super) fn inverse(x: f64) -> f64 {
    let inverse = 1.0 / x;
    // A short decimal fraction, if one has that inverse.
    let short = format!("{inverse:.12}").parse().unwrap_or(inverse);
    if 1.0 / short == x { short } else { inverse }
}
