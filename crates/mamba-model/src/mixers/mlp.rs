//! The gated multilayer perceptron of state-spaces.

use candle_core::Tensor;

use super::Mixer;
use crate::Result;
use crate::cache::MixerState;
use crate::config::MlpConfig;
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct Mlp {
    d_hidden: usize,
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    pub(super) fn new(config: &MlpConfig, d_model: usize, params: &Params) -> Result<Self> {
        let MlpConfig { d_hidden, bias } = *config;
        Ok(Self {
            d_hidden,
            fc1: Linear::new(&params.at("fc1"), d_model, 2 * d_hidden, bias)?,
            fc2: Linear::new(&params.at("fc2"), d_hidden, d_model, bias)?,
        })
    }
}

impl Mixer for Mlp {
    fn forward(&self, x: &Tensor, _: Option<&mut MixerState>) -> Result<Tensor> {
        let both = self.fc1.forward(x)?;
        let gate = both.narrow(2, self.d_hidden, self.d_hidden)?.silu()?;
        self.fc2.forward(&(both.narrow(2, 0, self.d_hidden)? * gate)?)
    }
}
