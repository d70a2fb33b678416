//! The same steps as PyTorch.

use candle_core::{DType, Device, Tensor};
use mamba_model::families::FAMILIES;
use mamba_train::data::Batch;
use mamba_train::{
    AdamWOptions, Decay, Gradients, Schedule, TrainOptions, TrainableModel, Trainer, language_model_loss,
};

use crate::open;
use crate::support::golden::Golden;
use crate::support::tolerance::{max_error, relative_rms, values};

/// Our batch of a golden's: the last row is cut short.
fn batch(golden: &Golden, step: usize) -> Batch {
    let ids = golden.tensors["ids"].get(step).unwrap().to_dtype(DType::U32).unwrap();
    let mut rows = ids.to_vec2::<u32>().unwrap();
    rows.last_mut().unwrap().truncate(golden.number("short").unwrap() as usize);
    Batch::padded(&rows, &Device::Cpu).unwrap()
}

/// The tensor of a golden that belongs to one of our parameters.
fn find<'a>(golden: &'a Golden, kind: &str, name: &str) -> &'a Tensor {
    let spelled = FAMILIES.iter().flat_map(|family| family.names.candidates(name));
    let mut found = spelled.filter_map(|spelled| golden.tensors.get(&format!("{kind}.{spelled}")));
    found.next().unwrap_or_else(|| panic!("{}: no {kind} of {name}", golden.name))
}

fn trainer(golden: &Golden) -> Trainer {
    let option = |name: &str| golden.number(name).unwrap();
    let optimizer = AdamWOptions {
        beta1: option("beta1"),
        beta2: option("beta2"),
        eps: option("eps"),
        weight_decay: option("weight_decay"),
        ..AdamWOptions::default()
    };
    let lrs = values(&golden.tensors["lrs"]);
    let lr = lrs[lrs.len() - 1];
    let warmup = lrs.iter().position(|rate| *rate == lr).unwrap() + 1;
    let schedule = Schedule { lr, warmup, steps: lrs.len(), min_lr: 0.0, decay: Decay::Constant };
    let options = TrainOptions { schedule, optimizer, clip_norm: option("clip"), ema: None };
    let model = TrainableModel::new(&open(&golden.name, DType::F32), DType::F32).unwrap();
    Trainer::new(model, options).unwrap()
}

#[test]
fn twenty_steps_are_those_of_pytorch() {
    let goldens = Golden::folder("train");
    assert_eq!(goldens.len(), 6);
    for golden in goldens {
        let name = &golden.name;
        let mut trainer = trainer(&golden);
        let (losses, norms) = (values(&golden.tensors["losses"]), values(&golden.tensors["norms"]));
        assert_eq!(losses.len(), 20);
        assert!(losses[19] < losses[0] - 0.3, "{name} learned nothing");
        let mut worst = 0.0f64;
        for (step, (loss, norm)) in losses.iter().zip(&norms).enumerate() {
            let report = trainer.step(&[batch(&golden, step)]).unwrap();
            let gap = (report.loss - loss).abs();
            worst = worst.max(gap);
            assert!(gap < 1e-4, "{name} step {step}: loss {} expected {loss}", report.loss);
            assert!((report.grad_norm - norm).abs() < 1e-3 * norm, "{name} step {step}: norm");
        }
        let mut worst_weight = 0.0f64;
        for parameter in trainer.model().parameters() {
            let want = find(&golden, "final", parameter.name());
            let error = max_error(&parameter.value().reshape(want.shape()).unwrap(), want);
            worst_weight = worst_weight.max(error);
            assert!(error < 2e-4, "{name} {}: {error}", parameter.name());
        }
        println!("{name}: losses within {worst:.1e}, weights within {worst_weight:.1e}");
    }
}

#[test]
fn every_gradient_is_that_of_pytorch_in_f64() {
    for golden in Golden::folder("train") {
        let model = TrainableModel::new(&open(&golden.name, DType::F64), DType::F64).unwrap();
        let batch = batch(&golden, 0);
        let loss = (language_model_loss(model.model(), &batch).unwrap() / batch.count as f64).unwrap();
        let gradients = Gradients::of(&loss, model.parameters()).unwrap();
        let stored = golden.tensors.keys().filter(|name| name.starts_with("grad.")).count();
        assert_eq!(model.parameters().len(), stored, "{}", golden.name);
        for parameter in model.parameters() {
            let want = find(&golden, "grad", parameter.name());
            let got = gradients.get(parameter.name()).unwrap();
            let error = relative_rms(&got.reshape(want.shape()).unwrap(), want);
            assert!(error < 1e-6, "{} {}: {error}", golden.name, parameter.name());
        }
    }
}
