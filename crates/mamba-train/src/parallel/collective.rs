//! What processes do together.

use std::fmt::{Debug, Display};

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failed;
use crate::{Error, Result};

/// Processes that work together. All of them call the same functions in the same order, with tensors of the same shape and
/// dtype, `f32` or `f64`; a call returns when its result is there, or on a GPU is enqueued.
///
/// Results have the same bits in every process, and in every run with as many processes.
pub trait Collective: Debug + Send + Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn world_size(&self) -> usize;

    /// The sum of the tensors of all processes, on the device of `x`.
    ///
    /// # Errors
    /// If another process is gone or does something else, or the device fails.
    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor>;

    /// The tensor that rank 0 has, on the device of `x`.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn broadcast(&self, x: &Tensor) -> Result<Tensor>;

    /// Waits until everything that was enqueued is done: only then is it known that no process was lost.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn wait(&self) -> Result<()> {
        Ok(())
    }

    /// Whether this is rank 0, which alone writes and shows what is for all.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The sums of the numbers of all processes.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn sum(&self, numbers: &[f64]) -> Result<Vec<f64>> {
        if numbers.is_empty() {
            return Ok(vec![]);
        }
        Ok(self.all_reduce_sum(&Tensor::new(numbers, &Device::Cpu)?)?.to_vec1()?)
    }

    /// Whether something holds for any process.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn any(&self, holds: bool) -> Result<bool> {
        Ok(self.sum(&[f64::from(u8::from(holds))])?[0] > 0.0)
    }

    /// Waits until every process is here.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn barrier(&self) -> Result<()> {
        self.any(false).map(drop)
    }

    /// The bytes that rank 0 has; those of the others may be of any number.
    ///
    /// # Errors
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    fn broadcast_bytes(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let length = self.broadcast(&Tensor::new(&[bytes.len() as f64], &Device::Cpu)?)?;
        let length = length.to_vec1::<f64>()?[0] as usize;
        // As numbers, which is what goes over every collective; these are short messages.
        let mut numbers: Vec<f32> = bytes.iter().copied().map(f32::from).collect();
        numbers.resize(length, 0.0);
        if length == 0 {
            return Ok(vec![]);
        }
        let numbers = self.broadcast(&Tensor::new(numbers, &Device::Cpu)?)?.to_vec1::<f32>()?;
        Ok(numbers.into_iter().map(|x| x as u8).collect())
    }

    /// Requires that all processes have the same, such as "0.1" on "the learning rate".
    ///
    /// # Errors
    /// If one has something else than rank 0: the same error in all of them. And as
    /// [`all_reduce_sum`](Self::all_reduce_sum).
    fn agree(&self, on: &str, mine: &str) -> Result<()> {
        let first = String::from_utf8_lossy(&self.broadcast_bytes(mine.as_bytes())?).into_owned();
        let others = self.sum(&[f64::from(u8::from(first != mine))])?[0];
        if others == 0.0 {
            return Ok(());
        }
        let size = self.world_size();
        let differ = format!("{others} of {size} ranks differ from rank 0 in {on}; rank 0 has {first}");
        let message = if first == mine { differ } else { format!("{differ}, this one {mine}") };
        Err(failed(self.rank(), self.world_size(), message))
    }
}

/// Lets rank 0 do something that only one process should, or can, and tells the others what came of it.
///
/// # Errors
/// If it fails, in every process, and as [`Collective::all_reduce_sum`].
///
/// # Example
/// ```
/// use mamba_train::parallel::{Alone, on_first};
/// let answer = on_first(&Alone, || Ok::<_, mamba_train::Error>(6 * 7))?;
/// assert_eq!(answer, 42);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub fn on_first<T, E>(collective: &dyn Collective, f: impl FnOnce() -> Result<T, E>) -> Result<T, E>
where
    T: Serialize + DeserializeOwned,
    E: From<Error> + Display,
{
    if collective.world_size() == 1 {
        return f();
    }
    let message = |e: serde_json::Error| failed(collective.rank(), collective.world_size(), e);
    if collective.is_first() {
        let outcome = f();
        let told: Result<&T, String> = outcome.as_ref().map_err(ToString::to_string);
        let told = serde_json::to_vec(&told).map_err(message)?;
        collective.broadcast_bytes(&told)?;
        return outcome;
    }
    let told = collective.broadcast_bytes(&[])?;
    let told: Result<T, String> = serde_json::from_slice(&told).map_err(message)?;
    Ok(told.map_err(|e| failed(collective.rank(), collective.world_size(), format!("rank 0 failed: {e}")))?)
}

/// A process without others.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, x: &Tensor) -> Result<Tensor> {
        known(x)?;
        Ok(x.clone())
    }

    fn broadcast(&self, x: &Tensor) -> Result<Tensor> {
        known(x)?;
        Ok(x.clone())
    }
}

/// Requires a dtype that goes over every collective.
pub(super) fn known(x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(()),
        other => Err(Error::Parallel(format!("a tensor has dtype {other:?}, expected F32 or F64"))),
    }
}
