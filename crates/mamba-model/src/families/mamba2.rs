//! transformers' `mamba2`, Codestral too, whose names stand behind `model.`.

use serde_json::{Value, json};

use super::parts::{self, Parts};
use super::{Family, require_silu};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{Fields, GatedNorm, Mamba2Config, MixerSpec, ModelConfig};

pub(super) static MAMBA2: Family = Family {
    model_type: Some("mamba2"),
    names: NameMap::new(&[
        ("embedding", "backbone.embeddings"),
        ("embedding", "backbone.embedding"),
        ("layers.{l}.0.norm", "backbone.layers.{l}.norm"),
        ("layers.{l}.0.mamba2", "backbone.layers.{l}.mixer"),
        ("norm_f", "backbone.norm_f"),
        ("lm_head", "lm_head"),
    ])
    .with_leading("model.")
    .with_optional("backbone."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    require_silu(fields, "hidden_act")?;
    let d_model = fields.usize("hidden_size")?;
    let d_inner = fields.usize_opt("expand")?.unwrap_or(2) * d_model;
    let (nheads, headdim) =
        (fields.usize_opt("num_heads")?.unwrap_or(128), fields.usize_opt("head_dim")?.unwrap_or(64));
    if nheads * headdim != d_inner {
        let message =
            format!("times head_dim is {nheads} · {headdim}, expected expand · hidden_size {d_inner}");
        return Err(fields.error("num_heads", message));
    }
    let norm_eps = fields.f64_or("layer_norm_epsilon", 1e-5)?;
    let default = Mamba2Config::new(d_model);
    let mixer = Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: fields.usize_opt("state_size")?.unwrap_or(default.d_state),
        d_conv: fields.usize_opt("conv_kernel")?.unwrap_or(default.d_conv),
        headdim,
        ngroups: fields.usize_opt("n_groups")?.unwrap_or(8),
        conv_bias: fields.bool_or("use_conv_bias", true)?,
        in_bias: fields.bool_or("use_bias", false)?,
        out_bias: fields.bool_or("use_bias", false)?,
        norm: Some(GatedNorm { eps: norm_eps, before_gate: false }),
        d_has_headdim: false,
        dt_limit: fields.range_or("time_step_limit", default.dt_limit)?,
        chunk_size: fields.usize_opt("chunk_size")?.unwrap_or(default.chunk_size),
        ..default
    };
    let n_layer = fields.layers("num_hidden_layers")?;
    Ok(ModelConfig {
        norm_eps,
        residual_in_f32: fields.bool_or("residual_in_fp32", true)?,
        tie_embeddings: fields.bool_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        ..ModelConfig::uniform(fields.usize("vocab_size")?, d_model, n_layer, MixerSpec::Mamba2(mixer))
    })
}

fn write(config: &ModelConfig) -> Option<Value> {
    let c = Parts::of(config).mamba2?;
    let words = json!({
        "num_heads": c.nheads(), "head_dim": c.headdim, "state_size": c.d_state,
        "expand": c.d_inner / config.d_model, "conv_kernel": c.d_conv, "n_groups": c.ngroups,
        "use_conv_bias": c.conv_bias, "use_bias": c.in_bias, "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps, "residual_in_fp32": config.residual_in_f32,
        "time_step_limit": parts::range(c.dt_limit), "time_step_rank": config.d_model.div_ceil(16),
        "chunk_size": c.chunk_size,
    });
    Some(parts::object(config, "mamba2", "Mamba2ForCausalLM", &[words]))
}
