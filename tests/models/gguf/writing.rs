//! Writing: what the `gguf` package writes, and what comes back from it.

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;
use mamba_model::checkpoint::gguf::{Array, GgmlType, Metadata, TensorSpec, Value};
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use mamba_model::config::{MixerSpec, ModelConfig};

use super::{checkpoint, described, ids, load, save, writable};
use crate::support::golden::{Golden, path};
use crate::support::tolerance::{max_error, relative_rms};
use crate::{in_pieces, open};

/// What we write is what the `gguf` package wrote, name by name and bit by bit, and keys agree.
#[test]
fn saved_files_are_those_of_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let (mut keys, mut exact, mut rounded) = (0, 0, 0);
    for name in writable() {
        let file = folder.path().join(format!("{name}.gguf"));
        save(&open(&name, DType::F32), &file);
        let (got, want) = (checkpoint(&file), checkpoint(&path("gguf").join(format!("{name}.gguf"))));
        assert_eq!(got.names().collect::<Vec<_>>(), want.names().collect::<Vec<_>>(), "{name}");
        for tensor in want.names() {
            assert_eq!(got.info(tensor), want.info(tensor), "{name} {tensor}");
            let read = |from: &Checkpoint| from.tensor(tensor, &Device::Cpu).unwrap();
            // Two ways to round an exponential, and products of several numbers; all else is the same to the bit.
            let computed = tensor.ends_with("ssm_a") || name.starts_with("falcon_h1");
            let gap = max_error(&read(&got), &read(&want));
            assert!(gap <= if computed { 3e-7 } else { 0.0 }, "{name} {tensor}: off by {gap:.1e}");
            *(if computed { &mut rounded } else { &mut exact }) += 1;
        }
        let (got, want) = (got.metadata().unwrap(), want.metadata().unwrap());
        for (key, value) in want.iter() {
            assert_eq!(got.get(key), Some(value), "{name} {key}");
            keys += 1;
        }
    }
    assert!(keys >= 15 * 12 && exact > 250 && rounded > 40, "{keys} keys, {exact} and {rounded} tensors");
}

/// A folder becomes a file and the file a folder again, and the numbers stay the same to the bit.
#[test]
fn conversions_keep_every_logit() {
    let folder = tempfile::tempdir().unwrap();
    let more =
        ["jamba_dense", "nemotron_h_latent_moe", "falcon_h1_norm", "lfm2_bias", "falcon_mamba_untied_bias"];
    let (mut converted, mut ended, mut refused) = (0, 0, vec![]);
    for name in writable().into_iter().chain(more.map(str::to_owned)) {
        let original = open(&name, DType::F32);
        let file = folder.path().join(format!("{name}.gguf"));
        if original.save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).is_err() {
            refused.push(name);
            continue;
        }
        let ids = ids(&Golden::read(&path("models").join(&name).join("io.safetensors")));
        let from_file = load(&file, DType::F32).unwrap();
        assert_eq!(from_file.config().eos_token_ids, original.config().eos_token_ids, "{name}");
        ended += usize::from(!original.config().eos_token_ids.is_empty());
        // Token by token, since files do not say how many are computed at once, which rounds otherwise.
        let logits = |model: &Model| in_pieces(model, &ids, &vec![1; ids.dim(1).unwrap()]);
        let (want, got) = (logits(&original), logits(&from_file));
        // Multipliers that go into weights round them.
        let allowed = if name.starts_with("falcon_h1") { 2e-5 } else { 0.0 };
        let gap = max_error(&got, &want);
        assert!(gap <= allowed, "{name}: logits are off by {gap:.1e}");

        let again = folder.path().join(&name);
        from_file.save_pretrained(&again, DType::F32).unwrap();
        let from_folder = load(&again, DType::F32).unwrap();
        assert_eq!(described(&from_folder), described(&from_file), "{name}");
        assert_eq!(max_error(&logits(&from_folder), &got), 0.0, "{name}");
        converted += 1;
    }
    // A norm before the gate, and an eps of the norms of dt, B and C: llama.cpp has neither.
    assert!(ended > 10, "{ended} models say where they end");
    assert_eq!((converted, refused), (18, vec!["falcon_h1_norm".into(), "falcon_mamba_untied_bias".into()]));
}

/// Multipliers of inputs reach weights alone, those of outputs biases too; a tied head that is multiplied otherwise than the
/// embedding is stored beside it.
#[test]
fn multipliers_go_into_weights_and_biases() {
    let folder = tempfile::tempdir().unwrap();
    let from = path("models/falcon_h1_norm");
    let text = std::fs::read_to_string(from.join("config.json")).unwrap();
    assert!(text.contains("\"mamba_norm_before_gate\": true"));
    let text = text.replace("\"mamba_norm_before_gate\": true", "\"mamba_norm_before_gate\": false");
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    std::fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let model = load(folder.path(), DType::F32).unwrap();
    assert!(model.config().tie_embeddings && model.config().embedding_scale != model.config().logits_scale);
    assert!(model.parameters().iter().filter(|(name, _)| name.ends_with("proj.bias")).count() >= 8);

    let file = folder.path().join("x.gguf");
    save(&model, &file);
    let again = load(&file, DType::F32).unwrap();
    assert!(!again.config().tie_embeddings && again.config().embedding_scale == 1.0);
    let ids = ids(&Golden::read(&from.join("io.safetensors")));
    let [got, want] = [&again, &model].map(|model| model.forward(&ids, None).unwrap());
    assert!(max_error(&got, &want) <= 2e-5);

    // Layers with multipliers of their own have no words.
    let mut config = open("falcon_h1", DType::F32).config().clone();
    config.layers[1].branches[0].mixers[0].0 *= 2.0;
    let uneven = Model::random(&config, 3, &Device::Cpu).unwrap();
    assert!(uneven.save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).is_err());
}

/// Experts in blocks are cut out of their stack, and gates and what they gate are put together.
#[test]
fn hybrids_are_quantized_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    for (name, matrices) in
        [("jamba", 30), ("granitemoehybrid", 28), ("nemotron_h_moe", 16), ("falcon_h1", 20), ("lfm2", 18)]
    {
        let text = std::fs::read_to_string(path("models").join(name).join("config.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (field, value) in [
            ("hidden_size", 64),
            ("intermediate_size", 96),
            ("moe_intermediate_size", 32),
            ("shared_intermediate_size", 32),
            ("moe_shared_expert_intermediate_size", 64),
            ("head_dim", 16),
            ("mamba_d_head", 16),
            ("mamba_d_ssm", 128),
            ("mamba_dt_rank", 32),
            ("mamba_num_heads", 4),
            ("mamba_head_dim", 32),
            ("block_multiple_of", 32),
        ] {
            if json.get(field).is_some_and(|old| !old.is_null()) {
                json[field] = value.into();
            }
        }
        let config = ModelConfig::from_json(&json.to_string()).unwrap();
        let model = Model::random(&config, 3, &Device::Cpu).unwrap();
        let mut quantized = 0;
        let report = |tensor: &TensorSpec| quantized += usize::from(tensor.kind == GgmlType::Q8_0);
        model.save_gguf(&file, GgmlType::Q8_0, Metadata::default(), report).unwrap();
        let again = load(&file, DType::F32).unwrap();
        save(&model, &file);
        let whole = load(&file, DType::F32).unwrap();
        assert_eq!(again.config(), whole.config());
        let mut rounded = 0;
        for ((canonical, got), (_, want)) in again.parameters().iter().zip(whole.parameters()) {
            let gap = relative_rms(got, want);
            assert!(gap <= 1e-2, "{name} {canonical}: off by {gap:.1e}");
            rounded += usize::from(gap > 1e-6);
        }
        assert_eq!((quantized, rounded > 10), (matrices, true), "{name}");
    }
}

#[test]
fn every_type_that_can_be_written_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let mixer =
        mamba_model::config::Mamba2Config { d_state: 16, ..mamba_model::config::Mamba2Config::new(256) };
    let mut config = ModelConfig::uniform(50, 256, 1, MixerSpec::Mamba2(mixer));
    config.padded_vocab_size = 64;
    let model = Model::random(&config, 3, &Device::Cpu).unwrap();
    // Largest relative error of a matrix.
    for (kind, bound) in [
        (GgmlType::F32, 0.0),
        (GgmlType::F16, 1e-3),
        (GgmlType::BF16, 1e-2),
        (GgmlType::Q8_0, 1e-2),
        (GgmlType::Q6_K, 3e-2),
        (GgmlType::Q5_K, 6e-2),
        (GgmlType::Q5_1, 6e-2),
        (GgmlType::Q5_0, 6e-2),
        (GgmlType::Q4_K, 0.12),
        (GgmlType::Q4_1, 0.12),
        (GgmlType::Q4_0, 0.12),
        (GgmlType::Q3_K, 0.25),
        (GgmlType::Q2_K, 0.5),
    ] {
        let mut kinds = vec![];
        model.save_gguf(&file, kind, Metadata::default(), |tensor| kinds.push(tensor.kind)).unwrap();
        assert_eq!(
            kinds.iter().filter(|other| **other == kind).count(),
            if kind == GgmlType::F32 { 11 } else { 3 }
        );
        let again = load(&file, DType::F32).unwrap();
        assert_eq!(again.config(), model.config(), "{kind}");
        for ((name, got), (_, want)) in again.parameters().iter().zip(model.parameters()) {
            let gap = relative_rms(got, want);
            let matrix = name.ends_with("proj.weight") || name == "embedding.weight";
            // A decay goes through its logarithm.
            let bound = if matrix { bound } else { 1e-6 };
            assert!(gap <= bound, "{kind} {name}: off by {gap:.1e}");
            assert!(!matrix || kind == GgmlType::F32 || gap > 1e-6, "{kind} {name} is not rounded at all");
        }
    }
    let unfit =
        [GgmlType::MXFP4, GgmlType::IQ4_NL, GgmlType::I16, GgmlType::I32, GgmlType::I64, GgmlType::F64];
    for kind in unfit {
        let error = model.save_gguf(&file, kind, Metadata::default(), |_| {}).unwrap_err().to_string();
        let want = format!(
            "input: `kind` is {kind}, expected one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K"
        );
        assert!(error.starts_with(&want), "{error}");
    }
    assert_eq!(GgmlType::of_weights().count(), 13);
    // Nothing is left of files that were not finished.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Where generation ends is told by three keys; those that the caller sets come first.
#[test]
fn ends_of_texts_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let mixer = MixerSpec::Mamba1(mamba_model::config::Mamba1Config::new(16));
    for (ids, extra, want) in [
        (vec![], vec![], vec![]),
        (vec![5], vec![], vec![5]),
        (vec![5, 3, 9], vec![], vec![5, 3, 9]),
        (vec![5, 3, 9, 8], vec![], vec![5, 3, 9]), // there is no fourth key
        (vec![5, 3], vec![("eos", 3)], vec![3, 5]),
        (vec![5], vec![("eot", 3)], vec![5, 3]),
        (vec![5, 3], vec![("eos", 3), ("eot", 3)], vec![3, 5]),
    ] {
        let mut config = ModelConfig::uniform(50, 16, 1, mixer.clone());
        config.eos_token_ids = ids.clone();
        let model = Model::random(&config, 3, &Device::Cpu).unwrap();
        let mut metadata = Metadata::default();
        for (end, id) in &extra {
            metadata.set(format!("tokenizer.ggml.{end}_token_id"), Value::U32(*id));
        }
        model.save_gguf(&file, GgmlType::F32, metadata, |_| {}).unwrap();
        assert_eq!(load(&file, DType::F32).unwrap().config().eos_token_ids, want, "{ids:?} {extra:?}");
    }
}

/// What describes the model is the model's to say.
#[test]
fn keys_that_describe_the_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let model = open("mamba_tied", DType::F32);
    for key in
        ["general.architecture", "general.file_type", "mamba.block_count", "mamba.vocab_size", "mamba.new"]
    {
        let mut extra = Metadata::default();
        extra.set(key, Value::U32(1));
        let error = model.save_gguf(&file, GgmlType::F32, extra, |_| {}).unwrap_err().to_string();
        assert_eq!(error, format!("input: `extra` has `{key}`, which the model itself says"));
    }
    // A bound that holds zeros to be written, and sizes that can be added up.
    let mut extra = Metadata::default();
    extra.set("general.alignment", Value::U64(1 << 62));
    let error = model.save_gguf(&file, GgmlType::F32, extra, |_| {}).unwrap_err().to_string();
    assert!(error.contains("`general.alignment` U64(4611686018427387904), expected a power of two up to"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn adapters_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        ModelConfig::uniform(50, 16, 1, MixerSpec::Mamba1(mamba_model::config::Mamba1Config::new(16)));
    let plain = Model::random(&config, 3, &Device::Cpu).unwrap();
    let mut tensors: std::collections::HashMap<_, _> = plain.parameters().iter().cloned().collect();
    let (name, weight) =
        plain.parameters().iter().find(|(name, _)| name.ends_with("in_proj.weight")).unwrap();
    let place = name.strip_suffix("weight").unwrap();
    let (rows, columns) = weight.dims2().unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    tensors.insert(format!("{place}lora_A.weight"), zeros(&[2, columns]));
    tensors.insert(format!("{place}lora_B.weight"), zeros(&[rows, 2]));
    tensors.insert(format!("{place}lora_scale"), zeros(&[]));
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let adapted = Model::new(&config, builder).unwrap();
    assert!(adapted.has_adapters());
    let file = folder.path().join("x.gguf");
    let errors = [
        adapted.save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).unwrap_err(),
        adapted.save_pretrained(folder.path(), DType::F32).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.to_string(), "input: the model has adapters: save what `merged` gives");
    }
    save(&adapted.merged().unwrap(), &file);
}

/// A vocabulary is filled up to the rows of the embedding, and known to have been.
#[test]
fn vocabularies_are_filled_up() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let model = open("ss_mamba1_options", DType::F32);
    let (vocab, rows) = (model.config().vocab_size, model.config().padded_vocab_size);
    assert!(vocab < rows);
    let mut extra = Metadata::default();
    extra.set("tokenizer.ggml.tokens", Array::String((0..vocab).map(|id| format!("t{id}")).collect()));
    extra.set("tokenizer.ggml.eos_token_id", Value::U32(7));
    // One that is no type says nothing, and leaves the others in their places.
    extra.set("tokenizer.ggml.token_type", Array::I32(vec![3, -1, 4]));
    model.save_gguf(&file, GgmlType::F16, extra, |_| {}).unwrap();
    let again = load(&file, DType::F32).unwrap();
    assert_eq!((again.config().vocab_size, again.config().padded_vocab_size), (vocab, rows));
    assert_eq!(again.config().eos_token_ids, [7]);
    let checkpoint = Checkpoint::open(&LocalDir::new(&file).unwrap()).unwrap();
    let kinds = checkpoint.metadata().unwrap().array("tokenizer.ggml.token_type").unwrap();
    let first: Vec<_> = kinds.iter().take(4).collect();
    assert_eq!((first, kinds.len()), ([3, 1, 4, 1].map(Value::I32).to_vec(), rows));
    let tokens = checkpoint.metadata().unwrap().strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!((tokens.len(), tokens[rows - 1].as_str()), (rows, format!("[PAD{}]", rows - 1).as_str()));
}

#[test]
fn what_gguf_has_no_words_for_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in [
        "ss_mamba2_partial_ssm",
        "ss_mamba1_layer_norm_mlp",
        "mamba2_time_step_limit",
        "ss_mamba2_d_has_hdim",
        "ss_mamba2_attention",
        "bamba",
        "zamba2",
        "falcon_h1_norm",
    ] {
        let file = folder.path().join("x.gguf");
        let error =
            open(name, DType::F32).save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).unwrap_err();
        assert!(error.to_string().contains("no architecture of GGUF has words for"), "{name}: {error}");
        assert!(!file.exists());
    }
}
