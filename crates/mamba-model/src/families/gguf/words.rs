//! What a GGUF file can say of a configuration, so that what was written can be compared with what is read again.

use crate::config::{MixerSpec, ModelConfig, RopeScaling};

/// A configuration without what files do not say and what does not change a model's numbers, and with numbers as `f32`.
pub(super) fn sayable(mut config: ModelConfig) -> ModelConfig {
    let round = |x: &mut f64| *x = f64::from(*x as f32);
    config.eos_token_ids.clear(); // stands beside the architecture's words, with the tokenizer
    // llama.cpp computes in f32 throughout.
    config.residual_in_f32 = true;
    [&mut config.norm_eps, &mut config.embedding_scale, &mut config.logits_scale].into_iter().for_each(round);
    let branches = config.layers.iter_mut().flat_map(|layer| &mut layer.branches);
    for (scale, mixer) in branches.flat_map(|branch| &mut branch.mixers) {
        round(scale);
        match mixer {
            MixerSpec::Mamba1(c) => c.dt_bc_norm.iter_mut().for_each(|norm| round(&mut norm.eps)),
            MixerSpec::Mamba2(c) => {
                c.chunk_size = 1;
                c.norm.iter_mut().for_each(|norm| round(&mut norm.eps));
                round(&mut c.dt_limit.0);
            }
            MixerSpec::Attention(c) => {
                round(&mut c.softmax_scale);
                c.qk_norm_eps.iter_mut().for_each(round);
                if let Some(rope) = &mut c.rope {
                    round(&mut rope.base);
                    match &mut rope.scaling {
                        RopeScaling::Linear { factor } => round(factor),
                        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, .. } => {
                            [factor, beta_fast, beta_slow, attention_factor].into_iter().for_each(round);
                        }
                        _ => {}
                    }
                }
            }
            MixerSpec::Moe(c) => round(&mut c.router.scale),
            MixerSpec::ShortConv(_) | MixerSpec::Mlp(_) => {}
        }
    }
    config
}
