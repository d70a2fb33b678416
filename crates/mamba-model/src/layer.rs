//! A layer: branches that add to the residual stream.

use candle_core::Tensor;
use mamba_ops::{Norm, NormKind};

use crate::Result;
use crate::cache::MixerState;
use crate::config::{BranchSpec, ModelConfig};
use crate::mixers::{Mixer, build};
use crate::params::Params;

/// The residual stream between two branches: the next norm adds what the last branch gave, in one pass.
pub(crate) struct Stream {
    /// What the last branch gave, or the embedding.
    pub(crate) update: Tensor,
    /// The stream before it; none at the embedding.
    pub(crate) residual: Option<Tensor>,
}

/// A norm over the residual stream.
pub(crate) struct StreamNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
    residual_in_f32: bool,
}

impl StreamNorm {
    pub(crate) fn new(config: &ModelConfig, params: &Params) -> Result<Self> {
        Ok(Self {
            weight: params.get(config.d_model, "weight")?,
            bias: params.get_if(config.norm == NormKind::Layer, config.d_model, "bias")?,
            kind: config.norm,
            eps: config.norm_eps,
            residual_in_f32: config.residual_in_f32,
        })
    }

    /// Adds the update to the stream; the normalised sum, and the sum.
    pub(crate) fn forward(&self, stream: &Stream) -> Result<(Tensor, Tensor)> {
        let output = mamba_ops::norm(&Norm {
            weight: Some(&self.weight),
            bias: self.bias.as_ref(),
            residual: stream.residual.as_ref(),
            residual_in_f32: self.residual_in_f32,
            ..Norm::new(&stream.update, self.kind, self.eps)
        })?;
        Ok((output.y, output.residual))
    }
}

/// `x + Σ mixer(norm(x))`.
pub(crate) struct Branch {
    norm: StreamNorm,
    mixers: Vec<Box<dyn Mixer>>,
}

impl Branch {
    pub(crate) fn new(spec: &BranchSpec, config: &ModelConfig, params: &Params) -> Result<Self> {
        let mixers = spec.mixers.iter().map(|mixer| build(mixer, config.d_model, params));
        Ok(Self {
            norm: StreamNorm::new(config, &params.at("norm"))?,
            mixers: mixers.collect::<Result<_>>()?,
        })
    }

    pub(crate) fn forward<'c>(
        &self,
        stream: Stream,
        states: &mut impl Iterator<Item = Option<&'c mut MixerState>>,
    ) -> Result<Stream> {
        let (x, residual) = self.norm.forward(&stream)?;
        let mut update: Option<Tensor> = None;
        for mixer in &self.mixers {
            let y = mixer.forward(&x, states.next().flatten())?;
            update = Some(match update {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        let update = match update {
            Some(update) => update,
            None => x.zeros_like()?,
        };
        Ok(Stream { update, residual: Some(residual) })
    }
}
