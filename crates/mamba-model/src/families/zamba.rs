//! transformers' `zamba`: Mamba with heads, and in some layers one transformer block on top that serves all of them.

use serde_json::{Value, json};

use super::layer_types::{self, LayerType};
use super::parts::{self, Parts};
use super::zamba2::{hybrid_layers, shared_attention};
use super::{Family, require_silu, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    Fields, Mamba1Config, MixerSpec, MlpActivation, MlpConfig, ModelConfig, SharedBlockSpec,
};

pub(super) static ZAMBA: Family = Family {
    model_type: Some("zamba"),
    names: NameMap::new(&[
        ("embedding", "model.embed_tokens"),
        ("layers.{l}.0.norm", "model.layers.{l}.input_layernorm"),
        ("layers.{l}.hybrid.0.norm", "model.layers.{l}.mamba_decoder.input_layernorm"),
        ("layers.{l}.0.mamba1", "model.layers.{l}.mamba"),
        ("layers.{l}.hybrid.0.mamba1", "model.layers.{l}.mamba_decoder.mamba"),
        ("layers.{l}.0.mamba1.x_proj.weight", "model.layers.{l}.mamba.x_proj_weight"),
        ("layers.{l}.hybrid.0.mamba1.x_proj.weight", "model.layers.{l}.mamba_decoder.mamba.x_proj_weight"),
        ("layers.{l}.0.mamba1.dt_proj.weight", "model.layers.{l}.mamba.dt_proj_weight"),
        ("layers.{l}.hybrid.0.mamba1.dt_proj.weight", "model.layers.{l}.mamba_decoder.mamba.dt_proj_weight"),
        ("layers.{l}.0.mamba1.dt_proj.bias", "model.layers.{l}.mamba.dt_proj_bias"),
        ("layers.{l}.hybrid.0.mamba1.dt_proj.bias", "model.layers.{l}.mamba_decoder.mamba.dt_proj_bias"),
        ("layers.{l}.linear", "model.layers.{l}.linear"),
        ("layers.{l}.shared.norm", "model.layers.{l}.shared_transf.input_layernorm"),
        ("layers.{l}.shared.norm2", "model.layers.{l}.shared_transf.pre_ff_layernorm"),
        ("layers.{l}.shared.attention", "model.layers.{l}.shared_transf.self_attn"),
        ("layers.{l}.shared.mlp", "model.layers.{l}.shared_transf.feed_forward"),
        ("norm_f", "model.final_layernorm"),
    ])
    .with_optional("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_mamba_act")?;
    let d_model = fields.usize("hidden_size")?;
    let default = Mamba1Config::new(d_model);
    let mamba = Mamba1Config {
        d_inner: fields.usize_or("mamba_expand", 2)? * d_model,
        d_state: fields.usize_or("mamba_d_state", default.d_state)?,
        d_conv: fields.usize_or("mamba_d_conv", default.d_conv)?,
        dt_rank: fields.usize_or_auto("mamba_dt_rank")?.unwrap_or(default.dt_rank),
        conv_bias: fields.bool_or("mamba_conv_bias", true)?,
        proj_bias: fields.bool_or("mamba_proj_bias", false)?,
        dt_bc_norm: None,
        nheads: Some(fields.usize_or("n_mamba_heads", 2)?),
    };
    let width = fields.usize_or("attention_hidden_size", 2 * d_model)?;
    if width != 2 * d_model {
        let message = format!("is {width}, expected twice hidden_size {d_model}");
        return Err(fields.error("attention_hidden_size", message));
    }
    let block = SharedBlockSpec {
        attention: shared_attention(fields, d_model, false)?,
        mlp: MlpConfig {
            activation: transformer::activation(fields, "hidden_act", MlpActivation::Gelu)?,
            ..MlpConfig::new(fields.usize("intermediate_size")?)
        },
        attention_adapter_rank: None,
        mlp_adapter_rank: None,
    };
    let n_layer = fields.layers("num_hidden_layers")?;
    let types = match layer_types::read_all(fields, n_layer)? {
        Some(types) => types,
        None => default_types(fields, n_layer)?,
    };
    Ok(ModelConfig {
        norm_eps: fields.f64_or("rms_norm_eps", 1e-5)?,
        residual_in_f32: false,
        tie_embeddings: fields.bool_or("tie_word_embeddings", true)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        shared_blocks: vec![block],
        ..ModelConfig::of_layers(
            fields.usize("vocab_size")?,
            d_model,
            hybrid_layers(fields, &types, MixerSpec::Mamba1(mamba), 1)?,
        )
    })
}

/// The third layer is the first hybrid one; from the fourth on they return with a period.
fn default_types(fields: &Fields, n_layer: usize) -> Result<Vec<LayerType>> {
    let (period, offset) =
        (fields.usize_or("attn_layer_period", 6)?, fields.usize_or("attn_layer_offset", 4)?);
    if period == 0 {
        return Err(fields.error("attn_layer_period", "is 0, expected at least 1"));
    }
    let kind = |i: usize| match i == 2 || (i > 2 && (i - 3) % period == offset) {
        true => LayerType::Hybrid,
        false => LayerType::Mamba,
    };
    Ok((0..n_layer).map(kind).collect())
}

fn write(config: &ModelConfig) -> Option<Value> {
    let (c, block) = (Parts::of(config).mamba1?, config.shared_blocks.first()?);
    let attention = &block.attention;
    let words = json!({
        "rms_norm_eps": config.norm_eps, "layers_block_type": layer_types::words(&parts::types(config)?),
        "mamba_expand": c.d_inner / config.d_model, "n_mamba_heads": c.nheads?, "mamba_d_state": c.d_state,
        "mamba_d_conv": c.d_conv, "mamba_dt_rank": c.dt_rank, "mamba_conv_bias": c.conv_bias,
        "mamba_proj_bias": c.proj_bias, "hidden_mamba_act": "silu", "num_attention_heads": attention.nheads,
        "num_key_value_heads": attention.nheads_kv, "attention_head_dim": attention.headdim,
        "intermediate_size": block.mlp.d_hidden, "hidden_act": transformer::activation_word(block.mlp.activation),
    });
    Some(parts::object(config, "zamba", "ZambaForCausalLM", &[words]))
}
