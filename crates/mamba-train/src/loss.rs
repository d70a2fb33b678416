//! What is minimised.

use candle_core::Tensor;
use mamba_model::Model;
use mamba_ops::{LinearCrossEntropy, linear_cross_entropy};

use crate::Result;
use crate::data::{Batch, IGNORED};

/// The sum of the cross-entropies of all predictions of a batch, in nats, `f32`; the logits of all positions never exist at
/// once.
///
/// # Errors
/// If a token is out of range, or the device is out of memory.
pub fn language_model_loss(model: &Model, batch: &Batch) -> Result<Tensor> {
    let hidden = model.hidden_states(batch.input()?, None)?.flatten_to(1)?;
    let (targets, weight) = (batch.targets.flatten_all()?, model.head_weight()?);
    let hidden = hidden.to_dtype(weight.dtype())?;
    let logit_scale = model.config().logits_scale;
    let args = LinearCrossEntropy {
        ignore_index: IGNORED,
        logit_scale,
        ..LinearCrossEntropy::new(&hidden, &weight, &targets)
    };
    Ok(linear_cross_entropy(&args)?)
}
