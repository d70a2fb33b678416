//! The duality on slices: a block of heads of one group walks over chunks of tokens, its states in cache; what
//! happens within a chunk is matrix products. The derivation is in the `README.md` of the folder above.
//!
//! Scratch matrices have padded rows. With `q` tokens in a chunk, rows over the channels of a head are
//! `(…, headdim)`, rows over tokens `(…, q)`; `d_state` only counts rows, so states are `(d_state, headdim)` here.

mod backward;
mod forward;

use std::f64::consts::LOG2_E;

use pulp::Simd;

use super::Sizes;
use crate::packing::Packing;
use crate::simd::math::{clamp, exp2};
use crate::simd::matrix::{Product, Strided, Zeros, padded, transpose};
use crate::simd::slice::{map, map2, map3, softplus};

pub(super) use backward::backward;
pub(super) use forward::{Forward, forward};

/// Tokens of a chunk: within bounds between which speed differs little, what the caller asks for; not more than there are
/// in the longest sequence, for room takes time too.
pub(super) fn chunk_len(chunk_size: usize, packing: &Packing) -> usize {
    let longest = packing.sequences().iter().map(|sequence| sequence.len).max().unwrap_or(0);
    chunk_size.min(longest).clamp(16, 64)
}

/// The inputs as slices, in the layouts of [`SsdChunkScan`](super::SsdChunkScan).
pub(super) struct Scan<'a> {
    pub sizes: Sizes,
    pub packing: &'a Packing,
    pub chunk: usize,
    pub x: &'a [f32],
    pub dt: &'a [f32],
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub c: &'a [f32],
    pub d: Option<&'a [f32]>,
    pub d_per_channel: bool,
    pub z: Option<&'a [f32]>,
    pub dt_bias: Option<&'a [f32]>,
    pub dt_softplus: bool,
    pub dt_limit: (f32, f32),
    pub initial_state: Option<&'a [f32]>,
}

/// Neighbouring heads of one group of one sequence: they share `C·Bᵀ`, and sums of gradients of `b` and `c`.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// The place of the sequence among all.
    sequence: usize,
    /// Its first token among those of all rows, and how many it has.
    token: usize,
    len: usize,
    /// Tokens of all blocks before this one.
    tokens_before: usize,
    /// Chunks of all heads of all sequences before this one.
    chunks_before: usize,
    group: usize,
    first: usize,
    heads: usize,
}

/// Neighbouring tokens.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    index: usize,
    first: usize,
    tokens: usize,
}

impl Scan<'_> {
    /// All blocks; which heads share one depends on the sizes alone.
    fn blocks(&self) -> Vec<Block> {
        let Sizes { seqlen, nheads, ngroups, sequences, .. } = self.sizes;
        // Larger blocks share more, smaller ones occupy more threads.
        let (group_len, wanted) = (nheads / ngroups, (sequences * nheads / 16).clamp(4, 8));
        let mut blocks = vec![];
        if self.sizes.headdim == 0 {
            return blocks;
        }
        let (mut tokens_before, mut chunks_before) = (0, 0);
        for (index, sequence) in self.packing.sequences().iter().enumerate() {
            let (token, len) = (sequence.row * seqlen + sequence.start, sequence.len);
            for group in 0..ngroups {
                for start in (0..group_len).step_by(wanted) {
                    let (first, heads) = (group * group_len + start, wanted.min(group_len - start));
                    let sequence = index;
                    blocks.push(Block {
                        sequence,
                        token,
                        len,
                        tokens_before,
                        chunks_before,
                        group,
                        first,
                        heads,
                    });
                    tokens_before += len;
                }
            }
            chunks_before += nheads * len.div_ceil(self.chunk);
        }
        blocks
    }

    /// The chunks of a sequence: they begin where it begins.
    fn chunks(&self, block: Block) -> impl DoubleEndedIterator<Item = Chunk> + use<> {
        let chunk = self.chunk;
        (0..block.len.div_ceil(chunk)).map(move |index| {
            let first = index * chunk;
            Chunk { index, first, tokens: chunk.min(block.len - first) }
        })
    }

    /// The place of the state that is kept before a chunk of a head.
    fn checkpoint(&self, Piece { block, chunk, head }: Piece) -> usize {
        let place = block.chunks_before + head * block.len.div_ceil(self.chunk) + chunk.index;
        place * self.sizes.d_state * self.sizes.headdim
    }

    /// An estimate of the work, in operations.
    fn operations(&self) -> usize {
        self.x.len() * (2 * self.sizes.d_state + self.chunk)
    }

    /// Where the channels of a head at a token of a chunk begin in `x`.
    fn at(&self, piece: Piece, i: usize) -> usize {
        self.step_at(piece, i) * self.sizes.headdim
    }

    /// Where the step of a head at a token of a chunk is in `dt`.
    fn step_at(&self, piece: Piece, i: usize) -> usize {
        (piece.block.token + piece.chunk.first + i) * self.sizes.nheads + piece.head
    }

    /// `b` or `c` of a chunk, `(q, d_state)` with the stride of [`Self::group_stride`].
    fn of_group<'x>(&self, x: &'x [f32], block: Block, chunk: Chunk) -> &'x [f32] {
        let Sizes { ngroups, d_state, .. } = self.sizes;
        &x[((block.token + chunk.first) * ngroups + block.group) * d_state..]
    }

    fn group_stride(&self) -> usize {
        self.sizes.ngroups * self.sizes.d_state
    }

    /// The size of a state, `(d_state, headdim)`.
    fn state_len(&self) -> usize {
        self.sizes.d_state * padded(self.sizes.headdim)
    }

    /// Copies a state `(headdim, d_state)` of one head to `(d_state, headdim)`.
    fn load_state(&self, states: &[f32], sequence: usize, head: usize, out: &mut [f32]) {
        let Sizes { nheads, headdim, d_state, .. } = self.sizes;
        let start = (sequence * nheads + head) * headdim * d_state;
        let state = &states[start..][..headdim * d_state];
        transpose((state, d_state.max(1)), [headdim, d_state], (out, padded(headdim)));
    }

    /// `y += D · x` for the channels of a head.
    #[inline(always)]
    fn add_skip<S: Simd>(&self, simd: S, head: usize, x: &[f32], y: &mut [f32]) {
        let Some(d) = self.d else { return };
        if self.d_per_channel {
            let d = &d[head * x.len()..][..x.len()];
            map3(simd, y, d, x, |y, d, x| simd.mul_add_e_f32s(d, x, y));
        } else {
            let d = simd.splat_f32s(d[head]);
            map2(simd, y, x, |y, x| simd.mul_add_e_f32s(d, x, y));
        }
    }
}

/// One head over one chunk.
#[derive(Debug, Clone, Copy)]
struct Piece {
    block: Block,
    chunk: Chunk,
    head: usize,
}

/// What the steps of one head do over one chunk.
struct Steps {
    /// `dt + dt_bias`.
    raw: Vec<f32>,
    /// After the softplus, before the limits.
    free: Vec<f32>,
    dt: Vec<f32>,
    /// `log2` of the decay from before the chunk to after each token, as the sum of two `f32`: differences of far
    /// tokens of a long chunk would lose too much in one.
    high: Vec<f32>,
    low: Vec<f32>,
    /// The decay from before the chunk to after each token.
    from_start: Vec<f32>,
    /// The decay from after each token to the end of the chunk.
    to_end: Vec<f32>,
    /// The decay over the chunk.
    total: f32,
}

impl Steps {
    fn new(chunk: usize) -> Self {
        let zeros = || vec![0.0; padded(chunk)];
        Self {
            raw: zeros(),
            free: zeros(),
            dt: zeros(),
            high: zeros(),
            low: zeros(),
            from_start: zeros(),
            to_end: zeros(),
            total: 1.0,
        }
    }

    #[inline(always)]
    fn load<S: Simd>(&mut self, simd: S, scan: &Scan, piece: Piece) {
        let Piece { chunk, head, .. } = piece;
        let (q, bias) = (chunk.tokens, scan.dt_bias.map_or(0.0, |bias| bias[head]));
        let dt = scan.dt[scan.step_at(piece, 0)..].iter().step_by(scan.sizes.nheads);
        for (raw, dt) in self.raw[..q].iter_mut().zip(dt) {
            *raw = dt + bias;
        }
        self.free.copy_from_slice(&self.raw);
        if scan.dt_softplus {
            softplus(simd, &mut self.free);
        }
        self.dt.copy_from_slice(&self.free);
        let (low, high) = scan.dt_limit;
        map(
            simd,
            &mut self.dt,
            #[inline(always)]
            |x| clamp(simd, x, low, high),
        );
        let (a, mut sum) = (f64::from(scan.a[head]) * LOG2_E, 0.0);
        for t in 0..q {
            sum += f64::from(self.dt[t]) * a;
            self.high[t] = sum as f32;
            self.low[t] = (sum - f64::from(self.high[t])) as f32;
        }
        self.from_start.copy_from_slice(&self.high);
        map2(
            simd,
            &mut self.from_start,
            &self.low,
            #[inline(always)]
            |high, low| decay(simd, simd.add_f32s(high, low)),
        );
        self.total = self.from_start[q - 1];
        self.to_end.fill(1.0);
        let Self { high, low, to_end, .. } = self;
        mul_decays(simd, [high, low], q - 1, to_end);
    }

    /// `out[j] = scores[j] · (the decay from after token j to after token i)` for `j ≤ i`, then zeros.
    #[inline(always)]
    fn decay_row<S: Simd>(&self, simd: S, i: usize, scores: &[f32], out: &mut [f32]) {
        let len = (i + 1).next_multiple_of(S::F32_LANES);
        out[..len].copy_from_slice(&scores[..len]);
        mul_decays(simd, [&self.high, &self.low], i, &mut out[..len]);
        out[i + 1..].fill(0.0);
    }
}

/// `2^exponent`, but 0 below `2^-100`: products with subnormal numbers would take a hundred times as long.
#[inline(always)]
fn decay<S: Simd>(simd: S, exponent: S::f32s) -> S::f32s {
    let vanishes = simd.less_than_f32s(exponent, simd.splat_f32s(-100.0));
    exp2(simd, simd.select_f32s(vanishes, simd.splat_f32s(f32::NEG_INFINITY), exponent))
}

/// `y[j] *= 2^(s[i] - s[j])`, where `s = high + low`.
#[inline(always)]
fn mul_decays<S: Simd>(simd: S, [high, low]: [&[f32]; 2], i: usize, y: &mut [f32]) {
    let (high_i, low_i) = (simd.splat_f32s(high[i]), simd.splat_f32s(low[i]));
    map3(
        simd,
        y,
        high,
        low,
        #[inline(always)]
        |y, high, low| {
            let exponent = simd.add_f32s(simd.sub_f32s(high_i, high), simd.sub_f32s(low_i, low));
            simd.mul_f32s(y, decay(simd, exponent))
        },
    );
}

/// `out (q, q) = C · Bᵀ` at and below the diagonal; `b_columns` is `Bᵀ`, `(d_state, q)`.
#[inline(always)]
fn scores<S: Simd>(simd: S, scan: &Scan, block: Block, chunk: Chunk, b_columns: &[f32], out: &mut [f32]) {
    let stride = padded(scan.chunk);
    simd.vectorize(Product {
        a: Strided::rows(scan.of_group(scan.c, block, chunk), scan.group_stride()),
        b: (b_columns, stride),
        out: (out, stride),
        keep: 0.0,
        rows: chunk.tokens,
        inner: scan.sizes.d_state,
        columns: chunk.tokens,
        zeros: Zeros::AboveDiagonalOfResult,
    });
}

/// `out[j] = dt_j · x_j`, `(q, headdim)`.
#[inline(always)]
fn load_inputs<S: Simd>(simd: S, scan: &Scan, piece: Piece, steps: &Steps, out: &mut [f32]) {
    let headdim = scan.sizes.headdim;
    for (i, out) in out.chunks_exact_mut(padded(headdim)).take(piece.chunk.tokens).enumerate() {
        out[..headdim].copy_from_slice(&scan.x[scan.at(piece, i)..][..headdim]);
        scale(simd, steps.dt[i], out);
    }
}

/// `y (q, headdim)` before skip and gate: what the state before the chunk gives, if there is one, and what the
/// inputs of the chunk give through `decayed`, their scores with decays.
#[inline(always)]
fn outputs<S: Simd>(
    simd: S,
    scan: &Scan,
    piece: Piece,
    steps: &Steps,
    state: Option<&[f32]>,
    [decayed, inputs]: [&[f32]; 2],
    y: &mut [f32],
) {
    let Piece { block, chunk, .. } = piece;
    let (p, tokens, columns) = (padded(scan.sizes.headdim), chunk.tokens, scan.sizes.headdim);
    if let Some(state) = state {
        simd.vectorize(Product {
            a: Strided::rows(scan.of_group(scan.c, block, chunk), scan.group_stride()),
            b: (state, p),
            out: (y, p),
            keep: 0.0,
            rows: tokens,
            inner: scan.sizes.d_state,
            columns,
            zeros: Zeros::Nowhere,
        });
        for (y, &decay) in y.chunks_exact_mut(p).zip(&steps.from_start).take(tokens) {
            scale(simd, decay, y);
        }
    }
    simd.vectorize(Product {
        a: Strided::rows(decayed, padded(scan.chunk)),
        b: (inputs, p),
        out: (y, p),
        keep: if state.is_some() { 1.0 } else { 0.0 },
        rows: tokens,
        inner: tokens,
        columns,
        zeros: Zeros::AboveDiagonalOfA,
    });
}

#[inline(always)]
fn scale<S: Simd>(simd: S, factor: f32, y: &mut [f32]) {
    let factor = simd.splat_f32s(factor);
    map(simd, y, |y| simd.mul_f32s(factor, y));
}
