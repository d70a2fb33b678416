//! Seeded random tensors: candle's CPU generator cannot be seeded.

use candle_core::{Device, Tensor};

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform in `[low, high)`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform values of the given shape, `f64`.
    pub fn tensor(&mut self, shape: &[usize], low: f64, high: f64) -> Tensor {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| self.uniform(low, high)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Values with mean 0 and variance 1 of the given shape, `f64`.
    pub fn normal(&mut self, shape: &[usize]) -> Tensor {
        let mut normal = || {
            let (u, v) = (self.uniform(1e-12, 1.0), self.uniform(0.0, std::f64::consts::TAU));
            (-2.0 * u.ln()).sqrt() * v.cos()
        };
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Token ids below `vocab`.
    pub fn ids(&mut self, len: usize, vocab: u32) -> Vec<u32> {
        (0..len).map(|_| (self.bits() % u64::from(vocab)) as u32).collect()
    }
}
