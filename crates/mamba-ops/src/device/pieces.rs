//! Sequences of a packed batch as kernels read them: a table of pieces, from which a block knows its tokens.

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::{Device, Result, Storage, Tensor, bail};

use super::{Gpu, address, int};
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

/// The pieces of a packing in the memory of a GPU, the longest first, so that the last blocks have little to do. Of each a row
/// of [`NUMBERS`], `Piece` in `packing.cuh`.
#[derive(Debug, Clone)]
pub(crate) struct Pieces {
    /// Keeps what is at the address; none if there is no piece.
    _table: Option<Tensor>,
    address: u64,
    count: usize,
}

const NUMBERS: usize = 8;

impl Pieces {
    fn new(gpu: &Gpu, packing: &Packing, cut: Cut) -> Result<Self> {
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
        let count = pieces.len();
        if count == 0 {
            return Ok(Self { _table: None, address: 0, count });
        }
        let table = Tensor::from_vec(table, (count, NUMBERS), &Device::Cuda(gpu.device.clone()))?;
        let start = match &*table.storage_and_layout().0 {
            Storage::Cuda(storage) => address(storage, &gpu.stream)?.0,
            _ => bail!("packing: the pieces are not on the GPU"),
        };
        Ok(Self { _table: Some(table), address: start, count })
    }

    /// Where the table begins, for kernels on the stream of this device.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// How many pieces there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// The tables that a packing has on GPUs: made when an op first asks for them, for all that ask later.
#[derive(Debug, Clone, Default)]
pub(crate) struct PiecesOnGpus(Arc<Mutex<Vec<(DeviceId, Cut, Pieces)>>>);

impl Gpu {
    /// The sequences of a packing in pieces; none if each row is one sequence, as without a packing.
    pub(crate) fn pieces(&self, packing: &Packing, cut: Cut) -> Result<Option<Pieces>> {
        if packing.is_of_rows() {
            return Ok(None);
        }
        let mut known = packing.on_gpus.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., pieces)) = known.iter().find(|(on, of, _)| (*on, *of) == (self.device.id(), cut)) {
            return Ok(Some(pieces.clone()));
        }
        let pieces = Pieces::new(self, packing, cut)?;
        known.push((self.device.id(), cut, pieces.clone()));
        Ok(Some(pieces))
    }
}
