//! NVIDIA's `nemotron_h`: one mixer a layer, out of Mamba-2, attention without positions, an MLP and a mixture of experts.
//!
//! As in transformers 5.23, the step size is at least `time_step_min`, when reading a prompt and when decoding alike.

use serde_json::{Value, json};

use super::layer_types::{self, LayerType};
use super::parts::{self, Parts};
use super::{Family, require_silu, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    AttentionConfig, Fields, GatedNorm, LayerSpec, Mamba2Config, MixerSpec, MlpActivation, MlpConfig,
    MlpLayout, ModelConfig, MoeConfig, RouterConfig, RouterScore,
};

pub(super) static NEMOTRON_H: Family = Family {
    model_type: Some("nemotron_h"),
    names: NameMap::new(&[
        ("embedding", "backbone.embeddings"),
        ("embedding", "model.embeddings"),
        ("layers.{l}.0.norm", "backbone.layers.{l}.norm"),
        ("layers.{l}.0.norm", "model.layers.{l}.norm"),
        ("layers.{l}.0.mamba2", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.mamba2", "model.layers.{l}.mixer"),
        ("layers.{l}.0.attention", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.attention", "model.layers.{l}.mixer"),
        ("layers.{l}.0.mlp", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.mlp", "model.layers.{l}.mixer"),
        ("layers.{l}.0.moe", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.moe", "model.layers.{l}.mixer"),
        ("layers.{l}.0.moe.router", "backbone.layers.{l}.mixer.gate"),
        ("layers.{l}.0.moe.router", "model.layers.{l}.mixer.gate"),
        ("layers.{l}.0.moe.router.correction_bias", "backbone.layers.{l}.mixer.gate.e_score_correction_bias"),
        ("layers.{l}.0.moe.router.correction_bias", "model.layers.{l}.mixer.gate.e_score_correction_bias"),
        ("layers.{l}.0.moe.shared", "backbone.layers.{l}.mixer.shared_experts"),
        ("layers.{l}.0.moe.shared", "model.layers.{l}.mixer.shared_experts"),
        ("layers.{l}.0.moe.latent_in", "backbone.layers.{l}.mixer.fc1_latent_proj"),
        ("layers.{l}.0.moe.latent_in", "model.layers.{l}.mixer.fc1_latent_proj"),
        ("layers.{l}.0.moe.latent_out", "backbone.layers.{l}.mixer.fc2_latent_proj"),
        ("layers.{l}.0.moe.latent_out", "model.layers.{l}.mixer.fc2_latent_proj"),
        ("norm_f", "backbone.norm_f"),
        ("norm_f", "model.norm_f"),
    ])
    .with_optional("backbone.")
    // Heads that predict several tokens are not used.
    .with_unread(&["mtp"]),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "mamba_hidden_act")?;
    let d_model = fields.usize("hidden_size")?;
    let norm_eps = fields.f64_or("layer_norm_epsilon", 1e-5)?;
    let mamba = mamba2(fields, d_model, norm_eps)?;
    let headdim = fields.usize_or("head_dim", 128)?;
    let heads = fields.usize_or("num_attention_heads", 32)?;
    if let Some(window) = fields.usize_opt("sliding_window")? {
        // transformers reads the field and looks at all tokens; who looks at the last ones alone gives other logits.
        let message = format!("is {window}, expected null: transformers passes over it, others do not");
        return Err(fields.error("sliding_window", message));
    }
    let attention = AttentionConfig::new(heads, fields.usize_or("num_key_value_heads", 8)?, headdim);
    let mlp = |d_hidden: usize, bias: bool| -> Result<MlpConfig> {
        let activation = transformer::activation(fields, "mlp_hidden_act", MlpActivation::Relu2)?;
        Ok(MlpConfig { activation, layout: MlpLayout::Plain, bias, ..MlpConfig::new(d_hidden) })
    };
    let bias = fields.bool_or("mlp_bias", false)?;
    let types = match layer_types::read(fields)? {
        Some(types) => types,
        None => pattern(fields)?,
    };
    let layer = |kind: &LayerType| {
        Ok(LayerSpec::new([match kind {
            LayerType::Mamba => MixerSpec::Mamba2(mamba.clone()),
            LayerType::Attention => MixerSpec::Attention(attention.clone()),
            LayerType::Mlp => MixerSpec::Mlp(mlp(fields.usize_or("intermediate_size", 21504)?, bias)?),
            LayerType::Moe => MixerSpec::Moe(MoeConfig {
                experts: fields.usize_or("n_routed_experts", 8)?,
                top_k: fields.usize_or("num_experts_per_tok", 2)?,
                expert: mlp(fields.usize_or("moe_intermediate_size", 7688)?, false)?,
                stacked: false,
                router: router(fields)?,
                shared: Some(mlp(fields.usize_or("moe_shared_expert_intermediate_size", 7688)?, bias)?),
                d_latent: fields.usize_opt("moe_latent_size")?,
                latent_bias: bias,
            }),
            other => {
                let message = format!("has a layer of kind {other:?}, which this family lacks");
                return Err(fields.error("layers_block_type", message));
            }
        }]))
    };
    Ok(ModelConfig {
        norm_eps,
        residual_in_f32: fields.bool_or("residual_in_fp32", false)?,
        tie_embeddings: fields.bool_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        ..ModelConfig::of_layers(
            fields.usize("vocab_size")?,
            d_model,
            types.iter().map(layer).collect::<Result<Vec<_>>>()?,
        )
    })
}

/// One letter a layer.
fn pattern(fields: &Fields) -> Result<Vec<LayerType>> {
    let Some(pattern) = fields.str_opt("hybrid_override_pattern")? else {
        return Err(fields.error("layers_block_type", "is missing"));
    };
    fields.check_layers("hybrid_override_pattern", pattern.len())?;
    let kind = |letter: char| match letter {
        'M' => Ok(LayerType::Mamba),
        '*' => Ok(LayerType::Attention),
        '-' => Ok(LayerType::Mlp),
        'E' => Ok(LayerType::Moe),
        other => {
            let message = format!("has the letter {other:?}, expected M, *, - or E");
            Err(fields.error("hybrid_override_pattern", message))
        }
    };
    pattern.chars().map(kind).collect()
}

/// Fields of the same meaning have had two names.
fn mamba2(fields: &Fields, d_model: usize, eps: f64) -> Result<Mamba2Config> {
    let count = |names: [&str; 2], default: usize| -> Result<usize> {
        Ok(fields.usize_opt(names[1])?.or(fields.usize_opt(names[0])?).unwrap_or(default))
    };
    let headdim = fields.usize_or("mamba_head_dim", 64)?;
    let d_inner = fields.usize_or("mamba_num_heads", 128)? * headdim;
    let default = Mamba2Config::new(d_model);
    let conv_bias = fields.bool_or("mamba_conv_bias", fields.bool_or("use_conv_bias", true)?)?;
    let bias = fields.bool_or("use_bias", false)?;
    let dt_min = fields.f64_or("mamba_dt_min", fields.f64_or("time_step_min", 1e-3)?)?;
    Ok(Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: fields.usize_or("ssm_state_size", 128)?,
        d_conv: count(["conv_kernel", "mamba_d_conv"], 4)?,
        headdim,
        ngroups: count(["n_groups", "mamba_n_groups"], 8)?,
        conv_bias,
        in_bias: bias,
        out_bias: bias,
        norm: Some(GatedNorm { eps, before_gate: false }),
        dt_limit: (dt_min, f64::INFINITY),
        chunk_size: count(["chunk_size", "mamba_chunk_size"], 128)?,
        ..default
    })
}

fn router(fields: &Fields) -> Result<RouterConfig> {
    Ok(RouterConfig {
        score: RouterScore::Sigmoid,
        correction_bias: true,
        ngroups: fields.usize_or("n_group", 1)?,
        top_groups: fields.usize_or("topk_group", 1)?,
        normalize: fields.bool_or("norm_topk_prob", true)?,
        scale: fields.f64_or("routed_scaling_factor", 1.0)?,
    })
}

fn write(config: &ModelConfig) -> Option<Value> {
    let parts = Parts::of(config);
    let mut more = vec![json!({
        "layer_norm_epsilon": config.norm_eps, "residual_in_fp32": config.residual_in_f32,
        "layers_block_type": layer_types::words(&parts::types(config)?),
    })];
    if let Some(c) = parts.mamba2 {
        more.push(json!({
            "mamba_num_heads": c.nheads(), "mamba_head_dim": c.headdim, "ssm_state_size": c.d_state,
            "conv_kernel": c.d_conv, "n_groups": c.ngroups, "use_conv_bias": c.conv_bias, "use_bias": c.in_bias,
            "time_step_min": c.dt_limit.0, "chunk_size": c.chunk_size, "mamba_hidden_act": "silu",
        }));
    }
    more.extend(parts.attention.map(transformer::write_attention));
    if let Some(c) = parts.mlp {
        more.push(json!({
            "intermediate_size": c.d_hidden, "mlp_bias": c.bias,
            "mlp_hidden_act": transformer::activation_word(c.activation),
        }));
    }
    if let Some(c) = parts.moe {
        let shared = c.shared.as_ref()?;
        more.push(json!({
            "n_routed_experts": c.experts, "n_shared_experts": 1, "num_experts_per_tok": c.top_k,
            "moe_intermediate_size": c.expert.d_hidden, "moe_shared_expert_intermediate_size": shared.d_hidden,
            "moe_latent_size": c.d_latent, "mlp_bias": shared.bias, "n_group": c.router.ngroups,
            "topk_group": c.router.top_groups, "norm_topk_prob": c.router.normalize,
            "routed_scaling_factor": c.router.scale,
            "mlp_hidden_act": transformer::activation_word(c.expert.activation),
        }));
    }
    Some(parts::object(config, "nemotron_h", "NemotronHForCausalLM", &more))
}
