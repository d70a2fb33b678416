//! What a branch may hold: each maps `(batch, seqlen, d_model)` to the same shape.

pub(crate) mod attention;
mod conv;
mod mamba1;
mod mamba2;
pub(crate) mod mlp;
mod moe;
mod rope;
mod router;
mod short_conv;

use candle_core::{DType, Tensor};
use mamba_ops::decoder;

use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::MixerSpec;
use crate::params::Params;

/// A mixer with its weights.
pub(crate) trait Mixer: Send + Sync {
    /// Mixes `(batch, seqlen, d_model)`, or sequences one after another; continues from `state` and leaves it after the last
    /// token, if given one.
    fn forward(&self, x: &Tensor, sequences: &Sequences, state: Option<&mut MixerState>) -> Result<Tensor>;

    /// The weights for a [`Decoder`](mamba_ops::decoder::Decoder), if it computes the same.
    fn decoder(&self) -> Result<Option<decoder::Mixer>> {
        Ok(None)
    }
}

/// Builds a mixer; its parameters stand below `params` under the name of its kind.
pub(crate) fn build(spec: &MixerSpec, d_model: usize, params: &Params) -> Result<Box<dyn Mixer>> {
    Ok(match spec {
        MixerSpec::Mamba1(config) => Box::new(mamba1::Mamba1::new(config, d_model, &params.at("mamba1"))?),
        MixerSpec::Mamba2(config) => Box::new(mamba2::Mamba2::new(config, d_model, &params.at("mamba2"))?),
        MixerSpec::Attention(config) => {
            let params = params.at("attention");
            Box::new(attention::Attention::new(config, d_model, d_model, &params)?)
        }
        MixerSpec::ShortConv(config) => {
            Box::new(short_conv::ShortConv::new(config, d_model, &params.at("short_conv"))?)
        }
        MixerSpec::Mlp(config) => Box::new(mlp::Mlp::new(config, d_model, &params.at("mlp"))?),
        MixerSpec::Moe(config) => Box::new(moe::Moe::new(config, d_model, &params.at("moe"))?),
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

    /// The value, unless it is trained.
    fn fixed(&self) -> Option<&Tensor> {
        self.value.as_ref()
    }

    fn get(&self) -> Result<Tensor> {
        match &self.value {
            Some(value) => Ok(value.clone()),
            None => Ok(self.log.exp()?.neg()?),
        }
    }
}

/// `x` for arithmetic that rounds once at its end: 16 bits are widened. Candle rounds after every operation, and scalars too.
pub(crate) fn wide(x: &Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    })
}

/// `x · scale`, and nothing at all for 1.
pub(crate) fn scaled(x: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(x) } else { Ok((wide(&x)? * scale)?.to_dtype(x.dtype())?) }
}
