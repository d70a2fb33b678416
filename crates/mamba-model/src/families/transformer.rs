//! What the configurations of hybrids say about attention, rotary embeddings and multilayer perceptrons.

use serde_json::{Value, json};

use crate::Result;
use crate::config::{AttentionConfig, Fields, MlpActivation, MlpConfig, Rope, RopeScaling};

/// Heads and biases of attention by their usual names, without a rotary embedding.
pub(super) fn attention(
    fields: &Fields,
    d_model: usize,
    default_kv: Option<usize>,
) -> Result<AttentionConfig> {
    let nheads = fields.usize("num_attention_heads")?;
    let nheads_kv = fields.usize_opt("num_key_value_heads")?.or(default_kv).unwrap_or(nheads);
    let headdim = match fields.usize_opt("head_dim")? {
        Some(headdim) => headdim,
        None if nheads == 0 => return Err(fields.error("num_attention_heads", "is 0, expected at least 1")),
        None => d_model / nheads,
    };
    let bias = fields.bool_or("attention_bias", false)?;
    Ok(AttentionConfig { qkv_bias: bias, out_bias: bias, ..AttentionConfig::new(nheads, nheads_kv, headdim) })
}

/// A multilayer perceptron with a gate, three matrices and the activation of a field.
pub(super) fn mlp(fields: &Fields, d_hidden: usize, bias: bool) -> Result<MlpConfig> {
    let activation = activation(fields, "hidden_act", MlpActivation::Silu)?;
    Ok(MlpConfig { activation, bias, ..MlpConfig::new(d_hidden) })
}

/// What [`attention`] reads.
pub(super) fn write_attention(c: &AttentionConfig) -> Value {
    json!({
        "num_attention_heads": c.nheads, "num_key_value_heads": c.nheads_kv, "head_dim": c.headdim,
        "attention_bias": c.qkv_bias,
    })
}

/// What [`rope`] reads, for heads of this size.
pub(super) fn write_rope(rope: &Rope, headdim: usize) -> Value {
    let mut words = match rope.scaling {
        RopeScaling::None => json!({"rope_type": "default"}),
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": whole(original_context),
        }),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, truncate } => {
            json!({
                "rope_type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow,
                "original_max_position_embeddings": whole(original_context), "attention_factor": attention_factor,
                "truncate": truncate,
            })
        }
    };
    if let Some(object) = words.as_object_mut() {
        object.insert("rope_theta".into(), json!(rope.base));
        if rope.dim != headdim {
            object.insert("partial_rotary_factor".into(), json!(rope.dim as f64 / headdim as f64));
        }
    }
    words
}

/// Without a fraction where there is none.
fn whole(x: f64) -> Value {
    if x == x.trunc() && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// An activation by its usual name.
pub(super) fn activation(fields: &Fields, field: &str, default: MlpActivation) -> Result<MlpActivation> {
    Ok(match fields.str_opt(field)?.as_deref() {
        None => default,
        Some("silu" | "swish") => MlpActivation::Silu,
        Some("gelu") => MlpActivation::Gelu,
        Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => MlpActivation::GeluTanh,
        Some("relu2") => MlpActivation::Relu2,
        Some(other) => {
            let known = "silu, gelu, gelu_new, gelu_pytorch_tanh or relu2";
            return Err(fields.error(field, format!("is \"{other}\", expected {known}")));
        }
    })
}

/// The name that [`activation`] reads.
pub(super) fn activation_word(activation: MlpActivation) -> &'static str {
    match activation {
        MlpActivation::Silu => "silu",
        MlpActivation::Gelu => "gelu",
        MlpActivation::GeluTanh => "gelu_pytorch_tanh",
        MlpActivation::Relu2 => "relu2",
    }
}

/// The rotary embedding: `rope_parameters` of transformers 5, or `rope_theta`, `rope_scaling` and `partial_rotary_factor`
/// of earlier ones.
pub(super) fn rope(
    fields: &Fields,
    headdim: usize,
    default_base: f64,
    forced_part: Option<f64>,
) -> Result<Rope> {
    let new = fields.object("rope_parameters")?;
    let old = fields.object("rope_scaling")?;
    let scaling = if fields.is_set("rope_parameters") { &new } else { &old };
    let base = new.f64_or("rope_theta", fields.f64_or("rope_theta", default_base)?)?;
    let part = match forced_part {
        Some(part) => part,
        None => new.f64_or("partial_rotary_factor", fields.f64_or("partial_rotary_factor", 1.0)?)?,
    };
    let dim = (headdim as f64 * part) as usize;
    Ok(Rope { dim, base, interleaved: false, scaling: rope_scaling(fields, scaling)? })
}

fn rope_scaling(fields: &Fields, scaling: &Fields) -> Result<RopeScaling> {
    let kind = match scaling.str_opt("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.str_opt("type")?,
    };
    let number = |field: &str| {
        let value = scaling.f64_or(field, f64::NAN)?;
        if value > 0.0 { Ok(value) } else { Err(scaling.error(field, "is missing or not a positive number")) }
    };
    // Of the context that a model was trained with, where only the one it has is said.
    let context = fields.f64_or("max_position_embeddings", f64::NAN)?;
    let original_context = scaling.f64_or("original_max_position_embeddings", context)?;
    Ok(match kind.as_deref() {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: number("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: match original_context > 0.0 {
                true => original_context,
                false => number("original_max_position_embeddings")?,
            },
        },
        Some("yarn") => {
            let factor = scaling.f64_or("factor", context / original_context)?;
            let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
            let (m, all) = (scaling.f64_or("mscale", 0.0)?, scaling.f64_or("mscale_all_dim", 0.0)?);
            let usual = if m != 0.0 && all != 0.0 { scale(m) / scale(all) } else { scale(1.0) };
            RopeScaling::Yarn {
                factor,
                beta_fast: scaling.f64_or("beta_fast", 32.0)?,
                beta_slow: scaling.f64_or("beta_slow", 1.0)?,
                original_context,
                attention_factor: scaling.f64_or("attention_factor", usual)?,
                truncate: scaling.bool_or("truncate", true)?,
            }
        }
        Some(other) => {
            let message = format!("is \"{other}\", expected default, linear, llama3 or yarn");
            return Err(scaling.error("rope_type", message));
        }
    })
}
