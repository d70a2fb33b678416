use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};
use crate::rng::Rng;

/// Sometimes excludes the top choices: of the tokens that are at least as likely as a threshold, only the least likely stays.
///
/// With the given probability, once per token: if at least two tokens have `p ≥ threshold`, all of these but the one with
/// the smallest `p` (the highest id among equals) are dropped; the unlikelier ones stay. Else nothing happens. A threshold
/// above 0.5 never has two such tokens.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, Xtc};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()], 0)?;
/// Xtc::new(1.0, 0.1, 0)?.apply(&mut candidates, History::default())?;
/// let ids: Vec<u32> = candidates.as_slice().iter().map(|c| c.id).collect();
/// assert_eq!(ids, [2, 3]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// XTC by p-e-w (oobabooga/text-generation-webui, pull request 6335); as `xtc` in llama.cpp.
#[derive(Debug, Clone)]
pub struct Xtc {
    probability: f64,
    threshold: f64,
    rng: Rng,
}

/// The stream of the seed that decides; that of draws is 0.
const STREAM: u64 = 1;

impl Xtc {
    /// Makes the filter; `seed` says for which tokens it is active.
    ///
    /// # Errors
    /// If `probability` is not above 0 and at most 1, or `threshold` not above 0 and at most 1.
    pub fn new(probability: f64, threshold: f64, seed: u64) -> Result<Self> {
        for (argument, value) in [("probability", probability), ("threshold", threshold)] {
            if !(value > 0.0 && value <= 1.0) {
                return Err(Error::invalid("xtc", argument, value, "a number above 0 and at most 1"));
            }
        }
        Ok(Self { probability, threshold, rng: Rng::new(seed, STREAM) })
    }
}

impl LogitsFilter for Xtc {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        // One number for every token, used or not, so that a token says nothing about later ones.
        let active = self.rng.uniform() < self.probability;
        let Some(best) = candidates.best() else { return Ok(()) };
        if !active || best.logit == f32::NEG_INFINITY {
            return Ok(());
        }
        let weight = |logit: f32| f64::from(logit - best.logit).exp();
        let total: f64 = candidates.as_slice().iter().map(|c| weight(c.logit)).sum();
        let least = self.threshold * total;
        let tops = candidates.as_slice().iter().filter(|c| weight(c.logit) >= least);
        let last = tops.min_by(|a, b| a.logit.total_cmp(&b.logit).then(b.id.cmp(&a.id))).map(|c| c.id);
        candidates.retain(|c| weight(c.logit) < least || Some(c.id) == last);
        Ok(())
    }

    fn save_state(&self, words: &mut Vec<u64>) {
        self.rng.save(words);
    }

    fn restore_state(&mut self, words: &mut &[u64]) -> Result<()> {
        self.rng.restore(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::filtered;

    const NO: f32 = f32::NEG_INFINITY;

    #[test]
    fn only_the_least_likely_of_the_top_choices_stays() {
        let logits = [0.4f32.ln(), 0.3f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        // (threshold, the tokens that stay)
        for (threshold, stay) in
            [(0.05, vec![3]), (0.15, vec![2, 3]), (0.25, vec![1, 2, 3]), (0.35, vec![0, 1, 2, 3])]
        {
            let out = filtered(&mut Xtc::new(1.0, threshold, 0).unwrap(), &logits, &[]);
            let kept: Vec<usize> = (0..4).filter(|&i| out[i].is_finite()).collect();
            assert_eq!(kept, stay, "{threshold}");
        }
        // Among equals the highest id; nothing to choose from; nothing at all.
        assert_eq!(filtered(&mut Xtc::new(1.0, 0.1, 0).unwrap(), &[1.0, 1.0, 1.0], &[]), [NO, NO, 1.0]);
        assert_eq!(filtered(&mut Xtc::new(1.0, 0.6, 0).unwrap(), &[9.0, 1.0], &[]), [9.0, 1.0]);
        assert_eq!(filtered(&mut Xtc::new(1.0, 0.1, 0).unwrap(), &[NO, NO], &[]), [NO, NO]);
    }

    #[test]
    fn is_active_as_often_as_it_should() {
        let mut filter = Xtc::new(0.3, 0.1, 5).unwrap();
        let active = (0..10_000).filter(|_| filtered(&mut filter, &[1.0, 0.9], &[])[0] == NO).count();
        // Four standard deviations.
        assert!((active as f64 - 3000.0).abs() < 4.0 * 45.8, "{active}");
    }

    #[test]
    fn refuses_bad_numbers() {
        for bad in [0.0, -1.0, 1.1, f64::NAN] {
            assert!(Xtc::new(bad, 0.1, 0).is_err() && Xtc::new(0.1, bad, 0).is_err());
        }
    }
}
