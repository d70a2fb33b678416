//! What holds for every training.

use candle_core::{DType, Device};
use mamba_model::config::{LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, MlpConfig, ModelConfig};
use mamba_model::{Model, Recompute};
use mamba_train::data::{Batch, Position};
use mamba_train::{
    Gradients, Schedule, TrainOptions, TrainableModel, Trainer, language_model_loss, latest, prune,
};

use crate::bits;
use crate::support::random::Random;
use crate::support::tolerance::{BACKWARD, relative_rms, values};

/// Both kinds of blocks and an MLP.
pub fn config() -> ModelConfig {
    let mamba1 = MixerSpec::Mamba1(Mamba1Config { d_state: 4, ..Mamba1Config::new(16) });
    let mamba2 =
        MixerSpec::Mamba2(Mamba2Config { d_state: 8, headdim: 8, ngroups: 2, ..Mamba2Config::new(16) });
    let mlp = MixerSpec::Mlp(MlpConfig { bias: false, ..MlpConfig::new(128) });
    let layers = vec![LayerSpec::new([mamba1, mlp.clone()]), LayerSpec::new([mamba2, mlp])];
    ModelConfig { layers, ..ModelConfig::uniform(40, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16))) }
}

pub fn rows(seed: u64, count: usize, len: usize) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    (0..count).map(|i| random.ids(len - 3 * i, 40)).collect()
}

pub fn batch(rows: &[Vec<u32>]) -> Batch {
    Batch::padded(rows, &Device::Cpu).unwrap()
}

pub fn trainable(dtype: DType) -> TrainableModel {
    TrainableModel::new(&Model::random(&config(), 5, &Device::Cpu).unwrap(), dtype).unwrap()
}

fn trainer(dtype: DType, ema: Option<f64>) -> Trainer {
    trainer_with_dropout(dtype, ema, 0.0)
}

fn trainer_with_dropout(dtype: DType, ema: Option<f64>, dropout: f64) -> Trainer {
    let schedule = Schedule { lr: 5e-3, warmup: 3, steps: 12, ..Schedule::default() };
    let model = trainable(dtype).with_dropout(dropout, 4).unwrap();
    Trainer::new(model, TrainOptions { schedule, ema, ..TrainOptions::default() }).unwrap()
}

pub fn gradients(model: &TrainableModel, batch: &Batch) -> Gradients {
    let loss = language_model_loss(model.model(), batch).unwrap();
    Gradients::of(&(loss / batch.count as f64).unwrap(), model.parameters()).unwrap()
}

fn all_bits(trainer: &Trainer) -> Vec<Vec<u64>> {
    trainer.model().parameters().iter().map(|p| bits(p.value())).collect()
}

#[test]
fn every_parameter_has_a_gradient_and_recomputing_layers_does_not_change_it() {
    for dtype in [DType::F32, DType::F64] {
        let batch = batch(&rows(1, 3, 20));
        let plain = gradients(&trainable(dtype), &batch);
        let model = trainable(dtype).with_recompute(Recompute::Layers);
        let recomputed = gradients(&model, &batch);
        assert_eq!(model.parameters().len(), 4 + 9 + 8 + 8);
        for parameter in model.parameters() {
            let name = parameter.name();
            let (got, want) = (recomputed.get(name).unwrap(), plain.get(name).unwrap());
            assert!(values(want).iter().any(|v| *v != 0.0), "{name} has no gradient");
            let error = relative_rms(got, want);
            assert!(error < if dtype == DType::F64 { 1e-13 } else { BACKWARD }, "{name}: {error}");
        }
    }
}

/// The loss in pieces is that of the model's own logits, also where a family scales these.
#[test]
fn the_loss_is_of_the_logits_of_the_model() {
    for (name, scaled) in [("mamba_tied", false), ("granitemoehybrid", true), ("falcon_h1", true)] {
        let model = crate::open(name, DType::F32);
        assert_eq!(model.config().logits_scale != 1.0, scaled, "{name}");
        let vocab = model.config().vocab_size as u32;
        let mut random = Random::new(3);
        let batch = batch(&(0..3).map(|i| random.ids(17 - 4 * i, vocab)).collect::<Vec<_>>());
        let logits = model.forward(batch.input().unwrap(), None).unwrap().flatten_to(1).unwrap();
        let logits = logits.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let targets =
            batch.targets.flatten_all().unwrap().to_dtype(DType::I64).unwrap().to_vec1::<i64>().unwrap();
        let nll = |(row, target): (&Vec<f64>, &i64)| {
            let target = usize::try_from(*target).ok()?; // what is ignored is negative
            let max = row.iter().copied().fold(f64::MIN, f64::max);
            Some(row.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max - row[target])
        };
        let want: Vec<f64> = logits.iter().zip(&targets).filter_map(nll).collect();
        assert_eq!((want.len(), batch.count), (16 + 12 + 8, 16 + 12 + 8), "{name}");
        let got = values(&language_model_loss(&model, &batch).unwrap())[0];
        let want: f64 = want.iter().sum();
        assert!((got - want).abs() <= 1e-5 * want, "{name}: {got}, expected {want}");
    }
}

#[test]
fn parts_of_a_batch_are_the_batch() {
    let rows = rows(2, 4, 21);
    let (mut whole, mut parts) = (trainer(DType::F32, None), trainer(DType::F32, None));
    for _ in 0..3 {
        let a = whole.step(&[batch(&rows)]).unwrap();
        // Parts of different numbers of predictions count by these.
        let b = parts.step(&[batch(&rows[..1]), batch(&rows[1..3]), batch(&rows[3..])]).unwrap();
        assert_eq!(a.tokens, b.tokens);
        assert!((a.loss - b.loss).abs() < 1e-5 && (a.grad_norm / b.grad_norm - 1.0).abs() < 1e-4);
    }
    for (a, b) in whole.model().parameters().iter().zip(parts.model().parameters()) {
        let error = relative_rms(a.value(), b.value());
        assert!(error < 1e-3, "{}: {error}", a.name());
    }
}

/// In f32 and bf16, with a moving average, with dropout: one training, and one that was saved in the middle and resumed by a new
/// process.
#[test]
fn the_same_bits_again_and_after_a_resume() {
    let trainings = [(DType::F32, Some(0.9), 0.0), (DType::BF16, None, 0.0), (DType::F32, None, 0.2)];
    for (dtype, ema, dropout) in trainings {
        let trainer = |dtype: DType, ema: Option<f64>| trainer_with_dropout(dtype, ema, dropout);
        let part = |i: usize| batch(&rows(i as u64, 2, 18));
        let step = |trainer: &mut Trainer, i: usize| trainer.step(&[part(i), part(i + 9)]).unwrap();
        let mut once = trainer(dtype, ema);
        let losses: Vec<f64> = (0..6).map(|i| step(&mut once, i).loss).collect();
        let mut again = trainer(dtype, ema);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).stack_size(1 << 25).build().unwrap();
        let repeated: Vec<f64> = pool.install(|| (0..6).map(|i| step(&mut again, i).loss).collect());
        assert_eq!(losses, repeated);
        assert_eq!(all_bits(&once), all_bits(&again));

        let folder = tempfile::tempdir().unwrap();
        let mut first = trainer(dtype, ema);
        for i in 0..3 {
            step(&mut first, i);
        }
        let position = Position { epoch: 1, row: 7 };
        first.save(folder.path(), position, |_| Ok(())).unwrap();
        let mut second = trainer(dtype, ema);
        let place = latest(folder.path()).unwrap();
        assert_eq!(second.resume(&place).unwrap(), position);
        assert_eq!(second.steps_done(), 3);
        let resumed: Vec<f64> = (3..6).map(|i| step(&mut second, i).loss).collect();
        assert_eq!(losses[3..], resumed);
        assert_eq!(all_bits(&once), all_bits(&second));
        let averaged = |trainer: &mut Trainer| trainer.with_average(|t| Ok(all_bits(t))).unwrap();
        assert_eq!(averaged(&mut once), averaged(&mut second));
        assert_eq!(ema.is_some(), averaged(&mut once) != all_bits(&once));
    }
}

#[test]
fn only_complete_trainings_count() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(DType::F32, None);
    for i in 0..3 {
        trainer.step(&[batch(&rows(i, 2, 12))]).unwrap();
        trainer.save(folder.path(), Position::default(), |_| Ok(())).unwrap();
    }
    std::fs::create_dir(folder.path().join("step-00000009")).unwrap();
    let failed = trainer
        .save(&folder.path().join("x"), Position::default(), |_| Err(mamba_train::Error::Data("no".into())));
    assert!(failed.is_err());
    assert!(std::fs::read_dir(folder.path().join("x")).unwrap().next().is_none());
    assert!(latest(folder.path()).unwrap().ends_with("step-00000003"));

    // The same step again takes the place of the first when it is complete, and leaves it where it cannot be.
    let place = latest(folder.path()).unwrap();
    let noted = |text: &'static str| {
        move |part: &std::path::Path| {
            std::fs::create_dir(part.join("model")).unwrap();
            std::fs::write(part.join("model/note"), text).unwrap();
            Ok(())
        }
    };
    for text in ["one", "two"] {
        trainer.save(folder.path(), Position::default(), noted(text)).unwrap();
        assert_eq!(std::fs::read_to_string(place.join("model/note")).unwrap(), text);
    }
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    let lost = trainer.save(folder.path(), Position::default(), |part| {
        std::fs::remove_dir_all(part).unwrap();
        Ok(())
    });
    assert!(lost.is_err());
    assert_eq!(std::fs::read_to_string(place.join("model/note")).unwrap(), "two");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before, "nothing is left beside");
    prune(folder.path(), 1).unwrap();
    assert!(!folder.path().join("step-00000002").exists());

    // Another model is refused.
    let other = ModelConfig::uniform(40, 16, 1, MixerSpec::Mamba1(Mamba1Config::new(16)));
    let other = TrainableModel::new(&Model::random(&other, 1, &Device::Cpu).unwrap(), DType::F32).unwrap();
    let mut other = Trainer::new(other, TrainOptions::default()).unwrap();
    let error = other.resume(&latest(folder.path()).unwrap()).unwrap_err().to_string();
    assert!(error.contains("training.safetensors"), "{error}");
}

/// What is not trained keeps its bits and has no gradient, whatever is trained around it.
#[test]
fn frozen_parameters_keep_their_bits() {
    let start = Model::random(&config(), 5, &Device::Cpu).unwrap();
    let model =
        TrainableModel::only(&start, DType::F32, |name| name.contains("norm") || name.ends_with("A_log"))
            .unwrap();
    let mut trainer = Trainer::new(model, TrainOptions::default()).unwrap();
    for i in 0..3 {
        trainer.step(&[batch(&rows(i, 2, 12))]).unwrap();
    }
    let mut changed = 0;
    for ((name, before), (_, after)) in start.parameters().iter().zip(trainer.model().model().parameters()) {
        match trainer.model().parameters().get(name) {
            Some(_) => {
                assert_ne!(bits(before), bits(after), "{name}");
                changed += 1;
            }
            None => {
                assert!(!after.track_op(), "{name}");
                assert_eq!(bits(before), bits(after), "{name}");
            }
        }
    }
    assert_eq!(changed, 4 + 1 + 1 + 1 + 1);
}

/// bf16 learns too, close to f32, with values that keep more than bf16 can.
#[test]
fn bf16_follows_f32() {
    let (mut narrow, mut wide) = (trainer(DType::BF16, None), trainer(DType::F32, None));
    let batch = batch(&rows(3, 2, 20));
    let losses = |trainer: &mut Trainer| -> Vec<f64> {
        (0..12).map(|_| trainer.step(std::slice::from_ref(&batch)).unwrap().loss).collect()
    };
    let (a, b) = (losses(&mut narrow), losses(&mut wide));
    assert!(a[11] < a[0] - 0.5 && (a[11] - b[11]).abs() < 0.1, "{a:?} {b:?}");
    let parameter = narrow.model().parameters().get("layers.0.0.mamba1.in_proj.weight").unwrap();
    assert_eq!(parameter.var().dtype(), DType::BF16);
    let error = relative_rms(&parameter.var().to_dtype(DType::F32).unwrap(), parameter.value());
    assert!(error > 0.0 && error < 5e-3, "{error}");
    let decay = narrow.model().parameters().get("layers.0.0.mamba1.A_log").unwrap();
    assert_eq!(decay.var().dtype(), DType::F32);
}

#[test]
fn gradients_that_are_not_numbers_are_skipped() {
    let mut trainer = trainer(DType::F32, None);
    let before = all_bits(&trainer);
    let parameter = trainer.model().parameters().get("norm_f.weight").unwrap().clone();
    let good = parameter.value().copy().unwrap();
    parameter.set(&(&good * f64::NAN).unwrap()).unwrap();
    assert!(trainer.step(&[batch(&rows(1, 2, 12))]).unwrap().skipped);
    parameter.set(&good).unwrap();
    assert_eq!(all_bits(&trainer), before);
    assert!(!trainer.step(&[batch(&rows(1, 2, 12))]).unwrap().skipped);
}
