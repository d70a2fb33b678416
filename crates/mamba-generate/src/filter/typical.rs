use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Keeps the tokens whose surprise is nearest to the expected one, until their probabilities sum to `mass`.
///
/// With `H = -Σ p ln p`, tokens are taken in the order of `|-ln p - H|`, until the sum of their probabilities reaches
/// `mass`; those exactly as far away as the last one stay as well. At least one token stays. With `mass = 1` everything
/// is kept.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, Typical};
///
/// // H is 1.18, that of the second token 1.20: it is the most typical one, though not the likeliest.
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.5f32.ln(), 0.3f32.ln(), 0.1f32.ln(), 0.1f32.ln()], 0)?;
/// Typical::new(0.25)?.apply(&mut candidates, History::default())?;
/// let ids: Vec<u32> = candidates.as_slice().iter().map(|c| c.id).collect();
/// assert_eq!(ids, [1]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// Meister et al., 2022, Locally Typical Sampling; `TypicalLogitsWarper` in transformers.
#[derive(Debug, Clone, PartialEq)]
pub struct Typical {
    mass: f64,
    /// Distance from the expected surprise, and probability; kept between tokens for its memory only.
    tokens: Vec<(f64, f64)>,
}

/// How many tokens are sorted at first; each further block is four times as large.
const BLOCK: usize = 64;

impl Typical {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `mass` is not above 0 and at most 1.
    pub fn new(mass: f64) -> Result<Self> {
        if mass > 0.0 && mass <= 1.0 {
            Ok(Self { mass, tokens: Vec::new() })
        } else {
            Err(Error::invalid("typical", "mass", mass, "a number above 0 and at most 1"))
        }
    }

    /// How far the last token may be that is needed to reach the mass.
    fn distance(&mut self) -> f64 {
        let (mut sum, mut sorted, mut last) = (0.0, 0, 0.0);
        let mut block = BLOCK;
        while sum < self.mass && sorted < self.tokens.len() {
            let end = block.min(self.tokens.len());
            let rest = &mut self.tokens[sorted..];
            if end - sorted < rest.len() {
                rest.select_nth_unstable_by(end - sorted, |a, b| a.0.total_cmp(&b.0));
            }
            rest[..end - sorted].sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            for &(distance, p) in &self.tokens[sorted..end] {
                if sum >= self.mass {
                    break;
                }
                (sum, last) = (sum + p, distance);
            }
            (sorted, block) = (end, 4 * block);
        }
        last
    }
}

impl LogitsFilter for Typical {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        let Some(best) = candidates.best() else { return Ok(()) };
        if self.mass == 1.0 || best.logit == f32::NEG_INFINITY {
            return Ok(());
        }
        let shifted = |logit: f32| f64::from(logit) - f64::from(best.logit);
        let total: f64 = candidates.as_slice().iter().map(|c| shifted(c.logit).exp()).sum();
        let log_total = total.ln();
        let log_p = |logit: f32| shifted(logit) - log_total;
        let possible = || candidates.as_slice().iter().filter(|c| c.logit > f32::NEG_INFINITY);
        let entropy: f64 = possible().map(|c| -log_p(c.logit) * log_p(c.logit).exp()).sum();
        let distance = |logit: f32| (-log_p(logit) - entropy).abs();
        self.tokens.clear();
        self.tokens.extend(possible().map(|c| (distance(c.logit), log_p(c.logit).exp())));
        let most = self.distance();
        candidates.retain(|c| c.logit > f32::NEG_INFINITY && distance(c.logit) <= most);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::filtered;

    #[test]
    fn refuses_what_is_not_a_probability() {
        for mass in [0.0, -0.1, 1.1, f64::NAN] {
            assert!(Typical::new(mass).is_err(), "{mass}");
        }
    }

    #[test]
    fn equals_stay_together_and_the_forbidden_stays_forbidden() {
        let no = f32::NEG_INFINITY;
        assert_eq!(filtered(&mut Typical::new(0.1).unwrap(), &[0.0, 0.0, no, 0.0], &[]), [0.0, 0.0, no, 0.0]);
        assert_eq!(filtered(&mut Typical::new(0.5).unwrap(), &[no, no], &[]), [no, no]);
    }

    proptest! {
        /// Against a full sort.
        #[test]
        fn equals_the_definition(
            logits in prop::collection::vec(-8f32..8.0, 1..400),
            mass in 0.01f64..0.99,
        ) {
            let out = filtered(&mut Typical::new(mass).unwrap(), &logits, &[]);
            let most = logits.iter().fold(f32::MIN, |m, &x| m.max(x));
            let weights: Vec<f64> = logits.iter().map(|&x| (f64::from(x) - f64::from(most)).exp()).collect();
            let total: f64 = weights.iter().sum();
            let log_p: Vec<f64> = logits.iter().map(|&x| f64::from(x) - f64::from(most) - total.ln()).collect();
            let entropy: f64 = log_p.iter().map(|l| -l * l.exp()).sum();
            let mut order: Vec<usize> = (0..logits.len()).collect();
            let distance = |i: usize| (-log_p[i] - entropy).abs();
            order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
            let mut sum = 0.0;
            let needed = order.iter().take_while(|&&i| { let go = sum < mass; sum += log_p[i].exp(); go }).count();
            let last = distance(order[needed - 1]);
            for (i, (&logit, &out)) in logits.iter().zip(&out).enumerate() {
                prop_assert_eq!(out, if distance(i) <= last { logit } else { f32::NEG_INFINITY });
            }
        }
    }
}
