//! Which experts a token takes, and how much each of them counts.

use candle_core::{D, DType, Tensor};

use crate::Result;
use crate::config::{MoeConfig, RouterConfig, RouterScore};
use crate::params::Params;

pub(super) struct Router {
    config: RouterConfig,
    top_k: usize,
    /// `(experts, d_model)`, used in `f32`.
    weight: Tensor,
    /// `(experts,)`.
    correction_bias: Option<Tensor>,
}

/// The choices of all tokens.
pub(super) struct Choices {
    /// For each expert the tokens that take it, and the places of their weights in `weights`.
    pub(super) by_expert: Vec<(Vec<u32>, Vec<u32>)>,
    /// The weight of each choice, `(tokens · top_k,)`, `f32`.
    pub(super) weights: Tensor,
}

impl Router {
    pub(super) fn new(config: &MoeConfig, d_model: usize, params: &Params) -> Result<Self> {
        let weight = params.get((config.experts, d_model), "weight")?;
        let biased = config.router.correction_bias;
        let bias = biased.then(|| params.get_f32(config.experts, "correction_bias")).transpose()?;
        Ok(Self { config: config.router.clone(), top_k: config.top_k, weight, correction_bias: bias })
    }

    /// `x`: `(tokens, d_model)`. The choice has no gradient, the weights have.
    pub(super) fn choose(&self, x: &Tensor) -> Result<Choices> {
        let RouterConfig { score, normalize, scale, .. } = self.config;
        let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let (x, weight) = (x.to_dtype(dtype)?, self.weight.to_dtype(dtype)?);
        let logits = mamba_ops::linear(&mamba_ops::Linear::new(&x, &weight))?;
        let scores = match score {
            RouterScore::Softmax => {
                let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?.exp()?;
                shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?
            }
            RouterScore::Sigmoid => (logits.neg()?.exp()? + 1.0)?.recip()?,
        };
        let for_choice = match &self.correction_bias {
            Some(bias) => scores.broadcast_add(&bias.to_dtype(dtype)?)?,
            None => scores.clone(),
        };
        let (tokens, experts) = scores.dims2()?;
        let rows = for_choice.detach().to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let mut by_expert = vec![(vec![], vec![]); experts];
        let mut places = Vec::with_capacity(tokens * self.top_k);
        for (token, row) in rows.iter().enumerate() {
            for expert in self.best(row) {
                let (tokens, choices) = &mut by_expert[expert];
                tokens.push(token as u32);
                choices.push(places.len() as u32);
                places.push((token * experts + expert) as u32);
            }
        }
        let count = places.len();
        let places = Tensor::from_vec(places, count, x.device())?;
        let mut weights = scores.flatten_all()?.index_select(&places, 0)?.reshape((tokens, self.top_k))?;
        if normalize {
            weights = weights.broadcast_div(&(weights.sum_keepdim(1)? + 1e-20)?)?;
        }
        Ok(Choices { by_expert, weights: super::scaled(weights, scale)?.flatten_all()? })
    }

    /// The best experts of a token, out of the best groups.
    fn best(&self, scores: &[f32]) -> Vec<usize> {
        let RouterConfig { ngroups, top_groups, .. } = self.config;
        let size = scores.len() / ngroups;
        let group_score = |group: usize| {
            let scores = &scores[group * size..(group + 1) * size];
            largest(scores.len(), 2, |i| scores[i]).into_iter().map(|i| scores[i]).sum()
        };
        let groups: Vec<f32> = (0..ngroups).map(group_score).collect();
        let mut chosen = largest(ngroups, top_groups, |i| groups[i]);
        chosen.sort_unstable();
        let candidates: Vec<usize> = chosen.iter().flat_map(|g| g * size..(g + 1) * size).collect();
        let best = largest(candidates.len(), self.top_k, |i| scores[candidates[i]]);
        best.into_iter().map(|i| candidates[i]).collect()
    }
}

/// The `k` indices below `count` with the largest values, the first among equals.
fn largest(count: usize, k: usize, value: impl Fn(usize) -> f32) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..count).collect();
    indices.sort_by(|a, b| value(*b).total_cmp(&value(*a)));
    indices.truncate(k);
    indices
}
