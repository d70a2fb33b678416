//! Whole models against the published implementations, and the laws that every model keeps.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../support/mod.rs"]
mod support;

mod bfloat16;
#[cfg(feature = "cuda")]
mod cuda;
mod decoder;
mod embeddings;
mod gguf;
mod gradients;
mod heads;
mod laws;
mod manifest;
mod options;
mod parity;
mod records;
mod saving;
mod spellings;

use candle_core::{DType, Device, Tensor};
use mamba_model::{InferenceCache, Model, checkpoint::LocalDir};

/// A committed checkpoint by the name of its folder.
pub fn open(name: &str, dtype: DType) -> Model {
    open_on(name, dtype, &Device::Cpu)
}

/// The same on another device.
pub fn open_on(name: &str, dtype: DType, device: &Device) -> Model {
    let folder = match name {
        "mamba2-shakespeare" => {
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/mamba2-shakespeare")
        }
        _ => support::golden::path("models").join(name),
    };
    Model::from_pretrained(&LocalDir::new(folder).unwrap(), dtype, device)
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Logits of all positions, reading the ids in pieces of the given lengths; pieces of one token are steps.
pub fn in_pieces(model: &Model, ids: &Tensor, lengths: &[usize]) -> Tensor {
    let (batch, seqlen) = ids.dims2().unwrap();
    assert_eq!(lengths.iter().sum::<usize>(), seqlen);
    let mut cache: InferenceCache = model.new_cache(batch).unwrap();
    let mut start = 0;
    let mut logits = vec![];
    for &len in lengths {
        let piece = ids.narrow(1, start, len).unwrap();
        logits.push(model.forward(&piece, Some(&mut cache)).unwrap());
        start += len;
    }
    assert_eq!(cache.position(), seqlen);
    Tensor::cat(&logits, 1).unwrap()
}
