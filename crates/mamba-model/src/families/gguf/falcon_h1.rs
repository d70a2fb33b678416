//! llama.cpp's `falcon-h1`: Mamba-2 and attention side by side, then an MLP. Weights are stored multiplied by all multipliers, so
//! that none are left.

use super::names::names;
use super::{Architecture, Described, Folding, Keys, forms, keys};
use crate::Result;
use crate::config::{BranchSpec, LayerSpec, MixerSpec, MlpConfig, ModelConfig};
use crate::families::parts::{self, Parts};

pub(super) static FALCON_H1: Architecture = Architecture {
    name: "falcon-h1",
    names: names![
        ("norm_f", "output_norm"),
        ("layers.{l}.1.norm.weight", "blk.{l}.ffn_norm"), // without a suffix, here alone
        ("layers.{l}.1.norm.weight", "blk.{l}.ffn_norm.weight"),
    ],
    parse,
    write,
    form: forms::form,
    folding: Some(Folding { without, factors }),
};

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    config.residual_in_f32 = false;
    for l in 0..config.layers.len() {
        let mut mamba = file.mamba2(config, l)?;
        mamba.norm = mamba.norm.filter(|_| file.has(l, "ssm_norm.weight"));
        let mut attention = file.required_attention(config, l)?;
        attention.rope = Some(file.rope(attention.headdim)?);
        let mlp = file.mlp(l, "ffn_up", &MlpConfig::new(1))?;
        let first = vec![(1.0, MixerSpec::Mamba2(mamba)), (1.0, MixerSpec::Attention(attention))];
        let branches = [first, vec![(1.0, MixerSpec::Mlp(mlp))]].map(|mixers| BranchSpec { mixers });
        config.layers[l] = LayerSpec { shared: None, branches: branches.into() };
    }
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let parts = Parts::of(config);
    // The multipliers of all layers are those of the first.
    if config.layers.iter().any(|layer| *layer != config.layers[0]) {
        return None;
    }
    let rope = keys::rope(parts.attention?.rope.as_ref()?)?;
    let own = vec![("feed_forward_length", keys::count(parts.mlp?.d_hidden)?)];
    Some([keys::attention(config)?, rope, keys::mamba2(parts.mamba2?)?, own].concat())
}

/// The configuration of the multiplied weights.
fn without(config: &mut ModelConfig) {
    // A matrix cannot be multiplied by two numbers.
    config.tie_embeddings &= config.embedding_scale == config.logits_scale;
    (config.embedding_scale, config.logits_scale) = (1.0, 1.0);
    let branches = config.layers.iter_mut().flat_map(|layer| &mut layer.branches);
    for (scale, mixer) in branches.flat_map(|branch| &mut branch.mixers) {
        *scale = 1.0;
        match mixer {
            MixerSpec::Mamba2(c) => (c.input_scale, c.zxbcdt_scales) = (1.0, [1.0; 5]),
            MixerSpec::Attention(c) => (c.input_scale, c.key_scale) = (1.0, 1.0),
            MixerSpec::Mlp(c) => c.gate_scale = 1.0,
            _ => {}
        }
    }
}

/// What the outputs of a projection are multiplied by: a number for each of its rows, or none if nothing changes.
fn factors(config: &ModelConfig, name: &str) -> Vec<f64> {
    factors_of(config, name).unwrap_or_default()
}

fn factors_of(config: &ModelConfig, name: &str) -> Option<Vec<f64>> {
    let parts = Parts::of(config);
    let (mamba, attention, mlp) = (parts.mamba2?, parts.attention?, parts.mlp?);
    // What multiplies an input reaches the weight alone, what multiplies an output the bias too.
    let input = |scale: f64| if name.ends_with(".bias") { 1.0 } else { scale };
    let heads = |n: usize, scale: f64| vec![scale; n * attention.headdim];
    let place = |branch, mixer| parts::scale(config, branch, mixer);
    let module = name.trim_end_matches(".weight").trim_end_matches(".bias");
    let leaf = module.splitn(4, '.').nth(3).unwrap_or(module);
    Some(match leaf {
        "embedding" => vec![config.embedding_scale; config.padded_vocab_size],
        "lm_head" => vec![config.logits_scale; config.padded_vocab_size],
        "mamba2.in_proj" => {
            let state = mamba.ngroups * mamba.d_state;
            let widths = [mamba.d_ssm, mamba.d_ssm, state, state, mamba.nheads()];
            let parts = widths.into_iter().zip(mamba.zxbcdt_scales);
            parts.flat_map(|(width, scale)| vec![scale * input(mamba.input_scale); width]).collect()
        }
        "mamba2.out_proj" => vec![place(0, 0)?; config.d_model],
        "attention.q_proj" => heads(attention.nheads, input(attention.input_scale)),
        "attention.k_proj" => heads(attention.nheads_kv, attention.key_scale * input(attention.input_scale)),
        "attention.v_proj" => heads(attention.nheads_kv, input(attention.input_scale)),
        "attention.o_proj" => vec![place(0, 1)?; config.d_model],
        "mlp.gate_proj" => vec![mlp.gate_scale; mlp.d_hidden],
        "mlp.down_proj" => vec![place(1, 0)?; config.d_model],
        _ => return None,
    })
}
