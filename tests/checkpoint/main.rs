//! Checkpoints from folders and from a Hub on this machine; what is damaged or hostile gives an error.

// Clippy's exception for tests ends at the functions that tests call.
#![allow(clippy::unwrap_used)]

mod files;
mod hostile;
mod hub;
mod mock_hub;
