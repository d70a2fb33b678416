//! Training against PyTorch, and the laws that it keeps.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../support/mod.rs"]
mod support;

mod augmentation;
mod data;
mod dropout;
mod laws;
mod lora;
mod packed;
mod parallel;
mod parity;

use candle_core::{DType, Device, Tensor};
use mamba_model::{Model, checkpoint::LocalDir};

/// A committed tiny checkpoint.
pub fn open(name: &str, dtype: DType) -> Model {
    let folder = support::golden::path("models").join(name);
    Model::from_pretrained(&LocalDir::new(folder).unwrap(), dtype, &Device::Cpu)
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The bits of a tensor.
pub fn bits(x: &Tensor) -> Vec<u64> {
    support::tolerance::values(x).into_iter().map(f64::to_bits).collect()
}
