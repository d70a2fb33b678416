use super::{History, LogitsFilter};
use crate::candidates::Candidates;
use crate::error::{Error, Result};

/// Keeps the likeliest tokens until their probabilities sum to `p`: nucleus sampling.
///
/// The kept set is the smallest whose probability reaches `p`, so it includes the token that crosses the threshold, and
/// at least one token. Among equal logits the lower id counts as likelier. Probabilities are those among the candidates
/// that earlier filters left, and are summed in `f64`. With `p = 1` everything is kept.
///
/// Candidates are sorted only as far as needed: blocks of growing size are selected until their mass suffices.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, TopP};
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[0.3f32.ln(), 0.4f32.ln(), 0.3f32.ln()], 0)?;
/// TopP::new(0.5)?.apply(&mut candidates, History::default())?;
/// let ids: Vec<u32> = candidates.as_slice().iter().map(|c| c.id).collect();
/// assert_eq!(ids, [1, 0]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopP(f64);

/// How many candidates are sorted at first; each further block is four times as large.
const BLOCK: usize = 64;

impl TopP {
    /// Makes the filter.
    ///
    /// # Errors
    /// If `p` is not above 0 and at most 1.
    pub fn new(p: f64) -> Result<Self> {
        if p > 0.0 && p <= 1.0 {
            Ok(Self(p))
        } else {
            Err(Error::invalid("top_p", "p", p, "a number above 0 and at most 1"))
        }
    }
}

impl LogitsFilter for TopP {
    fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
        let Some(best) = candidates.best() else { return Ok(()) };
        if self.0 == 1.0 || best.logit == f32::NEG_INFINITY {
            return Ok(());
        }
        let weight = |logit: f32| f64::from(logit - best.logit).exp();
        let wanted = self.0 * candidates.as_slice().iter().map(|c| weight(c.logit)).sum::<f64>();

        let (mut mass, mut kept, mut block) = (0.0, 0, BLOCK);
        while mass < wanted && kept < candidates.len() {
            if kept == block {
                block *= 4;
            }
            // Sorts once a block: what is in order already costs nothing.
            candidates.sort_top(block);
            mass += weight(candidates.as_slice()[kept].logit);
            kept += 1;
        }
        candidates.truncate(kept);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::filter::{TopK, filtered};

    #[test]
    fn keeps_the_token_that_crosses_the_threshold() {
        let logits = [0.4f32.ln(), 0.3f32.ln(), 0.3f32.ln()];
        let kept =
            |p| filtered(&mut TopP::new(p).unwrap(), &logits, &[]).iter().filter(|x| x.is_finite()).count();
        assert_eq!(kept(0.5), 2);
        assert_eq!(kept(0.39), 1);
        assert_eq!(kept(1e-9), 1);
        assert_eq!(kept(0.75), 3);
        assert_eq!(kept(1.0), 3);
    }

    #[test]
    fn counts_only_what_earlier_filters_left() {
        let logits = [0.4f32.ln(), 0.3f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let mut candidates = Candidates::new();
        candidates.load(&logits, 0).unwrap();
        TopK::new(2).unwrap().apply(&mut candidates, History::default()).unwrap();
        TopP::new(0.55).unwrap().apply(&mut candidates, History::default()).unwrap(); // 0.4 / 0.7 = 0.571
        assert_eq!(candidates.len(), 1);
    }

    #[test]
    fn grows_over_many_blocks() {
        let logits = vec![0.0; 5000];
        let out = filtered(&mut TopP::new(0.5).unwrap(), &logits, &[]);
        assert_eq!(out.iter().filter(|x| x.is_finite()).count(), 2500);
        assert!(out[..2500].iter().all(|x| x.is_finite()));
    }

    #[test]
    fn refuses_what_is_not_a_probability() {
        for p in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(TopP::new(p).is_err(), "{p}");
        }
    }

    proptest! {
        /// The smallest set that reaches p: it reaches p, and without its least member it does not.
        #[test]
        fn equals_the_definition(
            logits in prop::collection::vec((-40i8..40).prop_map(|x| f32::from(x) / 8.0), 1..300),
            p in 0.01f64..0.999,
        ) {
            let out = filtered(&mut TopP::new(p).unwrap(), &logits, &[]);
            let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let kept: Vec<usize> = (0..logits.len()).filter(|&i| out[i].is_finite()).collect();
            let mass: f64 = kept.iter().map(|&i| f64::from(logits[i]).exp() / total).sum();
            let least = *kept.iter().max_by(|&&i, &&j| {
                logits[j].partial_cmp(&logits[i]).unwrap().then(i.cmp(&j))
            }).unwrap();
            prop_assert!(mass >= p - 1e-9);
            prop_assert!(mass - f64::from(logits[least]).exp() / total < p + 1e-9);
            for i in 0..logits.len() {
                let ahead = logits[i] > logits[least] || (logits[i] == logits[least] && i <= least);
                prop_assert_eq!(out[i], if ahead { logits[i] } else { f32::NEG_INFINITY });
            }
        }
    }
}
