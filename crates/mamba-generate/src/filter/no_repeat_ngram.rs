use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Forbids every token that would repeat a sequence of `n` tokens of the history.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, NoRepeatNgram};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[1.0, 2.0, 3.0], 0)?;
/// NoRepeatNgram::new(3)?.apply(&mut candidates, History::new(&[0, 1, 2, 0, 1], 0))?;
/// assert_eq!(candidates.best().map(|c| c.id), Some(1));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `NoRepeatNGramLogitsProcessor` in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRepeatNgram(usize);

impl NoRepeatNgram {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `n` is 0.
    pub fn new(n: usize) -> Result<Self> {
        if n > 0 { Ok(Self(n)) } else { Err(Error::invalid("no_repeat_ngram", "n", n, "a number from 1")) }
    }
}

impl LogitsFilter for NoRepeatNgram {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        let tokens = history.tokens();
        let Some(start) = (tokens.len() + 1).checked_sub(self.0) else { return Ok(()) };
        let end = &tokens[start..];
        for ngram in tokens.windows(self.0) {
            if let Some((&last, before)) = ngram.split_last()
                && before == end
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
    fn equals_the_definition() {
        let no = f32::NEG_INFINITY;
        let forbids = |n, history: &[u32]| {
            filtered(&mut NoRepeatNgram::new(n).unwrap(), &[1.0; 3], history)
                .iter()
                .map(|&x| x == no)
                .collect::<Vec<_>>()
        };
        assert_eq!(forbids(1, &[2, 0]), [true, false, true]);
        assert_eq!(forbids(2, &[1, 2, 0, 1]), [false, false, true]);
        assert_eq!(forbids(2, &[0, 0]), [true, false, false]);
        assert_eq!(forbids(4, &[0, 0]), [false; 3]);
        assert_eq!(forbids(3, &[]), [false; 3]);
        assert!(NoRepeatNgram::new(0).is_err());
    }
}
