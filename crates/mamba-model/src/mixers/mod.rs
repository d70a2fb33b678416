//! What a branch may hold: each maps `(batch, seqlen, d_model)` to the same shape.

mod mamba1;
mod mamba2;
mod mlp;

use candle_core::Tensor;

use crate::Result;
use crate::adapter::LowRank;
use crate::cache::MixerState;
use crate::config::MixerSpec;
use crate::params::Params;

/// A mixer with its weights.
pub(crate) trait Mixer: Send + Sync {
    /// Mixes `(batch, seqlen, d_model)`; continues from `state` and leaves it after the last token, if given one.
    fn forward(&self, x: &Tensor, state: Option<&mut MixerState>) -> Result<Tensor>;
}

/// Builds a mixer; its parameters stand below `params` under the name of its kind.
pub(crate) fn build(spec: &MixerSpec, d_model: usize, params: &Params) -> Result<Box<dyn Mixer>> {
    Ok(match spec {
        MixerSpec::Mamba1(config) => Box::new(mamba1::Mamba1::new(config, d_model, &params.at("mamba1"))?),
        MixerSpec::Mamba2(config) => Box::new(mamba2::Mamba2::new(config, d_model, &params.at("mamba2"))?),
        MixerSpec::Mlp(config) => Box::new(mlp::Mlp::new(config, d_model, &params.at("mlp"))?),
    })
}

/// `A = -exp(A_log)`: computed once for inference, each time while training.
#[derive(Debug)]
struct NegativeExp {
    log: Tensor,
    value: Option<Tensor>,
}

impl NegativeExp {
    fn new(log: Tensor) -> Result<Self> {
        let value = if log.track_op() { None } else { Some(log.exp()?.neg()?) };
        Ok(Self { log, value })
    }

    fn get(&self) -> Result<Tensor> {
        match &self.value {
            Some(value) => Ok(value.clone()),
            None => Ok(self.log.exp()?.neg()?),
        }
    }
}

/// A depthwise convolution with its weight as checkpoints store it, `(channels, 1, width)`.
#[derive(Debug)]
struct CausalConv {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<LowRank>,
}

impl CausalConv {
    fn new(params: &Params, channels: usize, width: usize, bias: bool) -> Result<Self> {
        let weight = params.get((channels, 1, width), "weight")?;
        let bias = params.get_if(bias, channels, "bias")?;
        Ok(Self { weight, bias, adapter: LowRank::find(params, channels, width)? })
    }

    /// One filter a channel, `(channels, width)`.
    fn filters(&self) -> Result<Tensor> {
        let weight = self.weight.squeeze(1)?;
        match &self.adapter {
            Some(adapter) => adapter.merged(&weight),
            None => Ok(weight),
        }
    }

    /// `x`: `(batch, seqlen, channels)`, through SiLU; moves the window in `state` on.
    fn forward(&self, x: &Tensor, state: Option<&mut Tensor>) -> Result<Tensor> {
        use mamba_ops::{Activation, CausalConv1d, CausalConv1dUpdate, SequenceLayout};
        let (weight, bias) = (self.filters()?, self.bias.as_ref());
        let (activation, layout) = (Activation::Silu, SequenceLayout::ChannelsLast);
        if let (Some(state), 1) = (&state, x.dim(1)?) {
            let step = CausalConv1dUpdate::new(x, state, &weight);
            let args = CausalConv1dUpdate { bias, activation, layout, ..step };
            return Ok(mamba_ops::causal_conv1d_update(&args)?);
        }
        let output = mamba_ops::causal_conv1d(&CausalConv1d {
            bias,
            initial_state: state.as_deref(),
            activation,
            layout,
            ..CausalConv1d::new(x, &weight)
        })?;
        if let Some(state) = state {
            *state = output.final_state;
        }
        Ok(output.y)
    }
}
