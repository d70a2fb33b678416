//! Prompts, read piece by piece.

use crate::error::{Error, Result};
use crate::lm::CausalLm;

/// How many tokens of a prompt are read at once, unless a generation is [told otherwise](crate::GeneratorBuilder::prompt_piece).
///
/// So the memory that reading takes does not grow with the prompt, and who [cancels](crate::CancelToken) waits for one piece at
/// most. States carry over from piece to piece; only sums are rounded in another order than in a prompt read at once.
pub const PROMPT_PIECE: usize = 2048;

/// Reads `ids` in pieces of so many tokens, as long as `go_on` says so before each; gives how many were read.
///
/// `position` is for errors: how many tokens there are with `ids`.
pub(crate) fn read_prompt<M: CausalLm + ?Sized>(
    model: &M,
    ids: &[u32],
    cache: &mut M::Cache,
    logits: &mut Vec<f32>,
    (piece, position): (usize, usize),
    mut go_on: impl FnMut() -> bool,
) -> Result<usize> {
    let mut read = 0;
    for ids in ids.chunks(piece).take_while(|_| go_on()) {
        model.prefill(ids, cache, logits).map_err(Error::model("prefill", position))?;
        read += ids.len();
    }
    Ok(read)
}

/// Reads all of `ids`, which nobody can cancel.
pub(crate) fn read_all<M: CausalLm + ?Sized>(
    model: &M,
    ids: &[u32],
    cache: &mut M::Cache,
    logits: &mut Vec<f32>,
    position: usize,
) -> Result<()> {
    read_prompt(model, ids, cache, logits, (PROMPT_PIECE, position), || true).map(drop)
}
