//! Generation against what others compute, and with a real tokenizer.
#![allow(clippy::unwrap_used, reason = "a failed helper fails the test")]

mod gguf_tokenizers;
mod sampling;
mod streaming;
