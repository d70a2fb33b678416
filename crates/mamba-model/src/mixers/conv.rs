//! The depthwise convolution of several mixers, with its window.

use candle_core::Tensor;
use mamba_ops::{Activation, CausalConv1d, CausalConv1dUpdate, Packing, SequenceLayout, decoder};

use crate::Result;
use crate::adapter::LowRank;
use crate::params::Params;

/// A depthwise convolution with its weight as checkpoints store it, `(channels, 1, width)`.
#[derive(Debug)]
pub(super) struct CausalConv {
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
    adapter: Option<LowRank>,
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
        let bias = params.get_if(bias, channels, "bias")?;
        Ok(Self { weight, bias, activation, adapter: LowRank::find(params, channels, width)? })
    }

    /// The weights, without an adapter, for a decoder.
    pub(super) fn decoder(&self) -> Result<Option<decoder::Conv>> {
        if self.adapter.is_some() {
            return Ok(None);
        }
        let silu = self.activation == Activation::Silu;
        Ok(Some(decoder::Conv { weight: self.weight.squeeze(1)?, bias: self.bias.clone(), silu }))
    }

    pub(super) fn is_trained(&self) -> bool {
        self.weight.track_op()
            || self.bias.as_ref().is_some_and(Tensor::track_op)
            || self.adapter.as_ref().is_some_and(LowRank::is_trained)
    }

    /// Added to what the filters give.
    pub(super) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// One filter a channel, `(channels, width)`.
    pub(super) fn filters(&self) -> Result<Tensor> {
        let weight = self.weight.squeeze(1)?;
        match &self.adapter {
            Some(adapter) => adapter.merged(&weight),
            None => Ok(weight),
        }
    }

    /// `x`: `(batch, seqlen, channels)`, or sequences as they are packed; moves the windows in `state` on.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        packing: Option<&Packing>,
        state: Option<&mut Tensor>,
    ) -> Result<Tensor> {
        let (weight, bias) = (self.filters()?, self.bias.as_ref());
        let (activation, layout) = (self.activation, SequenceLayout::ChannelsLast);
        if let (Some(state), 1, None) = (&state, x.dim(1)?, packing) {
            let step = CausalConv1dUpdate::new(x, state, &weight);
            let args = CausalConv1dUpdate { bias, activation, layout, ..step };
            return Ok(mamba_ops::causal_conv1d_update(&args)?);
        }
        let output = mamba_ops::causal_conv1d(&CausalConv1d {
            bias,
            initial_state: state.as_deref(),
            activation,
            layout,
            packing,
            ..CausalConv1d::new(x, &weight)
        })?;
        if let Some(state) = state {
            *state = output.final_state;
        }
        Ok(output.y)
    }
}
