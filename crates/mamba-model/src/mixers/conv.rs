//! The depthwise convolution of several mixers, with its window.

use candle_core::Tensor;
use mamba_ops::{Activation, CausalConv1d, CausalConv1dUpdate, SequenceLayout};

use crate::Result;
use crate::params::Params;

/// A depthwise convolution with its weight as checkpoints store it, `(channels, 1, width)`.
#[derive(Debug)]
pub(super) struct CausalConv {
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
}

impl CausalConv {
    pub(super) fn new(
        params: &Params,
        channels: usize,
        width: usize,
        bias: bool,
        activation: Activation,
    ) -> Result<Self> {
        let weight = params.get((channels, 1, width), "weight")?;
        Ok(Self { weight, bias: params.get_if(bias, channels, "bias")?, activation })
    }

    /// `x`: `(batch, seqlen, channels)`; moves the window in `state` on.
    pub(super) fn forward(&self, x: &Tensor, state: Option<&mut Tensor>) -> Result<Tensor> {
        let (weight, bias) = (self.weight.squeeze(1)?, self.bias.as_ref());
        let (activation, layout) = (self.activation, SequenceLayout::ChannelsLast);
        if let (Some(state), 1) = (&state, x.dim(1)?) {
            let args = CausalConv1dUpdate { x, state, weight: &weight, bias, activation, layout };
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
