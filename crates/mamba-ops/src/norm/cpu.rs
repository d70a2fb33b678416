//! The norm on slices, row by row: each row goes through a few short loops while it is in cache.
//!
//! With `r = x + residual`, `s = silu(z)`, `u = r·s` or `r`, `û = (u - m)·ρ`, `ρ = 1 / √(Σ (u - m)² / n + eps)`:
//! `y = û·w + b`, times `s` if the gate comes after. Backward, with `g` the gradient of `û·w + b`:
//! `db = Σ g`, `dw = Σ g·û`, `du = ρ·(g·w - û·mean(g·w·û) - mean(g·w))` (the last mean for layer norm alone),
//! `dr = du`, or `du·s` and `dz = du·r·s'` with the gate before; after, `g = dy·s` and `dz = dy·(û·w + b)·s'`.

use pulp::{Simd, WithSimd};

use super::{NormKind, Sizes};
use crate::host::{SharedMut, add_rows, parallel, uninit};
use crate::simd::Isa;
use crate::simd::math::silu_with_derivative;
use crate::simd::slice::{dot, map, map_all, map2, mul_silu, sum};

/// Tasks at most and rows of one at least: functions of the shape, so that sums do not depend on the threads.
const TASKS: usize = 128;
const ROWS: usize = 8;

/// The inputs as slices, `(rows, dim)`, and the options of [`Norm`](super::Norm).
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub sizes: Sizes,
    pub kind: NormKind,
    pub eps: f32,
    pub norm_before_gate: bool,
    pub x: &'a [f32],
    pub weight: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
    pub residual: Option<&'a [f32]>,
    pub z: Option<&'a [f32]>,
}

/// The outputs.
pub(super) struct Forward {
    pub y: Vec<f32>,
    /// `x + residual`, if asked for.
    pub sum: Option<Vec<f32>>,
}

/// Gradients of the inputs; that of `sum` is that of `x` and of `residual`.
pub(super) struct Grads {
    pub sum: Vec<f32>,
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub z: Vec<f32>,
}

pub(super) fn forward(rows: &Rows, isa: Isa, with_sum: bool) -> Forward {
    let mut y = uninit(rows.x.len());
    let mut sum = with_sum.then(|| uninit(rows.x.len()));
    {
        let y = SharedMut::new(&mut y);
        let sum = sum.as_deref_mut().map(SharedMut::new);
        parallel(rows.tasks(), rows.operations(), |task| {
            let (start, len) = rows.piece(task);
            // SAFETY: tasks have their own rows.
            let (y, sum) = unsafe { (y.get(start, len), sum.as_ref().map(|sum| sum.get(start, len))) };
            isa.dispatch(ForwardTask { rows, start, y, sum });
        });
    }
    Forward { y, sum }
}

/// All rows, to `y`, on this thread.
pub(crate) fn forward_to(rows: &Rows, isa: Isa, y: &mut [f32]) {
    isa.dispatch(ForwardTask { rows, start: 0, y, sum: None });
}

/// The backward pass; `grad_y` and `grad_sum` are the gradients of the outputs.
pub(super) fn backward(rows: &Rows, isa: Isa, grad_y: Option<&[f32]>, grad_sum: Option<&[f32]>) -> Grads {
    let len = |x: Option<&[f32]>| x.map_or(0, <[f32]>::len);
    let (weights, biases, gates) = (len(rows.weight), len(rows.bias), len(rows.z));
    let Some(grad_y) = grad_y else {
        let sum = grad_sum.map_or_else(|| vec![0.0; rows.x.len()], <[f32]>::to_vec);
        return Grads { sum, weight: vec![0.0; weights], bias: vec![0.0; biases], z: vec![0.0; gates] };
    };
    let (mut sum, mut z) = (uninit(rows.x.len()), uninit(gates));
    // One partial sum a task, added in the order of tasks.
    let (mut weight, mut bias) = (vec![0.0; rows.tasks() * weights], vec![0.0; rows.tasks() * biases]);
    {
        let [sum, z, weight, bias] = [&mut sum, &mut z, &mut weight, &mut bias].map(|x| SharedMut::new(x));
        parallel(rows.tasks(), rows.operations() * 2, |task| {
            let (start, len) = rows.piece(task);
            let gate = if rows.z.is_some() { (start, len) } else { (0, 0) };
            // SAFETY: tasks have their own rows and their own partial sums.
            let (sum, z, weight, bias) = unsafe {
                let (weight, bias) = (weight.get(task * weights, weights), bias.get(task * biases, biases));
                (sum.get(start, len), z.get(gate.0, gate.1), weight, bias)
            };
            isa.dispatch(BackwardTask { rows, start, grad_y, grad_sum, sum, z, weight, bias });
        });
    }
    Grads { sum, weight: add_rows(&weight, weights), bias: add_rows(&bias, biases), z }
}

impl Rows<'_> {
    fn rows_per_task(&self) -> usize {
        self.sizes.rows.div_ceil(TASKS).max(ROWS)
    }

    fn tasks(&self) -> usize {
        self.sizes.rows.div_ceil(self.rows_per_task())
    }

    /// Where the rows of a task start, and how many values they have.
    fn piece(&self, task: usize) -> (usize, usize) {
        let Sizes { rows, dim, .. } = self.sizes;
        let first = task * self.rows_per_task();
        (first * dim, self.rows_per_task().min(rows - first) * dim)
    }

    /// An estimate of the work, in operations.
    fn operations(&self) -> usize {
        self.x.len() * if self.z.is_some() { 24 } else { 8 }
    }

    /// The gate of the channels from `at` on, if there is one at this place.
    #[inline(always)]
    fn gate(&self, at: usize, after: bool) -> Option<&[f32]> {
        self.z.filter(|_| self.norm_before_gate == after).map(|z| &z[at..])
    }

    /// `r`, the row that starts at `at`, and a copy of it.
    #[inline(always)]
    fn add<S: Simd>(&self, simd: S, at: usize, r: &mut [f32], copy: Option<&mut [f32]>) {
        let (len, x) = (r.len(), &self.x[at..at + r.len()]);
        match (self.residual.map(|residual| &residual[at..]), copy) {
            (Some(residual), Some(copy)) => {
                map_all(simd, len, [r, copy], (x, residual), |_, (x, residual)| {
                    [simd.add_f32s(x, residual); 2]
                })
            }
            (Some(residual), None) => {
                map_all(simd, len, [r], (x, residual), |_, (x, residual)| [simd.add_f32s(x, residual)]);
            }
            (None, copy) => {
                r.copy_from_slice(x);
                copy.into_iter().for_each(|copy| copy.copy_from_slice(x));
            }
        }
    }

    /// `u - m` of a group from `u`, in place, and `ρ`.
    #[inline(always)]
    fn centre<S: Simd>(&self, simd: S, group: &mut [f32]) -> f32 {
        if self.kind == NormKind::Layer {
            // The second time takes away what rounding left of a mean that is large beside the spread.
            for _ in 0..2 {
                let mean = simd.splat_f32s(sum(simd, group) / group.len() as f32);
                map(simd, group, |u| simd.sub_f32s(u, mean));
            }
        }
        1.0 / (dot(simd, group, group) / group.len() as f32 + self.eps).sqrt()
    }

    /// `û·w + b` of the channels from `channel` on, from `u - m`, in place.
    #[inline(always)]
    fn affine<S: Simd>(&self, simd: S, channel: usize, rho: f32, y: &mut [f32]) {
        let len = y.len();
        match (self.weight.map(|w| &w[channel..]), self.bias.map(|b| &b[channel..])) {
            (Some(w), Some(b)) => map_all(simd, len, [y], (rho, w, b), |[u], (rho, w, b)| {
                [simd.mul_add_e_f32s(simd.mul_f32s(u, rho), w, b)]
            }),
            (Some(w), None) => {
                map_all(simd, len, [y], (rho, w), |[u], (rho, w)| [simd.mul_f32s(simd.mul_f32s(u, rho), w)])
            }
            (None, Some(b)) => {
                map_all(simd, len, [y], (rho, b), |[u], (rho, b)| [simd.mul_add_e_f32s(u, rho, b)])
            }
            (None, None) => map_all(simd, len, [y], rho, |[u], rho| [simd.mul_f32s(u, rho)]),
        }
    }
}

/// Rows of one task, the first starting at `start`.
struct ForwardTask<'a> {
    rows: &'a Rows<'a>,
    start: usize,
    y: &'a mut [f32],
    sum: Option<&'a mut [f32]>,
}

impl WithSimd for ForwardTask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, start, y, mut sum } = self;
        let Sizes { dim, group_size, .. } = rows.sizes;
        for (i, y) in y.chunks_exact_mut(dim).enumerate() {
            let at = start + i * dim;
            rows.add(simd, at, y, sum.as_deref_mut().map(|sum| &mut sum[i * dim..][..dim]));
            if let Some(z) = rows.gate(at, false) {
                mul_silu(simd, y, z);
            }
            for (group, y) in y.chunks_exact_mut(group_size).enumerate() {
                let rho = rows.centre(simd, y);
                rows.affine(simd, group * group_size, rho, y);
            }
            if let Some(z) = rows.gate(at, true) {
                mul_silu(simd, y, z);
            }
        }
    }
}

/// Rows of one task, the first starting at `start`, and the sums over them.
struct BackwardTask<'a> {
    rows: &'a Rows<'a>,
    start: usize,
    grad_y: &'a [f32],
    grad_sum: Option<&'a [f32]>,
    sum: &'a mut [f32],
    z: &'a mut [f32],
    weight: &'a mut [f32],
    bias: &'a mut [f32],
}

impl WithSimd for BackwardTask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, start, grad_y, grad_sum, sum: grad, z: grad_z, weight, bias } = self;
        let Sizes { dim, group_size, .. } = rows.sizes;
        let (mut u, mut factor) =
            (uninit(dim), uninit(if rows.gate(start, false).is_some() { dim } else { 0 }));
        for (i, g) in grad.chunks_exact_mut(dim).enumerate() {
            let at = start + i * dim;
            let grad_z = if grad_z.is_empty() { &mut [][..] } else { &mut grad_z[i * dim..][..dim] };
            rows.add(simd, at, &mut u, None);
            g.copy_from_slice(&grad_y[at..at + dim]);
            if let Some(z) = rows.gate(at, false) {
                // What becomes of the gradient of `u`: times `s` that of `r`, times `r·s'` that of `z`.
                map_all(
                    simd,
                    dim,
                    [&mut u, &mut factor, grad_z],
                    z,
                    #[inline(always)]
                    |[r, ..], z| {
                        let (silu, slope) = silu_with_derivative(simd, z);
                        [simd.mul_f32s(r, silu), silu, simd.mul_f32s(r, slope)]
                    },
                );
            }
            let groups = g.chunks_exact_mut(group_size).zip(u.chunks_exact_mut(group_size));
            for (group, (g, u)) in groups.enumerate() {
                let channels = group * group_size..(group + 1) * group_size;
                let rho = rows.centre(simd, u);
                if let Some(z) = rows.gate(at + channels.start, true) {
                    let grad_z = &mut grad_z[channels.clone()];
                    grad_z.copy_from_slice(u);
                    rows.affine(simd, channels.start, rho, grad_z);
                    gate(simd, g, grad_z, z);
                }
                if !bias.is_empty() {
                    map2(simd, &mut bias[channels.clone()], g, |sum, g| simd.add_f32s(sum, g));
                }
                // Of `g·w`: the sum, and the sum of its products with `û`.
                let [mut total, mut along] = [simd.splat_f32s(0.0); 2];
                let mut add = |g, u| {
                    total = simd.add_f32s(total, g);
                    along = simd.mul_add_e_f32s(g, u, along);
                };
                match rows.weight {
                    Some(w) => {
                        let sums = &mut weight[channels.clone()];
                        let w = &w[channels.clone()];
                        map_all(simd, group_size, [g, u, sums], (w, rho), |[g, u, sum], (w, rho)| {
                            let (u, gw) = (simd.mul_f32s(u, rho), simd.mul_f32s(g, w));
                            add(gw, u);
                            [gw, u, simd.mul_add_e_f32s(g, u, sum)]
                        });
                    }
                    None => map_all(simd, group_size, [u], (&*g, rho), |[u], (g, rho)| {
                        let u = simd.mul_f32s(u, rho);
                        add(g, u);
                        [u]
                    }),
                }
                let mean = |sum| simd.reduce_sum_f32s(sum) / group_size as f32;
                let along = simd.splat_f32s(-mean(along));
                let total = simd.splat_f32s(match rows.kind {
                    NormKind::Rms => 0.0,
                    NormKind::Layer => mean(total),
                });
                map_all(simd, group_size, [g], (&*u, rho), |[g], (u, rho)| {
                    [simd.mul_f32s(rho, simd.mul_add_e_f32s(along, u, simd.sub_f32s(g, total)))]
                });
            }
            if !factor.is_empty() {
                map_all(simd, dim, [g, grad_z], &factor[..], |[g, slope], silu| {
                    [simd.mul_f32s(g, silu), simd.mul_f32s(g, slope)]
                });
            }
            if let Some(grad_sum) = grad_sum {
                map2(simd, g, &grad_sum[at..at + dim], |g, grad| simd.add_f32s(g, grad));
            }
        }
    }
}

/// The backward of `value · silu(z)`: from its gradient and the value to the gradients of the value and of `z`.
#[inline(always)]
fn gate<S: Simd>(simd: S, grad: &mut [f32], value: &mut [f32], z: &[f32]) {
    map_all(
        simd,
        grad.len(),
        [grad, value],
        z,
        #[inline(always)]
        |[grad, value], z| {
            let (silu, slope) = silu_with_derivative(simd, z);
            [simd.mul_f32s(grad, silu), simd.mul_f32s(simd.mul_f32s(grad, value), slope)]
        },
    );
}
