//! transformers' `zamba2`: Mamba-2, and in some layers a transformer block on top that few copies of serve in turn.
//!
//! As in transformers 5.23, the step size is at least `time_step_min`, when reading a prompt and when decoding alike.

use serde_json::{Value, json};

use super::layer_types::{self, LayerType};
use super::parts::{self, Parts};
use super::{Family, transformer};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::config::{
    AttentionConfig, Fields, GatedNorm, LayerSpec, Mamba2Config, MixerSpec, MlpActivation, MlpConfig,
    MlpLayout, ModelConfig, SharedBlockSpec, SharedBlockUse,
};

pub(super) static ZAMBA2: Family = Family {
    model_type: Some("zamba2"),
    names: NameMap::new(&[
        ("embedding", "model.embed_tokens"),
        ("layers.{l}.0.norm", "model.layers.{l}.input_layernorm"),
        ("layers.{l}.hybrid.0.norm", "model.layers.{l}.mamba_decoder.input_layernorm"),
        ("layers.{l}.0.mamba2", "model.layers.{l}.mamba"),
        ("layers.{l}.hybrid.0.mamba2", "model.layers.{l}.mamba_decoder.mamba"),
        ("layers.{l}.linear", "model.layers.{l}.linear"),
        ("layers.{l}.shared.norm", "model.layers.{l}.shared_transformer.input_layernorm"),
        ("layers.{l}.shared.norm2", "model.layers.{l}.shared_transformer.pre_ff_layernorm"),
        ("layers.{l}.shared.attention", "model.layers.{l}.shared_transformer.self_attn"),
        (
            "layers.{l}.shared.attention.q_adapters",
            "model.layers.{l}.shared_transformer.self_attn.linear_q_adapter_list",
        ),
        (
            "layers.{l}.shared.attention.k_adapters",
            "model.layers.{l}.shared_transformer.self_attn.linear_k_adapter_list",
        ),
        (
            "layers.{l}.shared.attention.v_adapters",
            "model.layers.{l}.shared_transformer.self_attn.linear_v_adapter_list",
        ),
        ("layers.{l}.shared.mlp", "model.layers.{l}.shared_transformer.feed_forward"),
        (
            "layers.{l}.shared.mlp.gate_up_adapters",
            "model.layers.{l}.shared_transformer.feed_forward.gate_up_proj_adapter_list",
        ),
        ("norm_f", "model.final_layernorm"),
    ])
    .with_optional("model."),
    parse,
    write,
};

fn parse(fields: &Fields) -> Result<ModelConfig> {
    let d_model = fields.usize("hidden_size")?;
    let bias = fields.bool_or("add_bias_linear", false)?;
    let mamba = mamba2(fields, d_model, bias)?;
    let attention = shared_attention(fields, d_model, fields.bool_or("use_mem_rope", false)?)?;
    let mlp = MlpConfig {
        activation: transformer::activation(fields, "hidden_act", MlpActivation::Gelu)?,
        layout: MlpLayout::GateUp,
        bias,
        ..MlpConfig::new(fields.usize_or("intermediate_size", 4 * d_model)?)
    };
    if attention.rope.is_some() && fields.bool_or("use_long_context", false)? {
        // transformers 5.23 says that it stretches the rotary embedding and does not; earlier versions did.
        let message = "is true, expected false: versions of transformers disagree on what that means";
        return Err(fields.error("use_long_context", message));
    }
    let rank = fields.usize_or("adapter_rank", 128)?;
    let block = SharedBlockSpec {
        attention,
        mlp,
        attention_adapter_rank: fields.bool_or("use_shared_attention_adapter", false)?.then_some(rank),
        mlp_adapter_rank: Some(rank),
    };
    let types = match layer_types::read(fields)? {
        Some(types) => types,
        None => default_types(),
    };
    let layers =
        hybrid_layers(fields, &types, MixerSpec::Mamba2(mamba), fields.usize_or("num_mem_blocks", 1)?)?;
    let used = layers.iter().filter_map(|layer| Some(layer.shared?.block + 1)).max().unwrap_or(0);
    Ok(ModelConfig {
        norm_eps: fields.f64_or("rms_norm_eps", 1e-5)?,
        residual_in_f32: false,
        tie_embeddings: fields.bool_or("tie_word_embeddings", true)?,
        eos_token_ids: fields.ids("eos_token_id")?,
        shared_blocks: vec![block; used],
        ..ModelConfig::of_layers(fields.usize("vocab_size")?, d_model, layers)
    })
}

/// Layers of one mixer, of which the hybrid ones read the shared blocks in turn.
pub(super) fn hybrid_layers(
    fields: &Fields,
    types: &[LayerType],
    mixer: MixerSpec,
    blocks: usize,
) -> Result<Vec<LayerSpec>> {
    if blocks == 0 {
        return Err(fields.error("num_mem_blocks", "is 0, expected at least 1"));
    }
    let mut hybrids = 0;
    let layer = |kind: &LayerType| {
        let mut layer = LayerSpec::new([mixer.clone()]);
        match kind {
            LayerType::Mamba => {}
            LayerType::Hybrid => {
                layer.shared = Some(SharedBlockUse { block: hybrids % blocks, adapter: hybrids });
                hybrids += 1;
            }
            other => {
                let message = format!("has a layer of kind {other:?}, expected mamba or hybrid");
                return Err(fields.error("layers_block_type", message));
            }
        }
        Ok(layer)
    };
    types.iter().map(layer).collect()
}

/// Attention over `[stream | embedding]`, whose scale is that of half a head.
pub(super) fn shared_attention(fields: &Fields, d_model: usize, rope: bool) -> Result<AttentionConfig> {
    let nheads = fields.usize("num_attention_heads")?;
    let nheads_kv = fields.usize_or("num_key_value_heads", nheads)?;
    let headdim = match fields.usize_opt("attention_head_dim")? {
        Some(headdim) => headdim,
        None => 2 * d_model / nheads.max(1),
    };
    let mut attention = AttentionConfig::new(nheads, nheads_kv, headdim);
    attention.softmax_scale = (headdim as f64 / 2.0).powf(-0.5);
    if rope {
        attention.rope = Some(transformer::rope(fields, headdim, 1e4, None)?);
    }
    Ok(attention)
}

fn mamba2(fields: &Fields, d_model: usize, bias: bool) -> Result<Mamba2Config> {
    let d_inner = fields.usize_or("mamba_expand", 2)? * d_model;
    let nheads = fields.usize_or("n_mamba_heads", 8)?.max(1);
    Ok(Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: fields.usize_or("mamba_d_state", 64)?,
        d_conv: fields.usize_or("mamba_d_conv", 4)?,
        headdim: d_inner / nheads,
        ngroups: fields.usize_or("mamba_ngroups", 1)?,
        conv_bias: true, // whatever `use_conv_bias` says
        in_bias: bias,
        out_bias: bias,
        norm: Some(GatedNorm { eps: 1e-5, before_gate: false }),
        dt_limit: (fields.f64_or("time_step_min", 1e-3)?, f64::INFINITY),
        chunk_size: fields.usize_or("chunk_size", 256)?,
        ..Mamba2Config::new(d_model)
    })
}

/// The layers of Zamba2-2.7B, which a configuration may leave out.
fn default_types() -> Vec<LayerType> {
    let mut types = vec![LayerType::Mamba];
    for before in [5, 5, 5, 5, 5, 5, 5, 4, 3] {
        types.extend(vec![LayerType::Mamba; before]);
        types.push(LayerType::Hybrid);
    }
    types.extend([LayerType::Mamba; 2]);
    types
}

fn write(config: &ModelConfig) -> Option<Value> {
    let (c, block) = (Parts::of(config).mamba2?, config.shared_blocks.first()?);
    let attention = &block.attention;
    let words = json!({
        "rms_norm_eps": config.norm_eps, "layers_block_type": layer_types::words(&parts::types(config)?),
        "mamba_expand": c.d_inner / config.d_model, "n_mamba_heads": c.nheads(), "mamba_d_state": c.d_state,
        "mamba_d_conv": c.d_conv, "mamba_ngroups": c.ngroups, "time_step_min": c.dt_limit.0,
        "chunk_size": c.chunk_size, "add_bias_linear": c.in_bias, "num_attention_heads": attention.nheads,
        "num_key_value_heads": attention.nheads_kv, "use_mem_rope": attention.rope.is_some(),
        "intermediate_size": block.mlp.d_hidden, "hidden_act": transformer::activation_word(block.mlp.activation),
        "num_mem_blocks": config.shared_blocks.len(), "adapter_rank": block.mlp_adapter_rank?,
        "use_shared_attention_adapter": block.attention_adapter_rank.is_some(),
    });
    let rope = match &attention.rope {
        Some(rope) => json!({"rope_parameters": transformer::write_rope(rope, attention.headdim)}),
        None => json!({}),
    };
    Some(parts::object(config, "zamba2", "Zamba2ForCausalLM", &[words, rope]))
}
