//! The format of state-spaces/mamba: Mamba-1 or Mamba-2, attention in some layers, a gated MLP after each mixer if asked for.

use serde_json::{Value, json};

use super::Family;
use super::layer_types::LayerType;
use super::parts::{self, Parts};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    AttentionConfig, Fields, GatedNorm, LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, MlpConfig,
    MlpLayout, ModelConfig, NormKind, PackedAttention, Rope,
};

pub(super) static STATE_SPACES: Family = Family {
    model_type: None,
    names: NameMap::new(&[
        ("embedding", "backbone.embedding"),
        ("embedding", "backbone.embeddings"),
        ("layers.{l}.0.norm", "backbone.layers.{l}.norm"),
        ("layers.{l}.0.mamba1", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.mamba2", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.attention", "backbone.layers.{l}.mixer"),
        ("layers.{l}.0.attention.qkv_proj", "backbone.layers.{l}.mixer.in_proj"),
        ("layers.{l}.0.attention.o_proj", "backbone.layers.{l}.mixer.out_proj"),
        ("layers.{l}.1.norm", "backbone.layers.{l}.norm2"),
        ("layers.{l}.1.mlp.up_gate_proj", "backbone.layers.{l}.mlp.fc1"),
        ("layers.{l}.1.mlp.down_proj", "backbone.layers.{l}.mlp.fc2"),
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
    let ssm = fields.object("ssm_cfg")?;
    let mixer = match ssm.str_opt("layer")?.as_deref() {
        None | Some("Mamba1") => MixerSpec::Mamba1(mamba1(&ssm, d_model)?),
        Some("Mamba2") => MixerSpec::Mamba2(mamba2(&ssm, d_model)?),
        Some(other) => return Err(ssm.error("layer", format!("is \"{other}\", expected Mamba1 or Mamba2"))),
    };
    // The published MLP rounds its width up to a multiple of 128.
    let mlp = match fields.usize_or("d_intermediate", 0)? {
        0 => None,
        d => {
            let layout = MlpLayout::UpGate;
            Some(MixerSpec::Mlp(MlpConfig { layout, ..MlpConfig::new(d.next_multiple_of(128)) }))
        }
    };
    let attention_layers = fields.usizes_opt("attn_layer_idx")?.unwrap_or_default();
    let attention = match attention_layers.is_empty() {
        true => None,
        false => Some(MixerSpec::Attention(attention(&fields.object("attn_cfg")?, d_model)?)),
    };
    let layer = |i: usize| {
        let mixer = attention.as_ref().filter(|_| attention_layers.contains(&i)).unwrap_or(&mixer);
        LayerSpec::new([mixer.clone()].into_iter().chain(mlp.clone()))
    };
    Ok(ModelConfig {
        padded_vocab_size: vocab_size.next_multiple_of(multiple),
        norm: if fields.bool_or("rms_norm", true)? { NormKind::Rms } else { NormKind::Layer },
        norm_eps: 1e-5,
        residual_in_f32: fields.bool_or("residual_in_fp32", true)?,
        tie_embeddings: fields.bool_or("tie_embeddings", true)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        ..ModelConfig::of_layers(vocab_size, d_model, (0..fields.layers("n_layer")?).map(layer))
    })
}

fn attention(attn: &Fields, d_model: usize) -> Result<AttentionConfig> {
    if !attn.bool_or("causal", false)? {
        return Err(attn.error("causal", "is false, expected true: the model reads from left to right"));
    }
    let nheads = attn.usize("num_heads")?;
    let headdim = attn.usize_or("head_dim", d_model / nheads.max(1))?;
    let nheads_kv = attn.usize_or("num_heads_kv", nheads)?;
    let default = AttentionConfig::new(nheads, nheads_kv, headdim);
    let rotary = attn.usize_or("rotary_emb_dim", 0)?;
    let rope = Rope {
        interleaved: attn.bool_or("rotary_emb_interleaved", false)?,
        ..Rope::new(rotary, attn.f64_or("rotary_emb_base", 1e4)?)
    };
    Ok(AttentionConfig {
        softmax_scale: attn.f64_or("softmax_scale", default.softmax_scale)?,
        rope: (rotary > 0).then_some(rope),
        qkv_bias: attn.bool_or("qkv_proj_bias", true)?,
        out_bias: attn.bool_or("out_proj_bias", true)?,
        packed: Some(PackedAttention {
            d_conv: attn.usize_or("d_conv", 0)?,
            // As published, rounded up to a multiple of 256.
            d_mlp: attn.usize_or("mlp_dim", 0)?.next_multiple_of(256),
        }),
        ..default
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
        ..default
    })
}

fn mamba2(ssm: &Fields, d_model: usize) -> Result<Mamba2Config> {
    let default = Mamba2Config::new(d_model);
    let d_inner = ssm.usize_opt("expand")?.unwrap_or(2) * d_model;
    let norm = GatedNorm { eps: 1e-5, before_gate: ssm.bool_or("norm_before_gate", false)? };
    let learnable_init_states = ssm.bool_or("learnable_init_states", false)?;
    let ngroups = ssm.usize_opt("ngroups")?.unwrap_or(default.ngroups);
    if learnable_init_states && ngroups > 1 {
        // Of the two classes upstream one has groups in its norm, and the other learned states.
        let message =
            format!("is {ngroups}, expected 1 with learnable_init_states, whose norm has no groups");
        return Err(ssm.error("ngroups", message));
    }
    Ok(Mamba2Config {
        d_inner,
        d_ssm: ssm.usize_opt("d_ssm")?.unwrap_or(d_inner),
        d_state: ssm.usize_opt("d_state")?.unwrap_or(default.d_state),
        d_conv: ssm.usize_opt("d_conv")?.unwrap_or(default.d_conv),
        headdim: ssm.usize_opt("headdim")?.unwrap_or(default.headdim),
        ngroups,
        conv_bias: ssm.bool_or("conv_bias", true)?,
        in_bias: ssm.bool_or("bias", false)?,
        out_bias: ssm.bool_or("bias", false)?,
        norm: ssm.bool_or("rmsnorm", true)?.then_some(norm),
        d_has_headdim: ssm.bool_or("D_has_hdim", false)?,
        dt_limit: ssm.range_or("dt_limit", default.dt_limit)?,
        chunk_size: ssm.usize_opt("chunk_size")?.unwrap_or(default.chunk_size),
        learnable_init_states,
        ..default
    })
}

fn write(config: &ModelConfig) -> Option<Value> {
    if !config.has_head {
        return None;
    }
    let parts = Parts::of(config);
    let d_intermediate = parts.mlp.map_or(0, |mlp| mlp.d_hidden);
    let types = parts::types(config)?;
    let ssm_cfg = match (parts.mamba1, parts.mamba2) {
        (Some(c), None) => json!({
            "layer": "Mamba1", "expand": c.d_inner / config.d_model, "d_state": c.d_state, "d_conv": c.d_conv,
            "dt_rank": c.dt_rank, "conv_bias": c.conv_bias, "bias": c.proj_bias,
        }),
        (None, Some(c)) => mamba2_cfg(c, config.d_model),
        (None, None) => json!({}),
        _ => return None,
    };
    let attn_cfg = match parts.attention {
        Some(c) => attn_cfg(c)?,
        None => json!({}),
    };
    // The multiple is not kept: any that leads from one size to the other does.
    let (vocab, padded) = (config.vocab_size, config.padded_vocab_size);
    let multiple = (1..=padded).find(|&m| vocab.next_multiple_of(m) == padded)?;
    // The tokens at which texts end have no place here: mamba_ssm refuses fields that it does not know.
    Some(json!({
            "d_model": config.d_model, "d_intermediate": d_intermediate,
            "n_layer": config.layers.len(), "vocab_size": vocab, "pad_vocab_size_multiple": multiple,
            "ssm_cfg": ssm_cfg, "attn_layer_idx": parts::layers_of(&types, LayerType::Attention),
            "attn_cfg": attn_cfg, "rms_norm": config.norm == NormKind::Rms,
            "residual_in_fp32": config.residual_in_f32, "fused_add_norm": true,
            "tie_embeddings": config.tie_embeddings,
    }))
}

fn mamba2_cfg(c: &Mamba2Config, d_model: usize) -> Value {
    let (low, high) = c.dt_limit;
    let mut cfg = json!({
        "layer": "Mamba2", "expand": c.d_inner / d_model, "d_ssm": c.d_ssm, "d_state": c.d_state, "d_conv": c.d_conv,
        "headdim": c.headdim, "ngroups": c.ngroups, "conv_bias": c.conv_bias, "bias": c.in_bias,
        "rmsnorm": c.norm.is_some(), "norm_before_gate": c.norm.is_some_and(|n| n.before_gate),
        "D_has_hdim": c.d_has_headdim, "chunk_size": c.chunk_size,
    });
    let Some(fields) = cfg.as_object_mut() else { return cfg };
    if (low, high) != (0.0, f64::INFINITY) {
        let high = if high.is_finite() { json!(high) } else { json!("Infinity") };
        fields.insert("dt_limit".into(), json!([low, high]));
    }
    // Upstream knows it in the class Mamba2Simple alone, which takes no words for options that it lacks.
    if c.learnable_init_states {
        fields.insert("learnable_init_states".into(), json!(true));
        let usual = [
            ("d_ssm", json!(c.d_inner)),
            ("rmsnorm", json!(true)),
            ("norm_before_gate", json!(false)),
            ("D_has_hdim", json!(false)),
        ];
        fields.retain(|field, value| !usual.iter().any(|(known, usual)| known == field && usual == value));
    }
    cfg
}

fn attn_cfg(c: &AttentionConfig) -> Option<Value> {
    let packed = c.packed?;
    let rope = c.rope.clone().unwrap_or(Rope::new(0, 1e4));
    Some(json!({
        "num_heads": c.nheads, "num_heads_kv": c.nheads_kv, "head_dim": c.headdim, "causal": true,
        "softmax_scale": c.softmax_scale, "d_conv": packed.d_conv, "mlp_dim": packed.d_mlp,
        "qkv_proj_bias": c.qkv_bias, "out_proj_bias": c.out_bias, "rotary_emb_dim": rope.dim,
        "rotary_emb_base": rope.base, "rotary_emb_interleaved": rope.interleaved,
    }))
}
