//! Masks drawn and applied at once, piece by piece.

use super::{Mask, philox};
use crate::host::{self, SharedMut, parallel};

/// Elements of a task, a multiple of the words that are drawn at once.
const PIECE: usize = 1 << 14;
const WORDS: usize = 4;

/// `x` where the mask has it, scaled: the op, and its gradient for the gradient of what it gave.
pub(super) fn apply(mask: Mask, x: &[f32]) -> Vec<f32> {
    let scale = mask.scale as f32;
    let mut y = host::uninit(x.len());
    {
        let y = SharedMut::new(&mut y);
        parallel(x.len().div_ceil(PIECE), WORDS * x.len(), |piece| {
            let start = piece * PIECE;
            let x = &x[start..x.len().min(start + PIECE)];
            // SAFETY: no two pieces overlap.
            let y = unsafe { y.get(start, x.len()) };
            let first = (start / WORDS) as u64;
            for (block, (y, x)) in (first..).zip(y.chunks_mut(WORDS).zip(x.chunks(WORDS))) {
                let words = philox::words(mask.seed, mask.stream, block);
                for ((y, x), word) in y.iter_mut().zip(x).zip(words) {
                    *y = if word >= mask.threshold { scale * x } else { 0.0 };
                }
            }
        });
    }
    y
}
