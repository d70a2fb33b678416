//! Reading: logits, versions, what is missing or too much.

use candle_core::{DType, Device, Tensor};
use mamba_model::checkpoint::gguf::{Array, Value};

use super::{described, ids, load, names, rewrite};
use crate::in_pieces;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::max_error;

#[test]
fn logits_are_those_of_the_original() {
    let (mut plain, mut quantized, mut configurations) = (0, 0, 0);
    for name in names() {
        let file = path("gguf").join(format!("{name}.gguf"));
        let model = load(&file, DType::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        let golden = if name.ends_with("_quantized") {
            quantized += 1;
            Golden::read(&file.with_extension("safetensors"))
        } else {
            plain += 1;
            let folder = path("models").join(&name);
            // What was read from the file is what stands in the configuration.
            let original = load(&folder, DType::F32).unwrap();
            if !name.starts_with("falcon_h1") {
                // These files have no tokenizer, and with it nothing of the end of a text.
                let mut want = described(&original);
                want.eos_token_ids.clear();
                assert_eq!(described(&model), want, "{name}");
                configurations += 1;
            }
            Golden::read(&folder.join("io.safetensors"))
        };
        let (input, want) = (ids(&golden), &golden.tensors["logits"]);
        let seqlen = input.dim(1).unwrap();
        for (got, how) in [
            (model.forward(&input, None).unwrap(), "at once"),
            (in_pieces(&model, &input, &vec![1; seqlen]), "in steps"),
        ] {
            let gap = max_error(&got, want);
            assert!(gap <= 1e-4, "{name}, {how}: logits are off by {gap:.1e}");
        }
    }
    assert_eq!((plain, configurations, quantized), (16, 14, 2));
}

/// A quantized tensor goes straight to the type of the model: the same as through f32.
#[test]
fn quantized_weights_are_rounded_once() {
    let file = path("gguf/mamba2_quantized.gguf");
    let whole = load(&file, DType::F32).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let model = load(&file, dtype).unwrap();
        let mut compared = 0;
        for ((name, got), (_, want)) in model.parameters().iter().zip(whole.parameters()) {
            assert_eq!(max_error(got, &want.to_dtype(got.dtype()).unwrap()), 0.0, "{name}");
            compared += usize::from(got.dtype() == dtype);
        }
        assert!(compared > 10, "{compared} tensors are {dtype:?}");
    }
}

#[test]
fn version_2_is_read_too_and_a_folder_with_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(path("gguf/mamba_tied.gguf")).unwrap();
    assert_eq!(bytes[4..8], 3u32.to_le_bytes());
    bytes[4] = 2;
    std::fs::write(folder.path().join("any name.gguf"), &bytes).unwrap();
    let want = load(&path("models/mamba_tied"), DType::F32).unwrap();
    let got = load(folder.path(), DType::F32).unwrap();
    assert_eq!(got.config().layers, want.config().layers);
    let ids = candle_core::Tensor::new(&[[3u32, 1, 4, 1, 5]], &candle_core::Device::Cpu).unwrap();
    let [got, want] = [got, want].map(|model| model.forward(&ids, None).unwrap());
    assert!(max_error(&got, &want) <= 1e-4, "logits of version 2");

    std::fs::write(folder.path().join("b.gguf"), &bytes).unwrap();
    let error = load(folder.path(), DType::F32).unwrap_err().to_string();
    assert!(error.contains("has several files of weights, name one of any name.gguf, b.gguf"), "{error}");
    assert!(load(&folder.path().join("b.gguf"), DType::F32).is_ok());
}

#[test]
fn what_is_missing_or_too_much_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let (mut without_key, mut without_tensor) = (0, 0);
    for (name, architecture, needed, tensors) in [
        (
            "falcon_mamba_tied",
            "mamba",
            vec!["ssm.inner_size", "ssm.time_step_rank"],
            vec!["blk.1.ssm_x.weight"],
        ),
        (
            "jamba",
            "jamba",
            vec!["attention.head_count", "attention.head_count_kv", "expert_used_count", "ssm.state_size"],
            vec!["blk.0.ssm_dt_norm.weight", "blk.1.ffn_up_exps.weight", "blk.1.attn_q.weight"],
        ),
        (
            "granitemoehybrid",
            "granitehybrid",
            vec!["ssm.conv_kernel", "expert_count"],
            vec!["blk.0.ffn_up_exps.weight", "blk.2.ffn_up_shexp.weight", "blk.1.attn_k.weight"],
        ),
        ("nemotron_h", "nemotron_h", vec!["block_count", "ssm.state_size"], vec!["blk.2.ffn_down.weight"]),
        (
            "nemotron_h_moe",
            "nemotron_h_moe",
            vec!["expert_count", "expert_used_count"],
            vec!["blk.1.ffn_down_exps.weight", "blk.3.ffn_up_shexp.weight"],
        ),
        ("falcon_h1", "falcon-h1", vec!["attention.head_count", "ssm.inner_size"], vec!["blk.1.ffn_norm"]),
        ("lfm2", "lfm2", vec!["shortconv.l_cache", "embedding_length"], vec!["blk.0.shortconv.conv.weight"]),
    ] {
        for key in needed {
            let key = format!("{architecture}.{key}");
            rewrite(name, &file, |keys| keys.retain(|(other, _)| *other != key), |_| {});
            let error = load(&file, DType::F32).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}` is missing")), "{name}: {error}");
            without_key += 1;
        }
        for tensor in tensors {
            rewrite(name, &file, |_| {}, |tensors| tensors.retain(|(other, _)| other != tensor));
            let error = load(&file, DType::F32).unwrap_err().to_string();
            // Where there is no such thing as a shared expert any more, what is left of it is too much.
            let left = tensor.replace("ffn_up_shexp", "ffn_down_shexp");
            assert!(error.contains(tensor) || error.contains(&left), "{name} without {tensor}: {error}");
            without_tensor += 1;
        }
        let stray = ("blk.0.stray.weight".to_owned(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
        rewrite(name, &file, |_| {}, |tensors| tensors.push(stray));
        let error = load(&file, DType::F32).unwrap_err().to_string();
        assert!(error.contains("does not fit its own keys: unread: blk.0.stray.weight"), "{name}: {error}");
    }
    assert_eq!((without_key, without_tensor), (16, 12));
}

/// Where a file says nothing of its vocabulary, the rows of the embedding are its size; where it says too much, they bound it.
#[test]
fn sizes_of_vocabularies_are_inferred() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    for (name, architecture) in [("mamba_tied", "mamba"), ("jamba", "jamba"), ("lfm2", "lfm2")] {
        let key = format!("{architecture}.vocab_size");
        let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
        for said in [None, Some(1u32 << 20), Some(50)] {
            let tell = |keys: &mut Vec<(String, Value)>| {
                keys.retain(|(other, _)| *other != key);
                keys.extend(said.map(|size| (key.clone(), Value::U32(size))));
            };
            rewrite(name, &file, tell, |_| {});
            let model = load(&file, DType::F32).unwrap();
            let size = if said == Some(50) { 50 } else { 61 };
            assert_eq!(
                (model.config().vocab_size, model.config().padded_vocab_size),
                (size, 61),
                "{name} {said:?}"
            );
            let ids = ids(&golden).clamp(0u32, size as u32 - 1).unwrap();
            let logits = model.forward(&ids, None).unwrap();
            assert_eq!(logits.dim(2).unwrap(), size, "{name}");
            if size == 61 {
                assert!(max_error(&logits, &golden.tensors["logits"]) <= 1e-4, "{name} {said:?}");
            }
        }
    }
}

/// A last layer that predicts further tokens is left where it is.
#[test]
fn heads_for_further_tokens_are_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let name = "nemotron_h_moe";
    let extra = |keys: &mut Vec<(String, Value)>| {
        for (key, value) in keys.iter_mut() {
            match (key.rsplit('.').next().unwrap(), value) {
                ("block_count", Value::U32(count)) => *count += 1,
                ("head_count_kv" | "feed_forward_length", Value::Array(Array::I32(counts))) => counts.push(2),
                _ => {}
            }
        }
        keys.push((format!("{name}.nextn_predict_layers"), Value::U32(1)));
    };
    let tensors = |tensors: &mut Vec<(String, Tensor)>| {
        let zeros = Tensor::zeros((3, 3), DType::F32, &Device::Cpu).unwrap();
        tensors
            .extend(["attn_q", "nextn.eh_proj"].map(|part| (format!("blk.4.{part}.weight"), zeros.clone())));
    };
    rewrite(name, &file, extra, tensors);
    let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
    let model = load(&file, DType::F32).unwrap();
    assert_eq!(model.config().layers.len(), 4);
    assert!(max_error(&model.forward(&ids(&golden), None).unwrap(), &golden.tensors["logits"]) <= 1e-4);
}
