//! A layer: branches that add to the residual stream.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
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

/// What a model that is trained computes a second time in `backward()`, to remember less in between.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: the fastest, with the most memory.
    #[default]
    Nothing,
    /// Each branch of each layer as a whole: of a layer only its input is kept, for one more forward pass.
    Layers,
}

/// `x + Σ mixer(norm(x))`.
pub(crate) struct Branch {
    norm: StreamNorm,
    mixers: Vec<Box<dyn Mixer>>,
    recipe: Arc<Recipe>,
    parameters: Vec<Tensor>,
}

/// How to build a branch again over other tensors.
struct Recipe {
    spec: BranchSpec,
    config: Arc<ModelConfig>,
    dtype: DType,
    /// Where the branch stands.
    prefix: String,
    /// The full names of its parameters.
    names: Vec<String>,
}

impl Recipe {
    /// Update and stream after a branch of the given parameters.
    fn run(&self, stream: Stream, parameters: &[Tensor]) -> Result<Vec<Tensor>> {
        let device = stream.update.device().clone();
        let tensors: HashMap<String, Tensor> =
            self.names.iter().cloned().zip(parameters.iter().cloned()).collect();
        let params = Params::new(VarBuilder::from_tensors(tensors, self.dtype, &device)).at(&self.prefix);
        let branch = Branch::new(&self.spec, &self.config, &params)?;
        let Stream { update, residual } = branch.forward(stream, &mut std::iter::empty())?;
        Ok([Some(update), residual].into_iter().flatten().collect())
    }
}

impl Branch {
    pub(crate) fn new(spec: &BranchSpec, config: &Arc<ModelConfig>, params: &Params) -> Result<Self> {
        let before = params.count();
        let mixers = spec.mixers.iter().map(|mixer| build(mixer, config.d_model, params));
        let (norm, mixers) = (StreamNorm::new(config, &params.at("norm"))?, mixers.collect::<Result<_>>()?);
        let (names, parameters) = params.noted().into_iter().skip(before).unzip();
        let recipe = Recipe {
            spec: spec.clone(),
            config: config.clone(),
            dtype: params.dtype(),
            prefix: params.prefix(),
            names,
        };
        Ok(Self { norm, mixers, recipe: Arc::new(recipe), parameters })
    }

    /// As [`forward`](Self::forward) without states, as one node of the graph that keeps only its inputs.
    pub(crate) fn forward_checkpointed(&self, stream: &Stream) -> Result<Stream> {
        let recipe = self.recipe.clone();
        let streams = 1 + usize::from(stream.residual.is_some());
        let inputs: Vec<&Tensor> = [Some(&stream.update), stream.residual.as_ref()]
            .into_iter()
            .flatten()
            .chain(&self.parameters)
            .collect();
        let outputs = mamba_ops::checkpoint("layer", &inputs, move |inputs| {
            let (stream, parameters) = inputs.split_at(streams);
            let stream = Stream { update: stream[0].clone(), residual: stream.get(1).cloned() };
            Ok(recipe.run(stream, parameters)?)
        })?;
        let mut outputs = outputs.into_iter();
        match outputs.next() {
            Some(update) => Ok(Stream { update, residual: outputs.next() }),
            None => Err(crate::Error::Input("a layer gave nothing".into())),
        }
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
