//! Models from GGUF files that the `gguf` package wrote give the logits of the models they were written from.

mod reading;
mod writing;

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata, TensorSpec, Value, Writer};
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use mamba_model::config::{MixerSpec, ModelConfig};
use std::path::Path;

use crate::support::golden::{Golden, path};

pub fn load(file: &Path, dtype: DType) -> mamba_model::Result<Model> {
    Model::from_pretrained(&LocalDir::new(file)?, dtype, &Device::Cpu)
}

fn ids(golden: &Golden) -> Tensor {
    golden.tensors["input_ids"].to_dtype(DType::U32).unwrap()
}

/// The names of the files of models, without those that are only about types.
fn names() -> Vec<String> {
    let stem = |entry: std::io::Result<std::fs::DirEntry>| {
        let file = entry.unwrap().file_name().into_string().unwrap();
        file.strip_suffix(".gguf").filter(|name| *name != "types").map(str::to_owned)
    };
    let mut names: Vec<_> = std::fs::read_dir(path("gguf")).unwrap().filter_map(stem).collect();
    names.sort();
    names
}

/// A configuration without what files say nothing of.
fn described(model: &Model) -> ModelConfig {
    let mut config = model.config().clone();
    config.residual_in_f32 = true;
    for (_, mixer) in config.layers.iter_mut().flat_map(|l| &mut l.branches).flat_map(|b| &mut b.mixers) {
        if let MixerSpec::Mamba2(c) = mixer {
            // The least step is 1e-9 here, which bounds nothing.
            (c.chunk_size, c.dt_limit.0) = (0, 0.0);
        }
    }
    config
}

/// Files of models that can be written, by the name of the model they hold.
fn writable() -> Vec<String> {
    // llama.cpp cannot compute Bamba from its own files of it.
    names().into_iter().filter(|name| !name.ends_with("_quantized") && name != "bamba").collect()
}

fn checkpoint(file: &Path) -> Checkpoint {
    Checkpoint::open(&LocalDir::new(file).unwrap()).unwrap()
}

fn save(model: &Model, file: &Path) {
    model.save_gguf(file, GgmlType::F32, Metadata::default(), |_| {}).unwrap();
}

/// Writes a golden file again with other keys and tensors.
fn rewrite(
    name: &str,
    to: &Path,
    keys: impl FnOnce(&mut Vec<(String, Value)>),
    tensors: impl FnOnce(&mut Vec<(String, Tensor)>),
) {
    let from = checkpoint(&path("gguf").join(format!("{name}.gguf")));
    let metadata = from.metadata().unwrap().iter();
    let mut entries: Vec<_> = metadata.map(|(key, value)| (key.to_owned(), value.clone())).collect();
    keys(&mut entries);
    let mut metadata = Metadata::default();
    metadata.extend(entries);
    let read = |name: &str| (name.to_owned(), from.tensor(name, &Device::Cpu).unwrap());
    let mut all: Vec<_> = from.names().map(read).collect();
    tensors(&mut all);
    let spec = |(name, x): &(String, Tensor)| TensorSpec {
        name: name.clone(),
        shape: x.dims().to_vec(),
        kind: GgmlType::F32,
    };
    let mut writer = Writer::create(to, &metadata, all.iter().map(spec).collect()).unwrap();
    all.iter().for_each(|(_, x)| writer.write(x).unwrap());
    writer.finish().unwrap();
}
