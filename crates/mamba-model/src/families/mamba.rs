//! transformers' `mamba`.

use serde_json::{Value, json};

use super::parts::{self, Parts};
use super::{Family, require_silu};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{Fields, Mamba1Config, MixerSpec, ModelConfig};

pub(super) static MAMBA: Family =
    Family { model_type: Some("mamba"), names: NAMES, parse, write: |config| write_with(config, "mamba") };

pub(super) const NAMES: NameMap = NameMap::new(&[
    ("embedding", "backbone.embeddings"),
    ("embedding", "backbone.embedding"),
    ("layers.{l}.0.norm", "backbone.layers.{l}.norm"),
    ("layers.{l}.0.mamba1", "backbone.layers.{l}.mixer"),
    ("norm_f", "backbone.norm_f"),
    ("lm_head", "lm_head"),
])
.with_leading("model.")
.with_optional("backbone.");

pub(super) fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_act")?;
    let d_model = fields.usize("hidden_size")?;
    let default = Mamba1Config::new(d_model);
    let dt_rank = match fields.str_opt("time_step_rank") {
        Ok(_) => default.dt_rank, // absent or "auto"
        Err(_) => fields.usize("time_step_rank")?,
    };
    let d_inner = fields.usize_opt("expand")?.unwrap_or(2) * d_model;
    if let Some(got) = fields.usize_opt("intermediate_size")?.filter(|got| *got != d_inner) {
        let message = format!("is {got}, expected expand · hidden_size {d_inner}");
        return Err(fields.error("intermediate_size", message));
    }
    let mixer = Mamba1Config {
        d_inner,
        d_state: fields.usize_opt("state_size")?.unwrap_or(default.d_state),
        d_conv: fields.usize_opt("conv_kernel")?.unwrap_or(default.d_conv),
        dt_rank,
        conv_bias: fields.bool_or("use_conv_bias", true)?,
        proj_bias: fields.bool_or("use_bias", false)?,
        dt_bc_norm: None,
        nheads: None,
    };
    let n_layer = fields.layers("num_hidden_layers")?;
    Ok(ModelConfig {
        norm_eps: fields.f64_or("layer_norm_epsilon", 1e-5)?,
        residual_in_f32: fields.bool_or("residual_in_fp32", true)?,
        tie_embeddings: fields.bool_or("tie_word_embeddings", true)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        ..ModelConfig::uniform(fields.usize("vocab_size")?, d_model, n_layer, MixerSpec::Mamba1(mixer))
    })
}

/// The configuration of `mamba`, or of `falcon_mamba`, which has norms.
pub(super) fn write_with(config: &ModelConfig, model_type: &str) -> Option<Value> {
    let c = Parts::of(config).mamba1?;
    let architecture = if c.dt_bc_norm.is_none() { "MambaForCausalLM" } else { "FalconMambaForCausalLM" };
    let words = json!({
        "state_size": c.d_state, "expand": c.d_inner / config.d_model, "intermediate_size": c.d_inner,
        "conv_kernel": c.d_conv, "time_step_rank": c.dt_rank, "use_conv_bias": c.conv_bias,
        "use_bias": c.proj_bias, "hidden_act": "silu", "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_f32,
    });
    let norm = c.dt_bc_norm.map_or(json!({}), |norm| json!({"mixer_rms_eps": norm.eps}));
    Some(parts::object(config, model_type, architecture, &[words, norm]))
}
