//! How likely the model thought tokens were.

use std::cmp::Ordering;

/// A token and the logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token id.
    pub id: u32,
    /// The natural logarithm of its probability; minus infinity if the model rules it out.
    pub logprob: f32,
}

/// The log-probabilities at one position: that of the token that was chosen, and those of the likeliest.
///
/// They are the model's own, `logit - ln Σ exp logit`, before any filter.
///
/// # Example
/// ```
/// use mamba_generate::Logprobs;
///
/// let logits = [0.5f32.ln() + 3.0, 0.2f32.ln() + 3.0, 0.3f32.ln() + 3.0];
/// let logprobs = Logprobs::new(&logits, 1, 2);
/// assert!((logprobs.chosen - 0.2f32.ln()).abs() < 1e-6);
/// assert_eq!(logprobs.top.iter().map(|token| token.id).collect::<Vec<_>>(), [0, 2]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// That of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, likeliest first, lower id first among equals.
    pub top: Vec<TokenLogprob>,
}

impl Logprobs {
    /// Computes those of `chosen` and of the `top` likeliest from one logit per token of the vocabulary.
    ///
    /// A token that the vocabulary does not have gets minus infinity.
    pub fn new(logits: &[f32], chosen: u32, top: usize) -> Self {
        let sum = LogSum::of(logits);
        let logprob = |logit: f32| sum.logprob(logit) as f32;
        let rank = |a: &(u32, f32), b: &(u32, f32)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
        let mut best: Vec<(u32, f32)> = Vec::new();
        if top > 0 {
            best.extend((0u32..).zip(logits.iter().map(|x| x + 0.0)));
            if top < best.len() {
                best.select_nth_unstable_by(top, rank);
                best.truncate(top);
            }
            best.sort_unstable_by(rank);
        }
        Self {
            chosen: logits.get(chosen as usize).map_or(f32::NEG_INFINITY, |&logit| logprob(logit)),
            top: best.into_iter().map(|(id, logit)| TokenLogprob { id, logprob: logprob(logit) }).collect(),
        }
    }
}

/// `ln Σ exp x`, in `f64`, as a sum that is not carried out: the largest logit may be too large for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogSum {
    most: f64,
    rest: f64,
}

impl LogSum {
    pub(crate) fn of(logits: &[f32]) -> Self {
        let most = f64::from(logits.iter().fold(f32::NEG_INFINITY, |most, &x| most.max(x)));
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - most).exp()).sum();
        Self { most, rest: sum.ln() }
    }

    /// The logarithm of the probability of a token with this logit.
    pub(crate) fn logprob(self, logit: f32) -> f64 {
        f64::from(logit) - self.most - self.rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_the_top_is_sorted() {
        let logits: Vec<f32> = (0..97).map(|i| ((i * 31) % 17) as f32 - 8.0).collect();
        let all = Logprobs::new(&logits, 5, 1000);
        assert_eq!(all.top.len(), 97);
        let sum: f64 = all.top.iter().map(|t| f64::from(t.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert!(
            all.top.is_sorted_by(|a, b| a.logprob > b.logprob || (a.logprob == b.logprob && a.id < b.id))
        );
        assert_eq!(all.chosen, all.top.iter().find(|t| t.id == 5).unwrap().logprob);
        assert_eq!(Logprobs::new(&logits, 5, 3).top, all.top[..3]);
        assert_eq!(Logprobs::new(&logits, 500, 0), Logprobs { chosen: f32::NEG_INFINITY, top: vec![] });
    }

    #[test]
    fn large_and_forbidden_logits() {
        let no = f32::NEG_INFINITY;
        let logprobs = Logprobs::new(&[f32::MAX, no, f32::MAX], 1, 3);
        assert_eq!(logprobs.chosen, no);
        assert!((logprobs.top[0].logprob - 0.5f32.ln()).abs() < 1e-6);
    }
}
