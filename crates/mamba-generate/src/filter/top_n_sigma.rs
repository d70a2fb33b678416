use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Keeps the tokens whose logit is within `n` standard deviations of the largest.
///
/// `logit ≥ max - n · σ`, with σ the standard deviation (of the population) of the logits that are not minus infinity. What
/// is kept does not depend on the temperature.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, TopNSigma};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[8.0, 7.0, 0.0, 1.0], 0)?; // the mean is 4, σ is 3.54
/// TopNSigma::new(1.0)?.apply(&mut candidates, History::default())?;
/// assert_eq!(candidates.len(), 2);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// Tang et al., 2024, Top-nσ: Not All Logits Are You Need; as `top_n_sigma` in llama.cpp.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopNSigma(f64);

impl TopNSigma {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `n` is not a finite number above 0.
    pub fn new(n: f64) -> Result<Self> {
        if n.is_finite() && n > 0.0 {
            Ok(Self(n))
        } else {
            Err(Error::invalid("top_n_sigma", "n", n, "a finite number above 0"))
        }
    }
}

impl LogitsFilter for TopNSigma {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        let Some(best) = candidates.best() else { return Ok(()) };
        let possible = || {
            let logits = candidates.as_slice().iter().map(|c| c.logit);
            logits.filter(|&logit| logit > f32::NEG_INFINITY).map(f64::from)
        };
        let count = possible().count() as f64;
        let mean = possible().sum::<f64>() / count;
        let sigma = (possible().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt();
        let least = f64::from(best.logit) - self.0 * sigma;
        if least.is_finite() {
            candidates.retain(|c| f64::from(c.logit) >= least);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{Chain, Temperature, filtered};

    const NO: f32 = f32::NEG_INFINITY;

    #[test]
    fn equals_the_definition() {
        // max 6, mean 3, variance (9 + 1 + 1 + 9) / 4 = 5.
        let logits = [6.0, 4.0, 2.0, 0.0, NO];
        for (n, kept) in [(0.5, 1), (0.89, 1), (0.9, 2), (1.7, 2), (1.8, 3), (2.7, 4)] {
            let out = filtered(&mut TopNSigma::new(n).unwrap(), &logits, &[]);
            assert_eq!(out.iter().filter(|x| x.is_finite()).count(), kept, "{n}");
        }
    }

    #[test]
    fn equal_logits_and_none_at_all() {
        assert_eq!(filtered(&mut TopNSigma::new(1.0).unwrap(), &[2.0, 2.0], &[]), [2.0, 2.0]);
        assert_eq!(filtered(&mut TopNSigma::new(1.0).unwrap(), &[NO, NO], &[]), [NO, NO]);
        assert_eq!(filtered(&mut TopNSigma::new(1.0).unwrap(), &[f32::MAX, f32::MIN], &[]), [f32::MAX, NO]);
    }

    #[test]
    fn temperature_does_not_matter() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 101) as f32 * 0.25).collect();
        let kept = |temperature| {
            let chain = Chain::new().with(Temperature::new(temperature).unwrap());
            let out = filtered(&mut chain.with(TopNSigma::new(1.3).unwrap()), &logits, &[]);
            out.iter().map(|x| x.is_finite()).collect::<Vec<_>>()
        };
        assert_eq!(kept(0.5), kept(4.0));
    }

    #[test]
    fn refuses_bad_numbers() {
        for n in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(TopNSigma::new(n).is_err(), "{n}");
        }
    }
}
