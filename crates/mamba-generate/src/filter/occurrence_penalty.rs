use std::collections::BTreeMap;

use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Makes tokens less likely that were generated already: the presence and the frequency penalty.
///
/// `logit - presence - frequency · count` for each token that was generated `count > 0` times. Tokens of the prompt do not
/// count. Negative penalties favour repetition.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, OccurrencePenalty};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.0, 0.0, 0.0], 0)?;
/// // A prompt of one token, then three generated ones.
/// OccurrencePenalty::new(0.5, 0.25)?.apply(&mut candidates, History::new(&[2, 1, 0, 1], 1))?;
/// let logits: Vec<f32> = candidates.as_slice().iter().map(|c| c.logit).collect();
/// assert_eq!(logits, [-0.75, -1.0, 0.0]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `presence_penalty` and `frequency_penalty` of OpenAI's API.
#[derive(Debug, Clone, PartialEq)]
pub struct OccurrencePenalty {
    presence: f64,
    frequency: f64,
    counts: BTreeMap<u32, usize>,
}

impl OccurrencePenalty {
    /// Makes the filter.
    ///
    /// # Errors
    /// If a penalty is not a finite number.
    pub fn new(presence: f64, frequency: f64) -> Result<Self> {
        for (argument, value) in [("presence", presence), ("frequency", frequency)] {
            if !value.is_finite() {
                return Err(Error::invalid("occurrence_penalty", argument, value, "a finite number"));
            }
        }
        Ok(Self { presence, frequency, counts: BTreeMap::new() })
    }
}

impl LogitsFilter for OccurrencePenalty {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        self.counts.clear();
        for &id in history.generated() {
            *self.counts.entry(id).or_default() += 1;
        }
        for (&id, &count) in &self.counts {
            let penalty = self.presence + self.frequency * count as f64;
            candidates.update_one(id, |logit| {
                ((f64::from(logit) - penalty) as f32).clamp(f32::NEG_INFINITY, f32::MAX)
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn penalised(presence: f64, frequency: f64, history: History<'_>) -> Vec<f32> {
        let mut candidates = Candidates::new();
        candidates.load(&[1.0, 2.0, f32::NEG_INFINITY, 4.0], 0).unwrap();
        OccurrencePenalty::new(presence, frequency).unwrap().apply(&mut candidates, history).unwrap();
        candidates.as_slice().iter().map(|c| c.logit).collect()
    }

    #[test]
    fn equals_the_definition() {
        let tokens = [0, 0, 3, 1, 3, 2, 99];
        let no = f32::NEG_INFINITY;
        assert_eq!(penalised(0.5, 0.0, History::new(&tokens, 2)), [1.0, 1.5, no, 3.5]);
        assert_eq!(penalised(0.0, 0.5, History::new(&tokens, 2)), [1.0, 1.5, no, 3.0]);
        assert_eq!(penalised(-1.0, -0.5, History::new(&tokens, 0)), [3.0, 3.5, no, 6.0]);
        assert_eq!(penalised(1.0, 1.0, History::new(&tokens, 7)), [1.0, 2.0, no, 4.0]);
    }

    #[test]
    fn refuses_what_is_not_finite() {
        assert!(OccurrencePenalty::new(f64::NAN, 0.0).is_err());
        assert!(OccurrencePenalty::new(0.0, f64::INFINITY).is_err());
    }
}
