//! Attention on slices: a tile of queries goes through the keys tile by tile, with a running maximum and sum.
//!
//! With `m` the largest score so far, `l = Σ e^(s_j - m)` and `o = Σ e^(s_j - m) v_j`, a new tile with the largest score
//! `m'` gives `l ← e^(m - m') l + Σ …` and `o ← e^(m - m') o + Σ …`, and at the end `y = o / l`. The heads of a group are rows
//! of one tile, so keys and values are read once for all of them. Many rows go through small matrix products; a few, as
//! in decoding, through dot products with keys as they are stored.

use half::slice::HalfFloatSliceExt;
use pulp::{Simd, WithSimd};

use super::{Options, Sizes};
use crate::host::{SharedMut, Values, parallel, uninit};
use crate::simd::matrix::{Product, Strided, Zeros, padded, transpose};
use crate::simd::slice::{axpy, dot, exp_minus, map, sum};
use crate::simd::{Isa, half::widen};

/// Rows of a tile, about: positions times heads of a group.
const ROWS: usize = 48;

/// Keys of a tile.
const KEYS: usize = 64;

/// Below this many rows a transposed copy of the keys does not pay.
const FEW_ROWS: usize = 6;

/// Neighbouring positions of keys and values, `(batch, len, nheads_kv, headdim)`.
pub(crate) struct Block<'a> {
    pub keys: Values<'a>,
    pub values: Values<'a>,
    pub len: usize,
}

/// The inputs as slices.
pub(crate) struct Inputs<'a> {
    pub sizes: Sizes,
    pub options: Options,
    pub q: &'a [f32],
    pub blocks: Vec<Block<'a>>,
}

/// `(batch, seqlen, nheads, headdim)`.
pub(crate) fn forward(inputs: &Inputs, isa: Isa) -> Vec<f32> {
    let Sizes { batch, seqlen, nheads, headdim, nheads_kv, kv_len } = inputs.sizes;
    if inputs.q.is_empty() || kv_len == 0 {
        return vec![0.0; inputs.q.len()];
    }
    let mut y = uninit(inputs.q.len());
    {
        let y = SharedMut::new(&mut y);
        let positions = (ROWS / (nheads / nheads_kv)).max(1);
        let tiles = seqlen.div_ceil(positions);
        let operations = 4 * batch * seqlen * nheads * headdim * kv_len;
        parallel(batch * nheads_kv * tiles, operations, |task| {
            // The last tiles, which see most keys, first: they do not keep everybody waiting at the end.
            let (tile, task) = (tiles - 1 - task / (batch * nheads_kv), task % (batch * nheads_kv));
            let first = tile * positions;
            let (b, kv_head) = (task / nheads_kv, task % nheads_kv);
            isa.dispatch(Task { inputs, b, kv_head, first, count: positions.min(seqlen - first), y: &y });
        });
    }
    y
}

/// Some positions of the heads of one group.
struct Task<'a> {
    inputs: &'a Inputs<'a>,
    b: usize,
    kv_head: usize,
    /// The first position, and how many.
    first: usize,
    count: usize,
    y: &'a SharedMut<'a>,
}

/// The running softmax of the rows of a task.
struct Rows {
    /// Scaled queries, `(rows, headdim)`.
    q: Vec<f32>,
    /// Scores of a tile, then their exponentials, `(rows, KEYS)`.
    scores: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `(rows, padded headdim)`.
    out: Vec<f32>,
}

/// Room for a tile of keys or values in `f32`.
struct Tile {
    /// `(KEYS, padded headdim)`.
    rows: Vec<f32>,
    /// `(headdim, KEYS)`.
    columns: Vec<f32>,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sizes { seqlen, headdim, kv_len, .. } = self.inputs.sizes;
        let (rows, stride) = (self.count * self.group(), padded(headdim));
        let mut state = Rows {
            q: vec![0.0; rows * headdim],
            scores: vec![0.0; rows * KEYS],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            out: vec![0.0; rows * stride],
        };
        let mut tile = Tile { rows: vec![0.0; KEYS * stride], columns: vec![0.0; headdim * KEYS] };
        let scale = simd.splat_f32s(self.inputs.options.scale as f32);
        for i in 0..self.count {
            let q = &mut state.q[i * self.group() * headdim..][..self.group() * headdim];
            q.copy_from_slice(&self.inputs.q[self.offset(self.first + i)..][..q.len()]);
            map(simd, q, |q| simd.mul_f32s(q, scale));
        }
        let visible = |i: usize| self.inputs.options.visible((kv_len + i).saturating_sub(seqlen), kv_len);
        // What the first query may see starts first, what the last one may see ends last.
        let all = visible(self.first).start..visible(self.first + self.count - 1).end;
        let mut start = 0;
        for block in &self.inputs.blocks {
            for at in (0..block.len).step_by(KEYS) {
                let keys = start + at..start + block.len.min(at + KEYS);
                if keys.end <= all.start || keys.start >= all.end {
                    continue;
                }
                self.score(simd, block, at, keys.len(), &mut state, &mut tile);
                for row in 0..rows {
                    let visible = visible(self.first + row / self.group());
                    let seen = visible.start.clamp(keys.start, keys.end) - keys.start
                        ..visible.end.clamp(keys.start, keys.end) - keys.start;
                    state.weigh(simd, row, seen, keys.len(), stride);
                }
                self.add(simd, block, at, keys.len(), &mut state, &mut tile);
            }
            start += block.len;
        }
        for i in 0..self.count {
            // SAFETY: positions and groups have their own piece of the result.
            let y = unsafe { self.y.get(self.offset(self.first + i), self.group() * headdim) };
            for (g, y) in y.chunks_exact_mut(headdim).enumerate() {
                let row = i * self.group() + g;
                // A query that sees nothing reads nothing.
                let sum = if state.sum[row] > 0.0 { 1.0 / state.sum[row] } else { 0.0 };
                y.copy_from_slice(&state.out[row * stride..][..headdim]);
                let factor = simd.splat_f32s(sum);
                map(simd, y, |y| simd.mul_f32s(y, factor));
            }
        }
    }
}

impl Rows {
    /// Turns the scores of a row into weights, and makes what was summed before comparable.
    #[inline(always)]
    fn weigh<S: Simd>(
        &mut self,
        simd: S,
        row: usize,
        seen: std::ops::Range<usize>,
        keys: usize,
        stride: usize,
    ) {
        let scores = &mut self.scores[row * KEYS..][..keys];
        if seen.is_empty() {
            scores.fill(0.0);
            return;
        }
        let max = scores[seen.clone()].iter().fold(self.max[row], |max, score| max.max(*score));
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        exp_minus(simd, &mut scores[seen.clone()], max);
        let added = sum(simd, &scores[seen]);
        if max > self.max[row] {
            let factor = (self.max[row] - max).exp();
            self.max[row] = max;
            self.sum[row] *= factor;
            let factor = simd.splat_f32s(factor);
            map(simd, &mut self.out[row * stride..][..stride], |x| simd.mul_f32s(x, factor));
        }
        self.sum[row] += added;
    }
}

impl Task<'_> {
    /// Heads of queries that share keys and values.
    #[inline(always)]
    fn group(&self) -> usize {
        self.inputs.sizes.nheads / self.inputs.sizes.nheads_kv
    }

    /// Where the group of a position begins in `q` and in `y`.
    #[inline(always)]
    fn offset(&self, position: usize) -> usize {
        let Sizes { seqlen, nheads, headdim, .. } = self.inputs.sizes;
        ((self.b * seqlen + position) * nheads + self.kv_head * self.group()) * headdim
    }

    /// The row of one position of a block, in `f32`.
    #[inline(always)]
    fn load(&self, block: &Block, values: Values, position: usize, row: &mut [f32]) {
        let Sizes { headdim, nheads_kv, .. } = self.inputs.sizes;
        let at = ((self.b * block.len + position) * nheads_kv + self.kv_head) * headdim;
        let row = &mut row[..headdim];
        match values {
            Values::F32(values) => row.copy_from_slice(&values[at..at + headdim]),
            Values::F16(values) => widen(&values[at..at + headdim], row),
            Values::BF16(values) => values[at..at + headdim].convert_to_f32_slice(row),
        }
    }

    /// The rows of the positions `[at, at + keys)` of a block.
    #[inline(always)]
    fn load_all(&self, block: &Block, values: Values, at: usize, keys: usize, rows: &mut [f32]) {
        let stride = padded(self.inputs.sizes.headdim);
        for (j, row) in rows.chunks_exact_mut(stride).take(keys).enumerate() {
            self.load(block, values, at + j, row);
        }
    }

    /// The scores of the keys `[at, at + keys)` of a block.
    #[inline(always)]
    fn score<S: Simd>(
        &self,
        simd: S,
        block: &Block,
        at: usize,
        keys: usize,
        rows: &mut Rows,
        tile: &mut Tile,
    ) {
        let headdim = self.inputs.sizes.headdim;
        let (count, stride) = (rows.max.len(), padded(headdim));
        self.load_all(block, block.keys, at, keys, &mut tile.rows);
        if count < FEW_ROWS {
            for (j, key) in tile.rows.chunks_exact(stride).take(keys).enumerate() {
                let key = &key[..headdim];
                for row in 0..count {
                    rows.scores[row * KEYS + j] = dot(simd, &rows.q[row * headdim..][..headdim], key);
                }
            }
            return;
        }
        transpose((&tile.rows, stride), [keys, headdim], (&mut tile.columns, KEYS));
        Product {
            a: Strided::rows(&rows.q, headdim),
            b: (&tile.columns, KEYS),
            out: (&mut rows.scores, KEYS),
            keep: 0.0,
            rows: count,
            inner: headdim,
            columns: keys,
            zeros: Zeros::Nowhere,
        }
        .with_simd(simd);
    }

    /// Adds the values of `[at, at + keys)`, weighted.
    #[inline(always)]
    fn add<S: Simd>(&self, simd: S, block: &Block, at: usize, keys: usize, rows: &mut Rows, tile: &mut Tile) {
        let headdim = self.inputs.sizes.headdim;
        let (count, stride) = (rows.max.len(), padded(headdim));
        self.load_all(block, block.values, at, keys, &mut tile.rows);
        if count < FEW_ROWS {
            for (j, value) in tile.rows.chunks_exact(stride).take(keys).enumerate() {
                let value = &value[..headdim];
                for row in 0..count {
                    let weight = rows.scores[row * KEYS + j];
                    axpy(simd, &mut rows.out[row * stride..][..headdim], weight, value);
                }
            }
            return;
        }
        Product {
            a: Strided::rows(&rows.scores, KEYS),
            b: (&tile.rows, stride),
            out: (&mut rows.out, stride),
            keep: 1.0,
            rows: count,
            inner: keys,
            columns: headdim,
            zeros: Zeros::Nowhere,
        }
        .with_simd(simd);
    }
}
