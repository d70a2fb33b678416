//! The masks of a model that is trained, by number.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;

use crate::{Error, Result};

/// Masks pass after pass.
#[derive(Debug)]
pub(crate) struct Dropout {
    rate: f64,
    seed: u64,
    /// The number of the next pass.
    pass: AtomicU64,
}

/// Bits of a stream that say where in the model a mask belongs; the pass is above them.
const PLACE_BITS: u32 = 16;

impl Dropout {
    /// None for a rate of 0.
    pub(crate) fn new(rate: f64, seed: u64) -> Result<Option<Self>> {
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::Input(format!(
                "the rate of dropout is {rate}, expected at least 0 and less than 1"
            )));
        }
        Ok((rate > 0.0).then(|| Self { rate, seed, pass: AtomicU64::new(0) }))
    }

    pub(crate) fn seek(&self, pass: u64) {
        self.pass.store(pass, Ordering::Relaxed);
    }

    /// The masks of the next pass, from its first on.
    pub(crate) fn next_pass(&self) -> Masks {
        let pass = self.pass.fetch_add(1, Ordering::Relaxed);
        Masks(Mask { rate: self.rate, seed: self.seed, stream: pass << PLACE_BITS })
    }
}

/// The masks of one pass, from some place of the model on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Masks(Mask);

impl Masks {
    /// Hands out the next `count` of them.
    pub(crate) fn next(&mut self, count: usize) -> Self {
        let next = *self;
        self.0 = self.of(count);
        next
    }

    /// The one that stands `place` places further on.
    pub(crate) fn of(self, place: usize) -> Mask {
        Mask { stream: self.0.stream + place as u64, ..self.0 }
    }
}

/// A mask for a tensor of any shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mask {
    rate: f64,
    seed: u64,
    stream: u64,
}

impl Mask {
    pub(crate) fn apply(self, x: &Tensor) -> Result<Tensor> {
        let Self { rate, seed, stream } = self;
        Ok(mamba_ops::dropout(&mamba_ops::Dropout { x, rate, seed, stream })?)
    }
}
