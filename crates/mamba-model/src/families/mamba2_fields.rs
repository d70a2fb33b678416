//! The fields `mamba_*` with which Bamba, Granite and Falcon-H1 describe their Mamba-2 blocks.

use serde_json::{Value, json};

use super::parts;
use crate::Result;
use crate::config::{Fields, GatedNorm, Mamba2Config};

/// A block of `d_inner` channels, `mamba_expand · d_model` if absent, with a gated norm.
pub(super) fn mamba2(
    fields: &Fields,
    d_model: usize,
    d_inner: Option<usize>,
    eps: f64,
) -> Result<Mamba2Config> {
    let d_inner = match d_inner {
        Some(d_inner) => d_inner,
        None => fields.usize_or("mamba_expand", 2)? * d_model,
    };
    let nheads = fields.usize_or("mamba_n_heads", 128)?;
    let headdim = match fields.usize_or_auto("mamba_d_head")? {
        Some(headdim) => headdim,
        None => d_inner / nheads.max(1),
    };
    if nheads * headdim != d_inner {
        let message = format!("times mamba_d_head is {nheads} · {headdim}, expected {d_inner} channels");
        return Err(fields.error("mamba_n_heads", message));
    }
    let bias = fields.bool_or("mamba_proj_bias", false)?;
    let default = Mamba2Config::new(d_model);
    Ok(Mamba2Config {
        d_inner,
        d_ssm: d_inner,
        d_state: fields.usize_or("mamba_d_state", 256)?,
        d_conv: fields.usize_or("mamba_d_conv", 4)?,
        headdim,
        ngroups: fields.usize_or("mamba_n_groups", 1)?,
        conv_bias: fields.bool_or("mamba_conv_bias", true)?,
        in_bias: bias,
        out_bias: bias,
        norm: Some(GatedNorm { eps, before_gate: false }),
        dt_limit: fields.range_or("time_step_limit", default.dt_limit)?,
        chunk_size: fields.usize_or("mamba_chunk_size", 256)?,
        ..default
    })
}

/// What [`mamba2`] reads.
pub(super) fn write(c: &Mamba2Config, d_model: usize) -> Value {
    json!({
        "mamba_expand": c.d_inner / d_model.max(1), "mamba_n_heads": c.nheads(), "mamba_d_head": c.headdim,
        "mamba_n_groups": c.ngroups, "mamba_d_state": c.d_state, "mamba_d_conv": c.d_conv,
        "mamba_conv_bias": c.conv_bias, "mamba_proj_bias": c.in_bias, "mamba_chunk_size": c.chunk_size,
        "time_step_limit": parts::range(c.dt_limit),
    })
}
