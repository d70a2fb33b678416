//! The convolution on slices. Channels first, vectors run along time; channels last, along channels.
//!
//! With `m = width - 1 - k`, the distance of tap `k` into the past:
//! `pre_t = bias + Σ_m w_m x_{t-m}`, `y = activation(pre)`; backward, with `g = grad_y · activation'(pre)`:
//! `dx_t = Σ_m w_m g_{t+m}`, `dw_m = Σ_t g_t x_{t-m}`, `dbias = Σ_t g_t`, where `x_{-1}, x_{-2}, …` are the window.

use pulp::{Simd, WithSimd};

use super::Sizes;
use crate::host::{SharedMut, add_rows, parallel, transposed, uninit};
use crate::layout::{Activation, SequenceLayout};
use crate::packing::{PackedSequence, Packing};
use crate::simd::slice::{Source, dot, map_all, map2, silu, sum};
use crate::simd::{Isa, math, prefetch};

/// Tokens that one task handles, channels last: fixed, so that sums do not depend on the number of threads.
const TOKENS: usize = 64;

/// Tokens (channels first) or channels (last) that go through all steps while they are in cache.
const STRIP: usize = 512;

/// Bytes.
const CACHE_LINE: usize = 64;

/// As many channels for gradients, which take more room, channels last.
const GRADIENT_STRIP: usize = 256;

/// Tokens whose products are added to the sums over tokens at once, channels last.
const TOGETHER: usize = 4;

/// The inputs as slices, in the layouts of [`CausalConv1d`](super::CausalConv1d).
#[derive(Clone, Copy)]
pub(super) struct Conv<'a> {
    pub sizes: Sizes,
    pub packing: &'a Packing,
    pub layout: SequenceLayout,
    pub activation: Activation,
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub initial_state: Option<&'a [f32]>,
}

/// Gradients of the inputs.
pub(super) struct Grads {
    pub x: Vec<f32>,
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub initial_state: Vec<f32>,
}

/// What is made of the sums over taps.
#[derive(Clone, Copy)]
enum Wanted<'a> {
    Output,
    /// The gradient before the activation, from that of `y`.
    Gradient(Option<&'a [f32]>),
}

pub(super) fn forward(conv: &Conv, isa: Isa) -> Vec<f32> {
    let Sizes { dim, sequences, .. } = conv.sizes;
    let mut out = conv.packing.room(conv.x.len());
    let y = SharedMut::new(&mut out);
    match conv.layout {
        SequenceLayout::ChannelsFirst => parallel(sequences * dim, conv.operations(), |row| {
            let (start, len) = conv.row(row);
            // SAFETY: rows do not overlap.
            let y = unsafe { y.get(start, len) };
            isa.dispatch(ForwardRow { conv, row, y });
        }),
        SequenceLayout::ChannelsLast => {
            let (taps, blocks) = (Taps::new(conv), conv.blocks());
            parallel(blocks.len(), conv.operations(), |task| {
                let block = blocks[task];
                // SAFETY: blocks of tokens do not overlap.
                let y = unsafe { y.get(conv.at(&block.sequence, 0, block.first), block.tokens * dim) };
                isa.dispatch(ForwardBlock { conv, taps: &taps, block, y });
            });
        }
    }
    out
}

pub(super) fn backward(conv: &Conv, isa: Isa, grad_y: Option<&[f32]>, grad_state: Option<&[f32]>) -> Grads {
    let Sizes { dim, width, sequences, .. } = conv.sizes;
    let mut x = conv.packing.room(conv.x.len());
    let (mut weight, mut bias) = (vec![0.0; dim * width], vec![0.0; dim]);
    let mut initial_state = vec![0.0; sequences * dim * (width - 1)];
    {
        let [dx, window] = [&mut x, &mut initial_state].map(|x| SharedMut::new(x));
        match conv.layout {
            SequenceLayout::ChannelsFirst => {
                let [dw, db] = [&mut weight, &mut bias].map(|x| SharedMut::new(x));
                parallel(dim, conv.operations() * 3, |c| {
                    // SAFETY: channels do not overlap.
                    let (dw, db) = unsafe { (dw.get(c * width, width), db.get(c, 1)) };
                    for row in (0..sequences).map(|i| i * dim + c) {
                        let (start, len) = conv.row(row);
                        // SAFETY: nor do rows.
                        let (dx, window) =
                            unsafe { (dx.get(start, len), window.get(row * (width - 1), width - 1)) };
                        isa.dispatch(BackwardRow { conv, row, grad_y, dx, window, dw, db: &mut db[0] });
                    }
                });
            }
            SequenceLayout::ChannelsLast => {
                let (taps, blocks) = (Taps::new(conv), conv.blocks());
                // One partial sum a task, `(width + 1, dim)`, added in the order of tasks.
                let mut partial = vec![0.0; blocks.len() * (width + 1) * dim];
                let sums = SharedMut::new(&mut partial);
                parallel(blocks.len(), conv.operations() * 3, |task| {
                    let block = blocks[task];
                    // SAFETY: blocks of tokens do not overlap, and each task has its own sums.
                    let (dx, sums) = unsafe {
                        let sums = sums.get(task * (width + 1) * dim, (width + 1) * dim);
                        (dx.get(conv.at(&block.sequence, 0, block.first), block.tokens * dim), sums)
                    };
                    isa.dispatch(BackwardBlock {
                        conv,
                        taps: &taps,
                        block,
                        grad_y,
                        dx,
                        window: &window,
                        sums,
                    });
                });
                let sums = add_rows(&partial, (width + 1) * dim);
                weight = transposed(&sums[..width * dim], width, dim);
                bias.copy_from_slice(&sums[width * dim..]);
            }
        }
    }
    if let Some(grad_state) = grad_state {
        // The final window is the last width - 1 entries of (initial window, x).
        for (row, grads) in grad_state.chunks_exact((width - 1).max(1)).enumerate() {
            let sequence = conv.sequence(row);
            for (i, grad) in grads.iter().enumerate() {
                match (sequence.len + i).checked_sub(width - 1) {
                    Some(t) => x[conv.at(sequence, row % dim, t)] += grad,
                    None => initial_state[row * (width - 1) + sequence.len + i] += grad,
                }
            }
        }
    }
    Grads { x, weight, bias, initial_state }
}

/// One token of each of some rows, given with the place of its window: returns `y`, 0 in other rows, and moves the windows
/// on.
pub(super) fn step(conv: &Conv, isa: Isa, rows: &[(usize, usize)], state: &mut [f32]) -> Vec<f32> {
    const ROWS: usize = 512;
    let Sizes { dim, width, .. } = conv.sizes;
    let (pieces, mut out) = (dim.div_ceil(ROWS), conv.packing.room(conv.x.len()));
    let [y, state] = [&mut out, state].map(SharedMut::new);
    parallel(rows.len() * pieces, conv.operations(), |task| {
        let ((row, window), first) = (rows[task / pieces], task % pieces * ROWS);
        let (start, len) = (row * dim + first, ROWS.min(dim - first));
        // SAFETY: tasks have their own channels, rows their own windows.
        let (y, state) = unsafe {
            (y.get(start, len), state.get((window * dim + first) * (width - 1), len * (width - 1)))
        };
        y.copy_from_slice(&conv.x[start..][..len]);
        let weight = &conv.weight[first * width..][..len * width];
        let bias = conv.bias.map(|bias| &bias[first..first + len]);
        isa.dispatch(StepRows { weight, bias, activation: conv.activation, y, state });
    });
    out
}

/// One token of some channels; `y` comes in as `x`.
pub(crate) struct StepRows<'a> {
    /// `(channels, width)`.
    pub weight: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
    pub y: &'a mut [f32],
    /// `(channels, width - 1)`.
    pub state: &'a mut [f32],
}
impl WithSimd for StepRows<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { weight, bias, activation, y, state } = self;
        match weight.len() / y.len().max(1) {
            4 => step_rows(weight, bias, 4, y, state),
            width => step_rows(weight, bias, width, y, state),
        }
        if activation == Activation::Silu {
            silu(simd, y);
        }
    }
}

/// The sums over taps; inlined, so that a constant `width` unrolls the loops over taps.
#[inline(always)]
fn step_rows(weight: &[f32], bias: Option<&[f32]>, width: usize, y: &mut [f32], state: &mut [f32]) {
    let weight = &weight[..y.len() * width];
    let state = &mut state[..y.len() * (width - 1)];
    for (i, y) in y.iter_mut().enumerate() {
        let (weight, window) = (&weight[i * width..][..width], &mut state[i * (width - 1)..][..width - 1]);
        let mut next = *y;
        let mut sum = bias.map_or(0.0, |bias| bias[i]) + weight[width - 1] * next;
        for (w, x) in weight[..width - 1].iter().zip(window).rev() {
            sum += w * *x;
            next = std::mem::replace(x, next);
        }
        *y = sum;
    }
}

/// The last `width - 1` entries of (initial window, x), channels first.
pub(super) fn final_state(conv: &Conv) -> Vec<f32> {
    let Sizes { dim, width, sequences, .. } = conv.sizes;
    let mut state = uninit(sequences * dim * (width - 1));
    for (row, window) in state.chunks_exact_mut((width - 1).max(1)).enumerate() {
        let sequence = conv.sequence(row);
        for (i, value) in window.iter_mut().enumerate() {
            *value = match (sequence.len + i).checked_sub(width - 1) {
                Some(t) => conv.x[conv.at(sequence, row % dim, t)],
                None => conv.before(row, width - 1 - sequence.len - i),
            };
        }
    }
    state
}

/// Neighbouring tokens of one sequence, channels last.
#[derive(Clone, Copy)]
struct Block {
    /// The sequence, and its place among all.
    sequence: PackedSequence,
    index: usize,
    first: usize,
    tokens: usize,
}

impl<'a> Conv<'a> {
    /// The place of channel `c` of token `t` of a sequence in `x` and `y`.
    #[inline(always)]
    fn at(&self, sequence: &PackedSequence, c: usize, t: usize) -> usize {
        let Sizes { dim, seqlen, .. } = self.sizes;
        match self.layout {
            SequenceLayout::ChannelsFirst => (sequence.row * dim + c) * seqlen + sequence.start + t,
            SequenceLayout::ChannelsLast => (sequence.row * seqlen + sequence.start + t) * dim + c,
        }
    }

    /// The sequence of row `(sequence, channel)`.
    #[inline(always)]
    fn sequence(&self, row: usize) -> &'a PackedSequence {
        &self.packing.sequences()[row / self.sizes.dim]
    }

    /// Where row `(sequence, channel)` begins in `x` and how long it is, channels first.
    #[inline(always)]
    fn row(&self, row: usize) -> (usize, usize) {
        let sequence = self.sequence(row);
        (self.at(sequence, row % self.sizes.dim, 0), sequence.len)
    }

    /// The input `m ≥ 1` tokens before the first one of row `(sequence, channel)`.
    fn before(&self, row: usize, m: usize) -> f32 {
        let window = self.sizes.width - 1;
        self.initial_state.map_or(0.0, |state| state[row * window + window - m])
    }

    fn operations(&self) -> usize {
        self.x.len() * (self.sizes.width + 8)
    }

    /// The tasks, channels last; an empty sequence has none.
    fn blocks(&self) -> Vec<Block> {
        let mut blocks = vec![];
        for (index, &sequence) in self.packing.sequences().iter().enumerate() {
            for first in (0..sequence.len).step_by(TOKENS) {
                blocks.push(Block { sequence, index, first, tokens: TOKENS.min(sequence.len - first) });
            }
        }
        blocks
    }

    /// `bias + Σ_k weight_k x_k` of neighbouring elements, the first at `at` in the layout of `y`, and what is wanted of it; `tap` gives
    /// weights and inputs.
    #[inline(always)]
    fn convolve<'b, S: Simd, W: Source<S, Vectors = S::f32s>>(
        &self,
        simd: S,
        tap: impl Fn(usize) -> (W, &'b [f32]),
        bias: W,
        wanted: Wanted,
        at: usize,
        out: &mut [f32],
    ) {
        let width = self.sizes.width;
        match (wanted, self.activation) {
            (Wanted::Output, Activation::Identity) => {
                weighted(simd, width, tap, bias, (), out, |sum, ()| sum)
            }
            (Wanted::Output, Activation::Silu) => weighted(
                simd,
                width,
                tap,
                bias,
                (),
                out,
                #[inline(always)]
                |sum, ()| math::silu(simd, sum),
            ),
            (Wanted::Gradient(None), _) => out.fill(0.0),
            (Wanted::Gradient(Some(grad)), Activation::Identity) => {
                out.copy_from_slice(&grad[at..at + out.len()]);
            }
            (Wanted::Gradient(Some(grad)), Activation::Silu) => weighted(
                simd,
                width,
                tap,
                bias,
                &grad[at..],
                out,
                #[inline(always)]
                |sum, grad| simd.mul_f32s(grad, math::silu_with_derivative(simd, sum).1),
            ),
        }
    }
}

/// `out ← finish(bias + Σ_k weight_k x_k, more)`, the newest tap first; `tap` gives weights and inputs.
#[inline(always)]
fn weighted<'b, S: Simd, W: Source<S, Vectors = S::f32s>, B: Source<S, Vectors = S::f32s>, M: Source<S>>(
    simd: S,
    width: usize,
    tap: impl Fn(usize) -> (W, &'b [f32]),
    bias: B,
    more: M,
    out: &mut [f32],
    finish: impl Fn(S::f32s, M::Vectors) -> S::f32s,
) {
    match width {
        1 => weighted_by::<S, W, B, M, 1>(simd, tap, bias, more, out, finish),
        2 => weighted_by::<S, W, B, M, 2>(simd, tap, bias, more, out, finish),
        3 => weighted_by::<S, W, B, M, 3>(simd, tap, bias, more, out, finish),
        4 => weighted_by::<S, W, B, M, 4>(simd, tap, bias, more, out, finish),
        _ => {
            let len = out.len();
            map_all(simd, len, [out], bias, |_, bias| [bias]);
            for k in (0..width).rev() {
                map_all(simd, len, [out], tap(k), |[sum], (w, x)| [simd.mul_add_e_f32s(w, x, sum)]);
            }
            map_all(
                simd,
                len,
                [out],
                more,
                #[inline(always)]
                |[sum], more| [finish(sum, more)],
            );
        }
    }
}

/// The same with all taps in registers.
#[inline(always)]
fn weighted_by<
    'b,
    S: Simd,
    W: Source<S, Vectors = S::f32s>,
    B: Source<S, Vectors = S::f32s>,
    M: Source<S>,
    const TAPS: usize,
>(
    simd: S,
    tap: impl Fn(usize) -> (W, &'b [f32]),
    bias: B,
    more: M,
    out: &mut [f32],
    finish: impl Fn(S::f32s, M::Vectors) -> S::f32s,
) {
    let taps: [(W, &[f32]); TAPS] = std::array::from_fn(tap);
    map_all(
        simd,
        out.len(),
        [out],
        (taps, bias, more),
        #[inline(always)]
        |_, (taps, bias, more)| {
            let mut sum = bias;
            for (w, x) in taps.iter().rev() {
                sum = simd.mul_add_e_f32s(*w, *x, sum);
            }
            [finish(sum, more)]
        },
    );
}

// Channels first: a row at a time, of which the first tokens stand behind a copy of the window.

impl Conv<'_> {
    /// The window of a row and its first tokens.
    fn head(&self, row: usize, tokens: usize) -> Vec<f32> {
        let start = self.row(row).0;
        let window = (1..self.sizes.width).rev().map(|m| self.before(row, m));
        window.chain(self.x[start..start + tokens].iter().copied()).collect()
    }

    /// The filter of the channel of a row, and its bias.
    #[inline(always)]
    fn filter(&self, row: usize) -> (&[f32], f32) {
        let (width, c) = (self.sizes.width, row % self.sizes.dim);
        (&self.weight[c * width..][..width], self.bias.map_or(0.0, |bias| bias[c]))
    }

    /// `bias + Σ_m w_m x_{t-m}` and what is wanted of it.
    #[inline(always)]
    fn convolve_row<S: Simd>(&self, simd: S, row: usize, wanted: Wanted, out: &mut [f32]) {
        let ((weight, bias), (start, len), window) = (self.filter(row), self.row(row), self.sizes.width - 1);
        // Behind the first tokens, vectors of `out` lie in one line of the cache each.
        let aligned = out.get(window..).map_or(0, |out| out.as_ptr().align_offset(CACHE_LINE));
        let split = window.saturating_add(aligned).min(len);
        let head = self.head(row, split);
        let (first, rest) = out.split_at_mut(split);
        self.convolve(simd, |k| (weight[k], &head[k..]), bias, wanted, start, first);
        if !rest.is_empty() {
            let x = &self.x[start + split - window..];
            self.convolve(simd, |k| (weight[k], &x[k..]), bias, wanted, start + split, rest);
        }
    }
}

struct ForwardRow<'a> {
    conv: &'a Conv<'a>,
    row: usize,
    y: &'a mut [f32],
}
impl WithSimd for ForwardRow<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.conv.convolve_row(simd, self.row, Wanted::Output, self.y);
    }
}

struct BackwardRow<'a> {
    conv: &'a Conv<'a>,
    row: usize,
    grad_y: Option<&'a [f32]>,
    dx: &'a mut [f32],
    window: &'a mut [f32],
    dw: &'a mut [f32],
    db: &'a mut f32,
}
impl WithSimd for BackwardRow<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { conv, row, grad_y, dx, window, dw, db } = self;
        let ((weight, _), (start, len), width) = (conv.filter(row), conv.row(row), conv.sizes.width);
        // g between zeros: what lies before the sequence has none, nor what lies behind it.
        let mut padded = vec![0.0; len + 2 * (width - 1)];
        let g = &mut padded[width - 1..][..len];
        conv.convolve_row(simd, row, Wanted::Gradient(grad_y), g);
        *db += sum(simd, g);
        let (first, rest) = g.split_at(len.min(width - 1));
        weight_sums(simd, first, &conv.head(row, first.len()), dw);
        weight_sums(simd, rest, &conv.x[start..], dw);
        // `Σ_m w_m g_{t+m}`; before the sequence this is the gradient of the window.
        for (out, g) in [(window, &padded[..]), (dx, &padded[width - 1..])] {
            weighted(simd, width, |m| (weight[width - 1 - m], &g[m..]), 0.0, (), out, |sum, ()| sum);
        }
    }
}

/// `sums[k] += Σ_t g[t] · x[t + k]`.
#[inline(always)]
fn weight_sums<S: Simd>(simd: S, g: &[f32], x: &[f32], sums: &mut [f32]) {
    // In strips, so that no sum has very many terms.
    for (i, g) in g.chunks(STRIP).enumerate() {
        let x = &x[i * STRIP..];
        match sums {
            [_] => weight_sums_of::<S, 1>(simd, g, x, sums),
            [_, _] => weight_sums_of::<S, 2>(simd, g, x, sums),
            [_, _, _] => weight_sums_of::<S, 3>(simd, g, x, sums),
            [_, _, _, _] => weight_sums_of::<S, 4>(simd, g, x, sums),
            _ => sums.iter_mut().enumerate().for_each(|(k, sum)| *sum += dot(simd, g, &x[k..])),
        }
    }
}

/// The same with all sums in registers.
#[inline(always)]
fn weight_sums_of<S: Simd, const TAPS: usize>(simd: S, g: &[f32], x: &[f32], sums: &mut [f32]) {
    let x: [&[f32]; TAPS] = std::array::from_fn(|k| &x[k..]);
    let mut vectors = [simd.splat_f32s(0.0); TAPS];
    map_all(simd, g.len(), [], (g, x), |[], (g, x)| {
        for (sum, x) in vectors.iter_mut().zip(&x) {
            *sum = simd.mul_add_e_f32s(g, *x, *sum);
        }
        []
    });
    sums.iter_mut().zip(vectors).for_each(|(sum, vector)| *sum += simd.reduce_sum_f32s(vector));
}

// Channels last: a block of tokens at a time, strip by strip of its channels.

/// What channels last needs the other way round.
struct Taps {
    /// `(width, dim)`.
    weight: Vec<f32>,
    /// `(dim,)`.
    bias: Vec<f32>,
    /// `(sequences, width - 1, dim)`.
    windows: Vec<f32>,
}

impl Taps {
    fn new(conv: &Conv) -> Self {
        let Sizes { dim, width, sequences, .. } = conv.sizes;
        let windows = match conv.initial_state {
            Some(state) => transposed(state, dim, width - 1),
            None => vec![0.0; sequences * dim * (width - 1)],
        };
        let bias = conv.bias.map_or_else(|| vec![0.0; dim], <[f32]>::to_vec);
        Self { weight: transposed(conv.weight, dim, width), bias, windows }
    }

    /// The channels from `start` of the token `m` before token `t`, from the input or from the window.
    #[inline(always)]
    fn token<'a>(&'a self, conv: &Conv<'a>, block: &Block, t: usize, m: usize, start: usize) -> &'a [f32] {
        let Sizes { dim, width, .. } = conv.sizes;
        match t.checked_sub(m) {
            Some(t) => &conv.x[conv.at(&block.sequence, start, t)..],
            None => &self.windows[(block.index * (width - 1) + width - 1 + t - m) * dim + start..],
        }
    }

    /// `bias + Σ_m w_m x_{t-m}` for the channels from `start` of one token, and what is wanted of it.
    #[inline(always)]
    fn convolve<S: Simd>(
        &self,
        simd: S,
        conv: &Conv,
        block: &Block,
        [t, start]: [usize; 2],
        wanted: Wanted,
        y: &mut [f32],
    ) {
        let Sizes { dim, width, .. } = conv.sizes;
        if t + 1 < block.sequence.len {
            let next = conv.at(&block.sequence, start, t + 1)..;
            prefetch(&conv.x[next.clone()][..y.len()]);
            if let Wanted::Gradient(Some(grad)) = wanted {
                prefetch(&grad[next][..y.len()]);
            }
        }
        let tap =
            |k: usize| (&self.weight[k * dim + start..], self.token(conv, block, t, width - 1 - k, start));
        let at = conv.at(&block.sequence, start, t);
        conv.convolve(simd, tap, &self.bias[start..], wanted, at, y);
    }
}

struct ForwardBlock<'a> {
    conv: &'a Conv<'a>,
    taps: &'a Taps,
    block: Block,
    y: &'a mut [f32],
}
impl WithSimd for ForwardBlock<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { conv, taps, block, y } = self;
        let dim = conv.sizes.dim;
        for start in (0..dim).step_by(STRIP) {
            let end = dim.min(start + STRIP);
            for (i, y) in y.chunks_exact_mut(dim).enumerate() {
                let at = [block.first + i, start];
                taps.convolve(simd, conv, &block, at, Wanted::Output, &mut y[start..end]);
            }
        }
    }
}

struct BackwardBlock<'a> {
    conv: &'a Conv<'a>,
    taps: &'a Taps,
    block: Block,
    grad_y: Option<&'a [f32]>,
    dx: &'a mut [f32],
    window: &'a SharedMut<'a>,
    /// `(width + 1, dim)`: the sums of `weight`, then of `bias`.
    sums: &'a mut [f32],
}
impl WithSimd for BackwardBlock<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { conv, taps, block, grad_y, dx, window, sums } = self;
        let (Sizes { dim, width, .. }, first, tokens) = (conv.sizes, block.first, block.tokens);
        let (weight_sums, bias_sums) = sums.split_at_mut(width * dim);
        // g of the tokens of this block and of those that reach back into it, zeros behind the sequence.
        let rows = tokens + width - 1;
        let reach = rows.min(block.sequence.len - first);
        let mut strip = vec![0.0; rows * GRADIENT_STRIP.min(dim)];
        for start in (0..dim).step_by(GRADIENT_STRIP) {
            let end = dim.min(start + GRADIENT_STRIP);
            let columns = end - start;
            strip[reach * columns..rows * columns].fill(0.0);
            let mut known = 0;
            // A few tokens at a time, which stay in the first cache through all of this.
            for i in (0..tokens).step_by(TOGETHER) {
                let together = TOGETHER.min(tokens - i);
                for ahead in known..reach.min(i + together + width - 1) {
                    let g = &mut strip[ahead * columns..][..columns];
                    taps.convolve(simd, conv, &block, [first + ahead, start], Wanted::Gradient(grad_y), g);
                    known = ahead + 1;
                }
                let g = |i: usize| &strip[i * columns..][..columns];
                for i in i..i + together {
                    let tap = |m: usize| (&taps.weight[(width - 1 - m) * dim + start..], g(i + m));
                    let dx = &mut dx[i * dim + start..i * dim + end];
                    weighted(simd, width, tap, 0.0, (), dx, |sum, ()| sum);
                    map2(simd, &mut bias_sums[start..end], g(i), |sum, g| simd.add_f32s(sum, g));
                }
                for (k, sums) in weight_sums.chunks_exact_mut(dim).enumerate() {
                    let x = |i: usize| taps.token(conv, &block, first + i, width - 1 - k, start);
                    let sums = &mut sums[start..end];
                    if together == TOGETHER {
                        add_products::<S, TOGETHER>(simd, sums, |j| (g(i + j), x(i + j)));
                    } else {
                        (i..i + together).for_each(|i| add_products::<S, 1>(simd, sums, |_| (g(i), x(i))));
                    }
                }
            }
            let g = &strip;
            if first == 0 {
                for c in start..end {
                    // SAFETY: the first block of each sequence writes its windows.
                    let window = unsafe { window.get((block.index * dim + c) * (width - 1), width - 1) };
                    let weight = &conv.weight[c * width..][..width];
                    let g = |t: usize| g[t * columns + c - start];
                    window_gradients(weight, block.sequence.len, g, window);
                }
            }
        }
    }
}

/// `sums[i] += Σ_j a_j[i] · b_j[i]`.
#[inline(always)]
fn add_products<'a, S: Simd, const PAIRS: usize>(
    simd: S,
    sums: &mut [f32],
    pair: impl Fn(usize) -> (&'a [f32], &'a [f32]),
) {
    let pairs: [(&[f32], &[f32]); PAIRS] = std::array::from_fn(pair);
    map_all(simd, sums.len(), [sums], pairs, |[mut sum], pairs| {
        for (a, b) in &pairs {
            sum = simd.mul_add_e_f32s(*a, *b, sum);
        }
        [sum]
    });
}

/// Gradients of the window of a channel: position `-j` receives `Σ_m w_m g_{m-j}` over `m ≥ j`.
fn window_gradients(weight: &[f32], seqlen: usize, g: impl Fn(usize) -> f32, window: &mut [f32]) {
    let width = weight.len();
    for (i, grad) in window.iter_mut().enumerate() {
        let j = width - 1 - i;
        let reach = width.min(seqlen.saturating_add(j));
        *grad = (j..reach).map(|m| weight[width - 1 - m] * g(m - j)).sum();
    }
}
