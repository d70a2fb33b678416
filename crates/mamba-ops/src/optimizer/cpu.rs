//! The same on slices.

use candle_core::Result;
use rayon::prelude::*;

use super::{AdamWUpdate, Numbers, OP};
use crate::host;

/// Elements that one task works on, and that one partial sum is formed of: results do not depend on the threads.
const PIECE: usize = 1 << 15;

pub(super) fn adamw_update(args: &AdamWUpdate) -> Result<()> {
    let grad = host::read("grad", args.grad)?;
    host::modify(OP, args.value, |value| {
        host::modify(OP, args.first, |first| {
            host::modify(OP, args.second, |second| {
                on_slices(args, value, first, second, &grad);
                Ok(())
            })
        })
    })
}

fn on_slices(args: &AdamWUpdate, value: &mut [f32], first: &mut [f32], second: &mut [f32], grad: &[f32]) {
    let Numbers { factor, keep, rate, correction } = args.numbers();
    let AdamWUpdate { beta1, beta2, eps, .. } = *args;
    let (rest1, rest2, correction) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32, (1.0 / correction) as f32);
    let [factor, beta1, beta2, eps, keep, rate] = [factor, beta1, beta2, eps, keep, rate].map(|x| x as f32);
    let pieces = (value.par_chunks_mut(PIECE), first.par_chunks_mut(PIECE));
    let pieces = pieces.0.zip(pieces.1).zip(second.par_chunks_mut(PIECE));
    pieces.zip(grad.par_chunks(PIECE)).for_each(|(((value, first), second), grad)| {
        for (((value, first), second), grad) in value.iter_mut().zip(first).zip(second).zip(grad) {
            let grad = grad * factor;
            *first = beta1 * *first + rest1 * grad;
            *second = beta2 * *second + rest2 * grad * grad;
            *value = keep * *value - rate * *first / (second.sqrt() * correction + eps);
        }
    });
}

pub(super) fn sum_of_squares(x: &[f32]) -> f64 {
    let part = |x: &[f32]| x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let parts: Vec<f64> = x.par_chunks(PIECE).map(part).collect();
    parts.into_iter().sum()
}
