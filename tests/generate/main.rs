//! Generation against what others compute, and with a real tokenizer.
#![allow(clippy::unwrap_used, reason = "a failed helper fails the test")]

#[path = "../support/mod.rs"]
mod support;

mod batches;
mod beams;
mod chats;
mod draws;
mod gguf_tokenizers;
mod grammars;
mod models;
mod prefixes;
mod rules;
mod sampling;
mod speculation;
mod states;
mod streaming;
mod upstream;
