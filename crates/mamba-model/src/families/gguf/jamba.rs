//! llama.cpp's `jamba`: Mamba with norms of dt, B and C, attention without positions, MLPs and experts.

use super::names::names;
use super::{Architecture, Described, Keys, forms, keys};
use crate::Result;
use crate::config::{DtBcNorm, LayerSpec, MixerSpec, MlpConfig, ModelConfig, RouterConfig};
use crate::families::parts::Parts;

pub(super) static JAMBA: Architecture = Architecture {
    name: "jamba",
    names: names![("norm_f", "output_norm")],
    parse,
    write,
    form: forms::form,
    folding: None,
};

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    config.residual_in_f32 = false;
    let like = MlpConfig::new(1);
    for l in 0..config.layers.len() {
        let mixer = match file.attention(config, l)? {
            Some(attention) => MixerSpec::Attention(attention),
            None => {
                let mut mamba = file.mamba1(config, l)?;
                mamba.dt_bc_norm = Some(DtBcNorm { eps: config.norm_eps, weights: true });
                MixerSpec::Mamba1(mamba)
            }
        };
        let feed_forward = match file.experts(l, &like, RouterConfig::softmax())? {
            Some(experts) => MixerSpec::Moe(experts),
            None => MixerSpec::Mlp(file.mlp(l, "ffn_up", &like)?),
        };
        config.layers[l] = LayerSpec::new([mixer, feed_forward]);
    }
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let parts = Parts::of(config);
    let mlp = parts.mlp.or(parts.moe.map(|moe| &moe.expert))?;
    let own = vec![
        ("feed_forward_length", keys::count(mlp.d_hidden)?),
        ("expert_count", keys::count(parts.moe.map_or(1, |moe| moe.experts))?),
        ("expert_used_count", keys::count(parts.moe.map_or(1, |moe| moe.top_k))?),
    ];
    Some([keys::attention(config)?, keys::mamba1(parts.mamba1?)?, own].concat())
}
