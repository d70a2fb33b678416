//! A layer: branches that add to the residual stream.

use std::sync::Arc;

use candle_core::Tensor;
use mamba_ops::{Norm, NormKind};

use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{BranchSpec, LayerSpec, ModelConfig};
use crate::linear::Linear;
use crate::mixers::{Mixer, build, scaled};
use crate::params::Params;
use crate::shared_block::SharedBlock;

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

/// Branches one after another, the first of which may also read a block that other layers use too.
pub(crate) struct Layer {
    shared: Option<Shared>,
    branches: Vec<Branch>,
}

/// A use of a shared block.
struct Shared {
    block: Arc<SharedBlock>,
    adapter: usize,
    linear: Linear,
}

/// `x + Σ scale · mixer(norm(x))`.
struct Branch {
    norm: StreamNorm,
    mixers: Vec<(f64, Box<dyn Mixer>)>,
}

/// The states of the mixers that are still to come; none without a cache.
pub(crate) type States<'s, 'c> = &'s mut dyn Iterator<Item = &'c mut MixerState>;

impl Layer {
    /// `blocks` are the shared blocks that earlier layers made: the first layer that uses one holds its parameters.
    pub(crate) fn new(
        spec: &LayerSpec,
        config: &ModelConfig,
        params: &Params,
        blocks: &mut [Option<Arc<SharedBlock>>],
    ) -> Result<Self> {
        let shared = match spec.shared {
            None => None,
            Some(shared) => {
                let made = &mut blocks[shared.block];
                let block = match made {
                    Some(block) => block.clone(),
                    None => made
                        .insert(Arc::new(SharedBlock::new(shared.block, config, &params.at("shared"))?))
                        .clone(),
                };
                let linear = Linear::new(&params.at("linear"), config.d_model, config.d_model, false)?;
                Some(Shared { block, adapter: shared.adapter, linear })
            }
        };
        // Families that share blocks name such layers in another way.
        let params = if shared.is_some() { params.at("hybrid") } else { params.clone() };
        let branches = spec.branches.iter().enumerate();
        let branches = branches.map(|(b, branch)| Branch::new(branch, config, &params.at(b)));
        Ok(Self { shared, branches: branches.collect::<Result<_>>()? })
    }

    pub(crate) fn forward<'c>(
        &self,
        mut stream: Stream,
        embedding: &Tensor,
        sequences: &Sequences,
        states: States<'_, 'c>,
    ) -> Result<Stream> {
        for (b, branch) in self.branches.iter().enumerate() {
            stream = match &self.shared {
                Some(shared) if b == 0 => {
                    // The block reads the stream as it is, so it is added up first.
                    let sum = match stream.residual {
                        Some(residual) => (residual.to_dtype(stream.update.dtype())? + stream.update)?,
                        None => stream.update,
                    };
                    let block =
                        shared.block.forward(&sum, embedding, shared.adapter, sequences, states.next())?;
                    let addition = shared.linear.forward(&block)?;
                    let update = (&sum + addition)?;
                    let (x, _) = branch.norm.forward(&Stream { update, residual: None })?;
                    Stream { update: branch.mix(&x, sequences, states)?, residual: Some(sum) }
                }
                _ => {
                    let (x, residual) = branch.norm.forward(&stream)?;
                    Stream { update: branch.mix(&x, sequences, states)?, residual: Some(residual) }
                }
            };
        }
        Ok(stream)
    }
}

impl Branch {
    fn new(spec: &BranchSpec, config: &ModelConfig, params: &Params) -> Result<Self> {
        let mixers =
            spec.mixers.iter().map(|(scale, mixer)| Ok((*scale, build(mixer, config.d_model, params)?)));
        Ok(Self {
            norm: StreamNorm::new(config, &params.at("norm"))?,
            mixers: mixers.collect::<Result<_>>()?,
        })
    }

    fn mix<'c>(&self, x: &Tensor, sequences: &Sequences, states: States<'_, 'c>) -> Result<Tensor> {
        let mut update: Option<Tensor> = None;
        for (scale, mixer) in &self.mixers {
            let y = scaled(mixer.forward(x, sequences, states.next())?, *scale)?;
            update = Some(match update {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        match update {
            Some(update) => Ok(update),
            None => Ok(x.zeros_like()?),
        }
    }
}
