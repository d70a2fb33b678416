use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Adds a number to the logits of some tokens; minus infinity forbids a token.
///
/// A token that is named twice gets both numbers.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitBias, LogitsFilter};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[1.0, 3.0, 2.0], 0)?;
/// LogitBias::new([(0, 2.5), (1, f32::NEG_INFINITY)])?.apply(&mut candidates, History::default())?;
/// assert_eq!(candidates.best().map(|c| c.id), Some(0));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `logit_bias` of OpenAI's API; `SequenceBiasLogitsProcessor` in transformers for sequences of one token.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitBias(Vec<(u32, f32)>);

impl LogitBias {
    /// Makes the filter from pairs of a token id and what is added to its logit.
    ///
    /// # Errors
    /// If a number is NaN or plus infinity. To allow only one token, see [`ForcedTokens`](crate::ForcedTokens).
    pub fn new(bias: impl IntoIterator<Item = (u32, f32)>) -> Result<Self> {
        let bias: Vec<(u32, f32)> = bias.into_iter().collect();
        match bias.iter().find(|(_, x)| x.is_nan() || *x == f32::INFINITY) {
            Some((_, x)) => Err(Error::invalid("logit_bias", "bias", x, "numbers below infinity")),
            None => Ok(Self(bias)),
        }
    }
}

impl LogitsFilter for LogitBias {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        for &(id, bias) in &self.0 {
            candidates.update_one(id, |logit| (logit + bias).min(f32::MAX));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::filtered;

    #[test]
    fn adds_and_forbids() {
        let no = f32::NEG_INFINITY;
        let mut filter = LogitBias::new([(1, 0.5), (2, no), (1, 1.0), (77, 3.0), (3, 1.0)]).unwrap();
        assert_eq!(filtered(&mut filter, &[1.0, 2.0, 3.0, no, f32::MAX], &[]), [1.0, 3.5, no, no, f32::MAX]);
        assert_eq!(filtered(&mut LogitBias::new([(0, f32::MAX)]).unwrap(), &[f32::MAX], &[]), [f32::MAX]);
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(LogitBias::new([(0, bad)]).is_err());
        }
    }
}
