//! transformers' `jamba`: Mamba with norms of dt, B and C, attention without positions, every other MLP a mixture of experts.

use serde_json::{Value, json};

use super::layer_types::LayerType;
use super::parts::{self, Parts};
use super::{Family, require_silu, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    DtBcNorm, Fields, LayerSpec, Mamba1Config, MixerSpec, ModelConfig, MoeConfig, RouterConfig,
};

pub(super) static JAMBA: Family = Family {
    model_type: Some("jamba"),
    names: NameMap::new(&[
        ("embedding", "model.embed_tokens"),
        ("layers.{l}.0.norm", "model.layers.{l}.input_layernorm"),
        ("layers.{l}.0.mamba1", "model.layers.{l}.mamba"),
        ("layers.{l}.0.mamba1.dt_norm", "model.layers.{l}.mamba.dt_layernorm"),
        ("layers.{l}.0.mamba1.b_norm", "model.layers.{l}.mamba.b_layernorm"),
        ("layers.{l}.0.mamba1.b_norm", "model.layers.{l}.mamba.B_layernorm"),
        ("layers.{l}.0.mamba1.c_norm", "model.layers.{l}.mamba.c_layernorm"),
        ("layers.{l}.0.mamba1.c_norm", "model.layers.{l}.mamba.C_layernorm"),
        ("layers.{l}.0.attention", "model.layers.{l}.self_attn"),
        ("layers.{l}.1.norm", "model.layers.{l}.pre_ff_layernorm"),
        ("layers.{l}.1.mlp", "model.layers.{l}.feed_forward"),
        ("layers.{l}.1.moe", "model.layers.{l}.feed_forward"),
        ("norm_f", "model.final_layernorm"),
    ])
    .with_optional("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_act")?; // the convolutions have it too
    let d_model = fields.usize("hidden_size")?;
    let norm_eps = fields.f64_or("rms_norm_eps", 1e-6)?;
    let default = Mamba1Config::new(d_model);
    let mamba = Mamba1Config {
        d_inner: fields.usize_or("mamba_expand", 2)? * d_model,
        d_state: fields.usize_or("mamba_d_state", default.d_state)?,
        d_conv: fields.usize_or("mamba_d_conv", default.d_conv)?,
        dt_rank: fields.usize_or_auto("mamba_dt_rank")?.unwrap_or(default.dt_rank),
        conv_bias: fields.bool_or("mamba_conv_bias", true)?,
        proj_bias: fields.bool_or("mamba_proj_bias", false)?,
        dt_bc_norm: Some(DtBcNorm { eps: norm_eps, weights: true }),
        nheads: None,
    };
    let attention = transformer::attention(fields, d_model, Some(8))?;
    let mlp = transformer::mlp(fields, fields.usize("intermediate_size")?, false)?;
    let experts = fields.usize_opt("num_experts")?.or(fields.usize_opt("num_local_experts")?).unwrap_or(16);
    let moe = MoeConfig {
        experts,
        top_k: fields.usize_or("num_experts_per_tok", 2)?,
        expert: mlp.clone(),
        stacked: false,
        router: RouterConfig::softmax(),
        shared: None,
        d_latent: None,
        latent_bias: false,
    };
    let schedule = |name: &str, period: usize, offset: usize| -> Result<(usize, usize)> {
        let period = fields.usize_or(&format!("{name}_period"), period)?;
        match period {
            0 => Err(fields.error(&format!("{name}_period"), "is 0, expected at least 1")),
            _ => Ok((period, fields.usize_or(&format!("{name}_offset"), offset)?)),
        }
    };
    let (attention_every, expert_every) = (schedule("attn_layer", 8, 4)?, schedule("expert_layer", 2, 1)?);
    let layer = |i: usize| {
        let falls = |(period, offset): (usize, usize)| i % period == offset;
        LayerSpec::new([
            match falls(attention_every) {
                true => MixerSpec::Attention(attention.clone()),
                false => MixerSpec::Mamba1(mamba.clone()),
            },
            match falls(expert_every) && experts > 1 {
                true => MixerSpec::Moe(moe.clone()),
                false => MixerSpec::Mlp(mlp.clone()),
            },
        ])
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
    let (mamba, attention) = (parts.mamba1?, parts.attention?);
    let dense = parts.mlp.or(parts.moe.map(|moe| &moe.expert))?;
    let n = config.layers.len();
    let has_experts = |i: usize| {
        let branch = config.layers[i].branches.get(1);
        branch.and_then(|b| b.mixers.first()).is_some_and(|(_, mixer)| matches!(mixer, MixerSpec::Moe(_)))
    };
    let types = parts::types(config)?;
    let (attention_period, attention_offset) = schedule(n, |i| types[i] == LayerType::Attention)?;
    let (expert_period, expert_offset) = schedule(n, has_experts)?;
    let words = json!({
        "rms_norm_eps": config.norm_eps, "intermediate_size": dense.d_hidden,
        "hidden_act": transformer::activation_word(dense.activation),
        "num_experts": parts.moe.map_or(1, |moe| moe.experts),
        "num_experts_per_tok": parts.moe.map_or(2, |moe| moe.top_k),
        "attn_layer_period": attention_period, "attn_layer_offset": attention_offset,
        "expert_layer_period": expert_period, "expert_layer_offset": expert_offset,
        "mamba_expand": mamba.d_inner / config.d_model, "mamba_d_state": mamba.d_state,
        "mamba_d_conv": mamba.d_conv, "mamba_dt_rank": mamba.dt_rank, "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias,
    });
    let more = [transformer::write_attention(attention), words];
    Some(parts::object(config, "jamba", "JambaForCausalLM", &more))
}

/// The shortest period, and the offset, with which layers return; one that is never reached if there are none.
fn schedule(n_layer: usize, is_there: impl Fn(usize) -> bool) -> Option<(usize, usize)> {
    let fits = |period: usize, offset: usize| (0..n_layer).all(|i| is_there(i) == (i % period == offset));
    (1..=n_layer + 1).find_map(|period| (0..period).find(|o| fits(period, *o)).map(|offset| (period, offset)))
}
