//! Small tables that say which part of a batch is whose, in the memory of the GPUs whose kernels read them.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::{Device, Result, Storage, Tensor, bail};

use super::{Gpu, address};

/// Rows of 32-bit numbers.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    /// Keeps what is at the address; none if there is no row.
    _numbers: Option<Tensor>,
    address: u64,
    rows: usize,
}

impl Table {
    fn new(gpu: &Gpu, numbers: Vec<u32>, of_row: usize) -> Result<Self> {
        let rows = numbers.len() / of_row;
        if rows == 0 {
            return Ok(Self { _numbers: None, address: 0, rows });
        }
        let numbers = Tensor::from_vec(numbers, (rows, of_row), &Device::Cuda(gpu.device.clone()))?;
        let start = match &*numbers.storage_and_layout().0 {
            Storage::Cuda(storage) => address(storage, &gpu.stream)?.0,
            _ => bail!("a table is not on the GPU"),
        };
        Ok(Self { _numbers: Some(numbers), address: start, rows })
    }

    /// Where it begins, for kernels on the stream of its device.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

/// The tables that something has on GPUs, for each `K` one: made when an op first asks for them, for all that ask later.
#[derive(Debug, Clone)]
pub(crate) struct Tables<K>(Arc<Mutex<Vec<(DeviceId, K, Table)>>>);

impl<K> Default for Tables<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Copy + PartialEq> Tables<K> {
    pub(crate) fn get(
        &self,
        gpu: &Gpu,
        key: K,
        of_row: usize,
        numbers: impl FnOnce() -> Result<Vec<u32>>,
    ) -> Result<Table> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., table)) = known.iter().find(|(on, of, _)| (*on, *of) == (gpu.device.id(), key)) {
            return Ok(table.clone());
        }
        let table = Table::new(gpu, numbers()?, of_row)?;
        known.push((gpu.device.id(), key, table.clone()));
        Ok(table)
    }
}
