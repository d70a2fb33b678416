//! A moving average of the parameters.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::error::require;
use crate::parameters::Parameters;
use crate::{Error, Result, slices};

/// The exponential moving average of every parameter, `e ← d e + (1 - d) p`, in full precision.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_train::{Ema, Parameters};
///
/// let x = Var::new(&[0f32], &Device::Cpu)?;
/// let parameters = Parameters::from_vars([("x".to_owned(), x.clone())])?;
/// let mut average = Ema::new(&parameters, 0.9)?;
/// x.set(&Tensor::new(&[1f32], &Device::Cpu)?)?;
/// average.update(&parameters)?;
/// average.swap(&parameters)?; // evaluate, or save
/// assert!((x.to_vec1::<f32>()?[0] - 0.1).abs() < 1e-6);
/// average.swap(&parameters)?;
/// assert_eq!(x.to_vec1::<f32>()?, [1.0]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    averages: BTreeMap<String, Tensor>,
}

impl Ema {
    /// Starts from the parameters as they are.
    ///
    /// # Errors
    /// If `decay` is not from 0 to 1, or the device is out of memory.
    pub fn new(parameters: &Parameters, decay: f64) -> Result<Self> {
        require((0.0..=1.0).contains(&decay), "ema", || format!("is {decay}, expected 0 to 1"))?;
        Ok(Self { decay, averages: parameters.snapshot()? })
    }

    /// Takes in the parameters as they are now.
    ///
    /// # Errors
    /// If they are others than at the start.
    pub fn update(&mut self, parameters: &Parameters) -> Result<()> {
        let (keep, rest) = (self.decay as f32, (1.0 - self.decay) as f32);
        for parameter in parameters {
            let value = parameter.value();
            let average = self.averages.get_mut(parameter.name()).ok_or_else(|| missing(parameter.name()))?;
            if slices::modifiable(average) {
                slices::read(value, |value| {
                    slices::modify(average, |average| {
                        average.iter_mut().zip(value).for_each(|(a, v)| *a = keep * *a + rest * v);
                        Ok(())
                    })
                })??;
            } else {
                *average = ((&*average * self.decay)? + (value.detach() * (1.0 - self.decay))?)?;
            }
        }
        Ok(())
    }

    /// Exchanges the parameters with their averages.
    ///
    /// # Errors
    /// If they are others than at the start.
    pub fn swap(&mut self, parameters: &Parameters) -> Result<()> {
        for parameter in parameters {
            let average = self.averages.get_mut(parameter.name()).ok_or_else(|| missing(parameter.name()))?;
            let value = parameter.value().detach().copy()?;
            parameter.set(average)?;
            *average = value;
        }
        Ok(())
    }

    /// The averages by name.
    pub fn averages(&self) -> &BTreeMap<String, Tensor> {
        &self.averages
    }

    pub(crate) fn load(&mut self, saved: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, average) in &mut self.averages {
            let saved = saved.get(name).ok_or_else(|| missing(name))?;
            *average = saved.to_dtype(average.dtype())?.to_device(average.device())?.copy()?;
        }
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::State(format!("no average of the parameter `{name}`"))
}
