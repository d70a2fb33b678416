//! The scan on slices, vectorised across channels: a block of [`BLOCK`] channels walks through time in tiles of
//! [`TILE`] tokens, its states in cache, for either layout.

mod backward;
mod forward;

use std::borrow::Cow;

use super::Sizes;
use crate::host::{SharedMut, transposed};
use crate::layout::SequenceLayout;
use crate::packing::Packing;
use crate::simd::prefetch;

pub(super) use backward::backward;
pub(super) use forward::{Forward, forward};

/// Channels of a block: one cache line, so that channels-last blocks share no line.
const BLOCK: usize = 16;

/// Tokens of a tile, and between two states kept for the backward pass.
pub(super) const TILE: usize = 64;

/// The inputs as slices, in the layouts of [`SelectiveScan`](super::SelectiveScan).
pub(super) struct Scan<'a> {
    pub sizes: Sizes,
    pub packing: &'a Packing,
    pub layout: SequenceLayout,
    pub u: &'a [f32],
    pub delta: &'a [f32],
    pub a: &'a [f32],
    pub b: Coefficients<'a>,
    pub c: Coefficients<'a>,
    pub d: Option<&'a [f32]>,
    pub z: Option<&'a [f32]>,
    pub delta_bias: Option<&'a [f32]>,
    pub delta_softplus: bool,
    pub initial_state: Option<&'a [f32]>,
}

/// `b` or `c`.
pub(super) enum Coefficients<'a> {
    /// `(dim, d_state)`.
    Constant(&'a [f32]),
    /// `(batch, seqlen, ngroups, d_state)`: the values of a token side by side.
    Varying { groups: usize, values: Cow<'a, [f32]> },
}

impl<'a> Coefficients<'a> {
    pub(super) fn new(x: &'a [f32], sizes: Sizes, groups: Option<usize>, layout: SequenceLayout) -> Self {
        let Some(groups) = groups else { return Self::Constant(x) };
        let values = match layout {
            SequenceLayout::ChannelsFirst => Cow::Owned(transposed(x, groups * sizes.d_state, sizes.seqlen)),
            SequenceLayout::ChannelsLast => Cow::Borrowed(x),
        };
        Self::Varying { groups, values }
    }

    fn is_varying(&self) -> bool {
        matches!(self, Self::Varying { .. })
    }

    /// Channels that have the same coefficients.
    fn group_size(&self, dim: usize) -> usize {
        match self {
            Self::Constant(_) => dim,
            Self::Varying { groups, .. } => dim / groups,
        }
    }

    /// Where the `d_state` values of a token of a block begin, if they vary.
    #[inline(always)]
    fn row(&self, sizes: &Sizes, block: &Block, t: usize) -> usize {
        match self {
            Self::Constant(_) => 0,
            Self::Varying { groups, .. } => {
                let group = block.first / (sizes.dim / groups);
                ((block.row * sizes.seqlen + block.start + t) * groups + group) * sizes.d_state
            }
        }
    }

    /// The values that vary in time; none if constant.
    #[inline(always)]
    fn varying(&self) -> &[f32] {
        match self {
            Self::Constant(_) => &[],
            Self::Varying { values, .. } => values,
        }
    }
}

/// Up to [`BLOCK`] neighbouring channels of one sequence, all in one group of `b` and of `c`.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// The sequence: its place among all, its row, its first token there and how many it has.
    sequence: usize,
    row: usize,
    start: usize,
    len: usize,
    /// Tiles of all blocks before this one.
    tiles_before: usize,
    first: usize,
    channels: usize,
}

impl Block {
    fn tiles(&self) -> usize {
        self.len.div_ceil(TILE)
    }

    /// The first token of a tile, and how many it has.
    fn tile(&self, tile: usize) -> (usize, usize) {
        (tile * TILE, TILE.min(self.len - tile * TILE))
    }
}

impl Scan<'_> {
    /// All blocks, those of one `(sequence, group)` side by side in one inner list.
    fn blocks(&self) -> Vec<Vec<Block>> {
        let dim = self.sizes.dim;
        let group = gcd(self.b.group_size(dim), self.c.group_size(dim));
        let mut tiles_before = 0;
        let mut groups = vec![];
        for (index, sequence) in self.packing.sequences().iter().enumerate() {
            for start in (0..dim).step_by(group.max(1)) {
                let firsts = (start..start + group).step_by(BLOCK);
                let blocks = firsts.map(|first| {
                    let block = Block {
                        sequence: index,
                        row: sequence.row,
                        start: sequence.start,
                        len: sequence.len,
                        tiles_before,
                        first,
                        channels: BLOCK.min(start + group - first),
                    };
                    tiles_before += block.tiles();
                    block
                });
                groups.push(blocks.collect());
            }
        }
        groups
    }

    /// An estimate of the work, in operations.
    fn operations(&self) -> usize {
        self.u.len() * (self.sizes.d_state + 4) * 16
    }

    /// Copies tokens `[t, t + tokens)` of a block to `tile`, `(tokens, BLOCK)`; channels past the block read 0.
    #[inline(always)]
    fn load(&self, x: &[f32], block: Block, t: usize, tile: &mut [f32]) {
        let Sizes { dim, seqlen, .. } = self.sizes;
        let tokens = tile.len() / BLOCK;
        match self.layout {
            SequenceLayout::ChannelsLast => {
                let start = (block.row * seqlen + block.start + t) * dim + block.first;
                for (i, row) in tile.chunks_exact_mut(BLOCK).enumerate() {
                    row[..block.channels].copy_from_slice(&x[start + i * dim..][..block.channels]);
                    row[block.channels..].fill(0.0);
                }
            }
            SequenceLayout::ChannelsFirst => {
                if block.channels < BLOCK {
                    tile.fill(0.0);
                }
                for c in 0..block.channels {
                    let start = (block.row * dim + block.first + c) * seqlen + block.start + t;
                    let row = &x[start..][..tokens];
                    for (place, &value) in tile[c..].iter_mut().step_by(BLOCK).zip(row) {
                        *place = value;
                    }
                }
            }
        }
    }

    /// Asks for the tokens of a tile of a block, before [`load`](Self::load).
    #[inline(always)]
    fn prefetch(&self, inputs: &[Option<&[f32]>], block: Block, tile: usize) {
        let Sizes { dim, seqlen, .. } = self.sizes;
        let (first, tokens) = block.tile(tile);
        for x in inputs.iter().flatten() {
            match self.layout {
                SequenceLayout::ChannelsLast => {
                    let start = (block.row * seqlen + block.start + first) * dim + block.first;
                    (0..tokens).for_each(|i| prefetch(&x[start + i * dim..][..block.channels]));
                }
                SequenceLayout::ChannelsFirst => {
                    let start = (block.row * dim + block.first) * seqlen + block.start + first;
                    (0..block.channels).for_each(|c| prefetch(&x[start + c * seqlen..][..tokens]));
                }
            }
        }
    }

    /// The inverse of [`load`](Self::load).
    ///
    /// # Safety
    /// No other thread may write these channels of this sequence of `x`.
    #[inline(always)]
    unsafe fn store(&self, x: &SharedMut, block: Block, t: usize, tile: &[f32]) {
        let Sizes { dim, seqlen, .. } = self.sizes;
        let tokens = tile.len() / BLOCK;
        match self.layout {
            SequenceLayout::ChannelsLast => {
                let start = (block.row * seqlen + block.start + t) * dim + block.first;
                for (i, row) in tile.chunks_exact(BLOCK).enumerate() {
                    // SAFETY: channels of this block alone, by the contract.
                    let out = unsafe { x.get(start + i * dim, block.channels) };
                    out.copy_from_slice(&row[..block.channels]);
                }
            }
            SequenceLayout::ChannelsFirst => {
                for c in 0..block.channels {
                    let start = (block.row * dim + block.first + c) * seqlen + block.start + t;
                    // SAFETY: channels of this block alone, by the contract.
                    let row = unsafe { x.get(start, tokens) };
                    for (place, &value) in row.iter_mut().zip(tile[c..].iter().step_by(BLOCK)) {
                        *place = value;
                    }
                }
            }
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The place of state `n` of channel `c` of a block, for vectors of `lanes`: all states of a vector side by side.
#[inline(always)]
fn place(lanes: usize, d_state: usize, n: usize, c: usize) -> usize {
    (c / lanes * d_state + n) * lanes + c % lanes
}

/// `(dim, d_state)` rows of a block, times `scale`, in the order of [`place`]; channels past the block are 0.
#[inline(always)]
fn gather(
    rows: Option<&[f32]>,
    lanes: usize,
    d_state: usize,
    block: Block,
    row: usize,
    scale: f32,
) -> Vec<f32> {
    let mut out = vec![0.0; BLOCK * d_state];
    if let Some(rows) = rows {
        for c in 0..block.channels {
            for (n, &value) in rows[(row + c) * d_state..][..d_state].iter().enumerate() {
                out[place(lanes, d_state, n, c)] = value * scale;
            }
        }
    }
    out
}

/// The inverse of [`gather`], times `scale`, for the rows of one block.
#[inline(always)]
fn scatter(values: &[f32], lanes: usize, d_state: usize, scale: f32, rows: &mut [f32]) {
    for (c, row) in rows.chunks_exact_mut(d_state.max(1)).enumerate() {
        for (n, out) in row.iter_mut().enumerate() {
            *out = values[place(lanes, d_state, n, c)] * scale;
        }
    }
}

/// `(dim,)` values of a block, channels past it 0.
#[inline(always)]
fn gather_channels(values: Option<&[f32]>, block: Block) -> [f32; BLOCK] {
    let mut out = [0.0; BLOCK];
    if let Some(values) = values {
        out[..block.channels].copy_from_slice(&values[block.first..][..block.channels]);
    }
    out
}
