//! llama.cpp's `mamba2`.

use super::{Architecture, Described, Keys, count, write_common};
use crate::Result;
use crate::checkpoint::gguf::Value;
use crate::checkpoint::{Form, NameMap};
use crate::config::{GatedNorm, LayerSpec, Mamba2Config, MixerSpec, ModelConfig, NormKind};

pub(super) static MAMBA2: Architecture = Architecture {
    name: "mamba2",
    names: NameMap::new(&[
        ("embedding", "token_embd"),
        ("layers.{l}.0.norm", "blk.{l}.attn_norm"),
        ("layers.{l}.0.mamba2.in_proj", "blk.{l}.ssm_in"),
        ("layers.{l}.0.mamba2.conv1d", "blk.{l}.ssm_conv1d"),
        ("layers.{l}.0.mamba2.dt_bias", "blk.{l}.ssm_dt.bias"),
        ("layers.{l}.0.mamba2.A_log", "blk.{l}.ssm_a"),
        ("layers.{l}.0.mamba2.D", "blk.{l}.ssm_d"),
        ("layers.{l}.0.mamba2.norm", "blk.{l}.ssm_norm"),
        ("layers.{l}.0.mamba2.out_proj", "blk.{l}.ssm_out"),
        ("norm_f", "output_norm"),
        ("lm_head", "output"),
    ]),
    parse,
    write,
    form: |config, name| {
        let mixer = config.layers.first().and_then(|layer| layer.branches.first()?.mixers.first());
        let groups = if let Some((_, MixerSpec::Mamba2(c))) = mixer { c.ngroups } else { 1 };
        form(groups, name)
    },
};

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    let mixer = mixer(file, config, 0)?;
    config.layers.fill(LayerSpec::new([MixerSpec::Mamba2(mixer)]));
    Ok(())
}

/// The mixer that the keys `ssm.*` describe, with biases as the given layer has them.
pub(super) fn mixer(file: &Described, config: &ModelConfig, layer: usize) -> Result<Mamba2Config> {
    let d_inner = file.fields.usize("ssm.inner_size")?;
    // The number of heads, whatever it is called.
    let nheads = file.fields.usize("ssm.time_step_rank")?;
    if nheads == 0 || !d_inner.is_multiple_of(nheads) {
        let message = format!("is {nheads}, expected a divisor of ssm.inner_size {d_inner}");
        return Err(file.fields.error("ssm.time_step_rank", message));
    }
    Ok(Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: file.fields.usize("ssm.state_size")?,
        d_conv: file.fields.usize("ssm.conv_kernel")?,
        headdim: d_inner / nheads,
        ngroups: file.fields.usize_opt("ssm.group_count")?.unwrap_or(1),
        conv_bias: file.has(&format!("blk.{layer}.ssm_conv1d.bias")),
        in_bias: file.has(&format!("blk.{layer}.ssm_in.bias")),
        out_bias: file.has(&format!("blk.{layer}.ssm_out.bias")),
        norm: Some(GatedNorm { eps: config.norm_eps, before_gate: false }),
        ..Mamba2Config::new(config.d_model)
    })
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let layer = config.layers.first()?;
    let [branch] = layer.branches.as_slice() else { return None };
    let [(1.0, MixerSpec::Mamba2(c))] = branch.mixers.as_slice() else { return None };
    let expressible = config.layers.iter().all(|other| other == layer)
        && layer.shared.is_none()
        && config.norm == NormKind::Rms;
    let mut keys = write_common(config).filter(|_| expressible)?;
    keys.extend([("feed_forward_length", Value::U32(0)), ("attention.head_count", Value::U32(0))]);
    keys.extend(write_mixer(config, c)?);
    Some(keys)
}

/// The keys `ssm.*` of a mixer with the usual norm.
pub(super) fn write_mixer(config: &ModelConfig, c: &Mamba2Config) -> Option<Keys> {
    let expressible = c.norm == Some(GatedNorm { eps: config.norm_eps, before_gate: false })
        && (c.d_ssm, c.d_has_headdim) == (c.d_inner, false)
        && c.dt_limit == (0.0, f64::INFINITY)
        && (c.learnable_init_states, c.input_scale, c.zxbcdt_scales) == (false, 1.0, [1.0; 5]);
    let keys = vec![
        ("ssm.inner_size", count(c.d_inner)?),
        ("ssm.state_size", count(c.d_state)?),
        ("ssm.conv_kernel", count(c.d_conv)?),
        ("ssm.time_step_rank", count(c.nheads())?),
        ("ssm.group_count", count(c.ngroups)?),
    ];
    expressible.then_some(keys)
}

/// How files keep the tensors of a Mamba-2 mixer, in all architectures.
pub(super) fn form(groups: usize, name: &str) -> Form {
    match name.split_once(".mamba2.").map(|(_, leaf)| leaf) {
        Some("A_log") => Form::DecayColumn,
        Some("D") => Form::Column,
        Some("norm.weight") => Form::Rows(groups),
        Some("conv1d.weight") => Form::Squeezed,
        _ => Form::Same,
    }
}
