//! The backward scan, tile by tile from the last: states are recomputed from those kept before each tile.
//!
//! With `ĝ_t` the gradient of `y_t` before the gate, `H_t = C_t ĝ_t + a_{t+1} H_{t+1}` the gradient of `h_t` and
//! `a_t = exp(Δ_t A)`:
//! `dC_t = Σ ĝ_t h_t`, `dB_t = Σ H_t Δ_t u_t`, `dA = Σ_t Δ_t H_t a_t h_{t-1}`, `du_t = D ĝ_t + Δ_t Σ_n H_t B_t`,
//! `dΔ_t = u_t Σ_n H_t B_t + Σ_n A H_t a_t h_{t-1}`, `dD = Σ_t ĝ_t u_t`; the first state receives `a_1 H_1`.

use std::f32::consts::LN_2;

use pulp::{Simd, WithSimd};

use super::forward::Steps;
use super::{BLOCK, Block, Coefficients, Scan, Sizes, TILE, gather, scatter};
use crate::host::{SharedMut, add_rows, parallel, transposed, uninit};
use crate::layout::SequenceLayout;
use crate::simd::Isa;
use crate::simd::math::exp2;
use crate::simd::slice::{map2, mul_sigmoid, mul_silu, mul_silu_derivative};

/// Blocks that one task handles: sums over channels are formed per task, then added in the order of tasks.
const BLOCKS_PER_TASK: usize = 8;

/// Gradients of the inputs, each laid out as its input.
pub(in super::super) struct Grads {
    pub u: Vec<f32>,
    pub delta: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub z: Vec<f32>,
    pub delta_bias: Vec<f32>,
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
    let Sizes { dim, d_state, sequences, .. } = scan.sizes;
    let mut tokens = 0;
    let tasks: Vec<Task> = scan
        .blocks()
        .iter()
        .flat_map(|group| group.chunks(BLOCKS_PER_TASK))
        .map(|blocks| {
            let task = Task { blocks: blocks.to_vec(), tokens_before: tokens };
            tokens += task.len();
            task
        })
        .collect();
    // Sums over channels of varying b and c, one a task; sums over sequences of everything else per (sequence, channel).
    let varying = |x: &Coefficients| if x.is_varying() { tokens * d_state } else { 0 };
    let room = |len: usize| scan.packing.room(len);
    let [mut u, mut delta] = [(); 2].map(|()| room(scan.u.len()));
    let mut z = room(scan.z.map_or(0, <[f32]>::len));
    let mut initial_state = uninit(sequences * dim * d_state);
    let [mut a, mut b_constant, mut c_constant] = [(); 3].map(|()| uninit(sequences * dim * d_state));
    let [mut d, mut delta_bias] = [(); 2].map(|()| uninit(sequences * dim));
    let (mut b_sums, mut c_sums) = (uninit(varying(&scan.b)), uninit(varying(&scan.c)));
    {
        let outputs = Outputs {
            u: SharedMut::new(&mut u),
            delta: SharedMut::new(&mut delta),
            z: SharedMut::new(&mut z),
            initial_state: SharedMut::new(&mut initial_state),
            a: SharedMut::new(&mut a),
            b: SharedMut::new(&mut b_constant),
            c: SharedMut::new(&mut c_constant),
            d: SharedMut::new(&mut d),
            delta_bias: SharedMut::new(&mut delta_bias),
            b_sums: SharedMut::new(&mut b_sums),
            c_sums: SharedMut::new(&mut c_sums),
        };
        parallel(tasks.len(), scan.operations() * 3, |index| {
            let (task, outputs) = (&tasks[index], &outputs);
            isa.dispatch(BackwardTask { scan, checkpoints, grad_y, grad_state, task, outputs })
        });
    }
    let by_state = |values: Vec<f32>| add_rows(&values, dim * d_state);
    let by_channel = |values: Vec<f32>| add_rows(&values, dim);
    let coefficients = |x: &Coefficients, constant: Vec<f32>, sums: Vec<f32>| match x {
        Coefficients::Constant(_) => by_state(constant),
        Coefficients::Varying { groups, .. } => varying_gradient(scan, *groups, &tasks, &sums),
    };
    Grads {
        u,
        delta,
        a: by_state(a),
        b: coefficients(&scan.b, b_constant, b_sums),
        c: coefficients(&scan.c, c_constant, c_sums),
        d: by_channel(d),
        z,
        delta_bias: by_channel(delta_bias),
        initial_state,
    }
}

/// Adds the sums of tasks, `(tokens, d_state)` each, up by group, in the layout of the input.
fn varying_gradient(scan: &Scan, groups: usize, tasks: &[Task], sums: &[f32]) -> Vec<f32> {
    let Sizes { batch, dim, seqlen, d_state, .. } = scan.sizes;
    let mut out = vec![0.0; batch * seqlen * groups * d_state]; // (batch, seqlen, ngroups, d_state)
    for task in tasks {
        let Block { row, start, first, .. } = task.blocks[0];
        let (group, sums) = (first / (dim / groups), &sums[task.tokens_before * d_state..]);
        for (t, sums) in sums.chunks_exact(d_state.max(1)).take(task.len()).enumerate() {
            let start = ((row * seqlen + start + t) * groups + group) * d_state;
            out[start..start + d_state].iter_mut().zip(sums).for_each(|(sum, value)| *sum += value);
        }
    }
    match scan.layout {
        SequenceLayout::ChannelsLast => out,
        SequenceLayout::ChannelsFirst => transposed(&out, seqlen, groups * d_state),
    }
}

struct Outputs<'a> {
    u: SharedMut<'a>,
    delta: SharedMut<'a>,
    z: SharedMut<'a>,
    initial_state: SharedMut<'a>,
    a: SharedMut<'a>,
    b: SharedMut<'a>,
    c: SharedMut<'a>,
    d: SharedMut<'a>,
    delta_bias: SharedMut<'a>,
    b_sums: SharedMut<'a>,
    c_sums: SharedMut<'a>,
}

/// Neighbouring blocks of one `(sequence, group)`: never none.
struct Task {
    blocks: Vec<Block>,
    /// Tokens of all tasks before this one.
    tokens_before: usize,
}

impl Task {
    /// Tokens of the sequence.
    fn len(&self) -> usize {
        self.blocks[0].len
    }
}

struct BackwardTask<'a> {
    scan: &'a Scan<'a>,
    checkpoints: &'a [f32],
    grad_y: Option<&'a [f32]>,
    grad_state: Option<&'a [f32]>,
    task: &'a Task,
    outputs: &'a Outputs<'a>,
}

impl WithSimd for BackwardTask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.scan.b.is_varying(), self.scan.c.is_varying()) {
            (true, true) => self.run::<S, true, true>(simd),
            (true, false) => self.run::<S, true, false>(simd),
            (false, true) => self.run::<S, false, true>(simd),
            (false, false) => self.run::<S, false, false>(simd),
        }
    }
}

/// What one block carries from tile to tile, in the order of [`place`](super::place) where it has states.
struct Carry {
    block: Block,
    steps: Steps,
    /// `a_{t+1} H_{t+1}`.
    h: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: [f32; BLOCK],
    delta_bias: [f32; BLOCK],
}

/// Room for one tile of one block.
struct Scratch {
    y: [f32; TILE * BLOCK],
    z: [f32; TILE * BLOCK],
    /// The gradient of `y` after the gate, then before it.
    gated: [f32; TILE * BLOCK],
    g: [f32; TILE * BLOCK],
    u: [f32; TILE * BLOCK],
    delta: [f32; TILE * BLOCK],
    /// Varying `b` and `c` of the tile, `(d_state, TILE)`.
    b: Vec<f32>,
    c: Vec<f32>,
    /// Sums of the gradients of varying `b` and `c` over blocks, per lane: `(d_state, TILE, lanes)`.
    b_sums: Vec<f32>,
    c_sums: Vec<f32>,
}

/// States that go through a tile at once: one alone waits for its own results.
const STATES: usize = 2;

/// One vector of channels over one tile, token by token.
struct Lanes<V> {
    tokens: usize,
    delta: [V; TILE],
    /// `Δ·u`.
    input: [V; TILE],
    g: [V; TILE],
    y: [V; TILE],
    /// `Σ_n H B`.
    through_input: [V; TILE],
    /// `Σ_n A log2(e) H a h_{t-1}`.
    through_decay: [V; TILE],
    /// Of the states that go through at once: before each token and after the last, and their decays.
    states: [[V; STATES]; TILE + 1],
    decays: [[V; STATES]; TILE],
}

impl BackwardTask<'_> {
    #[inline(always)]
    fn run<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(self, simd: S) {
        let Self { scan, task, outputs, .. } = self;
        let (Sizes { dim, d_state, .. }, blocks) = (scan.sizes, &task.blocks);
        let lanes = S::F32_LANES;
        let mut carries: Vec<Carry> = blocks.iter().map(|&block| self.carry::<S>(block)).collect();
        let tile_len = |varies: bool, lanes: usize| if varies { TILE * d_state * lanes } else { 0 };
        let mut scratch = Scratch {
            y: [0.0; TILE * BLOCK],
            z: [0.0; TILE * BLOCK],
            gated: [0.0; TILE * BLOCK],
            g: [0.0; TILE * BLOCK],
            u: [0.0; TILE * BLOCK],
            delta: [0.0; TILE * BLOCK],
            b: vec![0.0; tile_len(B_VARIES, 1)],
            c: vec![0.0; tile_len(C_VARIES, 1)],
            b_sums: vec![0.0; tile_len(B_VARIES, lanes)],
            c_sums: vec![0.0; tile_len(C_VARIES, lanes)],
        };
        for tile in (0..blocks[0].tiles()).rev() {
            let (first, tokens) = blocks[0].tile(tile);
            scratch.b_sums.fill(0.0);
            scratch.c_sums.fill(0.0);
            for (varies, x, out) in [(B_VARIES, &scan.b, &mut scratch.b), (C_VARIES, &scan.c, &mut scratch.c)]
            {
                for t in 0..if varies && d_state > 0 { tokens } else { 0 } {
                    let row = x.row(&scan.sizes, &blocks[0], first + t);
                    let values = &x.varying()[row..][..d_state];
                    out[t..].iter_mut().step_by(TILE).zip(values).for_each(|(out, value)| *out = *value);
                }
            }
            for (i, carry) in carries.iter_mut().enumerate() {
                let next = match blocks.get(i + 1) {
                    Some(&next) => Some((next, tile)),
                    None => tile.checked_sub(1).map(|tile| (blocks[0], tile)),
                };
                if let Some((block, tile)) = next {
                    scan.prefetch(&[Some(scan.u), Some(scan.delta), scan.z, self.grad_y], block, tile);
                }
                self.tile::<S, B_VARIES, C_VARIES>(simd, tile, first, tokens, carry, &mut scratch);
            }
            for (varies, sums, out) in
                [(B_VARIES, &scratch.b_sums, &outputs.b_sums), (C_VARIES, &scratch.c_sums, &outputs.c_sums)]
            {
                if varies {
                    // SAFETY: each task has its own sums.
                    let out = unsafe { out.get((task.tokens_before + first) * d_state, tokens * d_state) };
                    for (i, sums) in S::as_simd_f32s(sums).0.chunks_exact(TILE).enumerate() {
                        for (out, &sum) in out[i..].iter_mut().step_by(d_state).zip(sums) {
                            *out = simd.reduce_sum_f32s(sum);
                        }
                    }
                }
            }
        }
        for carry in &carries {
            let row = carry.block.sequence * dim + carry.block.first;
            let (start, len) = (row * d_state, carry.block.channels * d_state);
            let states = [
                (&carry.h, &outputs.initial_state),
                (&carry.a, &outputs.a),
                (&carry.b, &outputs.b),
                (&carry.c, &outputs.c),
            ];
            for (values, out) in states {
                // SAFETY: each block writes its own channels.
                scatter(values, lanes, d_state, 1.0, unsafe { out.get(start, len) });
            }
            for (values, out) in [(&carry.d, &outputs.d), (&carry.delta_bias, &outputs.delta_bias)] {
                // SAFETY: each block writes its own channels.
                let out = unsafe { out.get(row, carry.block.channels) };
                out.copy_from_slice(&values[..carry.block.channels]);
            }
        }
    }

    #[inline(always)]
    fn carry<S: Simd>(&self, block: Block) -> Carry {
        let Sizes { dim, d_state, .. } = self.scan.sizes;
        let row = block.sequence * dim + block.first;
        let zeros = || vec![0.0; BLOCK * d_state];
        Carry {
            block,
            steps: Steps::new::<S>(self.scan, block),
            h: gather(self.grad_state, S::F32_LANES, d_state, block, row, 1.0),
            a: zeros(),
            b: zeros(),
            c: zeros(),
            d: [0.0; BLOCK],
            delta_bias: [0.0; BLOCK],
        }
    }

    /// One tile of one block: forward again to have the states, then backward.
    #[inline(always)]
    fn tile<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(
        &self,
        simd: S,
        tile: usize,
        first: usize,
        tokens: usize,
        carry: &mut Carry,
        scratch: &mut Scratch,
    ) {
        let Self { scan, outputs, .. } = *self;
        let (block, len) = (carry.block, tokens * BLOCK);
        let state_len = scan.sizes.d_state * BLOCK;
        let kept = &self.checkpoints[(block.tiles_before + tile) * state_len..][..state_len];
        carry.steps.load(simd, scan, first, tokens);
        let (gated, g, gate) = (&mut scratch.gated[..len], &mut scratch.g[..len], &mut scratch.z[..len]);
        match self.grad_y {
            Some(grad_y) => scan.load(grad_y, block, first, gated),
            None => gated.fill(0.0),
        }
        g.copy_from_slice(gated);
        if let Some(z) = scan.z {
            scan.load(z, block, first, gate);
            mul_silu(simd, g, gate);
        }
        for v in 0..BLOCK / S::F32_LANES {
            self.vector::<S, B_VARIES, C_VARIES>(simd, v, tokens, kept, carry, scratch);
        }

        let (y, delta) = (&mut scratch.y[..len], &mut scratch.delta[..len]);
        if scan.z.is_some() {
            map2(simd, y, &scratch.gated, |y, g| simd.mul_f32s(y, g));
            mul_silu_derivative(simd, y, &scratch.z[..len]);
            // SAFETY: each block writes its own channels.
            unsafe { scan.store(&outputs.z, block, first, y) };
        }
        if scan.delta_softplus {
            mul_sigmoid(simd, delta, &carry.steps.raw_delta[..len]);
        }
        for row in delta.chunks_exact(BLOCK) {
            map2(simd, &mut carry.delta_bias, row, |sum, g| simd.add_f32s(sum, g));
        }
        // SAFETY: each block writes its own channels.
        unsafe {
            scan.store(&outputs.delta, block, first, delta);
            scan.store(&outputs.u, block, first, &scratch.u[..len]);
        }
    }

    /// One vector of channels through one tile: `y` and the gradients of `u` and `delta` into the scratch.
    #[inline(always)]
    fn vector<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(
        &self,
        simd: S,
        v: usize,
        tokens: usize,
        kept: &[f32],
        carry: &mut Carry,
        scratch: &mut Scratch,
    ) {
        let (n, vectors) = (self.scan.sizes.d_state, BLOCK / S::F32_LANES);
        let zero = simd.splat_f32s(0.0);
        let mut lanes = Lanes {
            tokens,
            delta: [zero; TILE],
            input: [zero; TILE],
            g: [zero; TILE],
            y: [zero; TILE],
            through_input: [zero; TILE],
            through_decay: [zero; TILE],
            states: [[zero; STATES]; TILE + 1],
            decays: [[zero; STATES]; TILE],
        };
        let steps = &carry.steps;
        let [delta, u] = [&steps.delta, &steps.u].map(|x| S::as_simd_f32s(x).0);
        let (d, g) = (S::as_simd_f32s(&steps.d).0[v], S::as_simd_f32s(&scratch.g).0);
        for t in 0..tokens {
            let at = t * vectors + v;
            lanes.delta[t] = delta[at];
            lanes.input[t] = simd.mul_f32s(delta[at], u[at]);
            lanes.g[t] = g[at];
            lanes.y[t] = simd.mul_f32s(d, u[at]);
        }
        let pairs = n / STATES * STATES;
        for i in (0..pairs).step_by(STATES) {
            states::<S, STATES, B_VARIES, C_VARIES>(simd, [v * n + i, i], kept, carry, &mut lanes, scratch);
        }
        for i in pairs..n {
            states::<S, 1, B_VARIES, C_VARIES>(simd, [v * n + i, i], kept, carry, &mut lanes, scratch);
        }
        let u = S::as_simd_f32s(&carry.steps.u).0;
        let grad_d = &mut S::as_mut_simd_f32s(&mut carry.d).0[v];
        let y = S::as_mut_simd_f32s(&mut scratch.y).0;
        let grad_u = S::as_mut_simd_f32s(&mut scratch.u).0;
        let grad_delta = S::as_mut_simd_f32s(&mut scratch.delta).0;
        let ln_2 = simd.splat_f32s(LN_2);
        for t in 0..tokens {
            let at = t * vectors + v;
            let (g, through_input) = (lanes.g[t], lanes.through_input[t]);
            y[at] = lanes.y[t];
            grad_u[at] = simd.mul_add_e_f32s(lanes.delta[t], through_input, simd.mul_f32s(d, g));
            let through_decay = simd.mul_f32s(ln_2, lanes.through_decay[t]);
            grad_delta[at] = simd.mul_add_e_f32s(u[at], through_input, through_decay);
            *grad_d = simd.mul_add_e_f32s(g, u[at], *grad_d);
        }
    }
}

/// `K` states from the `i`-th of one vector of channels through one tile, there and back; `at` is their place in what
/// is carried.
#[inline(always)]
fn states<S: Simd, const K: usize, const B_VARIES: bool, const C_VARIES: bool>(
    simd: S,
    [at, i]: [usize; 2],
    kept: &[f32],
    carry: &mut Carry,
    lanes: &mut Lanes<S::f32s>,
    scratch: &mut Scratch,
) {
    let tokens = lanes.tokens.min(TILE);
    let a = carried::<S, K>(simd, &carry.steps.a, at, true);
    let (b, c) = (
        carried::<S, K>(simd, &carry.steps.b, at, !B_VARIES),
        carried::<S, K>(simd, &carry.steps.c, at, !C_VARIES),
    );
    let (b_rows, c_rows) =
        (varying::<K>(&scratch.b, i, tokens, B_VARIES), varying::<K>(&scratch.c, i, tokens, C_VARIES));

    let mut h = carried::<S, K>(simd, kept, at, true);
    for t in 0..tokens {
        let mut y = lanes.y[t];
        for k in 0..K {
            let decay = exp2(simd, simd.mul_f32s(lanes.delta[t], a[k]));
            let b = if B_VARIES { simd.splat_f32s(b_rows[k][t]) } else { b[k] };
            let c = if C_VARIES { simd.splat_f32s(c_rows[k][t]) } else { c[k] };
            lanes.states[t][k] = h[k];
            lanes.decays[t][k] = decay;
            h[k] = simd.mul_add_e_f32s(decay, h[k], simd.mul_f32s(lanes.input[t], b));
            y = simd.mul_add_e_f32s(h[k], c, y);
        }
        lanes.y[t] = y;
    }

    let (mut grad_h, mut grad_a) =
        (carried::<S, K>(simd, &carry.h, at, true), carried::<S, K>(simd, &carry.a, at, true));
    let (mut grad_b, mut grad_c) =
        (carried::<S, K>(simd, &carry.b, at, !B_VARIES), carried::<S, K>(simd, &carry.c, at, !C_VARIES));
    let sums = |varies: bool| if varies { i * TILE..(i + K) * TILE } else { 0..0 };
    let b_sums = &mut S::as_mut_simd_f32s(&mut scratch.b_sums).0[sums(B_VARIES)];
    let c_sums = &mut S::as_mut_simd_f32s(&mut scratch.c_sums).0[sums(C_VARIES)];
    for t in (0..tokens).rev() {
        let (delta, input, g) = (lanes.delta[t], lanes.input[t], lanes.g[t]);
        let (mut through_input, mut through_decay) = (lanes.through_input[t], lanes.through_decay[t]);
        for k in 0..K {
            let b = if B_VARIES { simd.splat_f32s(b_rows[k][t]) } else { b[k] };
            let c = if C_VARIES { simd.splat_f32s(c_rows[k][t]) } else { c[k] };
            let c_sum = if C_VARIES { &mut c_sums[k * TILE + t] } else { &mut grad_c[k] };
            *c_sum = simd.mul_add_e_f32s(g, h[k], *c_sum);
            h[k] = lanes.states[t][k];
            let grad = simd.mul_add_e_f32s(c, g, grad_h[k]);
            let b_sum = if B_VARIES { &mut b_sums[k * TILE + t] } else { &mut grad_b[k] };
            *b_sum = simd.mul_add_e_f32s(grad, input, *b_sum);
            through_input = simd.mul_add_e_f32s(grad, b, through_input);
            grad_h[k] = simd.mul_f32s(grad, lanes.decays[t][k]);
            let exponent = simd.mul_f32s(grad_h[k], h[k]);
            through_decay = simd.mul_add_e_f32s(exponent, a[k], through_decay);
            grad_a[k] = simd.mul_add_e_f32s(exponent, delta, grad_a[k]);
        }
        (lanes.through_input[t], lanes.through_decay[t]) = (through_input, through_decay);
    }
    for (present, values, out) in [
        (true, grad_h, &mut carry.h),
        (true, grad_a, &mut carry.a),
        (!B_VARIES, grad_b, &mut carry.b),
        (!C_VARIES, grad_c, &mut carry.c),
    ] {
        if present {
            S::as_mut_simd_f32s(out).0[at..at + K].copy_from_slice(&values);
        }
    }
}

/// `K` neighbouring vectors of what is carried; zeros if it is not.
#[inline(always)]
fn carried<S: Simd, const K: usize>(simd: S, x: &[f32], at: usize, present: bool) -> [S::f32s; K] {
    let mut out = [simd.splat_f32s(0.0); K];
    if present {
        out.copy_from_slice(&S::as_simd_f32s(x).0[at..at + K]);
    }
    out
}

/// The values of `K` neighbouring states of varying `b` or `c` over a tile; nothing if it does not vary.
#[inline(always)]
fn varying<const K: usize>(x: &[f32], i: usize, tokens: usize, varies: bool) -> [&[f32]; K] {
    let mut out = [&x[..0]; K];
    if varies {
        out.iter_mut().zip(x[i * TILE..].chunks(TILE)).for_each(|(out, row)| *out = &row[..tokens]);
    }
    out
}
