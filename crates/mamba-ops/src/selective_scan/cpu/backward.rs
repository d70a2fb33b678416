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
    let Sizes { batch, dim, seqlen, d_state, .. } = scan.sizes;
    let tasks: Vec<Vec<Block>> =
        scan.blocks().iter().flat_map(|group| group.chunks(BLOCKS_PER_TASK).map(<[Block]>::to_vec)).collect();
    // Sums over channels of varying b and c, one a task; sums over the batch of everything else per (batch, channel).
    let varying = |x: &Coefficients| if x.is_varying() { tasks.len() * seqlen * d_state } else { 0 };
    let mut u = uninit(scan.u.len());
    let mut delta = uninit(scan.u.len());
    let mut z = uninit(scan.z.map_or(0, <[f32]>::len));
    let mut initial_state = uninit(batch * dim * d_state);
    let [mut a, mut b_constant, mut c_constant] = [(); 3].map(|()| uninit(batch * dim * d_state));
    let [mut d, mut delta_bias] = [(); 2].map(|()| uninit(batch * dim));
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
            let blocks = &tasks[index];
            isa.dispatch(BackwardTask {
                scan,
                checkpoints,
                grad_y,
                grad_state,
                index,
                blocks,
                outputs: &outputs,
            })
        });
    }
    let over_batch = |values: Vec<f32>| add_rows(&values, values.len() / batch.max(1));
    let coefficients = |x: &Coefficients, constant: Vec<f32>, sums: Vec<f32>| match x {
        Coefficients::Constant(_) => over_batch(constant),
        Coefficients::Varying { groups, .. } => varying_gradient(scan, *groups, &tasks, &sums),
    };
    Grads {
        u,
        delta,
        a: over_batch(a),
        b: coefficients(&scan.b, b_constant, b_sums),
        c: coefficients(&scan.c, c_constant, c_sums),
        d: over_batch(d),
        z,
        delta_bias: over_batch(delta_bias),
        initial_state,
    }
}

/// Adds the sums `(task, seqlen, d_state)` up by group, in the layout of the input.
fn varying_gradient(scan: &Scan, groups: usize, tasks: &[Vec<Block>], sums: &[f32]) -> Vec<f32> {
    let Sizes { batch, dim, seqlen, d_state, .. } = scan.sizes;
    let mut out = vec![0.0; batch * seqlen * groups * d_state]; // (batch, seqlen, ngroups, d_state)
    for (task, sums) in tasks.iter().zip(sums.chunks_exact((seqlen * d_state).max(1))) {
        let group = task[0].first / (dim / groups);
        for (t, row) in sums.chunks_exact(d_state).enumerate() {
            let start = ((task[0].batch * seqlen + t) * groups + group) * d_state;
            out[start..start + d_state].iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
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

/// Blocks of one `(batch, group)`.
struct BackwardTask<'a> {
    scan: &'a Scan<'a>,
    checkpoints: &'a [f32],
    grad_y: Option<&'a [f32]>,
    grad_state: Option<&'a [f32]>,
    index: usize,
    blocks: &'a [Block],
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
    /// States and decays, `(vector, token, d_state)`.
    states: Vec<f32>,
    decays: Vec<f32>,
    y: [f32; TILE * BLOCK],
    z: [f32; TILE * BLOCK],
    g: [f32; TILE * BLOCK],
    u: [f32; TILE * BLOCK],
    delta: [f32; TILE * BLOCK],
    /// Sums of varying `b` and `c` over blocks, per lane: `(token, d_state, lanes)`.
    b: Vec<f32>,
    c: Vec<f32>,
}

impl BackwardTask<'_> {
    #[inline(always)]
    fn run<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(self, simd: S) {
        let Self { scan, index, blocks, outputs, .. } = self;
        let Sizes { dim, seqlen, d_state, .. } = scan.sizes;
        let lanes = S::F32_LANES;
        let mut carries: Vec<Carry> = blocks.iter().map(|&block| self.carry::<S>(block)).collect();
        let mut scratch = Scratch {
            states: vec![0.0; TILE * BLOCK * d_state],
            decays: vec![0.0; TILE * BLOCK * d_state],
            y: [0.0; TILE * BLOCK],
            z: [0.0; TILE * BLOCK],
            g: [0.0; TILE * BLOCK],
            u: [0.0; TILE * BLOCK],
            delta: [0.0; TILE * BLOCK],
            b: vec![0.0; if B_VARIES { TILE * d_state * lanes } else { 0 }],
            c: vec![0.0; if C_VARIES { TILE * d_state * lanes } else { 0 }],
        };
        for tile in (0..scan.tiles()).rev() {
            let first = tile * TILE;
            let tokens = TILE.min(seqlen - first);
            scratch.b.fill(0.0);
            scratch.c.fill(0.0);
            for carry in &mut carries {
                self.tile::<S, B_VARIES, C_VARIES>(simd, tile, first, tokens, carry, &mut scratch);
            }
            for (varies, sums, out) in
                [(B_VARIES, &scratch.b, &outputs.b_sums), (C_VARIES, &scratch.c, &outputs.c_sums)]
            {
                if varies {
                    // SAFETY: each task has its own sums.
                    let out = unsafe { out.get((index * seqlen + first) * d_state, tokens * d_state) };
                    for (out, &sum) in out.iter_mut().zip(S::as_simd_f32s(sums).0) {
                        *out = simd.reduce_sum_f32s(sum);
                    }
                }
            }
        }
        for carry in &carries {
            let row = carry.block.batch * dim + carry.block.first;
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
        let row = block.batch * dim + block.first;
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
        let d_state = scan.sizes.d_state;
        let (block, len) = (carry.block, tokens * BLOCK);
        let kept =
            &self.checkpoints[(block.index * scan.tiles() + tile) * d_state * BLOCK..][..d_state * BLOCK];
        let mut h = kept.to_vec();
        carry.steps.load(simd, scan, first, tokens);
        let states = S::as_mut_simd_f32s(&mut scratch.states).0;
        let decays = S::as_mut_simd_f32s(&mut scratch.decays).0;
        let y = &mut scratch.y[..len];
        carry.steps.scan::<S, B_VARIES, C_VARIES>(
            simd,
            scan,
            &mut h,
            y,
            #[inline(always)]
            |at, h, decay| {
                states[at] = h;
                decays[at] = decay;
            },
        );

        let g = &mut scratch.g[..len];
        match self.grad_y {
            Some(grad_y) => scan.load(grad_y, block, first, g),
            None => g.fill(0.0),
        }
        if let Some(z) = scan.z {
            let gate = &mut scratch.z[..len];
            scan.load(z, block, first, gate);
            // dz = grad · y · silu'(z), then g = grad · silu(z).
            map2(simd, y, g, |y, g| simd.mul_f32s(y, g));
            mul_silu_derivative(simd, y, gate);
            // SAFETY: each block writes its own channels.
            unsafe { scan.store(&outputs.z, block, first, y) };
            mul_silu(simd, g, gate);
        }
        self.reverse::<S, B_VARIES, C_VARIES>(simd, first, tokens, kept, carry, scratch);

        let delta = &mut scratch.delta[..len];
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

    /// The recurrence of the gradients through one tile.
    #[inline(always)]
    fn reverse<S: Simd, const B_VARIES: bool, const C_VARIES: bool>(
        &self,
        simd: S,
        first: usize,
        tokens: usize,
        kept: &[f32],
        carry: &mut Carry,
        scratch: &mut Scratch,
    ) {
        let scan = self.scan;
        let (n, vectors) = (scan.sizes.d_state, BLOCK / S::F32_LANES);
        let Carry { block, steps, .. } = carry;
        let [a, b, c] = [&steps.a, &steps.b, &steps.c].map(|x| S::as_simd_f32s(x).0);
        let [delta, u, d] = [&steps.delta[..], &steps.u, &steps.d].map(|x| S::as_simd_f32s(x).0);
        let [states, decays] = [&scratch.states, &scratch.decays].map(|x| S::as_simd_f32s(x).0);
        let (kept, g) = (S::as_simd_f32s(kept).0, S::as_simd_f32s(&scratch.g).0);
        let grad_u = S::as_mut_simd_f32s(&mut scratch.u).0;
        let grad_delta = S::as_mut_simd_f32s(&mut scratch.delta).0;
        let b_sums = S::as_mut_simd_f32s(&mut scratch.b).0;
        let c_sums = S::as_mut_simd_f32s(&mut scratch.c).0;
        let grad_h = S::as_mut_simd_f32s(&mut carry.h).0;
        let [grad_a, grad_b, grad_c] =
            [&mut carry.a, &mut carry.b, &mut carry.c].map(|x| S::as_mut_simd_f32s(x).0);
        let grad_d = S::as_mut_simd_f32s(&mut carry.d).0;
        let ln_2 = simd.splat_f32s(LN_2);
        for v in 0..vectors {
            let a = &a[v * n..][..n];
            let b_constant = if B_VARIES { &[] } else { &b[v * n..][..n] };
            let c_constant = if C_VARIES { &[] } else { &c[v * n..][..n] };
            let grad_h = &mut grad_h[v * n..][..n];
            let grad_a = &mut grad_a[v * n..][..n];
            let grad_b = &mut grad_b[v * n..][..n];
            let grad_c = &mut grad_c[v * n..][..n];
            for t in (0..tokens).rev() {
                let at = t * vectors + v;
                let (delta, u, g) = (delta[at], u[at], g[at]);
                let input = simd.mul_f32s(delta, u);
                let state = &states[(v * TILE + t) * n..][..n];
                let decay = &decays[(v * TILE + t) * n..][..n];
                let before =
                    if t == 0 { &kept[v * n..][..n] } else { &states[(v * TILE + t - 1) * n..][..n] };
                let b_row = scan.b.row(&scan.sizes, block.batch, first + t, block.first);
                let c_row = scan.c.row(&scan.sizes, block.batch, first + t, block.first);
                let b_values = if B_VARIES { &scan.b.varying()[b_row..][..n] } else { &[] };
                let c_values = if C_VARIES { &scan.c.varying()[c_row..][..n] } else { &[] };
                let b_sums = if B_VARIES { &mut b_sums[t * n..][..n] } else { &mut [] };
                let c_sums = if C_VARIES { &mut c_sums[t * n..][..n] } else { &mut [] };
                let mut through_input = simd.splat_f32s(0.0); // Σ_n H B
                let mut through_decay = simd.splat_f32s(0.0); // Σ_n A log2(e) H a h_{t-1}
                for i in 0..n {
                    let b = if B_VARIES { simd.splat_f32s(b_values[i]) } else { b_constant[i] };
                    let c = if C_VARIES { simd.splat_f32s(c_values[i]) } else { c_constant[i] };
                    let c_sum = if C_VARIES { &mut c_sums[i] } else { &mut grad_c[i] };
                    *c_sum = simd.mul_add_e_f32s(g, state[i], *c_sum);
                    let h = simd.mul_add_e_f32s(c, g, grad_h[i]);
                    let b_sum = if B_VARIES { &mut b_sums[i] } else { &mut grad_b[i] };
                    *b_sum = simd.mul_add_e_f32s(h, input, *b_sum);
                    through_input = simd.mul_add_e_f32s(h, b, through_input);
                    let carried = simd.mul_f32s(h, decay[i]);
                    let exponent = simd.mul_f32s(carried, before[i]);
                    through_decay = simd.mul_add_e_f32s(exponent, a[i], through_decay);
                    grad_a[i] = simd.mul_add_e_f32s(exponent, delta, grad_a[i]);
                    grad_h[i] = carried;
                }
                grad_u[at] = simd.mul_add_e_f32s(delta, through_input, simd.mul_f32s(d[v], g));
                grad_delta[at] = simd.mul_add_e_f32s(u, through_input, simd.mul_f32s(ln_2, through_decay));
                grad_d[v] = simd.mul_add_e_f32s(g, u, grad_d[v]);
            }
        }
    }
}
