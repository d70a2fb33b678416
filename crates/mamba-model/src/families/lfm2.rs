//! transformers' `lfm2`: gated short convolutions and attention with norms of queries and keys, an MLP in every layer.

use serde_json::{Value, json};

use super::layer_types::{self, LayerType};
use super::parts::{self, Parts};
use super::{Family, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{Fields, LayerSpec, MixerSpec, MlpConfig, ModelConfig, ShortConvConfig};

pub(super) static LFM2: Family = Family {
    model_type: Some("lfm2"),
    names: NameMap::new(&[
        ("embedding", "model.embed_tokens"),
        ("layers.{l}.0.norm", "model.layers.{l}.operator_norm"),
        ("layers.{l}.0.short_conv", "model.layers.{l}.conv"),
        ("layers.{l}.0.short_conv.conv1d", "model.layers.{l}.conv.conv"),
        ("layers.{l}.0.attention", "model.layers.{l}.self_attn"),
        ("layers.{l}.0.attention.o_proj", "model.layers.{l}.self_attn.out_proj"),
        ("layers.{l}.0.attention.q_norm", "model.layers.{l}.self_attn.q_layernorm"),
        ("layers.{l}.0.attention.k_norm", "model.layers.{l}.self_attn.k_layernorm"),
        ("layers.{l}.1.norm", "model.layers.{l}.ffn_norm"),
        ("layers.{l}.1.mlp.gate_proj", "model.layers.{l}.feed_forward.w1"),
        ("layers.{l}.1.mlp.up_proj", "model.layers.{l}.feed_forward.w3"),
        ("layers.{l}.1.mlp.down_proj", "model.layers.{l}.feed_forward.w2"),
        ("norm_f", "model.embedding_norm"),
    ])
    .with_optional("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    let d_model = fields.usize("hidden_size")?;
    let n_layer = fields.layers("num_hidden_layers")?;
    let norm_eps = fields.f64_or("norm_eps", 1e-5)?;
    let conv = ShortConvConfig {
        d_conv: fields.usize_or("conv_L_cache", 3)?,
        bias: fields.bool_or("conv_bias", false)?,
    };
    let mut attention = transformer::attention(fields, d_model, Some(8))?;
    (attention.qkv_bias, attention.out_bias) = (false, false);
    attention.rope = Some(transformer::rope(fields, attention.headdim, 1e6, None)?);
    attention.qk_norm_eps = Some(norm_eps);
    let mlp = MlpConfig::new(d_hidden(fields)?);
    let types = match layer_types::read_all(fields, n_layer)? {
        Some(types) => types,
        None => {
            let attention = fields.usizes_opt("full_attn_idxs")?;
            let kind = |i| match attention.as_ref().is_none_or(|layers| layers.contains(&i)) {
                true => LayerType::Attention,
                false => LayerType::Conv,
            };
            (0..n_layer).map(kind).collect()
        }
    };
    let layer = |kind: &LayerType| {
        let mixer = match kind {
            LayerType::Conv => MixerSpec::ShortConv(conv.clone()),
            LayerType::Attention => MixerSpec::Attention(attention.clone()),
            other => {
                let message = format!("has a layer of kind {other:?}, expected conv or attention");
                return Err(fields.error("layer_types", message));
            }
        };
        Ok(LayerSpec::new([mixer, MixerSpec::Mlp(mlp.clone())]))
    };
    Ok(ModelConfig {
        norm_eps,
        residual_in_f32: false,
        tie_embeddings: fields.bool_or("tie_embedding", fields.bool_or("tie_word_embeddings", true)?)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        ..ModelConfig::of_layers(
            fields.usize("vocab_size")?,
            d_model,
            types.iter().map(layer).collect::<Result<Vec<_>>>()?,
        )
    })
}

/// Two thirds of what the configuration says, times a multiplier, rounded up.
fn d_hidden(fields: &Fields) -> Result<usize> {
    let size = match fields.usize_opt("block_ff_dim")? {
        Some(size) => size,
        None => fields.usize("intermediate_size")?,
    };
    if !fields.bool_or("block_auto_adjust_ff_dim", true)? {
        return Ok(size);
    }
    let two_thirds = 2 * size / 3;
    if fields.get("block_ffn_dim_multiplier").is_none() && fields.contains("block_ffn_dim_multiplier") {
        return Ok(two_thirds); // null: neither multiplied nor rounded
    }
    let multiplied = fields.f64_or("block_ffn_dim_multiplier", 1.0)? * two_thirds as f64;
    if !(0.0..2f64.powi(31)).contains(&multiplied) {
        let message = format!("gives a width of {multiplied}, expected a number from 0 to 2^31");
        return Err(fields.error("block_ffn_dim_multiplier", message));
    }
    Ok((multiplied as usize).next_multiple_of(fields.usize_or("block_multiple_of", 256)?.max(1)))
}

fn write(config: &ModelConfig) -> Option<Value> {
    let parts = Parts::of(config);
    let (attention, mlp) = (parts.attention?, parts.mlp?);
    let conv = parts.short_conv.map_or(json!({}), |c| json!({"conv_L_cache": c.d_conv, "conv_bias": c.bias}));
    let words = json!({
        "norm_eps": config.norm_eps, "layer_types": layer_types::words(&parts::types(config)?),
        "rope_parameters": transformer::write_rope(attention.rope.as_ref()?, attention.headdim),
        "intermediate_size": mlp.d_hidden, "block_auto_adjust_ff_dim": false,
    });
    let more = [transformer::write_attention(attention), conv, words];
    Some(parts::object(config, "lfm2", "Lfm2ForCausalLM", &more))
}
