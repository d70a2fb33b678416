//! Low-rank changes of weights that stay as they are, as parameters beside them.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use mamba_ops::linear;

use crate::params::Params;
use crate::{Model, Result};

/// Whether a parameter belongs to an adapter rather than to the model.
pub(crate) fn is_adapter(name: &str) -> bool {
    name.rsplit('.').any(|part| part.starts_with("lora_"))
}

/// `scale · B A`, the change of a matrix `(out, in)`; with a magnitude, the length of each row of the sum is that.
///
/// Where a builder has the tensors `lora_A.weight`, `lora_B.weight` and `lora_scale` beside a weight, the model computes
/// with the changed weight.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// `(rank, in)`.
    a: Tensor,
    /// `(out, rank)`.
    b: Tensor,
    scale: f64,
    /// `(out,)`.
    magnitude: Option<Tensor>,
}

impl LowRank {
    pub(crate) fn is_trained(&self) -> bool {
        [Some(&self.a), Some(&self.b), self.magnitude.as_ref()].into_iter().flatten().any(Tensor::track_op)
    }

    /// The change of a matrix `(out, in)` below `params`, if there is one.
    pub(crate) fn find(params: &Params, d_out: usize, d_in: usize) -> Result<Option<Self>> {
        Self::named(params, ["lora_A.weight", "lora_B.weight"], d_out, d_in)
    }

    /// The change of the transpose of an embedding, `(dim, rows)`, if there is one.
    pub(crate) fn of_embedding(params: &Params, rows: usize, dim: usize) -> Result<Option<Self>> {
        Self::named(params, ["lora_embedding_A", "lora_embedding_B"], dim, rows)
    }

    fn named(params: &Params, [a, b]: [&str; 2], d_out: usize, d_in: usize) -> Result<Option<Self>> {
        let Some(rank) = params.extent_if_present(a, 0)? else { return Ok(None) };
        let scale = params.get_f32((), "lora_scale")?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let magnitude = params.extent_if_present("lora_magnitude_vector", 0)?.is_some();
        Ok(Some(Self {
            a: params.get((rank, d_in), a)?,
            b: params.get((d_out, rank), b)?,
            scale,
            magnitude: params.get_if(magnitude, d_out, "lora_magnitude_vector")?,
        }))
    }

    /// The same change of the first rows only.
    pub(crate) fn narrowed(&self, d_out: usize) -> Result<Self> {
        let magnitude = self.magnitude.as_ref().map(|m| m.narrow(0, 0, d_out)).transpose()?;
        Ok(Self { b: self.b.narrow(0, 0, d_out)?, magnitude, ..self.clone() })
    }

    /// What the change adds to `y = x Wᵀ`, and what it then multiplies it with.
    pub(crate) fn forward(&self, x: &Tensor, y: Tensor, weight: &Tensor) -> Result<Tensor> {
        let low = linear(&mamba_ops::Linear::new(x, &self.a))?;
        let change = linear(&mamba_ops::Linear::new(&low, &self.b))?;
        let y = (y + (change * self.scale)?)?;
        match self.factors(weight)? {
            Some(factors) => Ok(y.broadcast_mul(&factors.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    /// The changed weight, `(out, in)`.
    pub(crate) fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let sum = (weight + self.change(weight.dtype())?)?;
        match self.factors(weight)? {
            Some(factors) => Ok(sum.broadcast_mul(&factors.to_dtype(sum.dtype())?.unsqueeze(1)?)?),
            None => Ok(sum),
        }
    }

    /// The changed rows of an embedding: `ids` of any shape.
    pub(crate) fn embed(&self, ids: &Tensor, y: Tensor) -> Result<Tensor> {
        let table = self.a.t()?.contiguous()?;
        let low = mamba_ops::embedding(&mamba_ops::Embedding::new(ids, &table))?;
        let change = linear(&mamba_ops::Linear::new(&low, &self.b))?;
        Ok((y + (change * self.scale)?)?)
    }

    /// `scale · B A`.
    fn change(&self, dtype: DType) -> Result<Tensor> {
        Ok((self.b.matmul(&self.a)? * self.scale)?.to_dtype(dtype)?)
    }

    /// The magnitude over the length of each row; the length is taken as a constant, as published.
    fn factors(&self, weight: &Tensor) -> Result<Option<Tensor>> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        let wide = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let detached = Self { a: self.a.detach(), b: self.b.detach(), ..self.clone() };
        let rows = (weight.detach().to_dtype(wide)? + detached.change(wide)?)?;
        let lengths = rows.sqr()?.sum(1)?.sqrt()?;
        Ok(Some(magnitude.to_dtype(wide)?.div(&lengths)?))
    }
}

impl Model {
    /// Whether low-rank adapters stand beside some of the weights.
    pub fn has_adapters(&self) -> bool {
        self.parameters().iter().any(|(name, _)| is_adapter(name))
    }

    /// The same model with its adapters added into the weights, without variables; this one stays as it is.
    ///
    /// A head that is the embedding becomes a matrix of its own if one of the two was adapted.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn merged(&self) -> Result<Self> {
        let all: HashMap<String, Tensor> =
            self.parameters().iter().map(|(name, x)| (name.clone(), x.detach())).collect();
        let builder = |tensors| VarBuilder::from_tensors(tensors, self.dtype(), self.device());
        let params = Params::new(builder(all.clone()));
        let mut config = self.config().clone();
        let mut merged = HashMap::new();
        for (name, weight) in all.iter().filter(|(name, _)| !is_adapter(name)) {
            let module = params.at(name.strip_suffix(".weight").unwrap_or(name));
            let matrix = if weight.rank() == 3 { weight.squeeze(1)? } else { weight.clone() };
            let weight = match matrix.dims() {
                [rows, dim] if name == "embedding.weight" => {
                    match LowRank::of_embedding(&module, *rows, *dim)? {
                        Some(adapter) => adapter.merged(&weight.t()?)?.t()?.contiguous()?,
                        None => weight.clone(),
                    }
                }
                [d_out, d_in] if name.ends_with(".weight") => match LowRank::find(&module, *d_out, *d_in)? {
                    Some(adapter) => adapter.merged(&matrix)?.reshape(weight.shape())?,
                    None => weight.clone(),
                },
                _ => weight.clone(),
            };
            merged.insert(name.clone(), weight);
        }
        let head = LowRank::find(&params.at("lm_head"), config.padded_vocab_size, config.d_model)?;
        let adapted = |name: &str| all.keys().any(|key| key.starts_with(name) && is_adapter(key));
        if config.tie_embeddings && (adapted("embedding.") || adapted("lm_head.")) {
            config.tie_embeddings = false;
            let base = &all["embedding.weight"];
            let head = head.map_or(Ok(base.clone()), |head| head.merged(base))?;
            merged.insert("lm_head.weight".into(), head);
        }
        Self::new(&config, builder(merged))
    }
}
