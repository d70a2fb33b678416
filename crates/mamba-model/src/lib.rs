//! Mamba models on candle: blocks, configuration, inference cache, checkpoints.

mod cache;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod families;
mod init;
mod layer;
mod linear;
mod mixers;
mod model;
mod params;
mod save;

pub use cache::InferenceCache;
pub use error::{Error, Result};
pub use init::Initializer;
pub use model::Model;
