//! What is left out while training.

use candle_core::{DType, Device, Tensor};
use mamba_model::{Model, Recompute};
use mamba_train::{TrainableModel, language_model_loss};

use crate::laws::{batch, config, gradients, rows, trainable};
use crate::support::random::Random;
use crate::support::tolerance::{BACKWARD, relative_rms, values};

fn ids() -> Tensor {
    Tensor::from_vec(Random::new(3).ids(20, 40), (2, 10), &Device::Cpu).unwrap()
}

fn model() -> Model {
    Model::random(&config(), 5, &Device::Cpu).unwrap()
}

/// In passes without a cache alone, and not in what is evaluated, generated from or saved.
#[test]
fn it_is_for_training() {
    let ids = ids();
    let want = values(&model().forward(&ids, None).unwrap());
    let dropping = model().with_dropout(0.3, 7).unwrap();
    assert_ne!(values(&dropping.forward(&ids, None).unwrap()), want);
    let mut cache = dropping.new_cache(2).unwrap();
    assert_eq!(values(&dropping.forward(&ids, Some(&mut cache)).unwrap()), want);

    let trained = trainable(DType::F32).with_dropout(0.3, 7).unwrap();
    assert_ne!(values(&trained.model().forward(&ids, None).unwrap()), want);
    for still in [trained.view().unwrap(), trained.snapshot(DType::F32).unwrap()] {
        assert_eq!(values(&still.forward(&ids, None).unwrap()), want);
    }
    assert_eq!(values(&model().with_dropout(0.0, 7).unwrap().forward(&ids, None).unwrap()), want);
    for rate in [1.0, -0.1, f64::NAN] {
        let error = model().with_dropout(rate, 7).unwrap_err().to_string();
        assert!(error.contains("expected at least 0 and less than 1"), "{error}");
    }
}

/// Each pass draws its own masks, the same ones for the same number and seed.
#[test]
fn masks_belong_to_numbers() {
    let ids = ids();
    let run = |model: &Model| values(&model.forward(&ids, None).unwrap());
    let one = model().with_dropout(0.2, 7).unwrap();
    let passes: Vec<_> = (0..3).map(|_| run(&one)).collect();
    assert!(passes[0] != passes[1] && passes[1] != passes[2] && passes[0] != passes[2]);
    one.seek_dropout(1);
    assert_eq!([run(&one), run(&one)], passes[1..]);
    let again = model().with_dropout(0.2, 7).unwrap();
    assert_eq!(run(&again), passes[0]);
    assert_ne!(run(&model().with_dropout(0.2, 8).unwrap()), passes[0]);
}

/// The gradients are those of the function with these masks: along a random direction, in f64.
#[test]
fn gradients_are_of_what_was_computed() {
    let trained = trainable(DType::F64).with_dropout(0.25, 3).unwrap();
    let batch = batch(&rows(1, 3, 20));
    let gradients = gradients(&trained, &batch);
    let mut random = Random::new(8);
    let start = trained.parameters().snapshot().unwrap();
    let directions: Vec<Tensor> =
        trained.parameters().iter().map(|p| random.normal(p.value().dims())).collect();
    let loss_at = |distance: f64| {
        for (parameter, direction) in trained.parameters().iter().zip(&directions) {
            let moved = (&start[parameter.name()] + (direction * distance).unwrap()).unwrap();
            parameter.set(&moved).unwrap();
        }
        trained.model().seek_dropout(0);
        values(&language_model_loss(trained.model(), &batch).unwrap())[0] / batch.count as f64
    };
    let step = 1e-6;
    let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
    let along = |(parameter, direction): (&mamba_train::Parameter, &Tensor)| {
        values(&(gradients.get(parameter.name()).unwrap() * direction).unwrap().sum_all().unwrap())[0]
    };
    let want: f64 = trained.parameters().iter().zip(&directions).map(along).sum();
    assert!(want.abs() > 1e-2 && (slope - want).abs() < 1e-6 * want.abs(), "{slope}, expected {want}");
}

/// Layers that are computed again draw their masks again: in our configuration, and in families with shared blocks, parallel
/// mixers and experts.
#[test]
fn recomputing_draws_the_same_masks() {
    let small = [DType::F32, DType::F64].map(|dtype| trainable(dtype).view().unwrap());
    let families = ["zamba2", "falcon_h1", "jamba"].map(|name| crate::open(name, DType::F64));
    let mut differ = 0;
    for source in small.into_iter().chain(families) {
        let batch = batch(&(0..3).map(|i| Random::new(i).ids(18 - i as usize, 40)).collect::<Vec<_>>());
        let run = |recompute: Recompute, rate: f64| {
            let model = TrainableModel::new(&source, source.dtype()).unwrap();
            let model = model.with_recompute(recompute).with_dropout(rate, 3).unwrap();
            let loss = language_model_loss(model.model(), &batch).unwrap();
            model.model().seek_dropout(0);
            (values(&loss), gradients(&model, &batch), model)
        };
        let (loss, plain, model) = run(Recompute::Nothing, 0.25);
        let (again, recomputed, _) = run(Recompute::Layers, 0.25);
        assert_eq!(loss, again);
        assert_ne!(loss, run(Recompute::Nothing, 0.0).0);
        let without = run(Recompute::Nothing, 0.0).1;
        for name in model.parameters().iter().map(mamba_train::Parameter::name) {
            let (got, want) = (recomputed.get(name).unwrap(), plain.get(name).unwrap());
            let error = relative_rms(got, want);
            let bound = if source.dtype() == DType::F64 { 1e-12 } else { BACKWARD };
            assert!(error < bound, "{name}: {error}");
            differ += usize::from(relative_rms(without.get(name).unwrap(), want) > 1e-3);
        }
    }
    assert!(differ > 60, "{differ}");
}
