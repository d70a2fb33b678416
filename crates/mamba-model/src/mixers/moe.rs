//! A mixture of experts: each token goes through a few of many multilayer perceptrons.

use candle_core::Tensor;

use super::mlp::Mlp;
use super::router::{Choices, Router};
use super::{Mixer, wide};
use crate::Result;
use crate::batch::Sequences;
use crate::cache::MixerState;
use crate::config::{MlpLayout, MoeConfig};
use crate::linear::Linear;
use crate::params::Params;

pub(super) struct Moe {
    router: Router,
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
    /// To the width of the experts, and back.
    latent: Option<(Linear, Linear)>,
}

impl Moe {
    pub(super) fn new(config: &MoeConfig, d_model: usize, params: &Params) -> Result<Self> {
        let d_expert = config.d_latent.unwrap_or(d_model);
        let latent = match config.d_latent {
            Some(d_latent) => Some((
                Linear::new(&params.at("latent_in"), d_model, d_latent, config.latent_bias)?,
                Linear::new(&params.at("latent_out"), d_latent, d_model, config.latent_bias)?,
            )),
            None => None,
        };
        let shared = config.shared.as_ref().map(|shared| Mlp::new(shared, d_model, &params.at("shared")));
        let experts = match config.stacked {
            true => stacked(config, d_expert, params)?,
            false => (0..config.experts)
                .map(|e| Mlp::new(&config.expert, d_expert, &params.at("experts").at(e)))
                .collect::<Result<_>>()?,
        };
        let router = Router::new(config, d_model, &params.at("router"))?;
        Ok(Self { router, experts, shared: shared.transpose()?, latent })
    }

    /// What the experts make of `(tokens, d_expert)`, not rounded yet.
    fn experts(&self, x: &Tensor, choices: &Choices) -> Result<Tensor> {
        let mut y = wide(&x.zeros_like()?)?;
        for (expert, (tokens, places)) in self.experts.iter().zip(&choices.by_expert) {
            if tokens.is_empty() {
                continue;
            }
            let index = |indices: &[u32]| Tensor::from_slice(indices, indices.len(), x.device());
            let (tokens, places) = (index(tokens)?, index(places)?);
            let weights = choices.weights.index_select(&places, 0)?.to_dtype(y.dtype())?.unsqueeze(1)?;
            let output = wide(&expert.apply(&x.index_select(&tokens, 0)?)?)?.broadcast_mul(&weights)?;
            y = y.index_add(&tokens, &output, 0)?;
        }
        Ok(y)
    }
}

/// Experts whose matrices are parts of `(experts, d_hidden or 2 · d_hidden, d_in)` and `(experts, d_in, d_hidden)`.
fn stacked(config: &MoeConfig, d_in: usize, params: &Params) -> Result<Vec<Mlp>> {
    let params = params.at("experts");
    let d_hidden = config.expert.d_hidden;
    let (name, d_first) = match config.expert.layout {
        MlpLayout::Plain => ("up_proj", d_hidden),
        MlpLayout::UpGate => ("up_gate_proj", 2 * d_hidden),
        MlpLayout::GateUp | MlpLayout::Gated => ("gate_up_proj", 2 * d_hidden),
    };
    let first = params.get((config.experts, d_first, d_in), name)?;
    let down = params.get((config.experts, d_in, d_hidden), "down_proj")?;
    let expert = |e: usize| {
        let matrix = |x: &Tensor| x.narrow(0, e, 1)?.squeeze(0);
        Ok(Mlp::from_matrices(&config.expert, matrix(&first)?, matrix(&down)?))
    };
    (0..config.experts).map(expert).collect()
}

impl Mixer for Moe {
    fn forward(&self, x: &Tensor, _: &Sequences, _: Option<&mut MixerState>) -> Result<Tensor> {
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let (batch, seqlen, d_model) = x.dims3()?;
        let tokens = x.reshape((batch * seqlen, d_model))?;
        let choices = self.router.choose(&tokens)?;
        let y = match &self.latent {
            Some((to, from)) => from.forward(&self.experts(&to.forward(&tokens)?, &choices)?)?,
            None => self.experts(&tokens, &choices)?,
        };
        let y = match &self.shared {
            Some(shared) => (wide(&y)? + wide(&shared.apply(&tokens)?)?)?,
            None => y,
        };
        Ok(y.to_dtype(x.dtype())?.reshape((batch, seqlen, d_model))?)
    }
}
