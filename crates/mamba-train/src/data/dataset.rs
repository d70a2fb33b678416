//! The rows of a file of tokens, and batches of them in a shuffled order.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::augment::Augmentation;
use super::batch::{Batch, Batching, Share};
use super::order::Permutation;
use super::tokens::TokenFile;
use crate::{Error, Result};

/// A part of a file of tokens, cut into rows that stay within one document.
///
/// Each document is cut into pieces of at most `seqlen` predictions; a piece begins with the last token of the one before.
#[derive(Debug, Clone)]
pub struct Dataset {
    tokens: Arc<TokenFile>,
    seqlen: usize,
    /// First token and length of each row.
    rows: Arc<Vec<(u64, u32)>>,
}

/// Tokens that are looked through at once.
const SCAN: u64 = 1 << 20;

impl Dataset {
    /// The rows of the tokens in `range`; ones without a prediction are left out.
    ///
    /// # Errors
    /// If `seqlen` is 0, the range goes past the end, or there is nothing to predict in it.
    pub fn new(tokens: Arc<TokenFile>, range: Range<u64>, seqlen: usize) -> Result<Self> {
        if seqlen == 0 || seqlen >= u32::MAX as usize {
            return Err(Error::option("seqlen", format!("is {seqlen}, expected at least 1")));
        }
        let mut rows = vec![];
        let mut document = range.start;
        let mut end_document = |end: u64| {
            let starts = (document..end.saturating_sub(1)).step_by(seqlen);
            rows.extend(starts.map(|start| (start, (end - start).min(seqlen as u64 + 1) as u32)));
            document = end;
        };
        let mut start = range.start;
        while start < range.end {
            let count = SCAN.min(range.end - start) as usize;
            for (i, (_, first)) in tokens.read(start, count)?.into_iter().enumerate() {
                if first {
                    end_document(start + i as u64);
                }
            }
            start += count as u64;
        }
        end_document(range.end);
        if rows.is_empty() {
            let message = format!("has nothing to predict in its tokens {} to {}", range.start, range.end);
            return Err(Error::file(tokens.path(), message));
        }
        Ok(Self { tokens, seqlen, rows: Arc::new(rows) })
    }

    /// Cuts a file in two: all but the last `part` of its tokens, and the rest, for validation.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn split(tokens: Arc<TokenFile>, seqlen: usize, part: f64) -> Result<(Self, Self)> {
        if !(0.0..1.0).contains(&part) {
            return Err(Error::option("validation", format!("is {part}, expected 0 to 1")));
        }
        let cut = (tokens.len() as f64 * (1.0 - part)) as u64;
        let end = tokens.len();
        Ok((Self::new(tokens.clone(), 0..cut, seqlen)?, Self::new(tokens, cut..end, seqlen)?))
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none, which does not happen.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Predictions of a full row.
    pub fn seqlen(&self) -> usize {
        self.seqlen
    }

    /// Predictions in all rows.
    pub fn predictions(&self) -> u64 {
        self.rows.iter().map(|(_, len)| u64::from(*len) - 1).sum()
    }

    /// The tokens of a row.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn row(&self, index: usize) -> Result<Vec<u32>> {
        self.shifted_row(index, 0)
    }

    /// The row that lies `shift` tokens further on in the same document, if that has more than a row. Its last row gets shorter
    /// by that, unless nothing would be left of it.
    pub(super) fn shifted_row(&self, index: usize, shift: usize) -> Result<Vec<u32>> {
        let (mut start, mut len) = self.rows[index];
        // A row that goes on begins with the last token of the one before.
        let goes_on = |i: usize| {
            let next =
                self.rows.get(i + 1).filter(|next| next.0 + 1 == self.rows[i].0 + u64::from(self.rows[i].1));
            next.map(|next| next.1 - 1)
        };
        let further = goes_on(index);
        if further.is_some() || index.checked_sub(1).is_some_and(|before| goes_on(before).is_some()) {
            let shift = (shift % self.seqlen) as u32;
            let end = len + further.unwrap_or(0).min(shift);
            if end >= shift + 2 {
                (start, len) = (start + u64::from(shift), end - shift);
            }
        }
        Ok(self.tokens.read(start, len as usize)?.into_iter().map(|(id, _)| id).collect())
    }

    /// Batches for ever, each epoch in its own order.
    ///
    /// # Errors
    /// If a row can be too long for a batch, or a batch is to have none.
    ///
    /// # Example
    /// ```
    /// use std::sync::Arc;
    /// use candle_core::Device;
    /// use mamba_train::data::{Batching, Dataset, TokenWriter};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let mut writer = TokenWriter::create(folder.path().join("text.tokens"))?;
    /// for length in [3, 9, 2, 5, 4] {
    ///     writer.begin_document();
    ///     writer.push(&vec![7; length])?;
    /// }
    /// let tokens = Arc::new(writer.finish()?);
    /// let end = tokens.len();
    /// let mut batches = Dataset::new(tokens, 0..end, 8)?.shuffled(Batching::Packed { tokens: 12 }, 0)?;
    /// let batch = batches.next_batch(&Device::Cpu)?;
    /// assert!(batch.count <= 12 && batch.inputs.dims() == [batch.count]);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn shuffled(&self, batching: Batching, seed: u64) -> Result<Batches> {
        self.check(batching)?;
        let (augmentation, share, position) =
            (Augmentation::default(), Share::default(), Position::default());
        Ok(Batches { dataset: self.clone(), batching, share, seed, augmentation, position })
    }

    /// Every row once, in order.
    ///
    /// # Errors
    /// As [`shuffled`](Self::shuffled).
    pub fn in_order(
        &self,
        batching: Batching,
        device: &Device,
    ) -> Result<impl Iterator<Item = Result<Batch>> + '_> {
        self.in_order_share(batching, Share::default(), device)
    }

    /// The same batches, but of each only the rows of a share, which may be none.
    ///
    /// # Errors
    /// As [`shuffled`](Self::shuffled).
    pub fn in_order_share(
        &self,
        batching: Batching,
        share: Share,
        device: &Device,
    ) -> Result<impl Iterator<Item = Result<Batch>> + '_> {
        self.check(batching)?;
        let (mut done, device) = (0, device.clone());
        Ok(std::iter::from_fn(move || {
            let rows = self.fill(batching, done..self.len());
            done += rows.len();
            (!rows.is_empty()).then(|| self.batch(batching, &rows, share, &device))
        }))
    }

    fn check(&self, batching: Batching) -> Result<()> {
        match batching {
            Batching::Padded { rows: 0 } => Err(Error::option("rows", "is 0, expected at least 1")),
            Batching::Packed { tokens } if tokens < self.seqlen => {
                let message = format!("is {tokens}, expected at least those of a row, {}", self.seqlen);
                Err(Error::option("tokens", message))
            }
            _ => Ok(()),
        }
    }

    /// The first of these rows, as many as go into a batch.
    fn fill(&self, batching: Batching, rows: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut predictions = 0;
        let fits = |(before, row): &(usize, usize)| {
            predictions += self.rows[*row].1 as usize - 1;
            batching.holds(before + 1, predictions)
        };
        rows.enumerate().take_while(fits).map(|(_, row)| row).collect()
    }

    /// A share of a batch of these rows.
    fn batch(&self, batching: Batching, rows: &[usize], share: Share, device: &Device) -> Result<Batch> {
        let rows: Vec<_> = rows.iter().map(|row| self.row(*row)).collect::<Result<_>>()?;
        batching.batch(&rows, share, device)
    }
}

/// How far a training has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Rows of the current pass that are done.
    pub row: u64,
}

/// An endless sequence of batches, which can be left and entered at any [`Position`].
#[derive(Debug, Clone)]
pub struct Batches {
    dataset: Dataset,
    batching: Batching,
    share: Share,
    seed: u64,
    augmentation: Augmentation,
    position: Position,
}

impl Batches {
    /// The same sequence for one of several processes, which reads only its share of the rows of each batch: the batches, their
    /// order and their positions stay as they are.
    ///
    /// # Example
    /// ```
    /// use std::sync::Arc;
    /// use candle_core::Device;
    /// use mamba_train::data::{Batching, Dataset, Share, TokenWriter};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let mut writer = TokenWriter::create(folder.path().join("text.tokens"))?;
    /// writer.push(&(0..101).collect::<Vec<u32>>())?;
    /// let whole = Dataset::new(Arc::new(writer.finish()?), 0..101, 10)?.shuffled(Batching::Packed { tokens: 40 }, 0)?;
    /// let [mut first, mut second] = [0, 1].map(|rank| whole.clone().share(Share { rank, of: 2 }));
    /// let parts = [first.next_batch(&Device::Cpu)?, second.next_batch(&Device::Cpu)?];
    /// assert_eq!(parts[0].count + parts[1].count, whole.clone().next_batch(&Device::Cpu)?.count);
    /// assert_eq!(first.position(), second.position());
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn share(self, share: Share) -> Self {
        Self { share, ..self }
    }

    /// The same order of rows that differ from epoch to epoch.
    pub fn augmented(self, augmentation: Augmentation) -> Self {
        Self { augmentation, ..self }
    }

    /// Where the next batch begins.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to where another sequence of the same data, batching and seed was.
    ///
    /// # Errors
    /// If there is no such row.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        if position.row >= self.dataset.len() as u64 {
            let message = format!("row {} of an epoch of {} rows", position.row, self.dataset.len());
            return Err(Error::State(message));
        }
        self.position = position;
        Ok(())
    }

    /// The next batch, or the share of it; the last rows of an epoch come together with the first of the next.
    ///
    /// # Errors
    /// If the data cannot be read; the position stays as it was.
    pub fn next_batch(&mut self, device: &Device) -> Result<Batch> {
        let (mut rows, mut predictions, mut position) = (vec![], 0, self.position);
        loop {
            let row = self.augmentation.row(&self.dataset, self.row(position), self.seed, position)?;
            predictions += row.len() - 1;
            if !self.batching.holds(rows.len() + 1, predictions) {
                break;
            }
            rows.push(row);
            position = self.after(position);
        }
        let batch = self.batching.batch(&rows, self.share, device)?;
        self.position = position;
        Ok(batch)
    }

    /// The row of the data that comes at a position.
    fn row(&self, Position { epoch, row }: Position) -> usize {
        let seed = self.seed ^ epoch.wrapping_mul(0xd6e8_feb8_6659_fd93);
        Permutation::new(self.dataset.len() as u64, seed).at(row) as usize
    }

    fn after(&self, Position { epoch, row }: Position) -> Position {
        match row + 1 == self.dataset.len() as u64 {
            true => Position { epoch: epoch + 1, row: 0 },
            false => Position { epoch, row: row + 1 },
        }
    }
}
