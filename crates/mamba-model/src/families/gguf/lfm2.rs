//! llama.cpp's `lfm2`: gated short convolutions, and attention with norms of queries and keys.

use super::names::names;
use super::{Architecture, Described, Keys, forms, keys};
use crate::Result;
use crate::config::{LayerSpec, MixerSpec, MlpConfig, ModelConfig, ShortConvConfig};
use crate::families::parts::Parts;

pub(super) static LFM2: Architecture = Architecture {
    name: "lfm2",
    names: names![("norm_f", "token_embd_norm"), ("norm_f", "output_norm")],
    parse,
    write,
    form: forms::form,
    folding: None,
};

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    config.residual_in_f32 = false;
    for l in 0..config.layers.len() {
        let mixer = match file.attention(config, l)? {
            Some(mut attention) => {
                attention.rope = Some(file.rope(attention.headdim)?);
                attention.qk_norm_eps = Some(config.norm_eps);
                MixerSpec::Attention(attention)
            }
            None => MixerSpec::ShortConv(ShortConvConfig {
                d_conv: file.fields.usize("shortconv.l_cache")?,
                bias: file.has(l, "shortconv.conv.bias"),
            }),
        };
        let mlp = MixerSpec::Mlp(file.mlp(l, "ffn_up", &MlpConfig::new(1))?);
        config.layers[l] = LayerSpec::new([mixer, mlp]);
    }
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let parts = Parts::of(config);
    let own = vec![
        ("shortconv.l_cache", keys::count(parts.short_conv?.d_conv)?),
        ("feed_forward_length", keys::count(parts.mlp?.d_hidden)?),
    ];
    let rope = parts.attention.and_then(|c| c.rope.as_ref()).map_or(Some(vec![]), keys::rope)?;
    Some([keys::attention(config)?, rope, own].concat())
}
