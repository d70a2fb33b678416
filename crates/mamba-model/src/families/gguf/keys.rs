//! The keys with which all architectures describe the same blocks.
//!
//! What is written need not be checked: it is read again, and must give the same model.

use crate::checkpoint::gguf::{Array, Value};
use crate::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig, Rope, RopeScaling};
use crate::families::parts::Parts;

/// Keys below the name of an architecture.
pub(super) type Keys = Vec<(&'static str, Value)>;

/// A count as files have it.
pub(super) fn count(n: usize) -> Option<Value> {
    Some(Value::U32(n.try_into().ok()?))
}

/// A number as files have it.
pub(super) fn number(x: f64) -> Value {
    Value::F32(x as f32)
}

/// A count for each layer.
pub(super) fn counts(counts: impl Iterator<Item = usize>) -> Option<Value> {
    let counts = counts.map(i32::try_from).collect::<Result<Vec<_>, _>>().ok()?;
    Some(Array::I32(counts).into())
}

/// The keys that all architectures have.
pub(super) fn common(config: &ModelConfig) -> Option<Keys> {
    Some(vec![
        // Configurations have no limit; llama.cpp's converter writes this for state space models.
        ("context_length", Value::U32(1 << 20)),
        ("embedding_length", count(config.d_model)?),
        ("block_count", count(config.layers.len())?),
        ("vocab_size", count(config.vocab_size)?),
        ("attention.layer_norm_rms_epsilon", number(config.norm_eps)),
    ])
}

/// What models without attention and without multilayer perceptrons say of them.
pub(super) fn neither_attention_nor_mlp() -> Keys {
    vec![("feed_forward_length", Value::U32(0)), ("attention.head_count", Value::U32(0))]
}

pub(super) fn mamba1(c: &Mamba1Config) -> Option<Keys> {
    Some(vec![
        ("ssm.inner_size", count(c.d_inner)?),
        ("ssm.state_size", count(c.d_state)?),
        ("ssm.conv_kernel", count(c.d_conv)?),
        ("ssm.time_step_rank", count(c.dt_rank)?),
    ])
}

pub(super) fn mamba2(c: &Mamba2Config) -> Option<Keys> {
    Some(vec![
        ("ssm.inner_size", count(c.d_inner)?),
        ("ssm.state_size", count(c.d_state)?),
        ("ssm.conv_kernel", count(c.d_conv)?),
        ("ssm.time_step_rank", count(c.nheads())?),
        ("ssm.group_count", count(c.ngroups)?),
    ])
}

/// Heads, of keys for each layer or, if all have some, for all of them.
pub(super) fn attention(config: &ModelConfig) -> Option<Keys> {
    let Some(c) = Parts::of(config).attention else {
        return Some(vec![
            ("attention.head_count", Value::U32(0)),
            ("attention.head_count_kv", Value::U32(0)),
        ]);
    };
    let mut heads = config.layers.iter().map(|layer| {
        let mut mixers = layer.branches.iter().flat_map(|branch| &branch.mixers);
        let has = mixers.any(|(_, mixer)| matches!(mixer, MixerSpec::Attention(_)));
        if has { c.nheads_kv } else { 0 }
    });
    let heads_kv = match heads.clone().all(|heads| heads > 0) {
        true => count(c.nheads_kv)?,
        false => counts(&mut heads)?,
    };
    Some(vec![
        ("attention.head_count", count(c.nheads)?),
        ("attention.head_count_kv", heads_kv),
        ("attention.key_length", count(c.headdim)?),
        ("attention.value_length", count(c.headdim)?),
    ])
}

pub(super) fn rope(rope: &Rope) -> Option<Keys> {
    let mut keys = vec![("rope.dimension_count", count(rope.dim)?), ("rope.freq_base", number(rope.base))];
    let mut stretched = |kind: &str, factor: f64| {
        keys.push(("rope.scaling.type", Value::String(kind.into())));
        keys.push(("rope.scaling.factor", number(factor)));
    };
    match rope.scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } => stretched("linear", factor),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, .. } => {
            stretched("yarn", factor);
            keys.extend([
                ("rope.scaling.original_context_length", count(original_context as usize)?),
                ("rope.scaling.yarn_beta_fast", number(beta_fast)),
                ("rope.scaling.yarn_beta_slow", number(beta_slow)),
            ]);
        }
        RopeScaling::Llama3 { .. } => return None, // llama.cpp has a tensor for it
    }
    Some(keys)
}
