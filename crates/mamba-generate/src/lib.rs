//! From logits to text.

mod candidates;
mod error;
#[cfg(test)]
mod fake;
mod filter;
mod generator;
mod lm;
mod sampler;
mod sampling;
pub use {candidates::*, error::*, filter::*, generator::*, lm::*, sampler::*, sampling::*};
