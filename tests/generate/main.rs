//! Generation against what others compute, and with a real tokenizer.
#![allow(clippy::unwrap_used, reason = "a failed helper fails the test")]

#[path = "../support/mod.rs"]
mod support;

mod gguf_tokenizers;
mod models;
mod rules;
mod sampling;
mod states;
mod streaming;
