//! Sequences of a packed batch as kernels read them: a table of pieces, from which a block knows its tokens.

use std::cmp::Reverse;

use candle_core::Result;

use super::{Gpu, Table, int};
use crate::packing::{PackedSequence, Packing};

/// How sequences are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Not at all: each is one piece.
    Whole,
    /// Into pieces of at most so many tokens; one without a token is a piece too.
    Pieces(usize),
    /// The same, but one without a token has none.
    Tokens(usize),
}

impl Cut {
    fn pieces(self, sequence: &PackedSequence) -> usize {
        match self {
            Self::Whole => 1,
            Self::Pieces(tokens) => sequence.len.div_ceil(tokens).max(1),
            Self::Tokens(tokens) => sequence.len.div_ceil(tokens),
        }
    }

    /// Tokens of a piece of a sequence.
    fn tokens(self, sequence: &PackedSequence, piece: usize) -> usize {
        match self {
            Self::Whole => sequence.len,
            Self::Pieces(tokens) | Self::Tokens(tokens) => tokens.min(sequence.len - piece * tokens),
        }
    }
}

/// Of each piece a row of so many numbers, `Piece` in `packing.cuh`.
const NUMBERS: usize = 8;

/// The pieces, the longest first, so that the last blocks have little to do.
fn pieces(packing: &Packing, cut: Cut) -> Result<Vec<u32>> {
    let (mut pieces, mut place) = (vec![], 0);
    for (index, sequence) in packing.sequences().iter().enumerate() {
        for piece in 0..cut.pieces(sequence) {
            let numbers = [sequence.row, sequence.start, sequence.len, index, piece, place];
            pieces.push((cut.tokens(sequence, piece), numbers));
            place += 1;
        }
    }
    pieces.sort_by_key(|(tokens, _)| Reverse(*tokens)); // those of one length stay in order
    let mut table = Vec::with_capacity(pieces.len() * NUMBERS);
    for (_, numbers) in &pieces {
        for number in numbers {
            table.push(int("packing", *number)? as u32);
        }
        table.resize(table.len().next_multiple_of(NUMBERS), 0);
    }
    Ok(table)
}

impl Gpu {
    /// The sequences of a packing in pieces; none if each row is one sequence, as without a packing.
    pub(crate) fn pieces(&self, packing: &Packing, cut: Cut) -> Result<Option<Table>> {
        if packing.is_of_rows() {
            return Ok(None);
        }
        packing.on_gpus.get(self, cut, NUMBERS, || pieces(packing, cut)).map(Some)
    }
}
