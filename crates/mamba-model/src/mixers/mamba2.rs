//! The block of Mamba-2: one projection for everything, convolution over x, B and C, chunk scan, gated norm.

use candle_core::Tensor;
use mamba_ops::{Norm, SelectiveStateUpdate, SsdChunkScan, norm, selective_state_update, ssd_chunk_scan};

use super::{CausalConv, Mixer, NegativeExp};
use crate::Result;
use crate::cache::MixerState;
use crate::config::{GatedNorm, Mamba2Config};
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct Mamba2 {
    config: Mamba2Config,
    in_proj: Linear,
    conv1d: CausalConv,
    dt_bias: Tensor,
    a: NegativeExp,
    d: Tensor,
    norm: Option<(GatedNorm, Tensor)>,
    out_proj: Linear,
}

impl Mamba2 {
    pub(super) fn new(config: &Mamba2Config, d_model: usize, params: &Params) -> Result<Self> {
        let nheads = config.nheads();
        let d = if config.d_has_headdim { config.d_ssm } else { nheads };
        let norm = match config.norm {
            Some(norm) => Some((norm, params.at("norm").get(config.d_ssm, "weight")?)),
            None => None,
        };
        Ok(Self {
            config: config.clone(),
            in_proj: Linear::new(&params.at("in_proj"), d_model, config.d_in_proj(), config.proj_bias)?,
            conv1d: CausalConv::new(
                &params.at("conv1d"),
                config.conv_dim(),
                config.d_conv,
                config.conv_bias,
            )?,
            dt_bias: params.get_f32(nheads, "dt_bias")?,
            a: NegativeExp::new(params.get_f32(nheads, "A_log")?)?,
            d: params.get_f32(d, "D")?,
            norm,
            out_proj: Linear::new(&params.at("out_proj"), config.d_inner, d_model, config.proj_bias)?,
        })
    }

    /// The scan over a sequence or, in place, one step of it; `(batch, seqlen, d_ssm)`.
    fn scan(
        &self,
        xbc: &Tensor,
        dt: &Tensor,
        z: Option<&Tensor>,
        state: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let Mamba2Config { d_ssm, d_state, headdim, ngroups, .. } = self.config;
        let (batch, seqlen, _) = xbc.dims3()?;
        let nheads = self.config.nheads();
        let bc = ngroups * d_state;
        let heads = |x: &Tensor| x.reshape((batch, seqlen, nheads, headdim));
        let groups = |start: usize| xbc.narrow(2, start, bc)?.reshape((batch, seqlen, ngroups, d_state));
        let (x, z) = (heads(&xbc.narrow(2, 0, d_ssm)?)?, z.map(heads).transpose()?);
        let (b, c) = (groups(d_ssm)?, groups(d_ssm + bc)?);
        let d = if self.config.d_has_headdim { self.d.reshape((nheads, headdim))? } else { self.d.clone() };
        let a = self.a.get()?;
        if let (Some(state), 1) = (&state, seqlen) {
            let y = selective_state_update(&SelectiveStateUpdate {
                d: Some(&d),
                z: z.map(|z| z.squeeze(1)).transpose()?.as_ref(),
                dt_bias: Some(&self.dt_bias),
                dt_softplus: true,
                dt_limit: self.config.dt_limit,
                ..SelectiveStateUpdate::new(
                    state,
                    &x.squeeze(1)?,
                    &dt.squeeze(1)?,
                    &a,
                    &b.squeeze(1)?,
                    &c.squeeze(1)?,
                )
            })?;
            return Ok(y.reshape((batch, 1, d_ssm))?);
        }
        let output = ssd_chunk_scan(&SsdChunkScan {
            d: Some(&d),
            z: z.as_ref(),
            dt_bias: Some(&self.dt_bias),
            dt_softplus: true,
            dt_limit: self.config.dt_limit,
            chunk_size: self.config.chunk_size,
            initial_state: state.as_deref(),
            ..SsdChunkScan::new(&x, dt, &a, &b, &c)
        })?;
        if let Some(state) = state {
            *state = output.final_state;
        }
        Ok(output.y.reshape((batch, seqlen, d_ssm))?)
    }
}

impl Mixer for Mamba2 {
    fn forward(&self, x: &Tensor, state: Option<&mut MixerState>) -> Result<Tensor> {
        let (conv, ssm) = match state {
            Some(MixerState::Recurrent { conv, ssm }) => (Some(conv), Some(ssm)),
            _ => (None, None),
        };
        let (bypass, d_ssm, conv_dim) = (self.config.d_bypass(), self.config.d_ssm, self.config.conv_dim());
        let projected = self.in_proj.forward(x)?;
        // [z₀ | x₀ | z | x B C | dt], the first two for the bypass.
        let z = projected.narrow(2, 2 * bypass, d_ssm)?;
        let xbc = projected.narrow(2, 2 * bypass + d_ssm, conv_dim)?;
        let dt = projected.narrow(2, 2 * bypass + d_ssm + conv_dim, self.config.nheads())?;
        let xbc = self.conv1d.forward(&xbc, conv)?;
        // Without a norm the scan applies the gate itself.
        let gate = if self.norm.is_none() { Some(z.contiguous()?) } else { None };
        let mut y = self.scan(&xbc, &dt, gate.as_ref(), ssm)?;
        if let Some((GatedNorm { eps, before_gate }, weight)) = &self.norm {
            y = norm(&Norm {
                z: Some(&z),
                group_size: Some(d_ssm / self.config.ngroups),
                norm_before_gate: *before_gate,
                ..Norm::rms(&y, weight, *eps)
            })?
            .y;
        }
        if bypass > 0 {
            let gate = projected.narrow(2, 0, bypass)?.silu()?;
            y = Tensor::cat(&[(gate * projected.narrow(2, bypass, bypass)?)?, y], 2)?;
        }
        self.out_proj.forward(&y)
    }
}
