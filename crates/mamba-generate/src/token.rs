//! What generations yield, and why they end.

use crate::error::Result;
use crate::logprobs::Logprobs;

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Token {
    /// The token id.
    pub id: u32,
    /// How likely the model thought it, if [asked for](crate::GeneratorBuilder::logprobs).
    pub logprobs: Option<Logprobs>,
}

/// Why a generation ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model chose a token at which to stop.
    StopToken,
    /// The text came to a string at which to stop; only a [`TextGenerator`](crate::TextGenerator) says this.
    StopString,
    /// A filter, such as a grammar, lets nothing follow.
    Complete,
    /// As many tokens were generated as were allowed.
    Length,
    /// Someone [asked](crate::CancelToken::cancel) it to stop.
    Cancelled,
}

impl FinishReason {
    /// The name in snake case, for machines to read: `stop_token`, `stop_string`, `complete`, `length` or `cancelled`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StopToken => "stop_token",
            Self::StopString => "stop_string",
            Self::Complete => "complete",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::fmt::Display for FinishReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An iterator of generated tokens that knows what came before: [`Generator`](crate::Generator), or
/// [`Speculative`](crate::Speculative).
pub trait Tokens: Iterator<Item = Result<Token>> {
    /// The tokens of the prompt.
    fn prompt(&self) -> &[u32];

    /// The tokens that were generated so far.
    fn generated(&self) -> &[u32];

    /// Why the generation ended, if it did.
    fn finish_reason(&self) -> Option<FinishReason>;
}
