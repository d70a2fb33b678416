//! transformers' `granitemoehybrid`, Granite 4: Mamba-2 and attention, each followed by experts and a shared MLP or by that
//! MLP alone, with multipliers.

use serde_json::{Value, json};

use super::layer_types::{self, LayerType};
use super::parts::{self, Parts};
use super::{Family, mamba2_fields, require_silu, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    Fields, LayerSpec, MixerSpec, MlpConfig, MlpLayout, ModelConfig, MoeConfig, RouterConfig,
};

pub(super) static GRANITE_MOE_HYBRID: Family = Family {
    model_type: Some("granitemoehybrid"),
    names: NameMap::new(&[
        ("embedding", "model.embed_tokens"),
        ("layers.{l}.0.norm", "model.layers.{l}.input_layernorm"),
        ("layers.{l}.0.mamba2", "model.layers.{l}.mamba"),
        ("layers.{l}.0.attention", "model.layers.{l}.self_attn"),
        ("layers.{l}.1.norm", "model.layers.{l}.post_attention_layernorm"),
        ("layers.{l}.1.mlp.gate_up_proj", "model.layers.{l}.shared_mlp.input_linear"),
        ("layers.{l}.1.mlp.down_proj", "model.layers.{l}.shared_mlp.output_linear"),
        ("layers.{l}.1.moe.shared.gate_up_proj", "model.layers.{l}.shared_mlp.input_linear"),
        ("layers.{l}.1.moe.shared.down_proj", "model.layers.{l}.shared_mlp.output_linear"),
        ("layers.{l}.1.moe.experts.gate_up_proj", "model.layers.{l}.block_sparse_moe.input_linear.weight"),
        ("layers.{l}.1.moe.experts.down_proj", "model.layers.{l}.block_sparse_moe.output_linear.weight"),
        ("layers.{l}.1.moe.router", "model.layers.{l}.block_sparse_moe.router.layer"),
        ("norm_f", "model.norm"),
    ])
    .with_optional("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_act")?; // the convolutions have it too
    let d_model = fields.usize("hidden_size")?;
    let n_layer = fields.layers("num_hidden_layers")?;
    let norm_eps = fields.f64_or("rms_norm_eps", 1e-6)?;
    let mamba = mamba2_fields::mamba2(fields, d_model, None, norm_eps)?;
    let mut attention = transformer::attention(fields, d_model, None)?;
    attention.softmax_scale = fields.f64_or("attention_multiplier", 1.0)?;
    if fields.str_opt("position_embedding_type")?.as_deref() == Some("rope") {
        attention.rope = Some(transformer::rope(fields, attention.headdim, 1e4, None)?);
    }
    let gate_up = |d_hidden: usize| -> Result<MlpConfig> {
        Ok(MlpConfig { layout: MlpLayout::GateUp, ..transformer::mlp(fields, d_hidden, false)? })
    };
    let shared = gate_up(fields.usize_or("shared_intermediate_size", 1024)?)?;
    let feed_forward = match fields.usize_or("num_local_experts", 8)? {
        0 => MixerSpec::Mlp(shared),
        experts => MixerSpec::Moe(MoeConfig {
            experts,
            top_k: fields.usize_or("num_experts_per_tok", 2)?,
            expert: gate_up(fields.usize("intermediate_size")?)?,
            stacked: true,
            // A softmax over the scores of the chosen ones is that over all of them, made to add up to 1 again.
            router: RouterConfig { normalize: true, ..RouterConfig::softmax() },
            shared: Some(shared),
            d_latent: None,
            latent_bias: false,
        }),
    };
    let types = layer_types::read_all(fields, n_layer)?.unwrap_or_else(|| vec![LayerType::Mamba; n_layer]);
    let residual = fields.f64_or("residual_multiplier", 1.0)?;
    let layer = |kind: &LayerType| {
        let mixer = match kind {
            LayerType::Mamba => MixerSpec::Mamba2(mamba.clone()),
            LayerType::Attention => MixerSpec::Attention(attention.clone()),
            other => {
                let message = format!("has a layer of kind {other:?}, expected mamba or attention");
                return Err(fields.error("layer_types", message));
            }
        };
        Ok(LayerSpec::new([mixer, feed_forward.clone()]).scaled(residual))
    };
    Ok(ModelConfig {
        norm_eps,
        residual_in_f32: false,
        tie_embeddings: fields.bool_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        embedding_scale: fields.f64_or("embedding_multiplier", 1.0)?,
        logits_scale: 1.0 / fields.f64_or("logits_scaling", 1.0)?,
        ..ModelConfig::of_layers(
            fields.usize("vocab_size")?,
            d_model,
            types.iter().map(layer).collect::<Result<Vec<_>>>()?,
        )
    })
}

fn write(config: &ModelConfig) -> Option<Value> {
    let parts = Parts::of(config);
    let mamba = parts.mamba2?;
    let attention = match parts.attention {
        Some(c) => transformer::write_attention(c),
        None => json!({"num_attention_heads": 1, "num_key_value_heads": 1}), // of which there is none
    };
    let rope = parts.attention.and_then(|c| Some((c.rope.as_ref()?, c.headdim)));
    let rope = match rope {
        Some((rope, headdim)) => json!({
            "position_embedding_type": "rope", "rope_parameters": transformer::write_rope(rope, headdim),
        }),
        None => json!({"position_embedding_type": null}),
    };
    let experts = match (parts.moe, parts.mlp) {
        (Some(moe), None) => json!({
            "num_local_experts": moe.experts, "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.expert.d_hidden,
            "shared_intermediate_size": moe.shared.as_ref()?.d_hidden,
            "hidden_act": transformer::activation_word(moe.expert.activation),
        }),
        (None, Some(mlp)) => json!({
            "num_local_experts": 0, "intermediate_size": mlp.d_hidden, "shared_intermediate_size": mlp.d_hidden,
            "hidden_act": transformer::activation_word(mlp.activation),
        }),
        _ => return None,
    };
    let words = json!({
        "rms_norm_eps": config.norm_eps, "layer_types": layer_types::words(&parts::types(config)?),
        "embedding_multiplier": config.embedding_scale, "logits_scaling": parts::inverse(config.logits_scale),
        "residual_multiplier": parts::scale(config, 0, 0)?,
        "attention_multiplier": parts.attention.map_or(1.0, |c| c.softmax_scale),
    });
    let more = [mamba2_fields::write(mamba, config.d_model), attention, rope, experts, words];
    Some(parts::object(config, "granitemoehybrid", "GraniteMoeHybridForCausalLM", &more))
}
