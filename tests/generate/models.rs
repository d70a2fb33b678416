//! Every committed checkpoint that loads: what generation promises, it promises for all families.

use candle_core::{DType, Device};
use mamba_model::{Model, checkpoint::LocalDir};

use crate::support::golden::path;

/// By name; the model that the examples use is among them.
pub fn all() -> Vec<(String, Model)> {
    let mut names: Vec<String> = std::fs::read_dir(path("models"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        // Written in pieces, the same models as others.
        .filter(|name| !name.ends_with("_bin") && !name.ends_with("sharded"))
        .collect();
    names.sort();
    let models: Vec<(String, Model)> =
        names.into_iter().filter_map(|name| Some((name.clone(), load(&name)?))).collect();
    // Without a head there is nothing to generate from.
    let models: Vec<_> = models.into_iter().filter(|(_, model)| model.config().has_head).collect();
    assert!(models.len() >= 14, "only {} checkpoints load", models.len());
    models
}

/// A committed checkpoint by the name of its folder.
pub fn open(name: &str) -> Model {
    load(name).unwrap_or_else(|| panic!("{name} does not load"))
}

fn load(name: &str) -> Option<Model> {
    let folder = match name {
        "mamba2-shakespeare" => {
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/mamba2-shakespeare")
        }
        _ => path("models").join(name),
    };
    // What does not load is told by the tests of models.
    Model::from_pretrained(&LocalDir::new(folder).unwrap(), DType::F32, &Device::Cpu).ok()
}

/// Token ids for a model, the same for the same seed.
pub fn ids(model: &Model, len: usize, seed: u64) -> Vec<u32> {
    crate::support::random::Random::new(seed).ids(len, model.config().vocab_size as u32)
}
