//! Mamba models on Candle: blocks, configuration, inference cache, checkpoints.

pub mod checkpoint;
pub mod error;

pub use error::{Error, Result};
