//! transformers' `falcon_h1`: Mamba-2 and attention side by side in every layer, then an MLP, with multipliers everywhere.

use serde_json::{Value, json};

use super::parts::{self, Parts};
use super::{Family, mamba2_fields, require_silu, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{BranchSpec, Fields, GatedNorm, LayerSpec, MixerSpec, ModelConfig};

pub(super) static FALCON_H1: Family = Family {
    model_type: Some("falcon_h1"),
    names: NameMap::new(&[
        ("embedding", "model.embed_tokens"),
        ("layers.{l}.0.norm", "model.layers.{l}.input_layernorm"),
        ("layers.{l}.0.mamba2", "model.layers.{l}.mamba"),
        ("layers.{l}.0.attention", "model.layers.{l}.self_attn"),
        ("layers.{l}.1.norm", "model.layers.{l}.pre_ff_layernorm"),
        ("layers.{l}.1.mlp", "model.layers.{l}.feed_forward"),
        ("norm_f", "model.final_layernorm"),
    ])
    .with_optional("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_act")?; // the convolutions have it too
    let d_model = fields.usize("hidden_size")?;
    let norm_eps = fields.f64_or("rms_norm_eps", 1e-5)?;
    let d_ssm = match fields.get("mamba_d_ssm") {
        None if fields.contains("mamba_d_ssm") => None, // null: what mamba_expand says
        _ => Some(fields.usize_or("mamba_d_ssm", 1024)?),
    };
    let mut mamba = mamba2_fields::mamba2(fields, d_model, d_ssm, norm_eps)?;
    mamba.out_bias = fields.bool_or("projectors_bias", false)?;
    mamba.input_scale = fields.f64_or("ssm_in_multiplier", 1.0)?;
    mamba.zxbcdt_scales = multipliers(fields, "ssm_multipliers")?;
    mamba.norm = match fields.bool_or("mamba_rms_norm", false)? {
        true => {
            Some(GatedNorm { eps: norm_eps, before_gate: fields.bool_or("mamba_norm_before_gate", true)? })
        }
        false => None,
    };
    let mut attention = transformer::attention(fields, d_model, Some(8))?;
    attention.rope = Some(transformer::rope(fields, attention.headdim, 1e4, None)?);
    attention.input_scale = fields.f64_or("attention_in_multiplier", 1.0)?;
    attention.key_scale = fields.f64_or("key_multiplier", 1.0)?;
    let mut mlp =
        transformer::mlp(fields, fields.usize("intermediate_size")?, fields.bool_or("mlp_bias", false)?)?;
    let [gate, down] = multipliers(fields, "mlp_multipliers")?;
    mlp.gate_scale = gate;
    let first = vec![
        (fields.f64_or("ssm_out_multiplier", 1.0)?, MixerSpec::Mamba2(mamba)),
        (fields.f64_or("attention_out_multiplier", 1.0)?, MixerSpec::Attention(attention)),
    ];
    let second = vec![(down, MixerSpec::Mlp(mlp))];
    let branches = vec![BranchSpec { mixers: first }, BranchSpec { mixers: second }];
    let layer = LayerSpec { shared: None, branches };
    Ok(ModelConfig {
        norm_eps,
        residual_in_f32: false,
        tie_embeddings: fields.bool_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        embedding_scale: fields.f64_or("embedding_multiplier", 1.0)?,
        logits_scale: fields.f64_or("lm_head_multiplier", 1.0)?,
        ..ModelConfig::of_layers(
            fields.usize("vocab_size")?,
            d_model,
            vec![layer; fields.layers("num_hidden_layers")?],
        )
    })
}

/// A list of so many numbers; all 1 if absent.
fn multipliers<const N: usize>(fields: &Fields, field: &str) -> Result<[f64; N]> {
    let Some(values) = fields.f64s_opt(field)? else { return Ok([1.0; N]) };
    values
        .as_slice()
        .try_into()
        .map_err(|_| fields.error(field, format!("has {} numbers, expected {N}", values.len())))
}

fn write(config: &ModelConfig) -> Option<Value> {
    let parts = Parts::of(config);
    let (mamba, attention, mlp) = (parts.mamba2?, parts.attention?, parts.mlp?);
    let words = json!({
        "rms_norm_eps": config.norm_eps, "mamba_d_ssm": mamba.d_ssm, "projectors_bias": mamba.out_bias,
        "ssm_in_multiplier": mamba.input_scale, "ssm_multipliers": mamba.zxbcdt_scales,
        "mamba_rms_norm": mamba.norm.is_some(),
        "mamba_norm_before_gate": mamba.norm.is_none_or(|norm| norm.before_gate),
        "rope_parameters": transformer::write_rope(attention.rope.as_ref()?, attention.headdim),
        "attention_in_multiplier": attention.input_scale, "key_multiplier": attention.key_scale,
        "intermediate_size": mlp.d_hidden, "mlp_bias": mlp.bias,
        "hidden_act": transformer::activation_word(mlp.activation),
        "mlp_multipliers": [mlp.gate_scale, parts::scale(config, 1, 0)?],
        "ssm_out_multiplier": parts::scale(config, 0, 0)?,
        "attention_out_multiplier": parts::scale(config, 0, 1)?,
        "embedding_multiplier": config.embedding_scale, "lm_head_multiplier": config.logits_scale,
    });
    let more = [mamba2_fields::write(mamba, config.d_model), transformer::write_attention(attention), words];
    Some(parts::object(config, "falcon_h1", "FalconH1ForCausalLM", &more))
}
