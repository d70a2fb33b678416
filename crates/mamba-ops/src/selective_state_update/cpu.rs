//! The step on slices, vectorised along `d_state`: one pass over the state, a row of it a channel.

use std::f32::consts::LOG2_E;

use pulp::{Simd, WithSimd};

use super::Sizes;
use crate::host::{SharedMut, parallel, uninit};
use crate::simd::Isa;
use crate::simd::math::{clamp, exp, exp2};
use crate::simd::slice::{map, map2, map3, mul_silu, softplus};

/// Most rows that one task handles.
pub(crate) const ROWS: usize = 256;

/// About how many elements of the state one task handles.
const ELEMENTS: usize = 1 << 13;

/// The inputs as slices, in the layouts of [`SelectiveStateUpdate`](super::SelectiveStateUpdate).
pub(crate) struct Update<'a> {
    pub sizes: Sizes,
    pub x: &'a [f32],
    pub dt: &'a [f32],
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub c: &'a [f32],
    pub d: Option<&'a [f32]>,
    pub d_per_head: bool,
    pub z: Option<&'a [f32]>,
    pub dt_bias: Option<&'a [f32]>,
    pub bias_per_head: bool,
    pub dt_softplus: bool,
    pub dt_limit: (f32, f32),
    /// Of each batch element the place of its state, none for padding; its own if absent.
    pub states: Option<&'a [Option<usize>]>,
}

/// Moves the state on and returns `y`.
pub(super) fn update(update: &Update, isa: Isa, state: &mut [f32]) -> Vec<f32> {
    let Sizes { batch, tokens, nheads, headdim, d_state, a_per_head, .. } = update.sizes;
    let channels = nheads * headdim;
    let rows = rows_of_task(d_state);
    let pieces = channels.div_ceil(rows);
    let operations = update.x.len() * (d_state * if a_per_head { 6 } else { 20 } + 40);
    let mut y = uninit(update.x.len());
    {
        let (state, y) = (SharedMut::new(state), SharedMut::new(&mut y));
        parallel(batch * pieces, operations, |task| {
            let (batch, first) = (task / pieces, task % pieces * rows);
            let len = rows.min(channels - first);
            // SAFETY: each task has its own channels of each of its tokens.
            let y = |token: usize| unsafe { y.get(token * channels + first, len) };
            let tokens = batch * tokens..(batch + 1) * tokens;
            let Some(place) = update.states.map_or(Some(batch), |states| states[batch]) else {
                return tokens.for_each(|token| y(token).fill(0.0));
            };
            // SAFETY: no two batch elements have the same state.
            let state = unsafe { state.get((place * channels + first) * d_state, len * d_state) };
            for token in tokens {
                isa.dispatch(UpdateRows { update, token, first, y: y(token), state });
            }
        });
    }
    y
}

/// How many rows one task handles.
pub(crate) fn rows_of_task(d_state: usize) -> usize {
    (ELEMENTS / d_state.max(1)).clamp(1, ROWS)
}

/// Neighbouring channels of one token, counted over all batch elements; [`ROWS`] at most.
pub(crate) struct UpdateRows<'a> {
    pub update: &'a Update<'a>,
    pub token: usize,
    pub first: usize,
    pub y: &'a mut [f32],
    pub state: &'a mut [f32],
}

impl WithSimd for UpdateRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { update, token, first, y, state } = self;
        let Sizes { nheads, headdim, ngroups, d_state, dt_per_head, a_per_head, .. } = update.sizes;
        let (channels, len) = (nheads * headdim, y.len());
        let [mut dt, mut decay, mut input] = [[0.0; ROWS]; 3];
        let (dt, decay, input) = (&mut dt[..len], &mut decay[..len], &mut input[..len]);

        let steps = if dt_per_head { nheads } else { channels };
        self::rows(&update.dt[token * steps..][..steps], dt_per_head, headdim, first, dt);
        if let Some(bias) = update.dt_bias {
            self::rows(bias, update.bias_per_head, headdim, first, input);
            map2(simd, dt, input, |dt, bias| simd.add_f32s(dt, bias));
        }
        if update.dt_softplus {
            softplus(simd, dt);
        }
        let (low, high) = update.dt_limit;
        map(
            simd,
            dt,
            #[inline(always)]
            |dt| clamp(simd, dt, low, high),
        );
        let x = &update.x[token * channels + first..][..len];
        input.copy_from_slice(x);
        map2(simd, input, dt, |x, dt| simd.mul_f32s(x, dt));
        if a_per_head {
            self::rows(update.a, true, headdim, first, decay);
            map2(
                simd,
                decay,
                dt,
                #[inline(always)]
                |a, dt| exp(simd, simd.mul_f32s(a, dt)),
            );
        } else {
            let log2_e = simd.splat_f32s(LOG2_E);
            decay.copy_from_slice(dt);
            map(simd, decay, |dt| simd.mul_f32s(dt, log2_e));
        }

        let group_len = channels / ngroups;
        for group in first / group_len..(first + len).div_ceil(group_len) {
            let start = (token * ngroups + group) * d_state;
            let (b, c) = (&update.b[start..][..d_state], &update.c[start..][..d_state]);
            let channels = (group * group_len).max(first)..((group + 1) * group_len).min(first + len);
            let part = channels.start - first..channels.end - first;
            let h = &mut state[part.start * d_state..part.end * d_state];
            let (decay, input, y) = (&decay[part.clone()], &input[part.clone()], &mut y[part]);
            if a_per_head {
                group_of::<S, true>(simd, h, [b, c, &[]], decay, input, y);
            } else {
                let a = &update.a[channels.start * d_state..channels.end * d_state];
                group_of::<S, false>(simd, h, [b, c, a], decay, input, y);
            }
        }

        if let Some(d) = update.d {
            self::rows(d, update.d_per_head, headdim, first, dt);
            map3(simd, y, dt, x, |y, d, x| simd.mul_add_e_f32s(d, x, y));
        }
        if let Some(z) = update.z {
            let z = &z[token * channels + first..][..len];
            mul_silu(simd, y, z);
        }
    }
}

/// The values of the channels from `first`, which have one each, or one a head.
#[inline(always)]
fn rows(values: &[f32], per_head: bool, headdim: usize, first: usize, out: &mut [f32]) {
    if !per_head {
        out.copy_from_slice(&values[first..][..out.len()]);
        return;
    }
    let (mut head, mut left) = (first / headdim, headdim - first % headdim);
    let mut out = out;
    while !out.is_empty() {
        let (run, rest) = out.split_at_mut(left.min(out.len()));
        run.fill(values[head]);
        (head, left, out) = (head + 1, headdim, rest);
    }
}

/// `h ← decay · h + input · b` and `y = h · c` of channels that share `b` and `c`. The decay of each is given (`ONE_DECAY`), or
/// it is `2^(decay · a)`.
#[inline(always)]
fn group_of<S: Simd, const ONE_DECAY: bool>(
    simd: S,
    h: &mut [f32],
    [b, c, a]: [&[f32]; 3],
    decay: &[f32],
    input: &[f32],
    y: &mut [f32],
) {
    let d_state = b.len();
    match d_state / S::F32_LANES {
        _ if !d_state.is_multiple_of(S::F32_LANES) => {}
        1 => return whole_rows::<S, ONE_DECAY, 1>(simd, h, [b, c, a], decay, input, y),
        2 => return whole_rows::<S, ONE_DECAY, 2>(simd, h, [b, c, a], decay, input, y),
        4 => return whole_rows::<S, ONE_DECAY, 4>(simd, h, [b, c, a], decay, input, y),
        _ => {}
    }
    for (i, y) in y.iter_mut().enumerate() {
        let of_row = i * d_state..(i + 1) * d_state;
        let a = if ONE_DECAY { b } else { &a[of_row.clone()] };
        *y = row::<S, ONE_DECAY>(simd, &mut h[of_row], [b, c, a], decay[i], input[i]);
    }
}

/// The same for short rows of whole vectors, where finding the vectors of each would take longer than the arithmetic.
#[inline(always)]
fn whole_rows<S: Simd, const ONE_DECAY: bool, const VECTORS: usize>(
    simd: S,
    h: &mut [f32],
    [b, c, a]: [&[f32]; 3],
    decay: &[f32],
    input: &[f32],
    y: &mut [f32],
) {
    let (h, _) = S::as_mut_simd_f32s(h).0.as_chunks_mut::<VECTORS>();
    let [a, b, c] = [a, b, c].map(|x| S::as_simd_f32s(x).0.as_chunks::<VECTORS>().0);
    let ([b], [c]) = (b, c) else { return };
    let (b, c) = (*b, *c);
    let rows = h.iter_mut().zip(decay).zip(input).zip(y);
    for (i, (((h, decay), input), y)) in rows.enumerate() {
        let a = if ONE_DECAY { &b } else { &a[i] };
        let (decay, input) = (simd.splat_f32s(*decay), simd.splat_f32s(*input));
        let mut sum = simd.splat_f32s(0.0);
        for v in 0..VECTORS {
            h[v] = step::<S, ONE_DECAY>(simd, h[v], [a[v], b[v]], decay, input);
            sum = if v == 0 { simd.mul_f32s(h[v], c[v]) } else { simd.mul_add_e_f32s(h[v], c[v], sum) };
        }
        *y = simd.reduce_sum_f32s(sum);
    }
}

/// `h ← decay · h + input · b`, and `h · c`. The decay is given (`ONE_DECAY`), or it is `2^(decay · a)`.
#[inline(always)]
fn row<S: Simd, const ONE_DECAY: bool>(
    simd: S,
    h: &mut [f32],
    [b, c, a]: [&[f32]; 3],
    decay: f32,
    input: f32,
) -> f32 {
    let (decay, input) = (simd.splat_f32s(decay), simd.splat_f32s(input));
    let (h, h_tail) = S::as_mut_simd_f32s(h);
    let [(a, a_tail), (b, b_tail), (c, c_tail)] = [a, b, c].map(S::as_simd_f32s);
    // Four sums hide the latency of the additions.
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (h4, h_rest) = h.as_chunks_mut::<4>();
    let [(a4, a_rest), (b4, b_rest), (c4, c_rest)] = [a, b, c].map(|x| x.as_chunks::<4>());
    for (((h, a), b), c) in h4.iter_mut().zip(a4).zip(b4).zip(c4) {
        for i in 0..4 {
            h[i] = step::<S, ONE_DECAY>(simd, h[i], [a[i], b[i]], decay, input);
            sums[i] = simd.mul_add_e_f32s(h[i], c[i], sums[i]);
        }
    }
    for (((h, a), b), c) in h_rest.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
        *h = step::<S, ONE_DECAY>(simd, *h, [*a, *b], decay, input);
        sums[0] = simd.mul_add_e_f32s(*h, *c, sums[0]);
    }
    if !h_tail.is_empty() {
        let (a, b) = (simd.partial_load_f32s(a_tail), simd.partial_load_f32s(b_tail));
        let c = simd.partial_load_f32s(c_tail);
        let h = step::<S, ONE_DECAY>(simd, simd.partial_load_f32s(h_tail), [a, b], decay, input);
        simd.partial_store_f32s(h_tail, h);
        sums[1] = simd.mul_add_e_f32s(h, c, sums[1]);
    }
    let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    simd.reduce_sum_f32s(sum)
}

/// `decay · h + input · b`.
#[inline(always)]
fn step<S: Simd, const ONE_DECAY: bool>(
    simd: S,
    h: S::f32s,
    [a, b]: [S::f32s; 2],
    decay: S::f32s,
    input: S::f32s,
) -> S::f32s {
    let decay = if ONE_DECAY { decay } else { exp2(simd, simd.mul_f32s(decay, a)) };
    simd.mul_add_e_f32s(decay, h, simd.mul_f32s(input, b))
}
