//! Configurations and names as they were written before: each describes the same model.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, safetensors};
use mamba_model::Model;
use mamba_model::checkpoint::LocalDir;
use mamba_model::config::ModelConfig;
use serde_json::{Value, json};

use crate::open;
use crate::support::golden::path;
use crate::support::tolerance::max_error;

fn config(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path("models").join(name).join("config.json")).unwrap())
        .unwrap()
}

/// Takes fields out and puts others in, which must not change the model.
#[track_caller]
fn same(name: &str, without: &[&str], with: Value) {
    let mut old = config(name);
    let fields = old.as_object_mut().unwrap();
    for field in without {
        assert!(fields.remove(*field).is_some(), "{name} has no {field}");
    }
    fields.extend(with.as_object().unwrap().clone());
    let [old, new] = [old, config(name)].map(|config| ModelConfig::from_json(&config.to_string()));
    assert_eq!(old.unwrap(), new.unwrap(), "{name} with {with}");
}

#[test]
fn kinds_of_layers() {
    // Of every family that has a list of them: the words of transformers before and since version 5, under either name of the field.
    let mut tried = 0;
    for name in ["granitemoehybrid", "zamba", "zamba2", "nemotron_h", "nemotron_h_moe", "lfm2", "lfm2_bias"] {
        let written = config(name);
        let fields = ["layer_types", "layers_block_type"];
        let field = fields.into_iter().find(|field| written.get(field).is_some()).unwrap();
        let new: Vec<&str> =
            written[field].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        let before = |word: &&str| match *word {
            "linear_attention" => "mamba".to_owned(),
            "full_attention" => "attention".to_owned(),
            other => other.to_owned(),
        };
        let old: Vec<String> = new.iter().map(before).collect();
        assert!(new.iter().any(|word| word.ends_with("_attention")) && old != new, "{name}: {new:?}");
        for other in fields {
            same(name, &[field], json!({other: new}));
            same(name, &[field], json!({other: old}));
            tried += 2;
        }
    }
    assert_eq!(tried, 7 * 4);
    same("nemotron_h", &["layers_block_type"], json!({"hybrid_override_pattern": "M*-M"}));
    same("nemotron_h_moe", &["layers_block_type"], json!({"hybrid_override_pattern": "ME*E"}));
    // What transformers writes of the others is derived from periods, offsets and lists of indices.
    for (name, types) in [
        ("jamba", ["mamba", "attention", "mamba", "mamba"].as_slice()),
        ("bamba", &["linear_attention", "full_attention", "linear_attention"]),
        ("falcon_h1", &["hybrid", "hybrid"]),
    ] {
        same(name, &[], json!({"layers_block_type": types}));
        same(name, &[], json!({"layer_types": types}));
    }
    same("lfm2_bias", &["layer_types"], json!({"full_attn_idxs": [1]}));
}

#[test]
fn fields_of_other_names() {
    let of_mamba =
        json!({"mamba_d_conv": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8, "mamba_conv_bias": true});
    same("nemotron_h", &["conv_kernel", "n_groups", "chunk_size", "use_conv_bias"], of_mamba);
    let of_lfm2 = json!({"block_ff_dim": 30, "tie_embedding": false});
    same("lfm2_bias", &["intermediate_size", "tie_word_embeddings"], of_lfm2);
}

#[test]
fn rotary_embeddings() {
    same("zamba2", &["rope_parameters"], json!({"rope_theta": 10000.0}));
    same("lfm2", &["rope_parameters"], json!({"rope_theta": 1000000.0}));
    let linear = json!({"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 2.0}});
    same("falcon_h1", &["rope_parameters"], linear);
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    let yarn = json!({"rope_theta": 100.0, "rope_scaling": yarn});
    same("granitemoehybrid_dense_rope", &["rope_parameters"], yarn);
    let mut llama3 = json!({
        "rope_type": "llama3", "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    });
    let with =
        |scaling: &Value| json!({"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_scaling": scaling});
    same("bamba_options", &["rope_parameters"], with(&llama3));
    // Without the context of its training, that which it has.
    llama3.as_object_mut().unwrap().remove("original_max_position_embeddings");
    let mut short = with(&llama3);
    short["max_position_embeddings"] = 16.into();
    same("bamba_options", &["rope_parameters", "max_position_embeddings"], short);
}

/// Codestral's names have one more word in front.
#[test]
fn names_of_codestral() {
    let name = "mamba2_g8";
    let folder = tempfile::tempdir().unwrap();
    let tensors =
        safetensors::load(path("models").join(name).join("model.safetensors"), &Device::Cpu).unwrap();
    let renamed: HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, x)| (format!("model.{name}"), x)).collect();
    safetensors::save(&renamed, folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), config(name).to_string()).unwrap();
    let model =
        Model::from_pretrained(&LocalDir::new(folder.path()).unwrap(), DType::F32, &Device::Cpu).unwrap();
    let ids = Tensor::new(&[[3u32, 1, 4, 1, 5]], &Device::Cpu).unwrap();
    let [got, want] = [model, open(name, DType::F32)].map(|model| model.forward(&ids, None).unwrap());
    assert_eq!(max_error(&got, &want), 0.0);
}
