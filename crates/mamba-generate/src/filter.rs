//! Filters: what is done to the logits before a token is chosen.

mod banned_tokens;
mod chain;
mod dry;
mod forced_tokens;
mod logit_bias;
mod min_new_tokens;
mod min_p;
mod no_repeat_ngram;
mod occurrence_penalty;
mod repetition_penalty;
mod temperature;
mod top_k;
mod top_n_sigma;
mod top_p;
mod typical;
mod xtc;

pub use banned_tokens::BannedTokens;
pub use chain::Chain;
pub use dry::{Dry, DryConfig};
pub use forced_tokens::ForcedTokens;
pub use logit_bias::LogitBias;
pub use min_new_tokens::MinNewTokens;
pub use min_p::MinP;
pub use no_repeat_ngram::NoRepeatNgram;
pub use occurrence_penalty::OccurrencePenalty;
pub use repetition_penalty::RepetitionPenalty;
pub use temperature::Temperature;
pub use top_k::TopK;
pub use top_n_sigma::TopNSigma;
pub use top_p::TopP;
pub use typical::Typical;
pub use xtc::Xtc;

use crate::candidates::Candidates;
use crate::error::Result;

/// The tokens that precede the one to choose.
///
/// # Example
/// ```
/// use mamba_generate::History;
///
/// let history = History::new(&[5, 6, 7, 8], 3);
/// assert_eq!(history.tokens(), [5, 6, 7, 8]);
/// assert_eq!(history.generated(), [8]);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct History<'a> {
    tokens: &'a [u32],
    prompt_len: usize,
}

impl<'a> History<'a> {
    /// Describes `tokens`, of which the first `prompt_len` were given and the rest was generated.
    ///
    /// A `prompt_len` past the end means that all were given.
    pub fn new(tokens: &'a [u32], prompt_len: usize) -> Self {
        Self { tokens, prompt_len: prompt_len.min(tokens.len()) }
    }

    /// All tokens, given and generated.
    pub fn tokens(&self) -> &'a [u32] {
        self.tokens
    }

    /// The generated tokens.
    pub fn generated(&self) -> &'a [u32] {
        &self.tokens[self.prompt_len..]
    }
}

/// One thing that is done to the candidates before a token is chosen: change logits, or drop tokens.
///
/// A filter may keep scratch memory or state between tokens, so it serves one generation at a time.
///
/// # Example
/// ```
/// use mamba_generate::{Candidates, History, LogitsFilter, Result};
///
/// /// Forbids one token.
/// struct Ban(u32);
///
/// impl LogitsFilter for Ban {
///     fn apply(&mut self, candidates: &mut Candidates, _: History<'_>) -> Result<()> {
///         candidates.retain(|c| c.id != self.0);
///         Ok(())
///     }
/// }
///
/// let mut candidates = Candidates::new();
/// candidates.load(&[1.0, 3.0, 2.0], 0)?;
/// Ban(1).apply(&mut candidates, History::default())?;
/// assert_eq!(candidates.best().map(|c| c.id), Some(2));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
pub trait LogitsFilter: Send {
    /// Edits `candidates`, the possible successors of `history`.
    ///
    /// # Errors
    /// As the filter says. The filters of this crate check their parameters when they are made, and never fail here.
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()>;

    /// Whether the generated text is complete, so that nothing may follow it; never, by default.
    ///
    /// Asked after each token, whether or not it is one at which to stop.
    ///
    /// # Errors
    /// As the filter says.
    fn is_complete(&mut self, history: History<'_>) -> Result<bool> {
        let _ = history;
        Ok(false)
    }

    /// Appends what the filter remembers between tokens, and cannot learn from the history, to `words`.
    ///
    /// Nothing by default. A filter that draws random numbers says how far it has come.
    fn save_state(&self, words: &mut Vec<u64>) {
        let _ = words;
    }

    /// Reads from the front of `words` what [`save_state`](Self::save_state) appended, and goes on from there.
    ///
    /// # Errors
    /// If there are too few words.
    fn restore_state(&mut self, words: &mut &[u64]) -> Result<()> {
        let _ = words;
        Ok(())
    }
}

/// For the tests of filters: the logits after `filter`, minus infinity where the token was dropped.
#[cfg(test)]
pub(crate) fn filtered(filter: &mut dyn LogitsFilter, logits: &[f32], history: &[u32]) -> Vec<f32> {
    let mut candidates = Candidates::new();
    candidates.load(logits, history.len()).unwrap();
    filter.apply(&mut candidates, History::new(history, 0)).unwrap();
    let mut out = vec![f32::NEG_INFINITY; logits.len()];
    for c in candidates.as_slice() {
        out[c.id as usize] = c.logit;
    }
    out
}
