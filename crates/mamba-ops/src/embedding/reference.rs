//! The op in plain tensor operations.

use candle_core::{Result, Tensor};

use super::Embedding;

/// `weight[ids]`, for any device and dtype; differentiable.
///
/// # Errors
/// If an id is out of range.
pub fn forward(args: &Embedding) -> Result<Tensor> {
    let Embedding { ids, weight } = *args;
    let shape = [ids.dims(), &weight.dims()[1..]].concat();
    weight.contiguous()?.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}
