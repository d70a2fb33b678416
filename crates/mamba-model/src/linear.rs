//! A matrix product with a weight as checkpoints store it.

use candle_core::{DType, Tensor};
use mamba_ops::decoder::Product;
use mamba_ops::linear;

use crate::Result;
use crate::adapter::LowRank;
use crate::params::Params;

/// `y = x Wᵀ + bias` over the last axis.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `(out, in)`.
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<LowRank>,
}

impl Linear {
    pub(crate) fn new(params: &Params, d_in: usize, d_out: usize, bias: bool) -> Result<Self> {
        Ok(Self {
            weight: params.get((d_out, d_in), "weight")?,
            bias: params.get_if(bias, d_out, "bias")?,
            adapter: LowRank::find(params, d_out, d_in)?,
        })
    }

    pub(crate) fn from_weight(weight: Tensor) -> Self {
        Self { weight, bias: None, adapter: None }
    }

    pub(crate) fn with_adapter(self, adapter: Option<LowRank>) -> Self {
        Self { adapter, ..self }
    }

    /// The weights, without an adapter, for a decoder.
    pub(crate) fn decoder(&self) -> Option<Product> {
        let product = Product { bias: self.bias.clone(), ..Product::new(self.weight.clone()) };
        self.adapter.is_none().then_some(product)
    }

    /// Several of the same inputs, one after another.
    pub(crate) fn decoder_of(linears: &[&Self]) -> Result<Option<Product>> {
        if linears.iter().any(|linear| linear.adapter.is_some()) {
            return Ok(None);
        }
        let product = Product::of(linears.iter().map(|linear| linear.weight.clone()).collect());
        if linears.iter().all(|linear| linear.bias.is_none()) {
            return Ok(Some(product));
        }
        let bias = linears.iter().map(|linear| match &linear.bias {
            Some(bias) => Ok(bias.clone()),
            None => Ok(Tensor::zeros(linear.weight.dim(0)?, linear.dtype(), linear.weight.device())?),
        });
        let bias = Tensor::cat(&bias.collect::<Result<Vec<_>>>()?, 0)?;
        Ok(Some(Product { bias: Some(bias), ..product }))
    }

    pub(crate) fn is_trained(&self) -> bool {
        self.weight.track_op()
            || self.bias.as_ref().is_some_and(Tensor::track_op)
            || self.adapter.as_ref().is_some_and(LowRank::is_trained)
    }

    /// Of the weight, and of what it gives.
    pub(crate) fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// The weight, if there is nothing else to the product.
    pub(crate) fn plain(&self) -> Option<&Tensor> {
        (self.adapter.is_none() && self.bias.is_none()).then_some(&self.weight)
    }

    /// The weight that is multiplied with, `(out, in)`.
    pub(crate) fn weight(&self) -> Result<Tensor> {
        match &self.adapter {
            Some(adapter) => adapter.merged(&self.weight),
            None => Ok(self.weight.clone()),
        }
    }

    /// `x`: `(.., in)` to `(.., out)`, in the dtype of the weight.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.weight.dtype())?;
        let Some(adapter) = &self.adapter else {
            return Ok(linear(&mamba_ops::Linear {
                bias: self.bias.as_ref(),
                ..mamba_ops::Linear::new(&x, &self.weight)
            })?);
        };
        let y = linear(&mamba_ops::Linear::new(&x, &self.weight))?;
        let y = adapter.forward(&x, y, &self.weight)?;
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }
}
