//! Several documents in one row: each as if it were alone.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use mamba_model::{Model, checkpoint::LocalDir, config::ModelConfig};
use mamba_train::data::{Batch, Batching, Dataset, IGNORED, TokenWriter};
use mamba_train::{Gradients, Schedule, TrainOptions, TrainableModel, Trainer, language_model_loss, latest};

use crate::support::golden;
use crate::support::random::Random;
use crate::support::target::with_gpu;
use crate::support::tolerance::{relative_rms, values};
use crate::{bits, open};

/// Mamba-1, Mamba-2, and hybrids of each with attention, MLPs or experts.
const MODELS: [&str; 4] = ["mamba_untied_bias", "mamba2_g2_tied_bias", "jamba", "bamba"];

/// Documents shorter than the convolution, longer than a chunk, and between.
fn documents(model: &Model) -> Vec<Vec<u32>> {
    let mut random = Random::new(11);
    [7, 2, 41, 3, 20].map(|len| random.ids(len, model.config().vocab_size as u32)).to_vec()
}

/// A model on another device.
fn open_on(name: &str, dtype: DType, device: &Device) -> Model {
    let folder = LocalDir::new(golden::path("models").join(name)).unwrap();
    Model::from_pretrained(&folder, dtype, device).unwrap()
}

fn loss_and_gradients(model: &TrainableModel, batch: &Batch) -> (f64, Gradients) {
    let loss = language_model_loss(model.model(), batch).unwrap();
    (values(&loss)[0], Gradients::of(&loss, model.parameters()).unwrap())
}

#[test]
fn packed_equals_separate_and_padded() {
    for name in MODELS {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
            equals_separate(name, dtype, tolerance, &Device::Cpu);
        }
    }
}

mod cuda {
    use super::*;

    /// One launch reads all documents.
    #[test]
    fn packed_equals_separate_and_padded() {
        with_gpu(|device| {
            for name in MODELS {
                equals_separate(name, DType::F32, 1e-4, device);
            }
            Ok(MODELS.len())
        });
    }
}

/// Packed or padded, documents have the loss and the gradients that they have one by one in CPU memory.
fn equals_separate(name: &str, dtype: DType, tolerance: f64, device: &Device) {
    let alone = TrainableModel::new(&open(name, dtype), dtype).unwrap();
    let documents = documents(alone.model());
    let (mut loss, mut gradients) = (0.0, Gradients::default());
    for document in &documents {
        let batch = Batch::padded(std::slice::from_ref(document), &Device::Cpu).unwrap();
        let (one, of_one) = loss_and_gradients(&alone, &batch);
        loss += one;
        gradients.add(of_one).unwrap();
    }
    let model = TrainableModel::new(&open_on(name, dtype, device), dtype).unwrap();
    let packed = Batch::packed(&documents, device).unwrap();
    let padded = Batch::padded(&documents, device).unwrap();
    assert_eq!((packed.count, padded.count), (68, 68));
    assert_eq!(packed.inputs.elem_count(), 68);
    for batch in [packed, padded] {
        let (got, of_all) = loss_and_gradients(&model, &batch);
        assert!((got / loss - 1.0).abs() < tolerance, "{name}: {got}, expected {loss}");
        for parameter in model.parameters() {
            let [got, want] = [&of_all, &gradients].map(|g| g.get(parameter.name()).unwrap());
            let error = relative_rms(&got.to_device(&Device::Cpu).unwrap(), want);
            assert!(error < tolerance, "{name} {}: {error}", parameter.name());
        }
    }
}

/// What the second document predicts has the same bits whatever the first one is, and depends on nothing of it.
#[test]
fn nothing_leaks_into_the_next_document() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let half = model.config().vocab_size as u32 / 2;
        let mut random = Random::new(5);
        let [first, other] = [0; 2].map(|_| random.ids(24, half));
        let second: Vec<u32> = random.ids(19, half).iter().map(|id| id + half).collect();
        let logits = |first: &[u32]| {
            let batch = Batch::packed(&[first.to_vec(), second.clone()], &Device::Cpu).unwrap();
            let all = model.forward(batch.input().unwrap(), None).unwrap().squeeze(0).unwrap();
            [all.narrow(0, 0, 23), all.narrow(0, 23, 18)].map(|part| bits(&part.unwrap()))
        };
        let ([a, b], [c, d]) = (logits(&first), logits(&other));
        assert!(a != c && b == d, "{name}");

        // With a head of its own, an embedding has a gradient only where its token was read.
        let untied = ModelConfig { tie_embeddings: false, ..model.config().clone() };
        let start = Model::random(&untied, 1, &Device::Cpu).unwrap();
        let model = TrainableModel::new(&start, DType::F32).unwrap();
        let mut batch = Batch::packed(&[first, second.clone()], &Device::Cpu).unwrap();
        let mut targets = vec![IGNORED; 23];
        targets.extend(second[1..].iter().map(|id| i64::from(*id)));
        batch.targets = Tensor::from_vec(targets, 41, &Device::Cpu).unwrap();
        let (_, gradients) = loss_and_gradients(&model, &batch);
        let embedding = model.parameters().iter().find(|p| p.name().contains("embed")).unwrap();
        let rows = gradients.get(embedding.name()).unwrap().to_vec2::<f32>().unwrap();
        let read = |id: usize| second[..18].contains(&(id as u32));
        for (id, row) in rows.iter().enumerate() {
            assert_eq!(row.iter().any(|x| *x != 0.0), read(id), "{name}: the embedding of {id}");
        }
    }
}

/// Packed data of short documents, in two parts a step: one training, and one that was interrupted.
#[test]
fn a_packed_training_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let start = open("bamba", DType::F32);
    let mut writer = TokenWriter::create(folder.path().join("x.tokens")).unwrap();
    let mut random = Random::new(2);
    for len in (0..40).map(|i| 2 + 7 * i % 31) {
        writer.begin_document();
        writer.push(&random.ids(len, start.config().vocab_size as u32)).unwrap();
    }
    let tokens = Arc::new(writer.finish().unwrap());
    let end = tokens.len();
    let data = Dataset::new(tokens, 0..end, 24).unwrap();
    let batching = Batching::Packed { tokens: 60 };
    let begin = || {
        let schedule = Schedule { lr: 5e-3, warmup: 2, steps: 8, ..Schedule::default() };
        let model = TrainableModel::new(&start, DType::F32).unwrap();
        let trainer = Trainer::new(model, TrainOptions { schedule, ..TrainOptions::default() }).unwrap();
        (trainer, data.shuffled(batching, 3).unwrap())
    };
    let steps = |trainer: &mut Trainer, batches: &mut mamba_train::data::Batches, count: usize| -> Vec<f64> {
        let step = |_| {
            let parts = [0; 2].map(|_| batches.next_batch(&Device::Cpu).unwrap());
            assert!(parts.iter().all(|part| part.count > 60 - 24 && part.count <= 60));
            trainer.step(&parts).unwrap().loss
        };
        (0..count).map(step).collect()
    };
    let (mut trainer, mut batches) = begin();
    let losses = steps(&mut trainer, &mut batches, 8);
    assert_eq!(batches.position().epoch, 1, "the losses should be of more than an epoch");

    let (mut first, mut before) = begin();
    steps(&mut first, &mut before, 3);
    first.save(folder.path(), before.position(), |_| Ok(())).unwrap();
    let (mut second, mut after) = begin();
    after.seek(second.resume(&latest(folder.path()).unwrap()).unwrap()).unwrap();
    assert_eq!(steps(&mut second, &mut after, 5), losses[3..]);
    for (a, b) in trainer.model().parameters().iter().zip(second.model().parameters()) {
        assert_eq!(bits(a.value()), bits(b.value()), "{}", a.name());
    }
}
