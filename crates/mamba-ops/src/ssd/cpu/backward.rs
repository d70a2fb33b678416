//! The backward pass of one block of heads, chunk by chunk from the last: everything within a chunk is recomputed
//! from the state kept before it. Names are those of the derivation in the `README.md`.

use pulp::{Simd, WithSimd};

use super::{Block, Chunk, Piece, Scan, Sizes, Steps, load_inputs, outputs, scale, scores};
use crate::host::{SharedMut, add_rows, parallel, uninit};
use crate::simd::Isa;
use crate::simd::matrix::{Product, Strided, Zeros, copy, padded, transpose};
use crate::simd::slice::{dot, map2, map3, mul_sigmoid, mul_silu, mul_silu_derivative, sum};

/// Gradients of the inputs, each laid out as its input.
pub(in super::super) struct Grads {
    pub x: Vec<f32>,
    pub dt: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub z: Vec<f32>,
    pub dt_bias: Vec<f32>,
    pub initial_state: Vec<f32>,
}

/// The backward pass; `grad_y` and `grad_state` are the gradients of the outputs, `checkpoints` from the forward.
pub(in super::super) fn backward(
    scan: &Scan,
    isa: Isa,
    checkpoints: &[f32],
    grad_y: Option<&[f32]>,
    grad_state: Option<&[f32]>,
) -> Grads {
    let Sizes { nheads, headdim, d_state, sequences, .. } = scan.sizes;
    let blocks = scan.blocks();
    let tokens = blocks.last().map_or(0, |last| last.tokens_before + last.len);
    let zeros = |len: usize| vec![0.0; len];
    let room = |len: usize| if blocks.is_empty() { zeros(len) } else { uninit(len) };
    let by_token = |len: usize| if blocks.is_empty() { zeros(len) } else { scan.packing.room(len) };
    // Sums over the heads of a block for b and c; everything else per (sequence, head).
    let mut x = by_token(scan.x.len());
    let mut dt = by_token(scan.dt.len());
    let mut z = by_token(scan.z.map_or(0, <[f32]>::len));
    let mut initial_state = room(sequences * nheads * headdim * d_state);
    let mut d = room(sequences * nheads * headdim);
    let [mut a, mut dt_bias] = [(); 2].map(|()| room(sequences * nheads));
    let [mut b_sums, mut c_sums] = [(); 2].map(|()| room(tokens * d_state));
    {
        let outputs = Outputs {
            x: SharedMut::new(&mut x),
            dt: SharedMut::new(&mut dt),
            z: SharedMut::new(&mut z),
            initial_state: SharedMut::new(&mut initial_state),
            a: SharedMut::new(&mut a),
            d: SharedMut::new(&mut d),
            dt_bias: SharedMut::new(&mut dt_bias),
            b_sums: SharedMut::new(&mut b_sums),
            c_sums: SharedMut::new(&mut c_sums),
        };
        parallel(blocks.len(), scan.operations() * 3, |index| {
            let block = blocks[index];
            let outputs = &outputs;
            isa.dispatch(BackwardBlock { scan, checkpoints, grad_y, grad_state, block, outputs })
        });
    }
    let mut d = add_rows(&d, nheads * headdim);
    if !scan.d_per_channel {
        d = d.chunks_exact(headdim.max(1)).map(|row| row.iter().sum()).collect();
    }
    Grads {
        x,
        dt,
        a: add_rows(&a, nheads),
        b: over_blocks(scan, &blocks, &b_sums),
        c: over_blocks(scan, &blocks, &c_sums),
        d,
        z,
        dt_bias: add_rows(&dt_bias, nheads),
        initial_state,
    }
}

/// Adds the sums of blocks, `(tokens, d_state)` each, up by group.
fn over_blocks(scan: &Scan, blocks: &[Block], sums: &[f32]) -> Vec<f32> {
    let Sizes { batch, seqlen, ngroups, d_state, .. } = scan.sizes;
    let mut out = vec![0.0; batch * seqlen * ngroups * d_state];
    for block in blocks {
        let sums = &sums[block.tokens_before * d_state..];
        for (t, row) in sums.chunks_exact(d_state.max(1)).take(block.len).enumerate() {
            let start = ((block.token + t) * ngroups + block.group) * d_state;
            out[start..start + d_state].iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
    }
    out
}

struct Outputs<'a> {
    x: SharedMut<'a>,
    dt: SharedMut<'a>,
    z: SharedMut<'a>,
    initial_state: SharedMut<'a>,
    a: SharedMut<'a>,
    d: SharedMut<'a>,
    dt_bias: SharedMut<'a>,
    b_sums: SharedMut<'a>,
    c_sums: SharedMut<'a>,
}

struct BackwardBlock<'a> {
    scan: &'a Scan<'a>,
    checkpoints: &'a [f32],
    grad_y: Option<&'a [f32]>,
    grad_state: Option<&'a [f32]>,
    block: Block,
    outputs: &'a Outputs<'a>,
}

/// What one head carries from chunk to chunk.
struct Carry {
    /// The gradient of the state after the chunk, then of that before it, `(d_state, headdim)`.
    state: Vec<f32>,
    a: f64,
    dt_bias: f64,
    d: Vec<f32>,
}

/// Room for one chunk of one head, and for the sums over the heads of a block.
struct Scratch {
    steps: Steps,
    /// `Bᵀ` and `Cᵀ`, `(d_state, q)`.
    b_columns: Vec<f32>,
    c_columns: Vec<f32>,
    /// `C·Bᵀ`, the decays between tokens, their product, and the gradient of that, `(q, q)`.
    scores: Vec<f32>,
    decays: Vec<f32>,
    decayed: Vec<f32>,
    grad_decayed: Vec<f32>,
    ones: Vec<f32>,
    /// The state before the chunk, `(d_state, headdim)`.
    state: Vec<f32>,
    /// `Δ·x`, `(q, headdim)`, its transposition and its gradient.
    inputs: Vec<f32>,
    input_columns: Vec<f32>,
    grad_inputs: Vec<f32>,
    /// `y` before the gate, `(q, headdim)`, its gradient and the transposition of that.
    y: Vec<f32>,
    grad_y: Vec<f32>,
    grad_y_columns: Vec<f32>,
    /// What one head gives to the gradient of `Cᵀ` through the state, `(d_state, q)`.
    grad_c: Vec<f32>,
    /// Per token: gradients of the log of its decay, through pairs of tokens, from and to the borders of the chunk.
    pairs: Vec<f32>,
    through_pairs: Vec<f32>,
    through_start: Vec<f32>,
    through_end: Vec<f32>,
    grad_dt: Vec<f32>,
    /// Sums over heads: gradients of the scores and their transposition, `(q, q)`, of `Bᵀ` and `Cᵀ`, `(d_state, q)`.
    score_sums: Vec<f32>,
    score_sums_columns: Vec<f32>,
    b_sums: Vec<f32>,
    c_sums: Vec<f32>,
}

impl WithSimd for BackwardBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scan, block, outputs, .. } = self;
        let Sizes { nheads, headdim, d_state, .. } = scan.sizes;
        let (p, q) = (padded(headdim), padded(scan.chunk));
        let mut carries: Vec<Carry> = (0..block.heads).map(|i| self.carry(block.first + i)).collect();
        let mut scratch = Scratch::new(scan);
        for chunk in scan.chunks(block).rev() {
            scratch.start_chunk(simd, scan, block, chunk);
            for (i, carry) in carries.iter_mut().enumerate() {
                self.head(simd, Piece { block, chunk, head: block.first + i }, carry, &mut scratch);
            }
            scratch.end_chunk(simd, scan, block, chunk);
            let (start, len) = ((block.tokens_before + chunk.first) * d_state, chunk.tokens * d_state);
            for (sums, out) in [(&scratch.b_sums, &outputs.b_sums), (&scratch.c_sums, &outputs.c_sums)] {
                // SAFETY: each block has its own sums.
                let out = unsafe { out.get(start, len) };
                transpose((sums, q), [d_state, chunk.tokens], (out, d_state));
            }
        }
        for (i, carry) in carries.iter().enumerate() {
            let row = block.sequence * nheads + block.first + i;
            // SAFETY: each head writes its own gradients.
            let [state, d, a, dt_bias] = unsafe {
                [
                    outputs.initial_state.get(row * headdim * d_state, headdim * d_state),
                    outputs.d.get(row * headdim, headdim),
                    outputs.a.get(row, 1),
                    outputs.dt_bias.get(row, 1),
                ]
            };
            transpose((&carry.state, p), [d_state, headdim], (state, d_state));
            d.copy_from_slice(&carry.d);
            (a[0], dt_bias[0]) = (carry.a as f32, carry.dt_bias as f32);
        }
    }
}

impl Scratch {
    fn new(scan: &Scan) -> Self {
        let Sizes { headdim, d_state, .. } = scan.sizes;
        let (p, q) = (padded(headdim), padded(scan.chunk));
        let zeros = |rows: usize, stride: usize| vec![0.0; rows * stride];
        Self {
            steps: Steps::new(scan.chunk),
            b_columns: zeros(d_state, q),
            c_columns: zeros(d_state, q),
            scores: zeros(scan.chunk, q),
            decays: zeros(scan.chunk, q),
            decayed: zeros(scan.chunk, q),
            grad_decayed: zeros(scan.chunk, q),
            ones: vec![1.0; q],
            state: zeros(d_state, p),
            inputs: zeros(scan.chunk, p),
            input_columns: zeros(headdim, q),
            grad_inputs: zeros(scan.chunk, p),
            y: zeros(scan.chunk, p),
            grad_y: zeros(scan.chunk, p),
            grad_y_columns: zeros(headdim, q),
            grad_c: zeros(d_state, q),
            pairs: zeros(1, q),
            through_pairs: zeros(1, q),
            through_start: zeros(1, q),
            through_end: zeros(1, q),
            grad_dt: zeros(1, q),
            score_sums: zeros(scan.chunk, q),
            score_sums_columns: zeros(scan.chunk, q),
            b_sums: zeros(d_state, q),
            c_sums: zeros(d_state, q),
        }
    }

    /// What all heads of a block share.
    #[inline(always)]
    fn start_chunk<S: Simd>(&mut self, simd: S, scan: &Scan, block: Block, chunk: Chunk) {
        let (q, stride, extents) =
            (padded(scan.chunk), scan.group_stride(), [chunk.tokens, scan.sizes.d_state]);
        transpose((scan.of_group(scan.b, block, chunk), stride), extents, (&mut self.b_columns, q));
        transpose((scan.of_group(scan.c, block, chunk), stride), extents, (&mut self.c_columns, q));
        scores(simd, scan, block, chunk, &self.b_columns, &mut self.scores);
        for sums in [&mut self.score_sums, &mut self.b_sums, &mut self.c_sums] {
            sums.fill(0.0);
        }
    }

    /// Adds what goes through the scores: `dCᵀ += Bᵀ·dGᵀ`, `dBᵀ += Cᵀ·dG`.
    #[inline(always)]
    fn end_chunk<S: Simd>(&mut self, simd: S, scan: &Scan, block: Block, chunk: Chunk) {
        let (q, tokens) = (padded(scan.chunk), chunk.tokens);
        transpose((&self.score_sums, q), [tokens, tokens], (&mut self.score_sums_columns, q));
        for (x, grads, out) in [
            (scan.b, &self.score_sums_columns, &mut self.c_sums),
            (scan.c, &self.score_sums, &mut self.b_sums),
        ] {
            simd.vectorize(Product {
                a: Strided::columns(scan.of_group(x, block, chunk), scan.group_stride()),
                b: (grads, q),
                out: (out, q),
                keep: 1.0,
                rows: scan.sizes.d_state,
                inner: tokens,
                columns: tokens,
                zeros: Zeros::Nowhere,
            });
        }
    }
}

impl BackwardBlock<'_> {
    fn carry(&self, head: usize) -> Carry {
        let mut state = vec![0.0; self.scan.state_len()];
        if let Some(grad_state) = self.grad_state {
            self.scan.load_state(grad_state, self.block.sequence, head, &mut state);
        }
        Carry { state, a: 0.0, dt_bias: 0.0, d: vec![0.0; self.scan.sizes.headdim] }
    }

    /// One chunk of one head.
    #[inline(always)]
    fn head<S: Simd>(&self, simd: S, piece: Piece, carry: &mut Carry, scratch: &mut Scratch) {
        self.recompute(simd, piece, scratch);
        self.through_gate(simd, piece, scratch);
        let headdim = self.scan.sizes.headdim;
        let (p, q, tokens) = (padded(headdim), padded(self.scan.chunk), piece.chunk.tokens);
        transpose((&scratch.inputs, p), [tokens, headdim], (&mut scratch.input_columns, q));
        transpose((&scratch.grad_y, p), [tokens, headdim], (&mut scratch.grad_y_columns, q));
        self.through_pairs(simd, piece, scratch);
        self.through_inputs(simd, piece, carry, scratch);
        let through_all = self.through_states(simd, piece, carry, scratch);
        self.finish(simd, piece, through_all, carry, scratch);
    }

    /// The steps, inputs, decays and first state of the chunk.
    #[inline(always)]
    fn recompute<S: Simd>(&self, simd: S, piece: Piece, scratch: &mut Scratch) {
        let (scan, chunk) = (self.scan, piece.chunk);
        let Sizes { headdim, d_state, .. } = scan.sizes;
        let (p, q) = (padded(headdim), padded(scan.chunk));
        scratch.steps.load(simd, scan, piece);
        load_inputs(simd, scan, piece, &scratch.steps, &mut scratch.inputs);
        let kept = &self.checkpoints[scan.checkpoint(piece)..];
        copy((kept, headdim), [d_state, headdim], (&mut scratch.state, p));
        let decays = scratch.decays.chunks_exact_mut(q);
        for (i, (decays, decayed)) in
            decays.zip(scratch.decayed.chunks_exact_mut(q)).take(chunk.tokens).enumerate()
        {
            scratch.steps.decay_row(simd, i, &scratch.ones, decays);
            decayed.copy_from_slice(decays);
            map2(simd, &mut decayed[..i + 1], &scratch.scores[i * q..], |decay, score| {
                simd.mul_f32s(decay, score)
            });
        }
    }

    /// The gradient of `y` before the gate, and that of `z`.
    #[inline(always)]
    fn through_gate<S: Simd>(&self, simd: S, piece: Piece, scratch: &mut Scratch) {
        let (scan, headdim) = (self.scan, self.scan.sizes.headdim);
        let Scratch { steps, state, decayed, inputs, y, grad_y, .. } = scratch;
        if scan.z.is_some() {
            outputs(simd, scan, piece, steps, Some(state), [decayed, inputs], y);
        }
        let rows = y.chunks_exact_mut(padded(headdim)).zip(grad_y.chunks_exact_mut(padded(headdim)));
        for (i, (y, grad)) in rows.take(piece.chunk.tokens).enumerate() {
            let (y, grad) = (&mut y[..headdim], &mut grad[..headdim]);
            let at = scan.at(piece, i);
            match self.grad_y {
                Some(grad_y) => grad.copy_from_slice(&grad_y[at..][..headdim]),
                None => grad.fill(0.0),
            }
            if let Some(z) = scan.z {
                let z = &z[at..][..headdim];
                scan.add_skip(simd, piece.head, &scan.x[at..][..headdim], y);
                map2(simd, y, grad, |y, grad| simd.mul_f32s(y, grad));
                mul_silu_derivative(simd, y, z);
                // SAFETY: each head writes its own channels.
                unsafe { self.outputs.z.get(at, headdim) }.copy_from_slice(y);
                mul_silu(simd, grad, z);
            }
        }
    }

    /// Pairs of tokens `j ≤ i` of the chunk: the gradients of their scores, and of the decays between them.
    #[inline(always)]
    fn through_pairs<S: Simd>(&self, simd: S, piece: Piece, scratch: &mut Scratch) {
        let (q, tokens) = (padded(self.scan.chunk), piece.chunk.tokens);
        simd.vectorize(Product {
            a: Strided::rows(&scratch.grad_y, padded(self.scan.sizes.headdim)),
            b: (&scratch.input_columns, q),
            out: (&mut scratch.grad_decayed, q),
            keep: 0.0,
            rows: tokens,
            inner: self.scan.sizes.headdim,
            columns: tokens,
            zeros: Zeros::AboveDiagonalOfResult,
        });
        // After row k, pairs[j] = Σ_{i ≥ k} T_ij; token k decays every pair j < k ≤ i.
        scratch.pairs.fill(0.0);
        for k in (0..tokens).rev() {
            let row = k * q..k * q + k + 1;
            let grads = &scratch.grad_decayed[row.clone()];
            map3(
                simd,
                &mut scratch.score_sums[row.clone()],
                grads,
                &scratch.decays[row.clone()],
                |s, g, d| simd.mul_add_e_f32s(g, d, s),
            );
            map3(simd, &mut scratch.pairs[..k + 1], grads, &scratch.decayed[row], |s, g, m| {
                simd.mul_add_e_f32s(g, m, s)
            });
            scratch.through_pairs[k] = sum(simd, &scratch.pairs[..k]);
        }
    }

    /// The gradient of the inputs, `w_j · (B_j R) + Σ_{i ≥ j} M_ij ĝ_i`.
    #[inline(always)]
    fn through_inputs<S: Simd>(&self, simd: S, piece: Piece, carry: &Carry, scratch: &mut Scratch) {
        let (scan, tokens) = (self.scan, piece.chunk.tokens);
        let Sizes { headdim, d_state, .. } = scan.sizes;
        let p = padded(headdim);
        simd.vectorize(Product {
            a: Strided::rows(scan.of_group(scan.b, piece.block, piece.chunk), scan.group_stride()),
            b: (&carry.state, p),
            out: (&mut scratch.grad_inputs, p),
            keep: 0.0,
            rows: tokens,
            inner: d_state,
            columns: headdim,
            zeros: Zeros::Nowhere,
        });
        let rows = scratch.grad_inputs.chunks_exact_mut(p).zip(scratch.inputs.chunks_exact(p));
        for (i, (grad, input)) in rows.take(tokens).enumerate() {
            scale(simd, scratch.steps.to_end[i], grad);
            scratch.through_end[i] = dot(simd, grad, input);
        }
        simd.vectorize(Product {
            a: Strided::columns(&scratch.decayed, padded(scan.chunk)),
            b: (&scratch.grad_y, p),
            out: (&mut scratch.grad_inputs, p),
            keep: 1.0,
            rows: tokens,
            inner: tokens,
            columns: headdim,
            zeros: Zeros::BelowDiagonalOfA,
        });
    }

    /// The gradients of `b` and `c` through the states at the borders, and of the state before the chunk; returns
    /// what every decay of the chunk gets, `e^{s_q} ⟨R, S⟩`.
    #[inline(always)]
    fn through_states<S: Simd>(
        &self,
        simd: S,
        piece: Piece,
        carry: &mut Carry,
        scratch: &mut Scratch,
    ) -> f32 {
        let (scan, tokens) = (self.scan, piece.chunk.tokens);
        let Sizes { headdim, d_state, .. } = scan.sizes;
        let (p, q) = (padded(headdim), padded(scan.chunk));
        for (columns, decays) in [
            (&mut scratch.grad_y_columns, &scratch.steps.from_start),
            (&mut scratch.input_columns, &scratch.steps.to_end),
        ] {
            for row in columns.chunks_exact_mut(q) {
                map2(simd, &mut row[..tokens], decays, |x, decay| simd.mul_f32s(x, decay));
            }
        }
        let product = |state, columns, out, keep| {
            simd.vectorize(Product {
                a: Strided::rows(state, p),
                b: (columns, q),
                out: (out, q),
                keep,
                rows: d_state,
                inner: headdim,
                columns: tokens,
                zeros: Zeros::Nowhere,
            });
        };
        product(&scratch.state, &scratch.grad_y_columns, &mut scratch.grad_c, 0.0);
        product(&carry.state, &scratch.input_columns, &mut scratch.b_sums, 1.0);
        scratch.through_start.fill(0.0);
        let rows = scratch.grad_c.chunks_exact(q).zip(scratch.c_columns.chunks_exact(q));
        for ((grad, c), sums) in rows.zip(scratch.c_sums.chunks_exact_mut(q)) {
            map2(simd, &mut sums[..tokens], grad, |sum, grad| simd.add_f32s(sum, grad));
            map3(simd, &mut scratch.through_start[..tokens], grad, c, |sum, grad, c| {
                simd.mul_add_e_f32s(grad, c, sum)
            });
        }
        let through_all = scratch.steps.total * dot(simd, &carry.state, &scratch.state);
        let rows = scratch.y.chunks_exact_mut(p).zip(scratch.grad_y.chunks_exact(p));
        for (i, (y, grad)) in rows.take(tokens).enumerate() {
            y.copy_from_slice(grad);
            scale(simd, scratch.steps.from_start[i], y);
        }
        simd.vectorize(Product {
            a: Strided::columns(scan.of_group(scan.c, piece.block, piece.chunk), scan.group_stride()),
            b: (&scratch.y, p),
            out: (&mut carry.state, p),
            keep: scratch.steps.total,
            rows: d_state,
            inner: tokens,
            columns: headdim,
            zeros: Zeros::Nowhere,
        });
        through_all
    }

    /// From the gradients of inputs and decays to those of `x`, `dt`, `a`, `d` and `dt_bias`.
    #[inline(always)]
    fn finish<S: Simd>(
        &self,
        simd: S,
        piece: Piece,
        through_all: f32,
        carry: &mut Carry,
        scratch: &mut Scratch,
    ) {
        let (scan, headdim, tokens) = (self.scan, self.scan.sizes.headdim, piece.chunk.tokens);
        let p = padded(headdim);
        let a = f64::from(scan.a[piece.head]);
        // Σ_{i ≥ k} through_start, Σ_{j < k} through_end.
        let mut after: f64 = scratch.through_start[..tokens].iter().map(|&x| f64::from(x)).sum();
        let mut before = 0.0;
        for k in 0..tokens {
            let decay = f64::from(through_all) + f64::from(scratch.through_pairs[k]) + after + before;
            after -= f64::from(scratch.through_start[k]);
            before += f64::from(scratch.through_end[k]);
            let (at, dt) = (scan.at(piece, k), scratch.steps.dt[k]);
            let x = &scan.x[at..][..headdim];
            let grad = &scratch.grad_inputs[k * p..][..headdim];
            let grad_y = &scratch.grad_y[k * p..][..headdim];
            carry.a += f64::from(dt) * decay;
            scratch.grad_dt[k] = (a * decay + f64::from(dot(simd, x, grad))) as f32;
            // SAFETY: each head writes its own channels.
            let grad_x = unsafe { self.outputs.x.get(at, headdim) };
            grad_x.copy_from_slice(grad);
            scale(simd, dt, grad_x);
            scan.add_skip(simd, piece.head, grad_y, grad_x);
            map3(simd, &mut carry.d, grad_y, x, |sum, grad, x| simd.mul_add_e_f32s(grad, x, sum));
        }
        let grad_dt = &mut scratch.grad_dt[..tokens];
        let (low, high) = scan.dt_limit;
        for (grad, dt) in grad_dt.iter_mut().zip(&scratch.steps.free) {
            if *dt < low || *dt > high {
                *grad = 0.0;
            }
        }
        if scan.dt_softplus {
            mul_sigmoid(simd, grad_dt, &scratch.steps.raw[..tokens]);
        }
        for (k, &grad) in grad_dt.iter().enumerate() {
            carry.dt_bias += f64::from(grad);
            // SAFETY: each head writes its own steps.
            let out = unsafe { self.outputs.dt.get(scan.step_at(piece, k), 1) };
            out[0] = grad;
        }
    }
}
