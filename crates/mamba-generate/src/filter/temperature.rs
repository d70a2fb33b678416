use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Divides every logit by a temperature: below 1 the likely become likelier, above 1 the choice becomes more even.
///
/// If the quotient of the largest logit is too large for `f32`, the logits are shifted first so that the largest is 0;
/// the distribution is the same. For a temperature of 0, choose greedily: see [`SamplingConfig`](crate::SamplingConfig).
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, Temperature};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[1.0, -2.0], 0)?;
/// Temperature::new(0.5)?.apply(&mut candidates, History::default())?;
/// assert_eq!(candidates.as_slice()[1].logit, -4.0);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature(f32);

impl Temperature {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `temperature` is not a finite number above 0, also after rounding to `f32`.
    pub fn new(temperature: f64) -> Result<Self> {
        let rounded = temperature as f32;
        if rounded.is_finite() && rounded > 0.0 {
            Ok(Self(rounded))
        } else {
            Err(Error::invalid("temperature", "temperature", temperature, "a finite number above 0"))
        }
    }
}

impl LogitsFilter for Temperature {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        let Some(best) = candidates.best() else { return Ok(()) };
        let fits = (best.logit / self.0).is_finite() || !best.logit.is_finite();
        if fits {
            candidates.update(|_, logit| logit / self.0);
        } else {
            // The difference is taken in f64: it may itself be too large for f32.
            let (best, temperature) = (f64::from(best.logit), f64::from(self.0));
            candidates.update(|_, logit| ((f64::from(logit) - best) / temperature) as f32);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::filtered;

    #[test]
    fn divides() {
        let mut filter = Temperature::new(2.0).unwrap();
        let out = filtered(&mut filter, &[1.0, -3.0, f32::NEG_INFINITY], &[]);
        assert_eq!(out, [0.5, -1.5, f32::NEG_INFINITY]);
    }

    #[test]
    fn extreme_quotients_keep_the_likeliest_apart() {
        for logits in [[1e10, 2e10, -3e38], [-2e10, -1e10, -3e38], [3e38, 3.2e38, -3e38]] {
            let out = filtered(&mut Temperature::new(1e-30).unwrap(), &logits, &[]);
            assert_eq!(out, [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], "{logits:?}");
        }
        let out = filtered(&mut Temperature::new(1e-30).unwrap(), &[f32::NEG_INFINITY; 2], &[]);
        assert_eq!(out, [f32::NEG_INFINITY; 2]);
    }

    #[test]
    fn refuses_what_is_not_above_zero() {
        for t in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-60, 1e60] {
            assert!(Temperature::new(t).is_err(), "{t}");
        }
    }
}
