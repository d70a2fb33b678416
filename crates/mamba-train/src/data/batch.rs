//! What one forward pass reads.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::Result;

/// The target of a position where nothing is to be predicted.
pub const IGNORED: i64 = -100;

/// Rows of tokens with what is to be predicted at each, side by side with padding or one behind another without.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `(batch, seqlen)` if padded, `(total,)` if packed, u32.
    pub inputs: Tensor,
    /// Of the same shape, i64; [`IGNORED`] counts nothing.
    pub targets: Tensor,
    /// Where each row begins in packed inputs, and `total` at last; none if padded.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Targets that count.
    pub count: usize,
}

impl Batch {
    /// Rows of consecutive tokens, side by side; each token predicts the next one. Shorter rows are filled up at their end,
    /// where nothing is predicted.
    ///
    /// # Errors
    /// If the device is out of memory.
    ///
    /// # Example
    /// ```
    /// use candle_core::Device;
    /// use mamba_train::data::Batch;
    /// let batch = Batch::padded(&[vec![1, 2, 3, 4], vec![5, 6]], &Device::Cpu)?;
    /// assert_eq!(batch.inputs.to_vec2::<u32>()?, [[1, 2, 3], [5, 0, 0]]);
    /// assert_eq!(batch.targets.to_vec2::<i64>()?, [[2, 3, 4], [6, -100, -100]]);
    /// assert_eq!(batch.count, 4);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn padded(rows: &[Vec<u32>], device: &Device) -> Result<Self> {
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
            cu_seqlens: None,
            count,
        })
    }

    /// The same rows, one behind another without padding. The model reads each as if it were alone: states and
    /// convolutions begin anew with it, attention does not look past its beginning, and its last token predicts nothing of
    /// the next row.
    ///
    /// # Errors
    /// If the device is out of memory.
    ///
    /// # Example
    /// ```
    /// use candle_core::Device;
    /// use mamba_train::data::Batch;
    /// let batch = Batch::packed(&[vec![1, 2, 3, 4], vec![5, 6]], &Device::Cpu)?;
    /// assert_eq!(batch.inputs.to_vec1::<u32>()?, [1, 2, 3, 5]);
    /// assert_eq!(batch.targets.to_vec1::<i64>()?, [2, 3, 4, 6]);
    /// assert_eq!(batch.cu_seqlens, Some(vec![0, 3, 4]));
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn packed(rows: &[Vec<u32>], device: &Device) -> Result<Self> {
        let (mut inputs, mut targets, mut cu_seqlens) = (Vec::<u32>::new(), vec![], vec![0]);
        for row in rows.iter().filter(|row| row.len() > 1) {
            inputs.extend(&row[..row.len() - 1]);
            targets.extend(row[1..].iter().map(|id| i64::from(*id)));
            cu_seqlens.push(inputs.len());
        }
        let count = inputs.len();
        Ok(Self {
            inputs: Tensor::from_vec(inputs, count, device)?,
            targets: Tensor::from_vec(targets, count, device)?,
            cu_seqlens: Some(cu_seqlens),
            count,
        })
    }

    /// What a model reads.
    ///
    /// # Errors
    /// If `cu_seqlens` was changed to what does not fit the inputs.
    pub fn input(&self) -> Result<mamba_model::Batch<'_>> {
        match &self.cu_seqlens {
            Some(cu_seqlens) => Ok(mamba_model::Batch::packed(&self.inputs, cu_seqlens)?),
            None => Ok((&self.inputs).into()),
        }
    }
}

/// Which part of every batch a process computes, if several compute it together.
///
/// # Example
/// ```
/// use mamba_train::data::Share;
/// assert_eq!(Share::default(), Share { rank: 0, of: 1 }); // all of it
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The number of the process, from 0.
    pub rank: usize,
    /// How many there are.
    pub of: usize,
}

impl Default for Share {
    /// The whole batch.
    fn default() -> Self {
        Self { rank: 0, of: 1 }
    }
}

/// How many rows come into a batch, and how they lie in it.
///
/// Rows of one length cost the same either way; where documents are shorter than rows may be, packed batches compute no
/// padding, and bear about the same number of predictions each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// So many rows, [padded](Batch::padded) to the longest of them.
    Padded {
        /// Rows of a batch.
        rows: usize,
    },
    /// As many rows as have so many predictions in all, [packed](Batch::packed). A row that does not fit whole begins the
    /// next batch.
    Packed {
        /// Predictions of a batch at most.
        tokens: usize,
    },
}

impl Batching {
    /// Whether a batch can have `rows` rows with `predictions` predictions.
    pub(super) fn holds(self, rows: usize, predictions: usize) -> bool {
        match self {
            Self::Padded { rows: limit } => rows <= limit,
            Self::Packed { tokens: limit } => predictions <= limit,
        }
    }

    /// A share of the batch that has these rows.
    pub(super) fn batch(self, rows: &[Vec<u32>], share: Share, device: &Device) -> Result<Batch> {
        let rows = &rows[self.share(rows, share)];
        match self {
            // Nothing computes with an empty batch, and not every device can hold one.
            _ if rows.is_empty() => Batch::packed(rows, &Device::Cpu),
            Self::Padded { .. } => Batch::padded(rows, device),
            Self::Packed { .. } => Batch::packed(rows, device),
        }
    }

    /// Which rows of a batch are a process's: neighbours, so that shares are about equal in predictions if packed, in rows if
    /// padded. Every row belongs to one share; there may be none for one.
    fn share(self, rows: &[Vec<u32>], share: Share) -> Range<usize> {
        let work = |row: &Vec<u32>| match self {
            Self::Padded { .. } => 1,
            Self::Packed { .. } => row.len() as u64 - 1,
        };
        let (total, ranks) = (rows.iter().map(work).sum::<u64>(), share.of as u64);
        let mut before = 0;
        // A row belongs where its middle lies.
        let owner = |row| {
            let middle = 2 * before + work(row);
            before += work(row);
            middle * ranks / (2 * total).max(1)
        };
        let owners: Vec<u64> = rows.iter().map(owner).collect();
        let start = owners.partition_point(|owner| *owner < share.rank as u64);
        start..owners.partition_point(|owner| *owner <= share.rank as u64)
    }
}
