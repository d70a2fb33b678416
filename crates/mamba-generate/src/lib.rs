//! From logits to text.

mod candidates;
mod error;
mod filter;
mod sampler;
mod sampling;
pub use {candidates::*, error::*, filter::*, sampler::*, sampling::*};
