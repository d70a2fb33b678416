//! llama.cpp's `mamba`.

use super::{Architecture, Described, Keys, count, write_common};
use crate::Result;
use crate::checkpoint::gguf::Value;
use crate::checkpoint::{Form, NameMap};
use crate::config::{LayerSpec, Mamba1Config, MixerSpec, ModelConfig, NormKind};

pub(super) static MAMBA: Architecture = Architecture {
    name: "mamba",
    names: NameMap::new(&[
        ("embedding", "token_embd"),
        ("layers.{l}.0.norm", "blk.{l}.attn_norm"),
        ("layers.{l}.0.mamba1.in_proj", "blk.{l}.ssm_in"),
        ("layers.{l}.0.mamba1.conv1d", "blk.{l}.ssm_conv1d"),
        ("layers.{l}.0.mamba1.x_proj", "blk.{l}.ssm_x"),
        ("layers.{l}.0.mamba1.dt_proj", "blk.{l}.ssm_dt"),
        ("layers.{l}.0.mamba1.A_log", "blk.{l}.ssm_a"),
        ("layers.{l}.0.mamba1.D", "blk.{l}.ssm_d"),
        ("layers.{l}.0.mamba1.out_proj", "blk.{l}.ssm_out"),
        ("norm_f", "output_norm"),
        ("lm_head", "output"),
    ]),
    parse,
    write,
    form,
};

fn parse(file: &Described, config: &mut ModelConfig) -> Result<()> {
    if file.fields.bool_or("ssm.dt_b_c_rms", false)? {
        return Err(file.fields.error("ssm.dt_b_c_rms", "is true, which is not supported yet"));
    }
    let mixer = Mamba1Config {
        d_inner: file.fields.usize("ssm.inner_size")?,
        d_state: file.fields.usize("ssm.state_size")?,
        d_conv: file.fields.usize("ssm.conv_kernel")?,
        dt_rank: file.fields.usize("ssm.time_step_rank")?,
        conv_bias: file.has("blk.0.ssm_conv1d.bias"),
        proj_bias: file.has("blk.0.ssm_in.bias"),
        ..Mamba1Config::new(config.d_model)
    };
    config.layers.fill(LayerSpec::new([MixerSpec::Mamba1(mixer)]));
    Ok(())
}

fn write(config: &ModelConfig) -> Option<Keys> {
    let layer = config.layers.first()?;
    let [branch] = layer.branches.as_slice() else { return None };
    let [(1.0, MixerSpec::Mamba1(c))] = branch.mixers.as_slice() else { return None };
    let Mamba1Config { d_inner, d_state, d_conv, dt_rank, conv_bias, proj_bias, .. } = *c;
    let plain = Mamba1Config {
        d_inner,
        d_state,
        d_conv,
        dt_rank,
        conv_bias,
        proj_bias,
        ..Mamba1Config::new(config.d_model)
    };
    let expressible = *c == plain
        && config.layers.iter().all(|other| other == layer)
        && layer.shared.is_none()
        && config.norm == NormKind::Rms;
    let mut keys = write_common(config).filter(|_| expressible)?;
    keys.extend([
        ("feed_forward_length", Value::U32(0)),
        ("attention.head_count", Value::U32(0)),
        ("ssm.inner_size", count(c.d_inner)?),
        ("ssm.state_size", count(c.d_state)?),
        ("ssm.conv_kernel", count(c.d_conv)?),
        ("ssm.time_step_rank", count(c.dt_rank)?),
        ("ssm.dt_b_c_rms", Value::Bool(false)),
    ]);
    Some(keys)
}

fn form(_: &ModelConfig, name: &str) -> Form {
    match name.split_once(".mamba1.").map(|(_, leaf)| leaf) {
        Some("A_log") => Form::Decay,
        Some("conv1d.weight") => Form::Squeezed,
        _ => Form::Same,
    }
}
