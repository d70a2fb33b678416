//! Which states of a pool a decoding step moves on.

use std::collections::HashSet;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::device::{Gpu, Table, Tables, int};
use crate::packing::integers;
use crate::reference::part;

/// For each row of a batch the state that it moves on, as an index into a pool of states; a negative index marks a row that
/// is padding: it reads and changes no state, and its output is 0.
///
/// With it, the first extent of the state is that of the pool, and states of no row stay as they are: what a server needs
/// whose requests come and go. Indices are read and checked once, here, and then serve every layer. A clone is cheap.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_ops::{Activation, CausalConv1dUpdate, StateIndices, causal_conv1d_update};
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::new(&[[1f32, 10.0]], &Device::Cpu)?;
/// let pool = Tensor::new(&[[[1f32]], [[2.0]], [[3.0]]], &Device::Cpu)?;
/// let x = Tensor::new(&[[[4f32]], [[5.0]], [[6.0]]], &Device::Cpu)?;
/// let indices = StateIndices::new(&[2, -1, 0])?;
/// let y = causal_conv1d_update(&CausalConv1dUpdate {
///     activation: Activation::Identity,
///     state_indices: Some(&indices),
///     ..CausalConv1dUpdate::new(&x, &pool, &weight)
/// })?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[43.0]], [[0.0]], [[61.0]]]);
/// assert_eq!(pool.to_vec3::<f32>()?, [[[6.0]], [[2.0]], [[4.0]]]);
/// # Ok(()) }
/// ```
/// # Source
/// `state_batch_indices` and `pad_slot_id` of `selective_state_update`, `conv_state_indices` of `causal_conv1d_update`, as
/// published.
#[derive(Debug, Clone)]
pub struct StateIndices {
    states: Arc<[Option<usize>]>,
    #[cfg(feature = "cuda")]
    on_gpus: Tables<()>,
}

impl PartialEq for StateIndices {
    fn eq(&self, other: &Self) -> bool {
        self.states == other.states
    }
}

impl Eq for StateIndices {}

impl StateIndices {
    /// One index a row.
    ///
    /// # Errors
    /// If two rows have the same state.
    pub fn new(indices: &[i64]) -> Result<Self> {
        let mut seen = HashSet::new();
        for (row, &index) in indices.iter().enumerate() {
            if index >= 0 && !seen.insert(index) {
                bail!("state_indices: row {row} has {index} as another row, expected states of their own")
            }
        }
        Ok(Self {
            states: indices.iter().map(|&index| usize::try_from(index).ok()).collect(),
            #[cfg(feature = "cuda")]
            on_gpus: Tables::default(),
        })
    }

    /// The same, from `(batch,)` of any integer dtype, on any device (on a GPU this waits for it).
    ///
    /// # Errors
    /// If the tensor has another rank or dtype, or two rows have the same state.
    pub fn from_tensor(indices: &Tensor) -> Result<Self> {
        if indices.rank() != 1 {
            bail!("state_indices: `indices` has shape {:?}, expected (batch)", indices.dims())
        }
        Self::new(&integers("state_indices", "indices", indices)?)
    }

    /// The state of each row; none for padding.
    pub fn states(&self) -> &[Option<usize>] {
        &self.states
    }

    /// The states of the rows, zeros for padding.
    pub(crate) fn gather(&self, pool: &Tensor) -> Result<Tensor> {
        let state = |state: &Option<usize>| match *state {
            Some(index) => part(pool, 0, index, 1),
            None => zeros(pool, 1),
        };
        join(self.states.iter().map(state), pool)
    }

    /// The pool with the new states of the rows.
    pub(crate) fn scatter(&self, states: &Tensor, pool: &Tensor) -> Result<Tensor> {
        let state = |index: usize| match self.states.iter().position(|state| *state == Some(index)) {
            Some(row) => part(states, 0, row, 1),
            None => part(pool, 0, index, 1),
        };
        join((0..pool.dim(0)?).map(state), pool)
    }

    /// The same for kernels: a number a row, -1 for padding.
    #[cfg(feature = "cuda")]
    pub(crate) fn on(&self, op: &'static str, gpu: &Gpu) -> Result<Table> {
        let number = |state: &Option<usize>| state.map_or(Ok(u32::MAX), |index| Ok(int(op, index)? as u32));
        self.on_gpus.get(gpu, (), 1, || self.states.iter().map(number).collect())
    }

    /// An output without that of padding.
    pub(crate) fn without_padding(&self, y: &Tensor) -> Result<Tensor> {
        let row = |(i, state): (usize, &Option<usize>)| match state {
            Some(_) => part(y, 0, i, 1),
            None => zeros(y, 1),
        };
        join(self.states.iter().enumerate().map(row), y)
    }
}

fn zeros(like: &Tensor, rows: usize) -> Result<Tensor> {
    Tensor::zeros([&[rows], &like.dims()[1..]].concat(), like.dtype(), like.device())
}

fn join(rows: impl Iterator<Item = Result<Tensor>>, like: &Tensor) -> Result<Tensor> {
    let rows: Vec<Tensor> = rows.collect::<Result<_>>()?;
    if rows.is_empty() { zeros(like, 0) } else { Tensor::cat(&rows, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn reads_and_checks() -> Result<()> {
        let want = StateIndices::new(&[3, -1, 0, -9])?;
        assert_eq!(want.states(), [Some(3), None, Some(0), None]);
        for dtype in [DType::I16, DType::I32, DType::I64] {
            let indices = Tensor::new(&[3i64, -1, 0, -9], &Device::Cpu)?.to_dtype(dtype)?;
            assert_eq!(StateIndices::from_tensor(&indices)?, want);
        }
        let fails = |result: Result<StateIndices>, want: &str| {
            let message = result.map(drop).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(want), "{message:?} is not {want:?}");
        };
        fails(StateIndices::new(&[1, -1, -1, 1]), "state_indices: row 3 has 1 as another row");
        let float = Tensor::new(&[1f32], &Device::Cpu)?;
        fails(StateIndices::from_tensor(&float), "state_indices: `indices` has dtype f32");
        let matrix = Tensor::new(&[[1u32]], &Device::Cpu)?;
        fails(
            StateIndices::from_tensor(&matrix),
            "state_indices: `indices` has shape [1, 1], expected (batch)",
        );
        Ok(())
    }
}
