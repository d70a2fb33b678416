//! Models from GGUF files that the `gguf` package wrote give the logits of the models they were written from.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;
use mamba_model::checkpoint::gguf::{Array, GgmlType, Metadata, Value};
use mamba_model::checkpoint::{Checkpoint, LocalDir};

use crate::support::golden::{Golden, path};
use crate::support::tolerance::{max_error, relative_rms};
use crate::{in_pieces, open};

fn load(file: &Path, dtype: DType) -> mamba_model::Result<Model> {
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

#[test]
fn logits_are_those_of_the_original() {
    let (mut plain, mut quantized) = (0, 0);
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
            let config = |model: &Model| {
                let mut config = model.config().clone();
                // Files say nothing of these; neither changes the numbers here.
                (config.eos_token_ids, config.residual_in_f32) = (vec![], true);
                for mixer in
                    config.layers.iter_mut().flat_map(|l| &mut l.branches).flat_map(|b| &mut b.mixers)
                {
                    if let (_, mamba_model::config::MixerSpec::Mamba2(c)) = mixer {
                        c.chunk_size = 0;
                    }
                }
                config
            };
            assert_eq!(config(&model), config(&original), "{name}");
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
    assert_eq!((plain, quantized), (6, 2));
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

    std::fs::write(folder.path().join("b.gguf"), &bytes).unwrap();
    let error = load(folder.path(), DType::F32).unwrap_err().to_string();
    assert!(error.contains("has several files of weights, name one of any name.gguf, b.gguf"), "{error}");
    assert!(load(&folder.path().join("b.gguf"), DType::F32).is_ok());
}

/// What we write is what the `gguf` package wrote, name by name and bit by bit, and keys agree.
#[test]
fn saved_files_are_those_of_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = |file: &Path| Checkpoint::open(&LocalDir::new(file).unwrap()).unwrap();
    let mut compared = 0;
    for name in names().into_iter().filter(|name| !name.ends_with("_quantized")) {
        let file = folder.path().join(format!("{name}.gguf"));
        open(&name, DType::F32).save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).unwrap();
        let (got, want) = (checkpoint(&file), checkpoint(&path("gguf").join(format!("{name}.gguf"))));
        assert_eq!(got.names().collect::<Vec<_>>(), want.names().collect::<Vec<_>>(), "{name}");
        for tensor in want.names() {
            assert_eq!(got.info(tensor), want.info(tensor), "{name} {tensor}");
            let read = |from: &Checkpoint| from.tensor(tensor, &Device::Cpu).unwrap();
            // Two ways to round an exponential; all else is the same to the bit.
            let allowed = if tensor.ends_with("ssm_a") { 2e-7 } else { 0.0 };
            assert!(max_error(&read(&got), &read(&want)) <= allowed, "{name} {tensor}");
        }
        let (got, want) = (got.metadata().unwrap(), want.metadata().unwrap());
        for (key, value) in want.iter() {
            assert_eq!(got.get(key), Some(value), "{name} {key}");
            compared += 1;
        }
    }
    assert!(compared >= 6 * 12, "{compared} keys were compared");
}

#[test]
fn every_type_that_can_be_written_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let mixer =
        mamba_model::config::Mamba2Config { d_state: 16, ..mamba_model::config::Mamba2Config::new(256) };
    let mut config =
        mamba_model::config::ModelConfig::uniform(50, 256, 1, mamba_model::config::MixerSpec::Mamba2(mixer));
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
    for kind in [GgmlType::MXFP4, GgmlType::IQ4_NL] {
        let error = model.save_gguf(&file, kind, Metadata::default(), |_| {}).unwrap_err().to_string();
        assert!(error.contains("which can be read but not written"), "{error}");
    }
    // Nothing is left of files that were not finished.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
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
    model.save_gguf(&file, GgmlType::F16, extra, |_| {}).unwrap();
    let again = load(&file, DType::F32).unwrap();
    assert_eq!((again.config().vocab_size, again.config().padded_vocab_size), (vocab, rows));
    assert_eq!(again.config().eos_token_ids, [7]);
    let checkpoint = Checkpoint::open(&LocalDir::new(&file).unwrap()).unwrap();
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
    ] {
        let file = folder.path().join("x.gguf");
        let error =
            open(name, DType::F32).save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).unwrap_err();
        assert!(error.to_string().contains("no architecture of GGUF has words for"), "{name}: {error}");
        assert!(!file.exists());
    }
}
