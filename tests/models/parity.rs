//! Logits, greedy tokens and losses equal those of mamba_ssm and transformers.

use candle_core::{DType, Device, Tensor};
use mamba_model::Model;

use crate::support::golden::{Golden, path};
use crate::support::tolerance::{max_error, values};
use crate::{in_pieces, open};

/// Largest difference of a logit or a loss in `f32`.
const LOGITS: f64 = 1e-4;

/// The same against upstream's Mamba-2 on a GPU as it runs by default, with products in TF32: told to multiply in float32, it
/// is itself off these numbers by 6e-3.
const LOGITS_TF32: f64 = 1e-2;

fn ids(golden: &Golden, name: &str) -> Tensor {
    golden.tensors[name].to_dtype(DType::U32).unwrap()
}

#[track_caller]
fn close(got: &Tensor, want: &Tensor, context: &str) {
    within(LOGITS, got, want, context);
}

#[track_caller]
fn within(bound: f64, got: &Tensor, want: &Tensor, context: &str) {
    let gap = (values(got).iter().zip(values(want)).map(|(a, b)| (a - b).abs())).fold(0.0, f64::max);
    assert_eq!(got.dims(), want.dims(), "{context}");
    assert!(gap <= bound, "{context}: logits are off by {gap:.1e}");
}

/// Greedy continuation through steps, with the logits that led to each token.
fn greedy(model: &Model, prompt: &Tensor, count: usize) -> (Vec<u32>, Tensor) {
    let mut cache = model.new_cache(1).unwrap();
    let mut logits = model.prefill(prompt, &mut cache).unwrap();
    let (mut ids, mut all) = (vec![], vec![]);
    for _ in 0..count {
        let id = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap()[0];
        all.push(logits);
        ids.push(id);
        logits = model.step(&Tensor::new(&[id], &Device::Cpu).unwrap(), &mut cache).unwrap();
    }
    (ids, Tensor::stack(&all, 1).unwrap())
}

/// Negative log-likelihoods of `ids[1..]`, reading in windows.
fn losses(model: &Model, ids: &Tensor, window: usize) -> Vec<f64> {
    let count = ids.dim(1).unwrap();
    let mut lengths = vec![window; (count - 1) / window];
    lengths.extend(Some((count - 1) % window).filter(|rest| *rest > 0));
    let logits = in_pieces(model, &ids.narrow(1, 0, count - 1).unwrap(), &lengths);
    let rows = logits.squeeze(0).unwrap().to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let targets = ids.squeeze(0).unwrap().to_vec1::<u32>().unwrap();
    let nll = |(row, target): (&Vec<f64>, &u32)| {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        row.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max - row[*target as usize]
    };
    rows.iter().zip(&targets[1..]).map(nll).collect()
}

/// What mamba_ssm computed on a GPU, for Mamba-2 also with products in float32, and what transformers computes in float64.
#[test]
fn shakespeare() {
    for (name, file, bound) in [
        ("mamba-shakespeare", "io.safetensors", LOGITS),
        ("mamba2-shakespeare", "io.safetensors", LOGITS_TF32),
        ("mamba2-shakespeare", "ieee.safetensors", LOGITS),
        ("mamba2-shakespeare", "f64.safetensors", LOGITS),
    ] {
        let model = open(name, DType::F32);
        let input = Golden::read(&path("models").join(name).join("io.safetensors"));
        let golden = Golden::read(&path("models").join(name).join(file));
        let context = |how: &str| format!("{name} against {file}, {how}");
        let prompt = ids(&input, "prompt_ids");
        let seqlen = prompt.dim(1).unwrap();
        let want = &golden.tensors["prompt_logits"];
        within(bound, &model.forward(&prompt, None).unwrap(), want, &context("in one forward"));
        within(bound, &in_pieces(&model, &prompt, &vec![1; seqlen]), want, &context("in single steps"));
        for t in 0..=seqlen {
            let got = in_pieces(&model, &prompt, &[t, seqlen - t]);
            within(bound, &got, want, &context(&format!("split at {t}")));
        }

        let (got, logits) = greedy(&model, &prompt, 64);
        let all = ids(&input, "greedy_ids").squeeze(0).unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(got, all[seqlen..], "{name}");
        within(bound, &logits, &golden.tensors["greedy_logits"], &context("greedy"));

        let validation = ids(&input, "val_ids");
        let want = values(&golden.tensors["val_nll"]);
        for window in [1023, 100, 1] {
            let got = losses(&model, &validation, window);
            assert_eq!(got.len(), want.len());
            let gap = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(
                gap <= bound,
                "{}: losses are off by {gap:.1e}",
                context(&format!("windows of {window}"))
            );
        }
    }
}

/// The names of all tiny language models that transformers and mamba_ssm wrote.
pub fn tiny_checkpoints() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(path("models"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !["-shakespeare", "_classifier", "_headless"].iter().any(|end| name.ends_with(end)))
        .collect();
    names.sort();
    names
}

#[test]
fn logits_of_tiny_checkpoints() {
    let (mut read, mut stepped) = (0, 0);
    for name in &tiny_checkpoints() {
        read += 1;
        let model = open(name, DType::F32);
        let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
        let input = ids(&golden, "input_ids");
        let (_, seqlen) = input.dims2().unwrap();
        // Ids past the vocabulary get no logits here.
        let known = |x: &Tensor| x.narrow(2, 0, model.config().vocab_size).unwrap();
        let want = known(&golden.tensors["logits"]);
        close(&model.forward(&input, None).unwrap(), &want, name);
        for t in [1, seqlen / 2, seqlen - 1] {
            close(&in_pieces(&model, &input, &[t, seqlen - t]), &want, &format!("{name} split at {t}"));
        }
        close(&in_pieces(&model, &input, &vec![1; seqlen]), &want, &format!("{name} in steps"));
        if let Some(want) = golden.tensors.get("step_logits") {
            stepped += 1;
            let prefill = golden.number("prefill").unwrap() as usize;
            let lengths: Vec<usize> = [prefill].into_iter().chain(vec![1; seqlen - prefill]).collect();
            let got = in_pieces(&model, &input, &lengths).narrow(1, prefill, seqlen - prefill).unwrap();
            close(&got, &known(want), &format!("{name} continued"));
        }
    }
    assert_eq!((read, stepped), (41, 30), "checkpoints read, and continued");
}

/// In half precision the error is that of rounding, not more: the loss hardly moves.
#[test]
fn half_precision() {
    for name in ["mamba-shakespeare", "mamba2-shakespeare"] {
        let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
        let validation = ids(&golden, "val_ids");
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let want = mean(&values(&golden.tensors["val_nll"]));
        for (dtype, allowed) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let got = mean(&losses(&open(name, dtype), &validation, 341));
            assert!((got - want).abs() <= allowed, "{name} {}: {got}, in f32 {want}", dtype.as_str());
        }
    }
}

/// `max_error` is what the other tests of this file rest on.
#[test]
fn a_wrong_logit_is_seen() {
    let x = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let y = Tensor::new(&[1f32, 2.001], &Device::Cpu).unwrap();
    assert!(max_error(&y, &x) > LOGITS);
}
