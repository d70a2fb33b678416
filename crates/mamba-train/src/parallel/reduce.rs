//! The gradients of all processes, added.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::collective::Collective;
use crate::gradients::Gradients;
use crate::parameters::{Parameter, Parameters};
use crate::{Error, Result};

/// Bytes of gradients that are sent in one call, of more than one parameter: enough to fill a link, little to hold twice.
const BUCKET: usize = 25 << 20;

/// Where each gradient begins in a bucket, in elements: as every allocation on a GPU, so that vectors of numbers can be read.
const ALIGN: usize = 64;

impl Gradients {
    /// Adds the gradients of all processes, in the order of the names of the parameters, in flat buckets of about 25 MB; in `f32`
    /// (`f64` for parameters of `f64`). A process in which the loss did not depend on a parameter counts as 0 for it; where
    /// that is so for all, there is still no gradient.
    ///
    /// Gradients that were clipped before are refused.
    ///
    /// # Errors
    /// If another process is gone, or the device is out of memory.
    ///
    /// # Example
    /// ```
    /// use candle_core::{Device, Var};
    /// use mamba_train::parallel::Ring;
    /// use mamba_train::{Gradients, Parameters};
    ///
    /// let gradient = |ring: Ring, scale: f64| -> mamba_train::Result<Vec<f32>> {
    ///     let x = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    ///     let parameters = Parameters::from_vars([("x".to_owned(), x.clone())])?;
    ///     let mine = Gradients::of(&(x.sqr()?.sum_all()? * scale)?, &parameters)?;
    ///     let all = mine.all_reduce(&parameters, &ring)?;
    ///     Ok(all.get("x").expect("a gradient").to_vec1()?)
    /// };
    /// let [one, two] = <[Ring; 2]>::try_from(Ring::threads(2)?).expect("two");
    /// let other = std::thread::spawn(move || gradient(two, 10.0));
    /// assert_eq!(gradient(one, 1.0)?, [66.0, 88.0]);
    /// assert_eq!(other.join().expect("no panic")?, [66.0, 88.0]);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn all_reduce(self, parameters: &Parameters, collective: &dyn Collective) -> Result<Self> {
        if collective.world_size() == 1 {
            return Ok(self);
        }
        let here: Vec<f64> =
            parameters.iter().map(|p| f64::from(u8::from(self.get(p.name()).is_some()))).collect();
        let anywhere = collective.sum(&here)?;
        let present = parameters.iter().zip(anywhere).filter(|(_, ranks)| *ranks > 0.0).map(|(p, _)| p);
        let mut mine = self.into_tensors()?;
        let mut sums = BTreeMap::new();
        for bucket in buckets(present) {
            let parts = bucket.iter().map(|parameter| {
                let grad = mine.remove(parameter.name());
                flat(parameter, grad)
            });
            let parts: Vec<Tensor> = parts.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
            let sum = collective.all_reduce_sum(&Tensor::cat(&parts, 0)?)?;
            let mut start = 0;
            for parameter in bucket {
                let (len, dims) = (parameter.value().elem_count(), parameter.value().dims());
                sums.insert(parameter.name().to_owned(), sum.narrow(0, start, len)?.reshape(dims)?);
                start += len.next_multiple_of(ALIGN);
            }
        }
        collective.wait()?;
        Ok(Self::from_tensors(sums))
    }
}

/// What gradients of a parameter are in.
fn dtype(parameter: &Parameter) -> DType {
    if parameter.value().dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Neighbours of one dtype that are sent together.
fn buckets<'a>(parameters: impl Iterator<Item = &'a Parameter>) -> Vec<Vec<&'a Parameter>> {
    let mut buckets: Vec<Vec<&Parameter>> = vec![];
    let mut bytes = 0;
    for parameter in parameters {
        let more = parameter.value().elem_count() * dtype(parameter).size_in_bytes();
        match buckets.last_mut() {
            Some(bucket) if bytes + more <= BUCKET && dtype(bucket[0]) == dtype(parameter) => {
                bucket.push(parameter);
                bytes += more;
            }
            _ => {
                buckets.push(vec![parameter]);
                bytes = more;
            }
        }
    }
    buckets
}

/// The elements of a gradient, 0 if there is none, and what fills them up to where the next begins.
fn flat(parameter: &Parameter, grad: Option<Tensor>) -> Result<Vec<Tensor>> {
    let (len, dtype, device) = (parameter.value().elem_count(), dtype(parameter), parameter.value().device());
    let grad = match grad {
        Some(grad) if grad.dims() == parameter.value().dims() => grad.flatten_all()?.to_dtype(dtype)?,
        Some(grad) => {
            let (name, got, expected) = (parameter.name(), grad.dims(), parameter.value().dims());
            let message = format!("the gradient of `{name}` has shape {got:?}, expected {expected:?}");
            return Err(Error::State(message));
        }
        None => Tensor::zeros(len, dtype, device)?,
    };
    match len.next_multiple_of(ALIGN) - len {
        0 => Ok(vec![grad]),
        fill => Ok(vec![grad, Tensor::zeros(fill, dtype, device)?]),
    }
}
