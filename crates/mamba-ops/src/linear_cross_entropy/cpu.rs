//! The softmax of rows of logits on slices, with the loss of each row, and the gradient in the place of the logits.

use pulp::{Simd, WithSimd};

use crate::host::{SharedMut, parallel};
use crate::simd::Isa;
use crate::simd::math;
use crate::simd::slice::{map, sum};

/// Rows of logits before they are scaled.
pub(super) struct Rows<'a> {
    pub classes: usize,
    pub targets: &'a [i64],
    pub ignore_index: i64,
    pub scale: f32,
}

/// The loss of each row; leaves in `logits` the gradient of their sum by the logits before scaling.
pub(super) fn losses(rows: &Rows, logits: &mut [f32], isa: Isa) -> Vec<f32> {
    let mut losses = vec![0.0; rows.targets.len()];
    {
        let operations = logits.len() * 8;
        let (logits, losses) = (SharedMut::new(logits), SharedMut::new(&mut losses));
        parallel(rows.targets.len(), operations, |row| {
            // SAFETY: each row has its own logits and its own loss.
            let (logits, loss) =
                unsafe { (logits.get(row * rows.classes, rows.classes), losses.get(row, 1)) };
            match rows.targets[row] {
                target if target == rows.ignore_index => logits.fill(0.0),
                target => {
                    loss[0] = isa.dispatch(RowTask { logits, target: target as usize, scale: rows.scale });
                }
            }
        });
    }
    losses
}

struct RowTask<'a> {
    logits: &'a mut [f32],
    target: usize,
    scale: f32,
}

impl WithSimd for RowTask<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let Self { logits, target, scale } = self;
        let factor = simd.splat_f32s(scale);
        map(simd, logits, |x| simd.mul_f32s(x, factor));
        let max = max(simd, logits);
        let wanted = logits[target] - max;
        let offset = simd.splat_f32s(max);
        map(
            simd,
            logits,
            #[inline(always)]
            |x| math::exp(simd, simd.sub_f32s(x, offset)),
        );
        let total = sum(simd, logits);
        let factor = simd.splat_f32s(scale / total);
        map(simd, logits, |x| simd.mul_f32s(x, factor));
        logits[target] -= scale;
        total.ln() - wanted
    }
}

#[inline(always)]
fn max<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (head, tail) = S::as_simd_f32s(x);
    let most = head.iter().fold(simd.splat_f32s(f32::NEG_INFINITY), |m, x| simd.max_f32s(m, *x));
    tail.iter().fold(simd.reduce_max_f32s(most), |m, x| m.max(*x))
}
