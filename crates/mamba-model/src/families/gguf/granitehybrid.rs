//! llama.cpp's `granitehybrid`: Granite 4 and Bamba. Its converter lets the halves of each head of queries and keys take turns,
//! so that the pairs of a rotary embedding are neighbours; here they are put back.

use super::names::names;
use super::{Architecture, Described, Keys, forms, keys};
use crate::Result;
use crate::checkpoint::Form;
use crate::checkpoint::gguf::Value;
use crate::config::{LayerSpec, MixerSpec, MlpConfig, MlpLayout, ModelConfig, RouterConfig};
use crate::families::parts::{self, Parts};

pub(super) static GRANITE_HYBRID: Architecture = Architecture {
    name: "granitehybrid",
    names: names![("norm_f", "output_norm")],
    parse,
    write,
    form,
    folding: None,
};

fn form(config: &ModelConfig, name: &str) -> Form {
    let heads = match (name.split_once(".attention."), Parts::of(config).attention) {
        (Some((_, "q_proj.weight" | "q_proj.bias")), Some(c)) => Some(c.nheads),
        (Some((_, "k_proj.weight" | "k_proj.bias")), Some(c)) => Some(c.nheads_kv),
        _ => None,
    };
    heads.map_or_else(|| forms::form(config, name), |heads| Form::Turned { heads })
}

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    config.residual_in_f32 = false;
    // A scale of 0 is none, as in llama.cpp.
    let scale = |field: &str| -> Result<f64> {
        Ok(Some(file.fields.f64_or(field, 1.0)?).filter(|scale| *scale != 0.0).unwrap_or(1.0))
    };
    config.embedding_scale = scale("embedding_scale")?;
    config.logits_scale = 1.0 / scale("logit_scale")?;
    let residual = scale("residual_scale")?;
    // llama.cpp's own use of this key: whether there is a rotary embedding at all.
    let turns = file.fields.bool_or("rope.scaling.finetuned", true)?;
    let router = RouterConfig { normalize: true, ..RouterConfig::softmax() };
    // Of Granite's heads all channels turn or none. Bamba's turn by half, and its MLP is of three matrices.
    let granite = !turns || !file.turns_in_part(config)?;
    let layout = if granite { MlpLayout::GateUp } else { MlpLayout::Gated };
    let like = MlpConfig { layout, ..MlpConfig::new(1) };
    for l in 0..config.layers.len() {
        let mixer = match file.attention(config, l)? {
            Some(mut attention) => {
                attention.rope = turns.then(|| file.rope(attention.headdim)).transpose()?;
                MixerSpec::Attention(attention)
            }
            None => MixerSpec::Mamba2(file.mamba2(config, l)?),
        };
        let feed_forward = match file.experts(l, &like, router.clone())? {
            Some(mut experts) => {
                experts.stacked = granite;
                MixerSpec::Moe(experts)
            }
            None => MixerSpec::Mlp(file.mlp(l, "ffn_up", &like)?),
        };
        config.layers[l] = LayerSpec::new([mixer, feed_forward]).scaled(residual);
    }
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let parts = Parts::of(config);
    let rope = parts.attention.and_then(|c| c.rope.as_ref());
    // Of heads that turn in part, the halves that take turns are not those that turn: llama.cpp's own files of Bamba are
    // read, but it does not compute what Bamba does from them.
    if rope.is_some_and(|rope| parts.attention.is_some_and(|c| rope.dim != c.headdim)) {
        return None;
    }
    // The halves of an odd number of channels cannot take turns.
    if parts.attention.is_some_and(|c| c.headdim % 2 == 1) {
        return None;
    }
    let mut own = vec![
        ("embedding_scale", keys::number(config.embedding_scale)),
        ("logit_scale", keys::number(parts::inverse(config.logits_scale))),
        ("residual_scale", keys::number(parts::scale(config, 0, 0)?)),
        ("rope.scaling.finetuned", Value::Bool(rope.is_some())),
    ];
    own.extend(parts.attention.map(|c| ("attention.scale", keys::number(c.softmax_scale))));
    if let Some(moe) = parts.moe {
        own.extend([
            ("feed_forward_length", keys::count(moe.expert.d_hidden)?),
            ("expert_count", keys::count(moe.experts)?),
            ("expert_used_count", keys::count(moe.top_k)?),
        ]);
        if let Some(shared) = &moe.shared {
            own.push(("expert_shared_feed_forward_length", keys::count(shared.d_hidden)?));
        }
    } else {
        own.push(("feed_forward_length", keys::count(parts.mlp?.d_hidden)?));
    }
    let rope = rope.map_or(Some(vec![]), keys::rope)?;
    Some([keys::attention(config)?, rope, keys::mamba2(parts.mamba2?)?, own].concat())
}
