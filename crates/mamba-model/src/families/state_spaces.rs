//! The format of state-spaces/mamba: Mamba-1 and Mamba-2, a gated MLP after each mixer if asked for.

use serde_json::{Value, json};

use super::Family;
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    Fields, GatedNorm, LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, MlpConfig, ModelConfig, NormKind,
};

pub(super) static STATE_SPACES: Family = Family {
    model_type: None,
    names: NameMap::new(&[
        ("embedding", "backbone.embedding"),
        ("embedding", "backbone.embeddings"),
        ("layers.{l}.0.norm", "backbone.layers.{l}.norm"),
        ("layers.{l}.0.mamba1", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.mamba2", "backbone.layers.{l}.mixer"),
        ("layers.{l}.1.norm", "backbone.layers.{l}.norm2"),
        ("layers.{l}.1.mlp", "backbone.layers.{l}.mlp"),
        ("norm_f", "backbone.norm_f"),
        ("lm_head", "lm_head"),
    ])
    .with_leading("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    let d_model = fields.usize("d_model")?;
    let vocab_size = fields.usize("vocab_size")?;
    let multiple = fields.usize_opt("pad_vocab_size_multiple")?.unwrap_or(8).max(1);
    if fields.is_set("attn_layer_idx") {
        return Err(fields.error("attn_layer_idx", "names attention layers, which are not supported yet"));
    }
    let ssm = fields.object("ssm_cfg")?;
    let mixer = match ssm.str_opt("layer")?.as_deref() {
        None | Some("Mamba1") => MixerSpec::Mamba1(mamba1(&ssm, d_model)?),
        Some("Mamba2") => MixerSpec::Mamba2(mamba2(&ssm, d_model)?),
        Some(other) => return Err(ssm.error("layer", format!("is \"{other}\", expected Mamba1 or Mamba2"))),
    };
    // The published MLP rounds its width up to a multiple of 128.
    let mlp = match fields.usize_opt("d_intermediate")?.unwrap_or(0) {
        0 => None,
        d => Some(MixerSpec::Mlp(MlpConfig { d_hidden: d.next_multiple_of(128), bias: false })),
    };
    let layer = LayerSpec::new([mixer].into_iter().chain(mlp));
    Ok(ModelConfig {
        vocab_size,
        padded_vocab_size: vocab_size.next_multiple_of(multiple),
        d_model,
        layers: vec![layer; fields.layers("n_layer")?],
        norm: if fields.bool_or("rms_norm", true)? { NormKind::Rms } else { NormKind::Layer },
        norm_eps: 1e-5,
        residual_in_f32: fields.bool_or("residual_in_fp32", true)?,
        tie_embeddings: fields.bool_or("tie_embeddings", true)?,
        eos_token_ids: fields.ids("eos_token_id")?,
    })
}

fn mamba1(ssm: &Fields, d_model: usize) -> Result<Mamba1Config> {
    let default = Mamba1Config::new(d_model);
    let dt_rank = match ssm.str_opt("dt_rank") {
        Ok(Some(word)) if word != "auto" => return Err(ssm.error("dt_rank", format!("is \"{word}\""))),
        Ok(_) => default.dt_rank,
        Err(_) => ssm.usize("dt_rank")?,
    };
    Ok(Mamba1Config {
        d_inner: ssm.usize_opt("expand")?.unwrap_or(2) * d_model,
        d_state: ssm.usize_opt("d_state")?.unwrap_or(default.d_state),
        d_conv: ssm.usize_opt("d_conv")?.unwrap_or(default.d_conv),
        dt_rank,
        conv_bias: ssm.bool_or("conv_bias", true)?,
        proj_bias: ssm.bool_or("bias", false)?,
    })
}

fn mamba2(ssm: &Fields, d_model: usize) -> Result<Mamba2Config> {
    let default = Mamba2Config::new(d_model);
    if ssm.bool_or("learnable_init_states", false)? {
        return Err(ssm.error("learnable_init_states", "is true, which is not supported yet"));
    }
    let d_inner = ssm.usize_opt("expand")?.unwrap_or(2) * d_model;
    let norm = GatedNorm { eps: 1e-5, before_gate: ssm.bool_or("norm_before_gate", false)? };
    Ok(Mamba2Config {
        d_inner,
        d_ssm: ssm.usize_opt("d_ssm")?.unwrap_or(d_inner),
        d_state: ssm.usize_opt("d_state")?.unwrap_or(default.d_state),
        d_conv: ssm.usize_opt("d_conv")?.unwrap_or(default.d_conv),
        headdim: ssm.usize_opt("headdim")?.unwrap_or(default.headdim),
        ngroups: ssm.usize_opt("ngroups")?.unwrap_or(default.ngroups),
        conv_bias: ssm.bool_or("conv_bias", true)?,
        proj_bias: ssm.bool_or("bias", false)?,
        norm: ssm.bool_or("rmsnorm", true)?.then_some(norm),
        d_has_headdim: ssm.bool_or("D_has_hdim", false)?,
        dt_limit: ssm.range_or("dt_limit", default.dt_limit)?,
        chunk_size: ssm.usize_opt("chunk_size")?.unwrap_or(default.chunk_size),
    })
}

fn write(config: &ModelConfig) -> Option<Value> {
    let layer = config.layers.first()?;
    let (mixer, mlp) = match layer.branches.iter().map(|b| b.mixers.as_slice()).collect::<Vec<_>>()[..] {
        [[mixer]] => (mixer, None),
        [[mixer], [MixerSpec::Mlp(mlp)]] if !mlp.bias && mlp.d_hidden % 128 == 0 => {
            (mixer, Some(mlp.d_hidden))
        }
        _ => return None,
    };
    let ssm_cfg = match mixer {
        MixerSpec::Mamba1(c) if c.d_inner % config.d_model == 0 => json!({
            "layer": "Mamba1", "expand": c.d_inner / config.d_model, "d_state": c.d_state, "d_conv": c.d_conv,
            "dt_rank": c.dt_rank, "conv_bias": c.conv_bias, "bias": c.proj_bias,
        }),
        MixerSpec::Mamba2(c) if c.d_inner % config.d_model == 0 && c.norm.is_none_or(|n| n.eps == 1e-5) => {
            let (low, high) = c.dt_limit;
            json!({
                "layer": "Mamba2", "expand": c.d_inner / config.d_model, "d_ssm": c.d_ssm, "d_state": c.d_state,
                "d_conv": c.d_conv, "headdim": c.headdim, "ngroups": c.ngroups, "conv_bias": c.conv_bias,
                "bias": c.proj_bias, "rmsnorm": c.norm.is_some(),
                "norm_before_gate": c.norm.is_some_and(|n| n.before_gate), "D_has_hdim": c.d_has_headdim,
                "dt_limit": [low, if high.is_finite() { json!(high) } else { json!("Infinity") }],
                "chunk_size": c.chunk_size,
            })
        }
        _ => return None,
    };
    // The multiple is not kept: any that leads from one size to the other does.
    let (vocab, padded) = (config.vocab_size, config.padded_vocab_size);
    let multiple = (1..=padded).find(|&m| vocab.next_multiple_of(m) == padded)?;
    let equal = config.layers.iter().all(|other| other == layer);
    (equal && config.norm_eps == 1e-5).then(|| {
        json!({
            "d_model": config.d_model, "d_intermediate": mlp.unwrap_or(0), "n_layer": config.layers.len(),
            "vocab_size": vocab, "pad_vocab_size_multiple": multiple, "ssm_cfg": ssm_cfg, "attn_layer_idx": [],
            "attn_cfg": {}, "rms_norm": config.norm == NormKind::Rms, "residual_in_fp32": config.residual_in_f32,
            "fused_add_norm": true, "tie_embeddings": config.tie_embeddings,
            "eos_token_id": config.eos_token_ids,
        })
    })
}
