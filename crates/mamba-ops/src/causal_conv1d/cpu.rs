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
use crate::simd::Isa;
use crate::simd::slice::{axpy, dot, map2, map3, silu, silu_backward, sum};

/// Tokens that one task handles, channels last: fixed, so that sums do not depend on the number of threads.
const TOKENS: usize = 64;

/// Tokens (channels first) or channels (last) that go through all steps while they are in cache.
const STRIP: usize = 512;

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
                let (dw, db) = (SharedMut::new(&mut weight), SharedMut::new(&mut bias));
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

    /// From sums over taps, in place, to what is wanted, at `at` in the layout of `y`.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, wanted: Wanted, at: usize, sums: &mut [f32]) {
        match (wanted, self.activation) {
            (Wanted::Output, Activation::Identity) => {}
            (Wanted::Output, Activation::Silu) => silu(simd, sums),
            (Wanted::Gradient(None), _) => sums.fill(0.0),
            (Wanted::Gradient(Some(grad)), Activation::Identity) => {
                sums.copy_from_slice(&grad[at..at + sums.len()]);
            }
            (Wanted::Gradient(Some(grad)), Activation::Silu) => silu_backward(simd, sums, &grad[at..]),
        }
    }
}

// Channels first: a row at a time.

/// `bias + Σ_m w_m x_{t-m}` and what is wanted of it.
#[inline(always)]
fn convolve_row<S: Simd>(simd: S, conv: &Conv, row: usize, wanted: Wanted, y: &mut [f32]) {
    let Sizes { dim, width, .. } = conv.sizes;
    let (start, len) = conv.row(row);
    let x = &conv.x[start..][..len];
    let weight = &conv.weight[row % dim * width..][..width];
    for (i, y) in y.chunks_mut(STRIP).enumerate() {
        let first = i * STRIP;
        y.fill(conv.bias.map_or(0.0, |bias| bias[row % dim]));
        for (m, &w) in weight.iter().rev().enumerate() {
            let split = m.saturating_sub(first).min(y.len());
            for (t, y) in y[..split].iter_mut().enumerate() {
                *y += w * conv.before(row, m - first - t);
            }
            if let Some(from) = (first + split).checked_sub(m) {
                axpy(simd, &mut y[split..], w, &x[from..]);
            }
        }
        conv.finish(simd, wanted, start + first, y);
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
        convolve_row(simd, self.conv, self.row, Wanted::Output, self.y);
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
        let Sizes { dim, width, .. } = conv.sizes;
        convolve_row(simd, conv, row, Wanted::Gradient(grad_y), dx); // g
        let (start, len) = conv.row(row);
        let x = &conv.x[start..][..len];
        *db += sum(simd, dx);
        for (m, dw) in dw.iter_mut().rev().enumerate() {
            let split = m.min(len);
            let before: f32 = (0..split).map(|t| dx[t] * conv.before(row, m - t)).sum();
            *dw += before + dot(simd, &dx[split..], &x[..len - split]);
        }
        let weight = &conv.weight[row % dim * width..][..width];
        window_gradients(weight, len, |t| dx[t], window);
        correlate(simd, weight, dx);
    }
}

/// `g_t ← Σ_m w_m g_{t+m}`, in place.
#[inline(always)]
fn correlate<S: Simd>(simd: S, weight: &[f32], g: &mut [f32]) {
    // Strips from first to last, each from a copy of what it reads: entries ahead are untouched.
    let width = weight.len();
    let mut ahead = vec![0.0; STRIP + width];
    for start in (0..g.len()).step_by(STRIP) {
        let strip = STRIP.min(g.len() - start);
        let read = (strip + width - 1).min(g.len() - start);
        ahead[..read].copy_from_slice(&g[start..start + read]);
        ahead[read..].fill(0.0);
        let out = &mut g[start..start + strip];
        out.fill(0.0);
        for (m, &w) in weight.iter().rev().enumerate() {
            axpy(simd, out, w, &ahead[m..m + strip]);
        }
    }
}

/// Gradients of the window of a channel: position `-j` receives `Σ_m w_m g_{m-j}` over `m ≥ j`.
#[inline(always)]
fn window_gradients(weight: &[f32], seqlen: usize, g: impl Fn(usize) -> f32, window: &mut [f32]) {
    let width = weight.len();
    for (i, grad) in window.iter_mut().enumerate() {
        let j = width - 1 - i;
        let reach = width.min(seqlen.saturating_add(j));
        *grad = (j..reach).map(|m| weight[width - 1 - m] * g(m - j)).sum();
    }
}

// Channels last: a block of tokens at a time, strip by strip of its channels.

/// What channels last needs the other way round.
struct Taps {
    /// `(width, dim)`.
    weight: Vec<f32>,
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
        Self { weight: transposed(conv.weight, dim, width), windows }
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
        match conv.bias {
            Some(bias) => y.copy_from_slice(&bias[start..start + y.len()]),
            None => y.fill(0.0),
        }
        for (m, w) in self.weight.chunks_exact(conv.sizes.dim).rev().enumerate() {
            let x = self.token(conv, block, t, m, start);
            map3(simd, y, &w[start..], x, |y, w, x| simd.mul_add_e_f32s(w, x, y));
        }
        conv.finish(simd, wanted, conv.at(&block.sequence, start, t), y);
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
        let (Sizes { dim, width, .. }, first) = (conv.sizes, block.first);
        let (weight_sums, bias_sums) = sums.split_at_mut(width * dim);
        // g of the tokens of this block and of those that reach back into it.
        let reach = (TOKENS + width - 1).min(block.sequence.len - first);
        let mut strip = uninit(reach * STRIP.min(dim));
        for start in (0..dim).step_by(STRIP) {
            let end = dim.min(start + STRIP);
            let columns = end - start;
            for (i, g) in strip.chunks_exact_mut(columns).take(reach).enumerate() {
                taps.convolve(simd, conv, &block, [first + i, start], Wanted::Gradient(grad_y), g);
            }
            for (i, dx) in dx.chunks_exact_mut(dim).enumerate() {
                let (dx, g) = (&mut dx[start..end], &strip[i * columns..]);
                map2(simd, &mut bias_sums[start..end], g, |sum, g| simd.add_f32s(sum, g));
                dx.fill(0.0);
                for m in 0..width {
                    let (w, x) = ((width - 1 - m) * dim, taps.token(conv, &block, first + i, m, start));
                    let sums = &mut weight_sums[w + start..w + end];
                    map3(simd, sums, g, x, |sum, g, x| simd.mul_add_e_f32s(g, x, sum));
                    if i + m < reach {
                        let w = &taps.weight[w + start..w + end];
                        map3(simd, dx, w, &g[m * columns..], |dx, w, g| simd.mul_add_e_f32s(w, g, dx));
                    }
                }
            }
            if first == 0 {
                for c in start..end {
                    // SAFETY: the first block of each sequence writes its windows.
                    let window = unsafe { window.get((block.index * dim + c) * (width - 1), width - 1) };
                    let weight = &conv.weight[c * width..][..width];
                    let g = |t: usize| strip[t * columns + c - start];
                    window_gradients(weight, block.sequence.len, g, window);
                }
            }
        }
    }
}
