//! The tokens that may come next, with their logits: the buffer that filters edit and samplers choose from.

use std::cmp::Ordering;

use crate::error::{Error, Result};

/// A token that may come next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token id.
    pub id: u32,
    /// Its logit. `exp` of it is its weight among the candidates.
    pub logit: f32,
}

/// The tokens that may come next, with their logits.
///
/// One buffer serves a whole generation: [`load`](Self::load) fills it from the model's logits, filters change logits or
/// drop tokens, a sampler chooses. Nothing is allocated once the buffer has grown to the size of the vocabulary.
///
/// The order is a function of the logits and the ids alone, never of the algorithm that produced it, so that a seed gives
/// the same token everywhere: by id after `load`, and by descending logit, lower id first among equals, for as many as
/// [`sort_top`](Self::sort_top) was asked for.
///
/// # Example
/// ```
/// use mamba_generate::Candidates;
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.5, 2.0, 1.0, 2.0], 0)?;
/// candidates.sort_top(2);
/// candidates.truncate(2);
/// let ids: Vec<u32> = candidates.as_slice().iter().map(|c| c.id).collect();
/// assert_eq!(ids, [1, 3]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    entries: Vec<Candidate>,
    /// The first `sorted` entries are the largest, in order.
    sorted: usize,
    position: usize,
}

/// Descending logit, then ascending id: a total order, as there is no NaN and no -0.0 in the buffer.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Candidates {
    /// Makes an empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills the buffer with one candidate per logit, in the order of ids.
    ///
    /// `position` is the position of the token to choose, for the messages of errors. A logit of minus infinity is
    /// accepted and means that the token is forbidden.
    ///
    /// # Errors
    /// If a logit is NaN or plus infinity.
    pub fn load(&mut self, logits: &[f32], position: usize) -> Result<()> {
        self.position = position;
        self.sorted = 0;
        self.entries.clear();
        // Adding 0.0 turns -0.0 into 0.0, which keeps `by_rank` from seeing two zeros.
        self.entries.extend((0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit: logit + 0.0 }));
        self.check()
    }

    /// Errors if a logit is NaN or plus infinity.
    pub(crate) fn check(&self) -> Result<()> {
        // Two passes, as the first, which is nearly always the only one, has no branch.
        if self.entries.iter().fold(true, |ok, c| ok & (c.logit < f32::INFINITY)) {
            return Ok(());
        }
        match self.entries.iter().find(|c| c.logit.is_nan() || c.logit == f32::INFINITY) {
            Some(&Candidate { id, logit }) => {
                Err(Error::InvalidLogit { id, position: self.position, value: logit })
            }
            None => Ok(()),
        }
    }

    /// The candidates in their present order.
    pub fn as_slice(&self) -> &[Candidate] {
        &self.entries
    }

    /// How many candidates are left.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no candidate is left.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The position of the token to choose: how many tokens precede it.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The likeliest candidate, the one with the lowest id among equals.
    pub fn best(&self) -> Option<Candidate> {
        if self.sorted > 0 {
            return self.entries.first().copied();
        }
        // Two passes, as the maximum alone takes no branch.
        let most = self.entries.iter().fold(f32::NEG_INFINITY, |most, c| most.max(c.logit));
        self.entries.iter().filter(|c| c.logit == most).min_by_key(|c| c.id).copied()
    }

    /// Replaces each logit by what `f` makes of the id and the logit.
    ///
    /// `f` may return minus infinity to forbid a token. NaN or plus infinity is reported as an error when a token is
    /// chosen.
    pub fn update(&mut self, mut f: impl FnMut(u32, f32) -> f32) {
        self.sorted = 0;
        for c in &mut self.entries {
            c.logit = f(c.id, c.logit) + 0.0;
        }
    }

    /// Replaces the logit of one token, if it is among the candidates; otherwise as [`update`](Self::update).
    pub fn update_one(&mut self, id: u32, f: impl FnOnce(f32) -> f32) {
        // Mostly the candidates still stand in the order of ids, and all are there.
        let at = match self.entries.get(id as usize) {
            Some(c) if c.id == id => Some(id as usize),
            _ => self.entries.iter().position(|c| c.id == id),
        };
        if let Some(c) = at.and_then(|at| self.entries.get_mut(at)) {
            self.sorted = 0;
            c.logit = f(c.logit) + 0.0;
        }
    }

    /// Keeps the candidates for which `f` is true, in their order.
    pub fn retain(&mut self, mut f: impl FnMut(&Candidate) -> bool) {
        let (mut index, mut sorted) = (0, 0);
        self.entries.retain(|c| {
            let keep = f(c);
            sorted += usize::from(keep && index < self.sorted);
            index += 1;
            keep
        });
        self.sorted = sorted;
    }

    /// Brings the `k` likeliest candidates to the front, likeliest first, lower id first among equals.
    ///
    /// Takes time linear in the number of candidates plus the sorting of `k` of them; what is in order already is not
    /// sorted again. Asking for more than there are sorts all.
    pub fn sort_top(&mut self, k: usize) {
        let k = k.min(self.entries.len());
        if k <= self.sorted {
            return;
        }
        let rest = &mut self.entries[self.sorted..];
        let wanted = k - self.sorted;
        if wanted < rest.len() {
            rest.select_nth_unstable_by(wanted - 1, by_rank);
        }
        rest[..wanted].sort_unstable_by(by_rank);
        self.sorted = k;
    }

    /// Keeps the first `n` candidates.
    pub fn truncate(&mut self, n: usize) {
        self.entries.truncate(n);
        self.sorted = self.sorted.min(n);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(candidates: &Candidates) -> Vec<u32> {
        candidates.as_slice().iter().map(|c| c.id).collect()
    }

    #[test]
    fn load_refuses_nan_and_plus_infinity_and_names_the_token() {
        let mut candidates = Candidates::new();
        let error = candidates.load(&[0.0, f32::NAN], 7).unwrap_err();
        assert_eq!(
            error.to_string(),
            "sampling: the logit of token 1 at position 7 is NaN, expected a number"
        );
        let error = candidates.load(&[0.0, 1.0, f32::INFINITY], 2).unwrap_err();
        assert!(matches!(error, Error::InvalidLogit { id: 2, position: 2, .. }), "{error}");
        candidates.load(&[f32::NEG_INFINITY, f32::MAX, f32::MIN], 0).unwrap();
        assert_eq!(candidates.len(), 3);
    }

    #[test]
    fn zeros_of_both_signs_are_equal() {
        let mut candidates = Candidates::new();
        candidates.load(&[-0.0, 0.0, -1.0], 0).unwrap();
        assert_eq!(candidates.best().unwrap().id, 0);
        candidates.update(|_, x| -x);
        candidates.sort_top(3);
        assert_eq!(ids(&candidates), [2, 0, 1]);
    }

    #[test]
    fn one_logit_is_found_wherever_it_stands() {
        let mut candidates = Candidates::new();
        candidates.load(&[1.0, 4.0, 2.0, 3.0], 0).unwrap();
        candidates.update_one(2, |x| x + 3.0);
        candidates.sort_top(4);
        assert_eq!(ids(&candidates), [2, 1, 3, 0]);
        candidates.update_one(1, |_| -0.0);
        candidates.update_one(9, |_| 9.0);
        assert_eq!(candidates.best().unwrap().id, 2);
        candidates.sort_top(4);
        assert_eq!(ids(&candidates), [2, 3, 0, 1]);
    }

    #[test]
    fn an_empty_buffer_has_no_best() {
        let mut candidates = Candidates::new();
        candidates.load(&[], 0).unwrap();
        assert!(candidates.is_empty() && candidates.best().is_none());
        candidates.sort_top(5);
        candidates.truncate(3);
    }

    proptest! {
        /// However it is reached, the order is that of a full sort.
        #[test]
        fn sort_top_equals_a_full_sort(
            logits in prop::collection::vec((-4i8..4).prop_map(f32::from), 1..80),
            ks in prop::collection::vec(0usize..100, 1..5),
            keep in prop::collection::vec(any::<bool>(), 80),
        ) {
            let mut candidates = Candidates::new();
            candidates.load(&logits, 0).unwrap();
            let mut expected = candidates.as_slice().to_vec();
            expected.sort_by(|a, b| b.logit.partial_cmp(&a.logit).unwrap().then(a.id.cmp(&b.id)));
            for k in ks {
                candidates.sort_top(k);
                let k = k.min(expected.len());
                prop_assert_eq!(&candidates.as_slice()[..k], &expected[..k]);
                prop_assert_eq!(candidates.best(), expected.first().copied());
                candidates.retain(|c| keep[c.id as usize]);
                expected.retain(|c| keep[c.id as usize]);
            }
        }
    }
}
