//! How likely a model thinks a given text is: teacher forcing.

use crate::error::{Error, Result};
use crate::lm::CausalLm;
use crate::logprobs::LogSum;
use crate::prompt::PROMPT_PIECE;

/// The losses of a text; see [`score`].
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// For each token but the first, in nats: `-ln p(token | all tokens before it)`.
    pub losses: Vec<f32>,
}

impl Score {
    /// The sum of the losses: minus the logarithm of the probability of the text, given its first token.
    pub fn total(&self) -> f64 {
        self.losses.iter().map(|&loss| f64::from(loss)).sum()
    }

    /// The mean loss; none for a text of one token.
    pub fn mean(&self) -> Option<f64> {
        (!self.losses.is_empty()).then(|| self.total() / self.losses.len() as f64)
    }

    /// `exp` of the mean loss.
    pub fn perplexity(&self) -> Option<f64> {
        self.mean().map(f64::exp)
    }
}

/// About how many logits are computed at once.
const LOGITS: usize = 1 << 24;

/// Scores a text token by token: each is predicted from those before it, whatever the model would have chosen.
///
/// Goes on from `cache`, and leaves there the state after all tokens but the last, which nobody asks what follows. The text is
/// read in pieces, so memory does not grow with it, but for the losses.
///
/// # Errors
/// If `ids` is empty or holds an id that the model does not know, or the model fails or gives a logit that is NaN.
///
/// # Example
/// ```
/// # use mamba_generate::{BoxError, CausalLm};
/// # struct Sum;
/// # impl CausalLm for Sum {
/// #     type Cache = u32;
/// #     fn vocab_size(&self) -> usize { 10 }
/// #     fn new_cache(&self) -> Result<u32, BoxError> { Ok(0) }
/// #     fn prefill(&self, ids: &[u32], sum: &mut u32, logits: &mut Vec<f32>) -> Result<(), BoxError> {
/// #         *sum += ids.iter().sum::<u32>();
/// #         logits.clear();
/// #         logits.resize(10, 0.0);
/// #         logits[(*sum % 10) as usize] = 1.0;
/// #         Ok(())
/// #     }
/// #     fn step(&self, id: u32, sum: &mut u32, logits: &mut Vec<f32>) -> Result<(), BoxError> {
/// #         self.prefill(&[id], sum, logits)
/// #     }
/// # }
/// // The model of the example of `CausalLm`: it expects the sum of all tokens, with a logit of 1 among zeros.
/// let score = mamba_generate::score(&Sum, &[3, 3, 0], &mut Sum.new_cache()?)?;
/// let norm = (1f32.exp() + 9.0).ln();
/// assert!((score.losses[0] - (norm - 1.0)).abs() < 1e-6 && (score.losses[1] - norm).abs() < 1e-6);
/// # Ok::<(), BoxError>(())
/// ```
pub fn score<M: CausalLm + ?Sized>(model: &M, ids: &[u32], cache: &mut M::Cache) -> Result<Score> {
    let vocab_size = model.vocab_size();
    crate::generator::check_prompt(ids, vocab_size)?;
    let (mut losses, mut logits) = (Vec::with_capacity(ids.len() - 1), Vec::new());
    let piece = (LOGITS / vocab_size.max(1)).clamp(1, PROMPT_PIECE);
    for inputs in ids[..ids.len() - 1].chunks(piece) {
        let position = losses.len();
        model.forward(inputs, cache, &mut logits).map_err(Error::model("forward", position))?;
        let (got, expected) = (logits.len(), inputs.len() * vocab_size);
        if got != expected {
            return Err(Error::LogitsLength { got, expected, position });
        }
        for row in logits.chunks_exact(vocab_size) {
            let position = losses.len() + 1;
            let id = ids[position];
            let value = row[id as usize];
            let loss = -LogSum::of(row).logprob(value);
            if loss.is_nan() {
                return Err(Error::InvalidLogit { id, position, value });
            }
            losses.push(loss as f32);
        }
    }
    Ok(Score { losses })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    #[test]
    fn one_token_has_no_loss_and_none_is_an_error() {
        let model = Fake::saying(1, &[5, 6]);
        let score = super::score(&model, &[1], &mut vec![]).unwrap();
        assert_eq!(
            (score.losses.len(), score.total(), score.mean(), score.perplexity()),
            (0, 0.0, None, None)
        );
        assert!(matches!(super::score(&model, &[], &mut vec![]), Err(Error::EmptyPrompt)));
        assert!(matches!(super::score(&model, &[1, 600], &mut vec![]), Err(Error::TokenOutOfRange { .. })));
        assert_eq!(model.calls(), [""; 0]);
    }

    #[test]
    fn losses_are_those_of_the_logits_and_the_last_token_is_not_read() {
        let model = Fake::saying(1, &[5, 6]);
        let mut cache = vec![];
        let score = super::score(&model, &[1, 5, 7], &mut cache).unwrap();
        let norm = (20f64.exp() + 511.0).ln();
        assert!((f64::from(score.losses[0]) - (norm - 20.0)).abs() < 1e-7);
        assert!((f64::from(score.losses[1]) - norm).abs() < 1e-5);
        assert_eq!(cache, [1, 5]);
    }

    #[test]
    fn what_is_not_a_number_is_an_error() {
        let model = Fake { nan_at: Some(2), ..Fake::saying(1, &[5, 6]) };
        let error = super::score(&model, &[1, 5, 3], &mut vec![]).unwrap_err();
        assert!(matches!(error, Error::InvalidLogit { id: 3, position: 2, .. }), "{error}");
        let error = super::score(&model, &[1, 5, 4], &mut vec![]).unwrap_err();
        assert!(matches!(error, Error::InvalidLogit { .. }), "{error}");
    }
}
