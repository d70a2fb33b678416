//! The gated short convolution of LFM2.

use candle_core::Tensor;
use mamba_ops::{Activation, decoder};

use super::Mixer;
use super::conv::CausalConv;
use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::ShortConvConfig;
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct ShortConv {
    d_model: usize,
    in_proj: Linear,
    conv: CausalConv,
    out_proj: Linear,
}

impl ShortConv {
    pub(super) fn new(config: &ShortConvConfig, d_model: usize, params: &Params) -> Result<Self> {
        let ShortConvConfig { d_conv, bias } = *config;
        Ok(Self {
            d_model,
            in_proj: Linear::new(&params.at("in_proj"), d_model, 3 * d_model, bias)?,
            conv: CausalConv::new(&params.at("conv1d"), d_model, d_conv, bias, Activation::Identity)?,
            out_proj: Linear::new(&params.at("out_proj"), d_model, d_model, bias)?,
        })
    }
}

impl Mixer for ShortConv {
    fn forward(&self, x: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor> {
        let bcx = self.in_proj.forward(x)?;
        let part = |i: usize| bcx.narrow(2, i * self.d_model, self.d_model);
        let gated = (part(0)? * part(2)?)?;
        let window = state.and_then(|state| state.conv.as_mut());
        let convolved = self.conv.forward(&gated, sequences.packing(), window)?;
        self.out_proj.forward(&(part(1)? * convolved)?)
    }
    fn decoder(&self) -> Result<Option<decoder::Mixer>> {
        let (Some(in_proj), Some(conv), Some(out_proj)) =
            (self.in_proj.decoder(), self.conv.decoder()?, self.out_proj.decoder())
        else {
            return Ok(None);
        };
        Ok(Some(decoder::Mixer::ShortConv(decoder::ShortConv { in_proj, conv, out_proj })))
    }
}
