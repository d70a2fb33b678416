//! The block of Mamba: projection, convolution, selective scan, gate, projection. Channels last throughout.

use candle_core::Tensor;
use mamba_ops::{
    SelectiveScan, SelectiveStateUpdate, SequenceLayout, selective_scan, selective_state_update,
};

use super::{CausalConv, Mixer, NegativeExp};
use crate::Result;
use crate::cache::MixerState;
use crate::config::Mamba1Config;
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct Mamba1 {
    config: Mamba1Config,
    in_proj: Linear,
    conv1d: CausalConv,
    x_proj: Linear,
    dt_proj: Linear,
    dt_bias: Tensor,
    a: NegativeExp,
    d: Tensor,
    out_proj: Linear,
}

impl Mamba1 {
    pub(super) fn new(config: &Mamba1Config, d_model: usize, params: &Params) -> Result<Self> {
        let Mamba1Config { d_inner, d_state, d_conv, dt_rank, conv_bias, proj_bias } = *config;
        Ok(Self {
            config: config.clone(),
            in_proj: Linear::new(&params.at("in_proj"), d_model, 2 * d_inner, proj_bias)?,
            conv1d: CausalConv::new(&params.at("conv1d"), d_inner, d_conv, conv_bias)?,
            x_proj: Linear::new(&params.at("x_proj"), d_inner, dt_rank + 2 * d_state, false)?,
            // The bias of dt_proj is added within the scan, in f32.
            dt_proj: Linear::new(&params.at("dt_proj"), dt_rank, d_inner, false)?,
            dt_bias: params.at("dt_proj").get_f32(d_inner, "bias")?,
            a: NegativeExp::new(params.get_f32((d_inner, d_state), "A_log")?)?,
            d: params.get_f32(d_inner, "D")?,
            out_proj: Linear::new(&params.at("out_proj"), d_inner, d_model, proj_bias)?,
        })
    }

    /// The scan over a sequence or, in place, one step of it.
    fn scan(&self, x: &Tensor, z: &Tensor, state: Option<&mut Tensor>) -> Result<Tensor> {
        let Mamba1Config { d_state, dt_rank, .. } = self.config;
        let projected = self.x_proj.forward(x)?;
        let dt = self.dt_proj.forward(&projected.narrow(2, 0, dt_rank)?)?;
        let b = projected.narrow(2, dt_rank, d_state)?;
        let c = projected.narrow(2, dt_rank + d_state, d_state)?;
        let a = self.a.get()?;
        if let (Some(state), 1) = (&state, x.dim(1)?) {
            let y = selective_state_update(&SelectiveStateUpdate {
                d: Some(&self.d),
                z: Some(&z.squeeze(1)?),
                dt_bias: Some(&self.dt_bias),
                dt_softplus: true,
                ..SelectiveStateUpdate::new(
                    state,
                    &x.squeeze(1)?,
                    &dt.squeeze(1)?,
                    &a,
                    &b.squeeze(1)?,
                    &c.squeeze(1)?,
                )
            })?;
            return Ok(y.unsqueeze(1)?);
        }
        let output = selective_scan(&SelectiveScan {
            d: Some(&self.d),
            z: Some(z),
            delta_bias: Some(&self.dt_bias),
            delta_softplus: true,
            initial_state: state.as_deref(),
            layout: SequenceLayout::ChannelsLast,
            ..SelectiveScan::new(x, &dt, &a, &b, &c)
        })?;
        if let Some(state) = state {
            *state = output.final_state;
        }
        Ok(output.y)
    }
}

impl Mixer for Mamba1 {
    fn forward(&self, x: &Tensor, state: Option<&mut MixerState>) -> Result<Tensor> {
        let (conv, ssm) = match state {
            Some(MixerState::Recurrent { conv, ssm }) => (Some(conv), Some(ssm)),
            _ => (None, None),
        };
        let d_inner = self.config.d_inner;
        let xz = self.in_proj.forward(x)?;
        let x = self.conv1d.forward(&xz.narrow(2, 0, d_inner)?, conv)?;
        let y = self.scan(&x, &xz.narrow(2, d_inner, d_inner)?, ssm)?;
        self.out_proj.forward(&y)
    }
}
