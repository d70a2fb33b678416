//! The rows of a file of tokens, and batches of them in a shuffled order.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::batch::Batch;
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
        let (start, len) = self.rows[index];
        Ok(self.tokens.read(start, len as usize)?.into_iter().map(|(id, _)| id).collect())
    }

    /// Batches of `batch` rows, for ever, each epoch in its own order.
    ///
    /// # Errors
    /// If `batch` is 0.
    pub fn shuffled(&self, batch: usize, seed: u64) -> Result<Batches> {
        if batch == 0 {
            return Err(Error::option("batch", "is 0, expected at least 1"));
        }
        Ok(Batches { dataset: self.clone(), batch, seed, position: Position::default() })
    }

    /// Every row once, in order, in batches of at most `batch`.
    pub fn in_order(&self, batch: usize, device: &Device) -> impl Iterator<Item = Result<Batch>> + '_ {
        let (batch, device) = (batch.max(1), device.clone());
        (0..self.len()).step_by(batch).map(move |start| {
            let rows: Vec<_> =
                (start..self.len().min(start + batch)).map(|i| self.row(i)).collect::<Result<_>>()?;
            Batch::new(&rows, &device)
        })
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
    batch: usize,
    seed: u64,
    position: Position,
}

impl Batches {
    /// Where the next batch begins.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to where another sequence of the same data, batch size and seed was.
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

    /// The next batch; the last rows of an epoch come together with the first of the next.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn next_batch(&mut self, device: &Device) -> Result<Batch> {
        let len = self.dataset.len() as u64;
        let mut rows = vec![];
        for _ in 0..self.batch {
            let Position { epoch, row } = self.position;
            let seed = self.seed ^ epoch.wrapping_mul(0xd6e8_feb8_6659_fd93);
            rows.push(self.dataset.row(Permutation::new(len, seed).at(row) as usize)?);
            self.position = if row + 1 == len {
                Position { epoch: epoch + 1, row: 0 }
            } else {
                Position { epoch, row: row + 1 }
            };
        }
        Batch::new(&rows, device)
    }
}
