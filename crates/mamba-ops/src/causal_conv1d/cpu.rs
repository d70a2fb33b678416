//! The convolution on slices. Channels first, vectors run along time; channels last, along channels.
//!
//! With `m = width - 1 - k`, the distance of tap `k` into the past:
//! `pre_t = bias + Σ_m w_m x_{t-m}`, `y = activation(pre)`; backward, with `g = grad_y · activation'(pre)`:
//! `dx_t = Σ_m w_m g_{t+m}`, `dw_m = Σ_t g_t x_{t-m}`, `dbias = Σ_t g_t`, where `x_{-1}, x_{-2}, …` are the window.

use pulp::{Simd, WithSimd};

use super::Sizes;
use crate::host::{SharedMut, parallel, transposed, uninit};
use crate::layout::{Activation, SequenceLayout};
use crate::simd::Isa;
use crate::simd::slice::{axpy, dot, map2, map3, mul_silu_derivative, silu, sum};

/// Tokens that one task handles, channels last: fixed, so that sums do not depend on the number of threads.
const TOKENS: usize = 64;

/// The inputs as slices, in the layouts of [`CausalConv1d`](super::CausalConv1d).
#[derive(Clone, Copy)]
pub(super) struct Conv<'a> {
    pub sizes: Sizes,
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

pub(super) fn forward(conv: &Conv, isa: Isa) -> Vec<f32> {
    let mut y = uninit(conv.x.len());
    convolve(conv, isa, &mut y);
    if conv.activation == Activation::Silu {
        for_pieces(conv, &mut y, |_, y| isa.dispatch(ApplySilu(y)));
    }
    y
}

pub(super) fn backward(conv: &Conv, isa: Isa, grad_y: Option<&[f32]>, grad_state: Option<&[f32]>) -> Grads {
    let Sizes { batch, dim, seqlen, width } = conv.sizes;
    // g, the gradient before the activation.
    let mut g = match (grad_y, conv.activation) {
        (None, _) => vec![0.0; conv.x.len()],
        (Some(grad_y), Activation::Identity) => grad_y.to_vec(),
        (Some(grad_y), Activation::Silu) => {
            let mut pre = uninit(conv.x.len());
            convolve(conv, isa, &mut pre);
            let mut g = grad_y.to_vec();
            for_pieces(conv, &mut g, |at, grad| {
                let pre = &pre[at..at + grad.len()];
                isa.dispatch(SiluBackward { grad, pre })
            });
            g
        }
    };
    let weights = parameter_gradients(conv, isa, &g);
    let mut initial_state = vec![0.0; batch * dim * (width - 1)];
    window_gradients(conv, &g, &mut initial_state);
    correlate(conv, isa, &mut g);
    if let Some(grad_state) = grad_state {
        // The final window is the last width - 1 entries of (initial window, x).
        for (row, grads) in grad_state.chunks_exact((width - 1).max(1)).enumerate() {
            for (i, grad) in grads.iter().enumerate() {
                match (seqlen + i).checked_sub(width - 1) {
                    Some(t) => g[conv.at(row / dim, row % dim, t)] += grad,
                    None => initial_state[row * (width - 1) + seqlen + i] += grad,
                }
            }
        }
    }
    let (weight, bias) = weights;
    Grads { x: g, weight, bias, initial_state }
}

/// The last `width - 1` entries of (initial window, x), channels first.
pub(super) fn final_state(conv: &Conv) -> Vec<f32> {
    let Sizes { batch, dim, seqlen, width } = conv.sizes;
    let mut state = uninit(batch * dim * (width - 1));
    for (row, window) in state.chunks_exact_mut((width - 1).max(1)).enumerate() {
        for (i, value) in window.iter_mut().enumerate() {
            *value = match (seqlen + i).checked_sub(width - 1) {
                Some(t) => conv.x[conv.at(row / dim, row % dim, t)],
                None => conv.before(row, width - 1 - seqlen - i),
            };
        }
    }
    state
}

impl Conv<'_> {
    /// The place of channel `c` of token `t` in `x` and `y`.
    fn at(&self, b: usize, c: usize, t: usize) -> usize {
        let Sizes { dim, seqlen, .. } = self.sizes;
        match self.layout {
            SequenceLayout::ChannelsFirst => (b * dim + c) * seqlen + t,
            SequenceLayout::ChannelsLast => (b * seqlen + t) * dim + c,
        }
    }

    /// The input `m ≥ 1` tokens before the first one of row `(b, c)`.
    fn before(&self, row: usize, m: usize) -> f32 {
        let window = self.sizes.width - 1;
        self.initial_state.map_or(0.0, |state| state[row * window + window - m])
    }

    /// Per batch element the window as `(width - 1, dim)`, channels last.
    fn window_rows(&self) -> Vec<f32> {
        let Sizes { batch, dim, width, .. } = self.sizes;
        match self.initial_state {
            Some(state) if width > 1 => state
                .chunks_exact(dim.max(1) * (width - 1))
                .flat_map(|state| transposed(state, dim, width - 1))
                .collect(),
            _ => vec![0.0; batch * dim * (width - 1)],
        }
    }

    fn operations(&self) -> usize {
        self.x.len() * (self.sizes.width + 8)
    }

    /// Tasks of one pass, channels last: `(batch, block of tokens)`.
    fn blocks(&self) -> usize {
        self.sizes.seqlen.div_ceil(TOKENS)
    }
}

/// Runs `f(offset, piece)` over pieces of a buffer in the layout of `x`.
fn for_pieces(conv: &Conv, buffer: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync + Send) {
    const PIECE: usize = 1 << 13;
    let len = buffer.len();
    let shared = SharedMut::new(buffer);
    parallel(len.div_ceil(PIECE), conv.operations(), |i| {
        let start = i * PIECE;
        // SAFETY: pieces of different tasks do not overlap.
        f(start, unsafe { shared.get(start, PIECE.min(len - start)) });
    });
}

/// `y = bias + Σ_m w_m x_{t-m}`.
fn convolve(conv: &Conv, isa: Isa, y: &mut [f32]) {
    let Sizes { batch, dim, seqlen, width } = conv.sizes;
    let y = SharedMut::new(y);
    match conv.layout {
        SequenceLayout::ChannelsFirst => parallel(batch * dim, conv.operations(), |row| {
            // SAFETY: rows do not overlap.
            let y = unsafe { y.get(row * seqlen, seqlen) };
            isa.dispatch(ConvolveRow { conv, row, y });
        }),
        SequenceLayout::ChannelsLast => {
            let (weight, windows) = (transposed(conv.weight, dim, width), conv.window_rows());
            parallel(batch * conv.blocks(), conv.operations(), |task| {
                let (b, first) = (task / conv.blocks(), task % conv.blocks() * TOKENS);
                let tokens = TOKENS.min(seqlen - first);
                // SAFETY: blocks of tokens do not overlap.
                let y = unsafe { y.get((b * seqlen + first) * dim, tokens * dim) };
                isa.dispatch(ConvolveBlock { conv, weight: &weight, windows: &windows, b, first, y });
            });
        }
    }
}

/// `g_t ← Σ_m w_m g_{t+m}`, in place: later entries are still the old ones when an earlier one is written.
fn correlate(conv: &Conv, isa: Isa, g: &mut [f32]) {
    let Sizes { batch, dim, seqlen, width } = conv.sizes;
    match conv.layout {
        SequenceLayout::ChannelsFirst => {
            let g = SharedMut::new(g);
            parallel(batch * dim, conv.operations(), |row| {
                // SAFETY: rows do not overlap.
                let g = unsafe { g.get(row * seqlen, seqlen) };
                isa.dispatch(CorrelateRow { weight: &conv.weight[row % dim * width..][..width], g });
            });
        }
        SequenceLayout::ChannelsLast => {
            let weight = transposed(conv.weight, dim, width);
            let old = g.to_vec();
            let g = SharedMut::new(g);
            parallel(batch * conv.blocks(), conv.operations(), |task| {
                let (b, first) = (task / conv.blocks(), task % conv.blocks() * TOKENS);
                let tokens = TOKENS.min(seqlen - first);
                // SAFETY: blocks of tokens do not overlap.
                let dx = unsafe { g.get((b * seqlen + first) * dim, tokens * dim) };
                let g = &old[b * seqlen * dim..][..seqlen * dim];
                isa.dispatch(CorrelateBlock { weight: &weight, dim, g, first, dx });
            });
        }
    }
}

/// Gradients of the window: position `-j` receives `Σ_m w_m g_{m-j}` over `m ≥ j`.
fn window_gradients(conv: &Conv, g: &[f32], grad_state: &mut [f32]) {
    let Sizes { dim, seqlen, width, .. } = conv.sizes;
    for (row, grads) in grad_state.chunks_exact_mut((width - 1).max(1)).enumerate() {
        let weight = &conv.weight[row % dim * width..][..width];
        for (i, grad) in grads.iter_mut().enumerate() {
            let j = width - 1 - i;
            let reach = width.min(seqlen.saturating_add(j));
            *grad = (j..reach).map(|m| weight[width - 1 - m] * g[conv.at(row / dim, row % dim, m - j)]).sum();
        }
    }
}

/// Gradients of `weight` and `bias`: one partial sum a task, added in the order of tasks.
fn parameter_gradients(conv: &Conv, isa: Isa, g: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let Sizes { batch, dim, seqlen, width } = conv.sizes;
    let (mut weight, mut bias) = (vec![0.0; dim * width], vec![0.0; dim]);
    match conv.layout {
        SequenceLayout::ChannelsFirst => {
            let (dw, db) = (SharedMut::new(&mut weight), SharedMut::new(&mut bias));
            parallel(dim, conv.operations(), |c| {
                // SAFETY: channels do not overlap.
                let (dw, db) = unsafe { (dw.get(c * width, width), db.get(c, 1)) };
                for row in (0..batch).map(|b| b * dim + c) {
                    let g = &g[row * seqlen..][..seqlen];
                    isa.dispatch(RowParameters { conv, row, g, weight: dw, bias: &mut db[0] });
                }
            });
        }
        SequenceLayout::ChannelsLast => {
            let windows = conv.window_rows();
            let tasks = batch * conv.blocks();
            let mut partial = vec![0.0; tasks * (width + 1) * dim];
            let shared = SharedMut::new(&mut partial);
            parallel(tasks, conv.operations(), |task| {
                let (b, first) = (task / conv.blocks(), task % conv.blocks() * TOKENS);
                // SAFETY: each task has its own partial sums.
                let sums = unsafe { shared.get(task * (width + 1) * dim, (width + 1) * dim) };
                isa.dispatch(BlockParameters { conv, windows: &windows, b, first, g, sums });
            });
            for sums in partial.chunks_exact(((width + 1) * dim).max(1)) {
                for (k, row) in sums.chunks_exact(dim.max(1)).enumerate() {
                    for (c, value) in row.iter().enumerate() {
                        let sum = if k < width { &mut weight[c * width + k] } else { &mut bias[c] };
                        *sum += value;
                    }
                }
            }
        }
    }
    (weight, bias)
}

struct ApplySilu<'a>(&'a mut [f32]);
impl WithSimd for ApplySilu<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        silu(simd, self.0);
    }
}

struct SiluBackward<'a> {
    grad: &'a mut [f32],
    pre: &'a [f32],
}
impl WithSimd for SiluBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        mul_silu_derivative(simd, self.grad, self.pre);
    }
}

struct ConvolveRow<'a> {
    conv: &'a Conv<'a>,
    row: usize,
    y: &'a mut [f32],
}
impl WithSimd for ConvolveRow<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { conv, row, y } = self;
        let Sizes { dim, seqlen, width, .. } = conv.sizes;
        let x = &conv.x[row * seqlen..][..seqlen];
        let weight = &conv.weight[row % dim * width..][..width];
        y.fill(conv.bias.map_or(0.0, |bias| bias[row % dim]));
        for (m, &w) in weight.iter().rev().enumerate() {
            let split = m.min(seqlen);
            for (t, y) in y[..split].iter_mut().enumerate() {
                *y += w * conv.before(row, m - t);
            }
            axpy(simd, &mut y[split..], w, &x[..seqlen - split]);
        }
    }
}

struct ConvolveBlock<'a> {
    conv: &'a Conv<'a>,
    /// `(width, dim)`.
    weight: &'a [f32],
    /// `(batch, width - 1, dim)`.
    windows: &'a [f32],
    b: usize,
    first: usize,
    y: &'a mut [f32],
}
impl WithSimd for ConvolveBlock<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let dim = self.conv.sizes.dim;
        for (i, y) in self.y.chunks_exact_mut(dim.max(1)).enumerate() {
            match self.conv.bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(0.0),
            }
            for (m, w) in self.weight.chunks_exact(dim.max(1)).rev().enumerate() {
                let x = token(self.conv, self.windows, self.b, self.first + i, m);
                map3(simd, y, w, x, |y, w, x| simd.mul_add_f32s(w, x, y));
            }
        }
    }
}

/// The row of channels `m` tokens before token `t`, from the input or from the window.
#[inline(always)]
fn token<'a>(conv: &Conv<'a>, windows: &'a [f32], b: usize, t: usize, m: usize) -> &'a [f32] {
    let Sizes { dim, seqlen, width, .. } = conv.sizes;
    match t.checked_sub(m) {
        Some(t) => &conv.x[(b * seqlen + t) * dim..][..dim],
        None => &windows[(b * (width - 1) + width - 1 + t - m) * dim..][..dim],
    }
}

struct CorrelateRow<'a> {
    weight: &'a [f32],
    g: &'a mut [f32],
}
impl WithSimd for CorrelateRow<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Blocks from first to last, each from a copy of what it reads: entries ahead are untouched.
        const BLOCK: usize = 256;
        let Self { weight, g } = self;
        let width = weight.len();
        let mut ahead = vec![0.0; BLOCK + width];
        for start in (0..g.len()).step_by(BLOCK) {
            let block = BLOCK.min(g.len() - start);
            let read = (block + width - 1).min(g.len() - start);
            ahead[..read].copy_from_slice(&g[start..start + read]);
            ahead[read..].fill(0.0);
            let out = &mut g[start..start + block];
            out.fill(0.0);
            for (m, &w) in weight.iter().rev().enumerate() {
                axpy(simd, out, w, &ahead[m..m + block]);
            }
        }
    }
}

struct CorrelateBlock<'a> {
    /// `(width, dim)`.
    weight: &'a [f32],
    dim: usize,
    g: &'a [f32],
    first: usize,
    dx: &'a mut [f32],
}
impl WithSimd for CorrelateBlock<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (i, dx) in self.dx.chunks_exact_mut(self.dim.max(1)).enumerate() {
            dx.fill(0.0);
            for (m, w) in self.weight.chunks_exact(self.dim.max(1)).rev().enumerate() {
                let Some(g) = self.g.get((self.first + i + m) * self.dim..).filter(|g| !g.is_empty()) else {
                    break;
                };
                map3(simd, dx, w, &g[..self.dim], |dx, w, g| simd.mul_add_f32s(w, g, dx));
            }
        }
    }
}

struct RowParameters<'a> {
    conv: &'a Conv<'a>,
    row: usize,
    g: &'a [f32],
    weight: &'a mut [f32],
    bias: &'a mut f32,
}
impl WithSimd for RowParameters<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sizes { seqlen, .. } = self.conv.sizes;
        let x = &self.conv.x[self.row * seqlen..][..seqlen];
        *self.bias += sum(simd, self.g);
        for (m, w) in self.weight.iter_mut().rev().enumerate() {
            let split = m.min(seqlen);
            let window: f32 = (0..split).map(|t| self.g[t] * self.conv.before(self.row, m - t)).sum();
            *w += window + dot(simd, &self.g[split..], &x[..seqlen - split]);
        }
    }
}

struct BlockParameters<'a> {
    conv: &'a Conv<'a>,
    windows: &'a [f32],
    b: usize,
    first: usize,
    g: &'a [f32],
    /// `(width + 1, dim)`: the sums of `weight`, then of `bias`.
    sums: &'a mut [f32],
}
impl WithSimd for BlockParameters<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sizes { dim, seqlen, width, .. } = self.conv.sizes;
        let (weight, bias) = self.sums.split_at_mut(width * dim);
        for t in self.first..seqlen.min(self.first + TOKENS) {
            let g = &self.g[(self.b * seqlen + t) * dim..][..dim];
            map2(simd, bias, g, |sum, g| simd.add_f32s(sum, g));
            for (m, sums) in weight.chunks_exact_mut(dim.max(1)).rev().enumerate() {
                let x = token(self.conv, self.windows, self.b, t, m);
                map3(simd, sums, g, x, |sum, g, x| simd.mul_add_f32s(g, x, sum));
            }
        }
    }
}
