//! How a generation is stopped from elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Stops generations, from any thread.
///
/// Copies of one token are one token: whoever has one can [`cancel`](Self::cancel), and each generation that was
/// [built](crate::GeneratorBuilder::cancel_token) with it ends before its next token, or the next [piece](crate::PROMPT_PIECE) of its prompt, with
/// [`FinishReason::Cancelled`](crate::FinishReason::Cancelled). What was read and generated before stays as it is, and can be
/// gone on with.
///
/// # Example
/// ```
/// use mamba_generate::CancelToken;
///
/// let token = CancelToken::new();
/// let other = token.clone();
/// std::thread::spawn(move || other.cancel()).join().unwrap();
/// assert!(token.is_cancelled());
/// ```
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Makes a token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks all generations with this token to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether someone cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes the request back, so that the token serves once more.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
