//! transformers' `bamba`: Mamba-2, some layers attention with half of each head turning, an MLP in every layer.

use serde_json::{Value, json};

use super::layer_types::LayerType;
use super::parts::{self, Parts};
use super::{Family, mamba2_fields, require_silu, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{Fields, LayerSpec, MixerSpec, ModelConfig};

pub(super) static BAMBA: Family = Family {
    model_type: Some("bamba"),
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

/// Of each head only a half turns, whatever the file says.
const TURNING: f64 = 0.5;

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_act")?; // the convolutions have it too
    let d_model = fields.usize("hidden_size")?;
    let norm_eps = fields.f64_or("rms_norm_eps", 1e-5)?;
    let mamba = mamba2_fields::mamba2(fields, d_model, None, norm_eps)?;
    let mut attention = transformer::attention(fields, d_model, Some(8))?;
    attention.rope = Some(transformer::rope(fields, attention.headdim, 1e4, Some(TURNING))?);
    let mlp =
        transformer::mlp(fields, fields.usize("intermediate_size")?, fields.bool_or("mlp_bias", false)?)?;
    let attention_layers = fields.usizes_opt("attn_layer_indices")?.unwrap_or_default();
    let layer = |i: usize| {
        let mixer = match attention_layers.contains(&i) {
            true => MixerSpec::Attention(attention.clone()),
            false => MixerSpec::Mamba2(mamba.clone()),
        };
        LayerSpec::new([mixer, MixerSpec::Mlp(mlp.clone())])
    };
    Ok(ModelConfig {
        norm_eps,
        residual_in_f32: false,
        tie_embeddings: fields.bool_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        ..ModelConfig::of_layers(
            fields.usize("vocab_size")?,
            d_model,
            (0..fields.layers("num_hidden_layers")?).map(layer),
        )
    })
}

fn write(config: &ModelConfig) -> Option<Value> {
    let parts = Parts::of(config);
    let (mamba, mlp) = (parts.mamba2?, parts.mlp?);
    let attention = match parts.attention {
        Some(c) => transformer::write_attention(c),
        None => json!({"num_attention_heads": 1, "num_key_value_heads": 1}), // of which there is none
    };
    let rope = match parts.attention {
        Some(c) => json!({"rope_parameters": transformer::write_rope(c.rope.as_ref()?, c.headdim)}),
        None => json!({}),
    };
    let words = json!({
        "rms_norm_eps": config.norm_eps, "intermediate_size": mlp.d_hidden, "mlp_bias": mlp.bias,
        "hidden_act": transformer::activation_word(mlp.activation),
        "attn_layer_indices": parts::layers_of(&parts::types(config)?, LayerType::Attention),
    });
    let more = [mamba2_fields::write(mamba, config.d_model), attention, rope, words];
    Some(parts::object(config, "bamba", "BambaForCausalLM", &more))
}
