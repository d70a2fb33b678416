//! How long a generation took.

use std::time::Duration;

/// How long a generation took, not counting what its caller did between tokens.
///
/// The first token is chosen from the logits that end the prompt, so it belongs to the prompt: `prompt` is the time to the
/// first token, and `generation` covers the others, one step of the model each.
///
/// # Example
/// ```
/// use std::time::Duration;
///
/// use mamba_generate::Timings;
///
/// let mut timings = Timings::default();
/// assert_eq!(timings.tokens_per_s(), None);
/// timings.generated_tokens = 11;
/// timings.generation = Duration::from_secs(2);
/// assert_eq!(timings.tokens_per_s(), Some(5.0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timings {
    /// How many tokens of prompt were read.
    pub prompt_tokens: usize,
    /// From the start of the prompt to the first token.
    pub prompt: Duration,
    /// How many tokens were generated.
    pub generated_tokens: usize,
    /// What the tokens after the first took.
    pub generation: Duration,
}

impl Timings {
    /// Tokens of prompt per second, once the prompt has been read.
    pub fn prompt_tokens_per_s(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prompt)
    }

    /// Generated tokens per second, the first not counted, once there are two.
    pub fn tokens_per_s(&self) -> Option<f64> {
        rate(self.generated_tokens.saturating_sub(1), self.generation)
    }
}

fn rate(tokens: usize, time: Duration) -> Option<f64> {
    let seconds = time.as_secs_f64();
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}
