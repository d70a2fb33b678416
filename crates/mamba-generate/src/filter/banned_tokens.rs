use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Forbids tokens, and sequences of tokens.
///
/// A sequence of one token is never generated. Of a longer one the last token is forbidden wherever the others stand before
/// it, in the prompt or generated.
///
/// # Example
/// ```
/// use mamba_generate::{BannedTokens, Candidates, History, LogitsFilter};
///
/// let mut ban = BannedTokens::new([vec![3], vec![5, 0]])?;
/// let mut candidates = Candidates::new();
/// candidates.load(&[4.0, 1.0, 2.0, 3.0], 0)?;
/// ban.apply(&mut candidates, History::new(&[7, 5], 0))?;
/// assert_eq!(candidates.best().map(|c| c.id), Some(2));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `NoBadWordsLogitsProcessor` and `SuppressTokensLogitsProcessor` in transformers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BannedTokens(Vec<Vec<u32>>);

impl BannedTokens {
    /// Makes the filter.
    ///
    /// # Errors
    /// If a sequence is empty.
    pub fn new(sequences: impl IntoIterator<Item = Vec<u32>>) -> Result<Self> {
        let sequences: Vec<Vec<u32>> = sequences.into_iter().collect();
        match sequences.iter().any(Vec::is_empty) {
            true => Err(Error::invalid("banned_tokens", "sequences", "[]", "sequences that are not empty")),
            false => Ok(Self(sequences)),
        }
    }
}

impl LogitsFilter for BannedTokens {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        for sequence in &self.0 {
            if let Some((&last, before)) = sequence.split_last()
                && history.tokens().ends_with(before)
            {
                candidates.update_one(last, |_| f32::NEG_INFINITY);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::filtered;

    #[test]
    fn single_tokens_always_and_sequences_where_they_end() {
        let no = f32::NEG_INFINITY;
        let mut ban = BannedTokens::new([vec![0], vec![7, 8, 1], vec![8, 2], vec![99]]).unwrap();
        assert_eq!(filtered(&mut ban, &[1.0; 4], &[]), [no, 1.0, 1.0, 1.0]);
        assert_eq!(filtered(&mut ban, &[1.0; 4], &[8]), [no, 1.0, no, 1.0]);
        assert_eq!(filtered(&mut ban, &[1.0; 4], &[7, 8]), [no, no, no, 1.0]);
        assert!(BannedTokens::new([vec![]]).is_err());
    }
}
