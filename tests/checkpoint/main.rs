//! Checkpoints from folders and from a Hub on this machine; what is damaged or hostile gives an error.

// Clippy's exception for tests ends at the functions that tests call.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod files;
mod gguf;
mod hostile;
mod hub;
mod mock_hub;

#[global_allocator]
static ALLOCATOR: support::alloc::Counting = support::alloc::Counting;
