use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::Result;

/// Filters that apply one after the other.
///
/// Order matters; see [`SamplingConfig`](crate::SamplingConfig) for the usual one.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, Chain, History, LogitsFilter, Temperature, TopK};
///
/// let mut chain = Chain::new().with(Temperature::new(0.7)?).with(TopK::new(2)?);
/// let mut candidates = Candidates::new();
/// candidates.load(&[1.0, 3.0, 2.0], 0)?;
/// chain.apply(&mut candidates, History::default())?;
/// assert_eq!(candidates.len(), 2);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Default)]
pub struct Chain(Vec<Box<dyn LogitsFilter>>);

impl Chain {
    /// Makes a chain without filters, which changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a filter at the end.
    pub fn push(&mut self, filter: impl LogitsFilter + 'static) {
        self.0.push(Box::new(filter));
    }

    /// Adds a filter at the end and returns the chain.
    #[must_use]
    pub fn with(mut self, filter: impl LogitsFilter + 'static) -> Self {
        self.push(filter);
        self
    }

    /// Adds a filter before all others.
    pub fn push_front(&mut self, filter: impl LogitsFilter + 'static) {
        self.0.insert(0, Box::new(filter));
    }

    /// How many filters there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no filters.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("len", &self.len()).finish()
    }
}

impl LogitsFilter for Chain {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|filter| filter.apply(candidates, history))
    }

    /// If any of the filters says so.
    fn is_complete(&mut self, history: History<'_>) -> Result<bool> {
        self.0.iter_mut().try_fold(false, |any, filter| Ok(any || filter.is_complete(history)?))
    }

    fn save_state(&self, words: &mut Vec<u64>) {
        self.0.iter().for_each(|filter| filter.save_state(words));
    }

    fn restore_state(&mut self, words: &mut &[u64]) -> Result<()> {
        self.0.iter_mut().try_for_each(|filter| filter.restore_state(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{RepetitionPenalty, Temperature, TopK, filtered};

    #[test]
    fn applies_in_order() {
        let logits = [4.0, 3.0, 2.0];
        // The penalty takes token 0 behind token 1, so it matters whether top-k comes before or after.
        let mut after = Chain::new().with(RepetitionPenalty::new(2.0).unwrap()).with(TopK::new(1).unwrap());
        let mut before = Chain::new().with(TopK::new(1).unwrap()).with(RepetitionPenalty::new(2.0).unwrap());
        let no = f32::NEG_INFINITY;
        assert_eq!(filtered(&mut after, &logits, &[0]), [no, 3.0, no]);
        assert_eq!(filtered(&mut before, &logits, &[0]), [2.0, no, no]);
    }

    #[test]
    fn nests_and_may_be_empty() {
        assert_eq!(filtered(&mut Chain::new(), &[1.0, 2.0], &[]), [1.0, 2.0]);
        let mut nested = Chain::new().with(Chain::new().with(Temperature::new(2.0).unwrap()));
        assert_eq!(filtered(&mut nested, &[1.0, 2.0], &[]), [0.5, 1.0]);
        assert_eq!(format!("{nested:?}"), "Chain { len: 1 }");
    }
}
