use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::Result;

/// Forbids the tokens that end a text until at least `n` others were generated.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, MinNewTokens};
///
/// let mut filter = MinNewTokens::new(2, &[0]);
/// let mut candidates = Candidates::new();
/// for (history, best) in [(&[7, 1][..], 1), (&[7, 1, 1], 0)] {
///     candidates.load(&[5.0, 1.0], 0)?;
///     filter.apply(&mut candidates, History::new(history, 1))?;
///     assert_eq!(candidates.best().map(|c| c.id), Some(best));
/// }
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `MinNewTokensLengthLogitsProcessor` in transformers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MinNewTokens {
    n: usize,
    ends: Vec<u32>,
}

impl MinNewTokens {
    /// Makes the filter; `ends` are the tokens that end a text.
    pub fn new(n: usize, ends: &[u32]) -> Self {
        Self { n, ends: ends.to_vec() }
    }
}

impl LogitsFilter for MinNewTokens {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        if history.generated().len() < self.n {
            for &id in &self.ends {
                candidates.update_one(id, |_| f32::NEG_INFINITY);
            }
        }
        Ok(())
    }
}
