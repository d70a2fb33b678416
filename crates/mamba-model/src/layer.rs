//! A layer: branches that add to the residual stream.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use mamba_ops::{Norm, NormKind, decoder};

use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{BranchSpec, LayerSpec, ModelConfig};
use crate::dropout::{Mask, Masks};
use crate::linear::Linear;
use crate::mixers::{Mixer, build, scaled, wide};
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

impl StreamNorm {
    /// The same for a decoder.
    pub(crate) fn decoder(&self) -> decoder::Norm {
        decoder::Norm { kind: self.kind, weight: self.weight.clone(), bias: self.bias.clone(), eps: self.eps }
    }
}

/// What a model that is trained computes a second time in `backward()`, to remember less in between.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: the fastest, with the most memory.
    #[default]
    Nothing,
    /// Each branch of each layer as a whole: of a layer only its input is kept, for one more forward pass. A branch that
    /// also reads a shared block (Zamba's) is computed once, as without this.
    Layers,
}

/// What only a model that is trained asks of its layers, in passes without states.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Training {
    pub(crate) recompute: Recompute,
    pub(crate) masks: Option<Masks>,
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
    fn run(
        &self,
        stream: Stream,
        sequences: &Sequences,
        mask: Option<Mask>,
        parameters: &[Tensor],
    ) -> Result<Vec<Tensor>> {
        let device = stream.update.device().clone();
        let tensors: HashMap<String, Tensor> =
            self.names.iter().cloned().zip(parameters.iter().cloned()).collect();
        let params = Params::new(VarBuilder::from_tensors(tensors, self.dtype, &device)).at(&self.prefix);
        let branch = Branch::new(&self.spec, &self.config, &params)?;
        let Stream { update, residual } =
            branch.forward(&stream, sequences, &mut std::iter::empty(), mask)?;
        Ok([Some(update), residual].into_iter().flatten().collect())
    }
}

/// The states of the mixers that are still to come; none without a cache.
pub(crate) type States<'s, 'c> = &'s mut dyn Iterator<Item = &'c mut MixerState>;

impl Layer {
    /// `blocks` are the shared blocks that earlier layers made: the first layer that uses one holds its parameters.
    pub(crate) fn new(
        spec: &LayerSpec,
        config: &Arc<ModelConfig>,
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

    /// The weights for a decoder, a layer for each branch, if it computes the same.
    pub(crate) fn decoder(&self) -> Result<Option<Vec<decoder::Layer>>> {
        let mut layers = vec![];
        for (b, branch) in self.branches.iter().enumerate() {
            let shared = match &self.shared {
                Some(Shared { block, adapter, linear }) if b == 0 => {
                    let Some(linear) = linear.plain() else { return Ok(None) };
                    let Some(shared) = block.decoder(*adapter, linear.clone())? else { return Ok(None) };
                    Some(shared)
                }
                _ => None,
            };
            let mut mixers = vec![];
            for (scale, mixer) in &branch.mixers {
                let Some(mixer) = mixer.decoder()? else { return Ok(None) };
                mixers.push((*scale, mixer));
            }
            if !(1..=2).contains(&mixers.len()) {
                return Ok(None);
            }
            layers.push(decoder::Layer { shared, norm: branch.norm.decoder(), mixers });
        }
        Ok(Some(layers))
    }

    /// How many branches there are.
    pub(crate) fn len(&self) -> usize {
        self.branches.len()
    }

    pub(crate) fn forward<'c>(
        &self,
        mut stream: Stream,
        embedding: &Tensor,
        sequences: &Sequences,
        states: States<'_, 'c>,
        training: Training,
    ) -> Result<Stream> {
        for (b, branch) in self.branches.iter().enumerate() {
            let mask = training.masks.map(|masks| masks.of(b));
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
                    Stream { update: branch.mix(&x, sequences, states, mask)?, residual: Some(sum) }
                }
                _ if training.recompute == Recompute::Layers => {
                    branch.forward_checkpointed(&stream, sequences, mask)?
                }
                _ => branch.forward(&stream, sequences, states, mask)?,
            };
        }
        Ok(stream)
    }
}

impl Branch {
    fn new(spec: &BranchSpec, config: &Arc<ModelConfig>, params: &Params) -> Result<Self> {
        let before = params.count();
        let mixers =
            spec.mixers.iter().map(|(scale, mixer)| Ok((*scale, build(mixer, config.d_model, params)?)));
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

    fn forward<'c>(
        &self,
        stream: &Stream,
        sequences: &Sequences,
        states: States<'_, 'c>,
        mask: Option<Mask>,
    ) -> Result<Stream> {
        let (x, residual) = self.norm.forward(stream)?;
        Ok(Stream { update: self.mix(&x, sequences, states, mask)?, residual: Some(residual) })
    }

    /// As [`forward`](Self::forward) without states, as one node of the graph that keeps only its inputs.
    fn forward_checkpointed(
        &self,
        stream: &Stream,
        sequences: &Sequences,
        mask: Option<Mask>,
    ) -> Result<Stream> {
        let (recipe, sequences) = (self.recipe.clone(), sequences.clone());
        let streams = 1 + usize::from(stream.residual.is_some());
        let inputs: Vec<&Tensor> = [Some(&stream.update), stream.residual.as_ref()]
            .into_iter()
            .flatten()
            .chain(&self.parameters)
            .collect();
        let outputs = mamba_ops::checkpoint("layer", &inputs, move |inputs| {
            let (stream, parameters) = inputs.split_at(streams);
            let stream = Stream { update: stream[0].clone(), residual: stream.get(1).cloned() };
            Ok(recipe.run(stream, &sequences, mask, parameters)?)
        })?;
        let mut outputs = outputs.into_iter();
        match outputs.next() {
            Some(update) => Ok(Stream { update, residual: outputs.next() }),
            None => Err(crate::Error::Input("a layer gave nothing".into())),
        }
    }

    /// The sum of the mixers, of which a mask leaves out a part.
    fn mix<'c>(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        states: States<'_, 'c>,
        mask: Option<Mask>,
    ) -> Result<Tensor> {
        let mut update: Option<Tensor> = None;
        for (scale, mixer) in &self.mixers {
            let mut y = mixer.forward(x, sequences, states.next())?;
            if self.mixers.len() > 1 {
                y = wide(&y)?; // the sum is rounded, not its parts
            }
            y = scaled(y, *scale)?;
            update = Some(match update {
                Some(sum) => (sum + y)?,
                None => y,
            });
        }
        let update = match update {
            Some(update) => update.to_dtype(x.dtype())?,
            None => x.zeros_like()?,
        };
        match mask {
            Some(mask) => mask.apply(&update),
            None => Ok(update),
        }
    }
}
