//! What one forward pass reads.

use candle_core::{Device, Tensor};

use crate::Result;

/// The target of a position where nothing is to be predicted.
pub const IGNORED: i64 = -100;

/// Rows of tokens with what is to be predicted at each.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `(batch, seqlen)`, u32.
    pub inputs: Tensor,
    /// `(batch, seqlen)`, i64; [`IGNORED`] counts nothing.
    pub targets: Tensor,
    /// Targets that count.
    pub count: usize,
}

impl Batch {
    /// Rows of consecutive tokens; each predicts the next one. Shorter rows are filled up at their end, where nothing is
    /// predicted.
    ///
    /// # Errors
    /// If the device is out of memory.
    ///
    /// # Example
    /// ```
    /// use candle_core::Device;
    /// use mamba_train::data::Batch;
    /// let batch = Batch::new(&[vec![1, 2, 3, 4], vec![5, 6]], &Device::Cpu)?;
    /// assert_eq!(batch.inputs.to_vec2::<u32>()?, [[1, 2, 3], [5, 0, 0]]);
    /// assert_eq!(batch.targets.to_vec2::<i64>()?, [[2, 3, 4], [6, -100, -100]]);
    /// assert_eq!(batch.count, 4);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(rows: &[Vec<u32>], device: &Device) -> Result<Self> {
        let seqlen = rows.iter().map(Vec::len).max().unwrap_or(0).saturating_sub(1);
        let (mut inputs, mut targets, mut count) = (vec![], vec![], 0);
        for row in rows {
            let predicted = row.len().saturating_sub(1);
            let fill = seqlen - predicted;
            inputs.extend(row[..predicted].iter().copied().chain(std::iter::repeat_n(0, fill)));
            let wanted = row.iter().skip(1).map(|id| i64::from(*id));
            targets.extend(wanted.chain(std::iter::repeat_n(IGNORED, fill)));
            count += predicted;
        }
        let shape = (rows.len(), seqlen);
        Ok(Self {
            inputs: Tensor::from_vec(inputs, shape, device)?,
            targets: Tensor::from_vec(targets, shape, device)?,
            count,
        })
    }
}
