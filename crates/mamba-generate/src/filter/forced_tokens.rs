use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::Result;

/// Says which token is generated at some places, whatever the model thinks.
///
/// Place 0 is the first generated token. Where a token is forced it gets the logit 0 and all others are dropped; later
/// filters cannot bring them back. A forced token that the vocabulary does not have is an error when its turn comes.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, ForcedTokens, History, LogitsFilter};
///
/// let mut forced = ForcedTokens::new([(0, 2)]);
/// let mut candidates = Candidates::new();
/// candidates.load(&[4.0, 1.0, f32::NEG_INFINITY], 0)?;
/// forced.apply(&mut candidates, History::new(&[7, 5], 2))?;
/// assert_eq!(candidates.best().map(|c| c.id), Some(2));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `ForcedBOSTokenLogitsProcessor` and `ForcedEOSTokenLogitsProcessor` in transformers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForcedTokens(Vec<(usize, u32)>);

impl ForcedTokens {
    /// Makes the filter from pairs of a place and a token id; of several for one place the last counts.
    pub fn new(tokens: impl IntoIterator<Item = (usize, u32)>) -> Self {
        Self(tokens.into_iter().collect())
    }
}

impl LogitsFilter for ForcedTokens {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        let place = history.generated().len();
        if let Some(&(_, forced)) = self.0.iter().rev().find(|(at, _)| *at == place) {
            candidates.retain(|c| c.id == forced);
            candidates.update(|_, _| 0.0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_at_its_place() {
        let mut forced = ForcedTokens::new([(0, 1), (2, 0), (2, 3)]);
        let mut best = |generated: usize| {
            let mut candidates = Candidates::new();
            candidates.load(&[1.0, 2.0, 3.0, f32::NEG_INFINITY], 0).unwrap();
            forced.apply(&mut candidates, History::new(&[9; 4][..2 + generated], 2)).unwrap();
            (candidates.len(), candidates.best().unwrap().id)
        };
        assert_eq!([best(0), best(1), best(2)], [(1, 1), (4, 2), (1, 3)]);
    }
}
