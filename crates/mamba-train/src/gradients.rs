//! The gradients of one step.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::parameters::Parameters;
use crate::{Error, Result, slices};

/// Gradients by the names of the parameters, in `f32` (`f64` for those of `f64`), and a factor that is still to be applied.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_train::{Gradients, Parameters};
///
/// let x = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let parameters = Parameters::from_vars([("x".to_owned(), x.clone())])?;
/// let mut gradients = Gradients::of(&x.sqr()?.sum_all()?, &parameters)?;
/// gradients.add(Gradients::of(&x.sqr()?.sum_all()?, &parameters)?)?; // accumulation
/// assert_eq!(gradients.norm()?, 20.0);
/// assert_eq!(gradients.clip(1.0)?, 20.0);
/// assert!((gradients.norm()? - 1.0).abs() < 1e-6);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    tensors: BTreeMap<String, Tensor>,
    factor: f64,
}

impl Gradients {
    /// Runs `backward()` and takes the gradients of the parameters; one that the loss does not depend on has none.
    ///
    /// # Errors
    /// If a part of the graph cannot be differentiated.
    pub fn of(loss: &Tensor, parameters: &Parameters) -> Result<Self> {
        let mut store = loss.backward()?;
        let mut tensors = BTreeMap::new();
        for parameter in parameters {
            if let Some(grad) = store.remove(parameter.var()) {
                let wide = if grad.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                tensors.insert(parameter.name().to_owned(), grad.detach().to_dtype(wide)?);
            }
        }
        Ok(Self { tensors, factor: 1.0 })
    }

    /// Adds the gradients of another part of the same batch.
    ///
    /// # Errors
    /// If they belong to another model.
    pub fn add(&mut self, other: Self) -> Result<()> {
        if self.tensors.is_empty() {
            *self = other;
            return Ok(());
        }
        for factor in [self.factor, other.factor] {
            debug_assert_eq!(factor, 1.0, "gradients are added before they are clipped");
        }
        for (name, grad) in other.tensors {
            let sum = match self.tensors.remove(&name) {
                Some(sum) => (sum + grad)?,
                None => grad,
            };
            self.tensors.insert(name, sum);
        }
        Ok(())
    }

    /// Takes gradients by name.
    pub(crate) fn from_tensors(tensors: BTreeMap<String, Tensor>) -> Self {
        Self { tensors, factor: 1.0 }
    }

    /// Gives all gradients, which must not have been clipped.
    pub(crate) fn into_tensors(self) -> Result<BTreeMap<String, Tensor>> {
        match self.tensors.is_empty() || self.factor == 1.0 {
            true => Ok(self.tensors),
            false => Err(Error::State("gradients are to be added before they are clipped".into())),
        }
    }

    /// The gradient of a parameter, without the factor of clipping.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// What the gradients are to be multiplied with: below 1 if they were clipped.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// The root of the sum of all squares, in `f64`, parameter after parameter.
    ///
    /// # Errors
    /// If the device fails.
    pub fn norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for grad in self.tensors.values() {
            sum += match grad.device().is_cpu() && grad.dtype() == DType::F32 {
                true => slices::read(grad, sum_of_squares)?,
                false => grad.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?,
            };
        }
        Ok(sum.sqrt() * self.factor)
    }

    /// Scales the gradients so that their norm is at most `max_norm`; the norm before.
    ///
    /// # Errors
    /// As [`norm`](Self::norm).
    pub fn clip(&mut self, max_norm: f64) -> Result<f64> {
        let norm = self.norm()?;
        self.factor *= (max_norm / (norm + 1e-6)).min(1.0);
        Ok(norm)
    }
}

fn sum_of_squares(x: &[f32]) -> f64 {
    let part = |x: &[f32]| x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let parts: Vec<f64> = x.par_chunks(slices::PIECE).map(part).collect();
    parts.into_iter().sum()
}
