//! A matrix product with a weight as checkpoints store it.

use candle_core::Tensor;
use mamba_ops::linear;

use crate::Result;
use crate::params::Params;

/// `y = x Wᵀ + bias` over the last axis.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `(out, in)`.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(params: &Params, d_in: usize, d_out: usize, bias: bool) -> Result<Self> {
        Ok(Self { weight: params.get((d_out, d_in), "weight")?, bias: params.get_if(bias, d_out, "bias")? })
    }

    pub(crate) fn from_weight(weight: Tensor) -> Self {
        Self { weight, bias: None }
    }

    /// `x`: `(.., in)` to `(.., out)`, in the dtype of the weight.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_dtype(self.weight.dtype())?;
        Ok(linear(&mamba_ops::Linear {
            bias: self.bias.as_ref(),
            ..mamba_ops::Linear::new(&x, &self.weight)
        })?)
    }
}
