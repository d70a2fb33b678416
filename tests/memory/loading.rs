//! Loading takes the model and one tensor, whatever the format and however the file keeps what the model needs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;
use mamba_model::checkpoint::LocalDir;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata};
use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
use mamba_model::families::Family;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::alloc::{live, peak, reset_peak};
use crate::support::golden::path;
use crate::support::torch::{self, Order};

/// What is neither weights nor a tensor: headers, names, the errors that are not raised.
const REST: usize = 150_000;

/// A configuration of goldens/models with tensors of megabytes.
fn widened(name: &str, changes: &Value) -> ModelConfig {
    let text = std::fs::read_to_string(path("models").join(name).join("config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        assert!(json.get(field).is_some() || field == "head_dim", "{name} has no {field}");
        json[field] = value.clone();
    }
    ModelConfig::from_json(&json.to_string()).unwrap()
}

/// Models, of which some file keeps tensors in another form than the model: stacked experts, halves of a matrix, turned rows,
/// decays in place of logarithms.
fn models() -> Vec<(&'static str, ModelConfig)> {
    let mut mamba = ModelConfig::uniform(3000, 256, 6, MixerSpec::Mamba1(Mamba1Config::new(256)));
    mamba.tie_embeddings = false;
    let common = json!({"hidden_size": 256, "vocab_size": 500});
    let with = |changes: Value| {
        let mut all = common.clone();
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        all
    };
    let mamba2 = json!({"mamba_d_head": 64, "mamba_n_heads": 8, "mamba_d_state": 32});
    let with_mamba2 = |changes: Value| {
        let mut all = with(changes);
        all.as_object_mut().unwrap().extend(mamba2.as_object().unwrap().clone());
        all
    };
    let wide = |name: &'static str, changes: Value| (name, widened(name, &changes));
    vec![
        ("mamba", mamba),
        // Experts in one tensor of gates and what they gate, which a GGUF file keeps apart: 4 MB.
        wide(
            "granitemoehybrid",
            with_mamba2(json!({"intermediate_size": 512, "shared_intermediate_size": 64})),
        ),
        // Queries and keys with their rows in another order in a GGUF file: 4 MB.
        wide(
            "granitemoehybrid_dense_rope",
            with_mamba2(json!({"head_dim": 512, "num_attention_heads": 8, "shared_intermediate_size": 128})),
        ),
        // Experts one by one, which a GGUF file keeps in stacks: 5 times 1 MB, and 6 times.
        wide(
            "jamba",
            with(
                json!({"intermediate_size": 1024, "mamba_d_state": 16, "mamba_dt_rank": 32, "vocab_size": 64}),
            ),
        ),
        wide(
            "nemotron_h_moe",
            with(json!({
                "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 64, "mamba_num_heads": 4,
                "mamba_head_dim": 32, "ssm_state_size": 32, "head_dim": 32,
            })),
        ),
        wide(
            "zamba2",
            with(json!({
                "n_mamba_heads": 8, "mamba_headdim": 64, "mamba_d_state": 32, "intermediate_size": 2048,
                "attention_hidden_size": 512, "attention_head_dim": 128,
            })),
        ),
        wide(
            "zamba",
            with(json!({
                "mamba_dt_rank": 16, "intermediate_size": 2048, "attention_hidden_size": 512, "attention_head_dim": 128,
            })),
        ),
    ]
}

/// The tensors of a folder, and that folder without its weights.
fn take_out(folder: &Path) -> BTreeMap<String, Tensor> {
    let file = folder.join("model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    std::fs::remove_file(file).unwrap();
    tensors.into_iter().collect()
}

/// In three files with an index.
fn write_shards(folder: &Path, tensors: &BTreeMap<String, Tensor>) {
    let name = |shard: usize| format!("model-{:05}-of-00003.safetensors", shard + 1);
    let mut parts = vec![std::collections::HashMap::new(); 3];
    for (i, (tensor, x)) in tensors.iter().enumerate() {
        parts[i % 3].insert(tensor.clone(), x.clone());
    }
    for (shard, part) in parts.iter().enumerate() {
        candle_core::safetensors::save(part, folder.join(name(shard))).unwrap();
    }
    let index: BTreeMap<_, _> = tensors.keys().enumerate().map(|(i, tensor)| (tensor, name(i % 3))).collect();
    let index = json!({"metadata": {}, "weight_map": index});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// Every file that a model can be read from, by the name of its format.
fn files(config: &ModelConfig) -> Vec<(String, TempDir, PathBuf)> {
    let mut files = vec![];
    let model = Model::random(config, 1, &Device::Cpu).unwrap();
    for kind in [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_K] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        // Zamba and Zamba2 have no words there.
        if model.save_gguf(&file, kind, Metadata::default(), |_| {}).is_ok() {
            files.push((format!("GGUF {kind}"), folder, file));
        }
    }
    let saved = |dtype: DType| {
        let folder = tempfile::tempdir().unwrap();
        model.save_pretrained(folder.path(), dtype).unwrap();
        folder
    };
    let mut add = |what: &str, folder: TempDir| {
        let file = folder.path().to_path_buf();
        files.push((what.to_owned(), folder, file));
    };
    add("safetensors", saved(DType::F32));
    add("safetensors in f16", saved(DType::F16));
    let folder = saved(DType::F32);
    write_shards(folder.path(), &take_out(folder.path()));
    add("safetensors in shards", folder);
    for (order, shards, what) in [
        (Order::Rows, 1, "torch"),
        (Order::Columns, 1, "torch, matrices turned"),
        (Order::Columns, 3, "torch in shards, matrices turned"),
    ] {
        let folder = saved(DType::F32);
        torch::write(folder.path(), &take_out(folder.path()), order, shards);
        add(what, folder);
    }
    files
}

/// What the loaded model is made of: its parameters, and the decays that it keeps beside their logarithms.
fn weights(model: &Model) -> usize {
    let bytes = |(name, x): &(String, Tensor)| {
        let copies = if name.ends_with(".A_log") { 2 } else { 1 };
        copies * x.elem_count() * x.dtype().size_in_bytes()
    };
    model.parameters().iter().map(bytes).sum()
}

pub fn one_tensor_at_a_time() {
    let mut loaded = BTreeMap::<String, usize>::new();
    for (name, config) in models() {
        for (format, _folder, file) in files(&config) {
            for dtype in [DType::F32, DType::BF16] {
                let load =
                    || Model::from_pretrained(&LocalDir::new(&file).unwrap(), dtype, &Device::Cpu).unwrap();
                drop(load()); // threads and tables that are made once
                reset_peak();
                let before = live();
                let model = load();
                let (took, keeps) = (peak() - before, live() - before);
                let weights = weights(&model);
                let largest = model.parameters().iter().map(|(_, x)| x.elem_count() * 4).max().unwrap();
                let case = format!("{name}, {format} as {dtype:?}");
                println!(
                    "{case}: {took} bytes, keeps {keeps}, weights {weights}, the largest tensor {largest}"
                );
                assert!(keeps >= weights, "{case}: the measure is wrong");
                assert!(keeps <= weights + REST, "{case}: {keeps} bytes are kept for {weights} of weights");
                assert!(took <= weights + largest + REST, "{case}: {took} bytes are taken");
                *loaded.entry(format.clone()).or_default() += 1;
            }
        }
    }
    assert_eq!(loaded.values().sum::<usize>(), 7 * 6 * 2 + 5 * 4 * 2, "{loaded:?}");
    assert!(loaded.values().all(|count| *count == 14 || *count == 10), "{loaded:?}");
}

/// Writing takes two tensors: the values, and the same in the type of the file.
pub fn writing() {
    let folder = tempfile::tempdir().unwrap();
    let (_, config) = models().swap_remove(0);
    let model = Model::random(&config, 1, &Device::Cpu).unwrap();
    for layout in ["mamba", "state-spaces"] {
        for dtype in [DType::F32, DType::BF16] {
            reset_peak();
            let before = live();
            let family = Family::named(layout).unwrap();
            model.save_pretrained_as(family, folder.path(), dtype).unwrap();
            let took = peak() - before;
            let largest = 3000 * 256 * 4;
            println!("writing {layout} in {dtype:?}: {took} bytes, the largest tensor has {largest}");
            assert!(
                took <= 2 * largest + (1 << 20) + REST,
                "writing {layout} in {dtype:?} takes {took} bytes"
            );
        }
    }
    for kind in [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_K] {
        reset_peak();
        let before = live();
        model.save_gguf(folder.path().join("x.gguf"), kind, Metadata::default(), |_| {}).unwrap();
        let took = peak() - before;
        let largest = 3000 * 256 * 4;
        println!("writing {kind}: {took} bytes, the largest tensor has {largest}");
        assert!(took <= 2 * largest + (1 << 20) + REST, "writing {kind} takes {took} bytes");
    }
}
