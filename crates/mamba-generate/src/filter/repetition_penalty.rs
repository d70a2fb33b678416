use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Makes tokens that occurred before less likely: negative logits are multiplied by the penalty, others divided by it.
///
/// Each distinct token of the history, prompt included, is penalised once, however often it occurred. A penalty below 1
/// favours repetition instead. A result too large for `f32` becomes the largest number there is.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, RepetitionPenalty};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.5, -0.5, 0.5], 0)?;
/// RepetitionPenalty::new(1.25)?.apply(&mut candidates, History::new(&[0, 1, 0], 0))?;
/// let logits: Vec<f32> = candidates.as_slice().iter().map(|c| c.logit).collect();
/// assert_eq!(logits, [0.4, -0.625, 0.5]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RepetitionPenalty {
    penalty: f32,
    /// One bit per token id: whether it occurred. Kept between tokens for its memory only.
    seen: Vec<u64>,
}

impl RepetitionPenalty {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `penalty` is not a finite number above 0, also after rounding to `f32`.
    pub fn new(penalty: f64) -> Result<Self> {
        let rounded = penalty as f32;
        if rounded.is_finite() && rounded > 0.0 {
            Ok(Self { penalty: rounded, seen: Vec::new() })
        } else {
            Err(Error::invalid("repetition_penalty", "penalty", penalty, "a finite number above 0"))
        }
    }
}

impl LogitsFilter for RepetitionPenalty {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        let Some(largest) = candidates.as_slice().iter().map(|c| c.id).max() else { return Ok(()) };
        self.seen.clear();
        self.seen.resize(largest as usize / 64 + 1, 0);
        for &id in history.tokens() {
            // Ids beyond the candidates have no bit, as they cannot be chosen.
            if let Some(word) = self.seen.get_mut(id as usize / 64) {
                *word |= 1 << (id % 64);
            }
        }
        let (penalty, seen) = (self.penalty, &self.seen);
        candidates.update(|id, logit| {
            if seen[id as usize / 64] >> (id % 64) & 1 == 0 || !logit.is_finite() {
                return logit;
            }
            let penalised = if logit < 0.0 { logit * penalty } else { logit / penalty };
            penalised.clamp(f32::MIN, f32::MAX)
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::filtered;

    #[test]
    fn once_per_distinct_token_and_never_compounding() {
        let mut filter = RepetitionPenalty::new(1.2).unwrap();
        let out = filtered(&mut filter, &[0.5, -0.5, 0.5, -0.5], &[0, 1, 0, 0, 1, 999]);
        assert_eq!(out, [0.5 / 1.2, -0.5 * 1.2, 0.5, -0.5]);
        // Again, with another history: nothing is left of the first.
        let out = filtered(&mut filter, &[0.5, -0.5, 0.5, -0.5], &[2]);
        assert_eq!(out, [0.5, -0.5, 0.5 / 1.2, -0.5]);
    }

    #[test]
    fn stays_finite_and_leaves_the_forbidden_forbidden() {
        let logits = [3e38, -3e38, f32::NEG_INFINITY, 0.0];
        let out = filtered(&mut RepetitionPenalty::new(1e30).unwrap(), &logits, &[0, 1, 2, 3]);
        assert_eq!(out[1..], [f32::MIN, f32::NEG_INFINITY, 0.0]);
        let out = filtered(&mut RepetitionPenalty::new(1e-30).unwrap(), &logits, &[0, 1, 2, 3]);
        assert_eq!(out[0], f32::MAX);
    }

    #[test]
    fn refuses_what_is_not_above_zero() {
        for p in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-60] {
            assert!(RepetitionPenalty::new(p).is_err(), "{p}");
        }
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            logits in prop::collection::vec(-8f32..8.0, 1..200),
            history in prop::collection::vec(0u32..220, 0..40),
            penalty in 0.5f32..2.0,
        ) {
            let mut filter = RepetitionPenalty::new(f64::from(penalty)).unwrap();
            let out = filtered(&mut filter, &logits, &history);
            for (i, (&x, &y)) in logits.iter().zip(&out).enumerate() {
                let expected = match (history.contains(&(i as u32)), x < 0.0) {
                    (false, _) => x,
                    (true, true) => x * penalty,
                    (true, false) => x / penalty,
                };
                prop_assert_eq!(y, expected);
            }
        }
    }
}
