//! How filters and samplers keep what they remember between tokens: as words, in the order of the chain.

use crate::error::{Error, Result};

/// Reads the next `N` words.
pub(crate) fn take<const N: usize>(words: &mut &[u64]) -> Result<[u64; N]> {
    match words.split_first_chunk() {
        Some((first, rest)) => {
            *words = rest;
            Ok(*first)
        }
        None => Err(Error::invalid(
            "sampling",
            "state",
            format_args!("{} words shorter than what is restored from it", N - words.len()),
            "the state of a sampling with the same options",
        )),
    }
}
