use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Keeps the tokens whose probability is at least `min_p` times that of the likeliest.
///
/// `p ≥ min_p · max p`, as in transformers; the likeliest token always stays.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, MinP};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()], 0)?;
/// MinP::new(0.4)?.apply(&mut candidates, History::default())?;
/// assert_eq!(candidates.len(), 2);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinP(f64);

impl MinP {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `min_p` is not above 0 and at most 1.
    pub fn new(min_p: f64) -> Result<Self> {
        if min_p > 0.0 && min_p <= 1.0 {
            Ok(Self(min_p))
        } else {
            Err(Error::invalid("min_p", "min_p", min_p, "a number above 0 and at most 1"))
        }
    }
}

impl LogitsFilter for MinP {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        let Some(best) = candidates.best() else { return Ok(()) };
        if best.logit > f32::NEG_INFINITY {
            // p / max p = exp(logit - best), so one logarithm replaces the softmax.
            let least = self.0.ln();
            candidates.retain(|c| f64::from(c.logit) - f64::from(best.logit) >= least);
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
    fn one_keeps_only_the_likeliest_and_its_equals() {
        let out = filtered(&mut MinP::new(1.0).unwrap(), &[1.0, 2.0, 2.0, f32::NEG_INFINITY], &[]);
        assert_eq!(out, [f32::NEG_INFINITY, 2.0, 2.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn refuses_what_is_not_a_probability() {
        for p in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(MinP::new(p).is_err(), "{p}");
        }
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            logits in prop::collection::vec(-8f32..8.0, 1..60),
            min_p in 0.001f64..1.0,
        ) {
            let out = filtered(&mut MinP::new(min_p).unwrap(), &logits, &[]);
            let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let probability = |x: f32| f64::from(x).exp() / total;
            let most = logits.iter().map(|&x| probability(x)).fold(0.0, f64::max);
            for (&x, &y) in logits.iter().zip(&out) {
                let excess = probability(x) - min_p * most;
                if excess.abs() > 1e-12 {
                    prop_assert_eq!(y, if excess > 0.0 { x } else { f32::NEG_INFINITY });
                }
            }
        }
    }
}
