//! llama.cpp's `nemotron_h` and `nemotron_h_moe`: one mixer a layer, out of Mamba-2, attention, an MLP and experts.
//!
//! Files do not say from below which number the step size is kept, and llama.cpp keeps it from none; transformers does. A file
//! of ours says it in a key of its own, which others pass over.

use super::names::names;
use super::{Architecture, Described, Keys, forms, keys};
use crate::Result;
use crate::checkpoint::NameMap;
use crate::checkpoint::gguf::Value;
use crate::config::{
    LayerSpec, MixerSpec, MlpActivation, MlpConfig, MlpLayout, ModelConfig, RouterConfig, RouterScore,
};
use crate::families::parts::Parts;

const NAMES: NameMap = names![("norm_f", "output_norm")];

pub(super) static NEMOTRON_H: Architecture =
    Architecture { name: "nemotron_h", names: NAMES, parse, write: dense, form: forms::form, folding: None };

pub(super) static NEMOTRON_H_MOE: Architecture = Architecture {
    name: "nemotron_h_moe",
    names: NAMES,
    parse,
    write: with_experts,
    form: forms::form,
    folding: None,
};

const LEAST_STEP: &str = "ssm.time_step_min";

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    config.residual_in_f32 = false;
    let fields = &file.fields;
    let like = MlpConfig { activation: MlpActivation::Relu2, layout: MlpLayout::Plain, ..MlpConfig::new(1) };
    for l in 0..config.layers.len() {
        let mixer = if file.has(l, "attn_q.weight") {
            MixerSpec::Attention(file.required_attention(config, l)?)
        } else if file.has(l, "ffn_gate_inp.weight") {
            let router = RouterConfig {
                score: RouterScore::Sigmoid,
                correction_bias: file.has(l, "exp_probs_b.bias"),
                ngroups: fields.usize_opt("expert_group_count")?.unwrap_or(1).max(1),
                top_groups: fields.usize_opt("expert_group_used_count")?.unwrap_or(1).max(1),
                normalize: fields.bool_or("expert_weights_norm", false)?,
                scale: fields.f64_or("expert_weights_scale", 1.0)?,
            };
            match file.experts(l, &like, router)? {
                Some(experts) => MixerSpec::Moe(experts),
                None => continue,
            }
        } else if file.has(l, "ffn_up.weight") {
            MixerSpec::Mlp(file.mlp(l, "ffn_up", &like)?)
        } else {
            let mut mamba = file.mamba2(config, l)?;
            mamba.dt_limit.0 = fields.f64_or(LEAST_STEP, 0.0)?;
            MixerSpec::Mamba2(mamba)
        };
        config.layers[l] = LayerSpec::new([mixer]);
    }
    Ok(())
}

fn dense(config: &ModelConfig) -> Option<Keys> {
    if Parts::of(config).moe.is_some() {
        return None;
    }
    write(config)
}

fn with_experts(config: &ModelConfig) -> Option<Keys> {
    let moe = Parts::of(config).moe?;
    let mut keys = write(config)?;
    keys.extend([
        ("expert_count", keys::count(moe.experts)?),
        ("expert_used_count", keys::count(moe.top_k)?),
        ("expert_feed_forward_length", keys::count(moe.expert.d_hidden)?),
        ("expert_shared_count", keys::count(1)?),
        ("expert_shared_feed_forward_length", keys::count(moe.shared.as_ref()?.d_hidden)?),
        ("expert_weights_norm", Value::Bool(moe.router.normalize)),
        ("expert_weights_scale", keys::number(moe.router.scale)),
        ("expert_group_count", keys::count(moe.router.ngroups)?),
        ("expert_group_used_count", keys::count(moe.router.top_groups)?),
    ]);
    if let Some(d_latent) = moe.d_latent {
        keys.push(("moe_latent_size", keys::count(d_latent)?));
    }
    Some(keys)
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let d_hidden = |layer: &LayerSpec| match layer.branches.first()?.mixers.first()? {
        (_, MixerSpec::Mlp(mlp)) => Some(mlp.d_hidden),
        (_, MixerSpec::Moe(moe)) => Some(moe.expert.d_hidden),
        _ => Some(0),
    };
    let widths = config.layers.iter().map(d_hidden).collect::<Option<Vec<_>>>()?;
    let mamba = Parts::of(config).mamba2?;
    let mut own = vec![
        ("feed_forward_length", keys::counts(widths.into_iter())?),
        // llama.cpp wants it beside that of RMS norms, and uses it nowhere.
        ("attention.layer_norm_epsilon", keys::number(config.norm_eps)),
    ];
    if mamba.dt_limit.0 > 0.0 {
        own.push((LEAST_STEP, keys::number(mamba.dt_limit.0)));
    }
    Some([keys::attention(config)?, keys::mamba2(mamba)?, own].concat())
}
