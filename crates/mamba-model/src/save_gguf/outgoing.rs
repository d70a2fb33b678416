//! The tensors of a model as a GGUF file holds them.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use crate::checkpoint::Form;
use crate::families::gguf::Architecture;
use crate::{Model, Result};

/// A tensor of a file, and what it is made of.
pub(super) struct Outgoing {
    pub name: String,
    pub shape: Vec<usize>,
    /// Whether it may be stored in any type.
    pub is_matrix: bool,
    form: Form,
    /// Which of the tensors that the form makes of one.
    place: usize,
    /// One tensor of the model, or all that are stacked.
    sources: Vec<Tensor>,
    /// What rows are multiplied by; empty if by nothing.
    factors: Vec<f64>,
}

impl Outgoing {
    /// All tensors of a model, in its order.
    pub fn all(model: &Model, architecture: &Architecture) -> Vec<Self> {
        let config = model.config();
        let mut parameters: Vec<_> = model.parameters().iter().map(|(name, x)| (name.as_str(), x)).collect();
        if config.tie_embeddings && !architecture.stored(config).tie_embeddings {
            parameters.extend(
                parameters
                    .iter()
                    .find(|(name, _)| *name == "embedding.weight")
                    .map(|(_, x)| ("lm_head.weight", *x)),
            );
        }
        let (mut all, mut places) = (Vec::<Self>::new(), HashMap::new());
        for (canonical, x) in parameters {
            let form = (architecture.form)(config, canonical);
            let name = architecture.names.candidates(canonical).into_iter().next().unwrap_or_default();
            let factors = architecture.folding.as_ref().map(|folding| (folding.factors)(config, canonical));
            for (place, name) in form.names(name).into_iter().enumerate() {
                if let (Form::Expert { .. }, Some(stack)) = (form, places.get(&name)) {
                    let stack: &mut Self = &mut all[*stack];
                    stack.sources.push(x.clone());
                    continue;
                }
                places.insert(name.clone(), all.len());
                let shape = form.shape_in_file(x.dims());
                all.push(Self {
                    is_matrix: form.keeps_matrices()
                        && shape.len() > 1
                        && !canonical.ends_with("router.weight"),
                    name,
                    shape,
                    form,
                    place,
                    sources: vec![x.clone()],
                    factors: factors.clone().unwrap_or_default(),
                });
            }
        }
        all
    }

    /// The values, in the shape of the file.
    pub fn values(&self) -> Result<Tensor> {
        let values = self.form.write(&self.sources, self.place)?;
        if self.factors.iter().all(|factor| *factor == 1.0) {
            return Ok(values);
        }
        let mut sides = vec![1; values.rank()];
        sides[0] = self.factors.len();
        let factors = Tensor::new(self.factors.as_slice(), values.device())?.to_dtype(DType::F32)?;
        Ok(values.to_dtype(DType::F32)?.broadcast_mul(&factors.reshape(sides)?)?)
    }
}
