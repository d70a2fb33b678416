use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Keeps the `k` likeliest tokens, or all if there are fewer.
///
/// Exactly `k` are kept: among equal logits at the border, those with the lower ids. (transformers keeps all that are
/// equal to the `k`-th.) No sort of the vocabulary takes place.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, TopK};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[1.0, 3.0, 2.0, 2.0], 0)?;
/// TopK::new(2)?.apply(&mut candidates, History::default())?;
/// let ids: Vec<u32> = candidates.as_slice().iter().map(|c| c.id).collect();
/// assert_eq!(ids, [1, 2]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopK(usize);

impl TopK {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `k` is 0.
    pub fn new(k: usize) -> Result<Self> {
        match k {
            0 => Err(Error::invalid("top_k", "k", k, "at least 1")),
            k => Ok(Self(k)),
        }
    }
}

impl LogitsFilter for TopK {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        if self.0 < candidates.len() {
            candidates.sort_top(self.0);
            candidates.truncate(self.0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::filtered;

    #[test]
    fn refuses_zero() {
        assert_eq!(TopK::new(0).unwrap_err().to_string(), "top_k: `k` is 0, expected at least 1");
    }

    proptest! {
        /// A token stays if fewer than k are ahead of it: larger, or equal with a lower id.
        #[test]
        fn equals_the_definition(
            logits in prop::collection::vec((-9i8..9).prop_map(f32::from), 1..60),
            k in 1usize..70,
        ) {
            let out = filtered(&mut TopK::new(k).unwrap(), &logits, &[]);
            for (i, &x) in logits.iter().enumerate() {
                let ahead = (0..logits.len())
                    .filter(|&j| logits[j] > x || (logits[j] == x && j < i))
                    .count();
                prop_assert_eq!(out[i], if ahead < k { x } else { f32::NEG_INFINITY });
            }
        }
    }
}
