//! Every committed checkpoint that loads: what generation promises, it promises for all families.

use candle_core::{DType, Device};
use mamba_generate::CausalLm;
use mamba_model::{Model, checkpoint::LocalDir};

use crate::support::golden::path;

/// Checkpoints without a head, which there is nothing to generate from: all others have one.
const HEADLESS: [&str; 5] =
    ["bamba_headless", "jamba_classifier", "mamba2_headless", "zamba2_classifier", "zamba_classifier"];

/// One of each kind of state: those of Mamba, of Mamba-2, of both beside attention with shared blocks, and of attention with experts.
pub const KINDS: [&str; 4] = ["mamba_tied", "mamba2_g8", "jamba", "zamba2"];

/// By name; the model that the examples use is among them.
pub fn all() -> Vec<(String, Model)> {
    let mut names: Vec<String> = std::fs::read_dir(path("models"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        // Written in pieces, the same models as others.
        .filter(|name| !name.ends_with("_bin") && !name.ends_with("sharded"))
        .collect();
    names.sort();
    let without = |name: &String| HEADLESS.contains(&name.as_str());
    let (headless, names): (Vec<_>, Vec<_>) = names.into_iter().partition(without);
    assert_eq!((headless.len(), names.len()), (HEADLESS.len(), 40), "checkpoints in goldens/models");
    names.into_iter().map(|name| (name.clone(), open(&name))).collect()
}

/// A committed checkpoint by the name of its folder.
pub fn open(name: &str) -> Model {
    open_as(name, DType::F32, &Device::Cpu)
}

/// The same, to compute in a dtype on a device.
pub fn open_as(name: &str, dtype: DType, device: &Device) -> Model {
    let folder = match name {
        "mamba2-shakespeare" => {
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/mamba2-shakespeare")
        }
        _ => path("models").join(name),
    };
    let model = Model::from_pretrained(&LocalDir::new(folder).unwrap(), dtype, device);
    let model = model.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(model.config().has_head, "{name} has no head");
    model
}

/// The [`KINDS`] in bfloat16.
pub fn in_bf16() -> Vec<(String, Model)> {
    let open = |name: &str| (format!("{name} in bf16"), open_as(name, DType::BF16, &Device::Cpu));
    KINDS.map(open).into()
}

/// The [`KINDS`] on a GPU.
pub fn on(device: &Device) -> Vec<(String, Model)> {
    let kinds = [DType::F32, DType::BF16].into_iter().flat_map(|dtype| KINDS.map(|name| (name, dtype)));
    let open = |(name, dtype)| (format!("{name} in {dtype:?} on a GPU"), open_as(name, dtype, device));
    kinds.map(open).collect()
}

/// Token ids for a model, the same for the same seed.
pub fn ids(model: &Model, len: usize, seed: u64) -> Vec<u32> {
    crate::support::random::Random::new(seed).ids(len, model.config().vocab_size as u32)
}

/// How far logits may be apart that were computed in other pieces, or by kernels for other sizes.
pub fn bound(model: &Model) -> f32 {
    match (model.dtype(), model.device().is_cpu()) {
        (DType::F32, true) => 1e-4,
        (DType::F32, false) => 1e-3,
        _ => 0.1,
    }
}

/// Asserts that two greedy texts are the same but for rounding: where they part, the model thinks two tokens about as likely.
pub fn assert_same_text(model: &Model, prompt: &[u32], one: &[u32], other: &[u32], label: &str) {
    let Some(at) = one.iter().zip(other).position(|(a, b)| a != b) else {
        return assert_eq!(one.len(), other.len(), "{label}");
    };
    let (mut cache, mut logits) = (CausalLm::new_cache(model).unwrap(), Vec::new());
    CausalLm::prefill(model, &[prompt, &one[..at]].concat(), &mut cache, &mut logits).unwrap();
    let gap = (logits[one[at] as usize] - logits[other[at] as usize]).abs();
    assert!(gap <= 2.0 * bound(model), "{label}: {one:?} and {other:?} part where logits are {gap} apart");
}
