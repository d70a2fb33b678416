//! Classifiers, and models without a head.

use candle_core::{DType, Device, Tensor};
use mamba_model::checkpoint::LocalDir;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata};
use mamba_model::families::Family;
use mamba_model::{Batch, Model, Pooling, SequenceClassifier};

use crate::open;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::max_error;

fn classifier(name: &str, pooling: Pooling) -> SequenceClassifier {
    let folder = LocalDir::new(path("models").join(name)).unwrap();
    SequenceClassifier::from_pretrained(&folder, pooling, DType::F32, &Device::Cpu)
        .unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn input(name: &str) -> (Golden, Tensor, Vec<usize>) {
    let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
    let ids = golden.tensors["input_ids"].to_dtype(DType::U32).unwrap();
    let lengths = golden.tensors["lengths"].to_vec1::<i64>().unwrap();
    (golden, ids, lengths.into_iter().map(|len| len as usize).collect())
}

/// Labels of padded rows equal those that transformers gives each row.
#[test]
fn classifiers() {
    for (name, labels) in [("jamba_classifier", 3), ("zamba2_classifier", 4), ("zamba_classifier", 2)] {
        let (golden, ids, lengths) = input(name);
        let classifier = classifier(name, Pooling::Last);
        let left = golden.tensors["left_ids"].to_dtype(DType::U32).unwrap();
        for (batch, logits) in [
            (Batch::right_padded(&ids, &lengths), "logits"),
            // What transformers gives such a batch at once.
            (Batch::left_padded(&left, &lengths), "left_logits"),
        ] {
            let got = classifier.forward(batch.unwrap()).unwrap();
            assert_eq!(got.dims(), [3, labels]);
            let gap = max_error(&got, &golden.tensors[logits]);
            assert!(gap <= 1e-4, "{name}, {logits}: off by {gap:.1e}");
        }
        assert!(classifier.parameters().iter().any(|(name, _)| name == "score.weight"));
    }
    // A language model has no labels.
    let folder = LocalDir::new(path("models").join("jamba")).unwrap();
    let error = SequenceClassifier::from_pretrained(&folder, Pooling::Last, DType::F32, &Device::Cpu);
    assert!(error.unwrap_err().to_string().ends_with("no tensor `score.weight`"));
}

/// Every pooling is what it says of the hidden states, and does not see padding.
#[test]
fn poolings() {
    let name = "bamba";
    let model = open(name, DType::F32);
    let ids = Golden::read(&path("models").join(name).join("io.safetensors")).tensors["input_ids"].clone();
    let ids = ids.to_dtype(DType::U32).unwrap();
    let (lengths, seqlen) = ([11, 5], ids.dim(1).unwrap());
    for pooling in POOLINGS {
        for side in ["right", "left"] {
            // On the left the last tokens of each row, on the right the first.
            let (batch, start) = match side {
                "right" => (Batch::right_padded(&ids, &lengths), [0, 0]),
                _ => (Batch::left_padded(&ids, &lengths), lengths.map(|len| seqlen - len)),
            };
            let got = model.pooled(batch.unwrap(), pooling).unwrap();
            for (row, len) in lengths.into_iter().enumerate() {
                let alone = ids.narrow(0, row, 1).unwrap().narrow(1, start[row], len).unwrap();
                let hidden = model.hidden_states(&alone, None).unwrap().squeeze(0).unwrap();
                let gap = max_error(&got.get(row).unwrap(), &pooled(&hidden, pooling));
                assert!(gap <= 1e-5, "{pooling:?}, {side}, row {row}: off by {gap:.1e}");
            }
        }
    }
    for empty in [Batch::right_padded(&ids, &[3, 0]), Batch::left_padded(&ids, &[3, 0])] {
        let error = model.pooled(empty.unwrap(), Pooling::Mean).unwrap_err().to_string();
        assert!(error.contains("row 1 is empty"), "{error}");
    }
}

const POOLINGS: [Pooling; 4] = [Pooling::Last, Pooling::Cls, Pooling::Mean, Pooling::Max];

/// A vector of the hidden states of one row, `(tokens, d_model)`.
fn pooled(hidden: &Tensor, pooling: Pooling) -> Tensor {
    let vector = match pooling {
        Pooling::Last => hidden.get(hidden.dim(0).unwrap() - 1),
        Pooling::Cls => hidden.get(0),
        Pooling::Mean => hidden.mean(0),
        Pooling::Max => hidden.max(0),
    };
    vector.unwrap()
}

/// Of a batch that is padded on the left, every pooling of the hidden states that transformers gives its tokens.
#[test]
fn poolings_of_the_published_hidden_states() {
    for name in ["mamba2_headless", "bamba_headless"] {
        let (golden, _, lengths) = input(name);
        let ids = golden.tensors["left_ids"].to_dtype(DType::U32).unwrap();
        let (model, hidden) = (open(name, DType::F32), &golden.tensors["left_hidden"]);
        let seqlen = ids.dim(1).unwrap();
        assert!(lengths.iter().any(|len| *len < seqlen), "{name}");
        for pooling in POOLINGS {
            let got = model.pooled(Batch::left_padded(&ids, &lengths).unwrap(), pooling).unwrap();
            for (row, &len) in lengths.iter().enumerate() {
                let tokens = hidden.get(row).unwrap().narrow(0, seqlen - len, len).unwrap();
                let gap = max_error(&got.get(row).unwrap(), &pooled(&tokens, pooling));
                assert!(gap <= 1e-4, "{name}, {pooling:?}, row {row}: off by {gap:.1e}");
            }
        }
    }
}

/// What transformers saves of a model without a head has no prefix to its names.
#[test]
fn hidden_states_of_models_without_a_head() {
    for name in ["mamba2_headless", "bamba_headless"] {
        let (golden, ids, _) = input(name);
        let model = open(name, DType::F32);
        let ids = ids.narrow(0, 0, 1).unwrap();
        let got = model.hidden_states(&ids, None).unwrap();
        let gap = max_error(&got, &golden.tensors["hidden"]);
        assert!(gap <= 1e-4, "{name}: off by {gap:.1e}");

        // Nobody makes logits of what is no head, and nothing is read on the way to the error.
        let mut cache = model.new_cache(1).unwrap();
        let refused = [
            model.forward(&ids, Some(&mut cache)).unwrap_err(),
            model.prefill(&ids, &mut cache).unwrap_err(),
            model.step(&ids.narrow(1, 0, 1).unwrap().squeeze(1).unwrap(), &mut cache).unwrap_err(),
            model.head_weight().unwrap_err(),
        ];
        for error in refused {
            let want = "input: the model has no head, and gives hidden states alone";
            assert_eq!(error.to_string(), want, "{name}");
        }
        assert_eq!(cache.position(), 0);

        // It is saved as what it is.
        let folder = tempfile::tempdir().unwrap();
        model.save_pretrained(folder.path(), DType::F32).unwrap();
        let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
        assert!(text.contains("Model\"") && !text.contains("CausalLM"), "{text}");
        let again = Model::from_pretrained(&LocalDir::new(folder.path()).unwrap(), DType::F32, &Device::Cpu);
        let again = again.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(again.config(), model.config(), "{name}");
        assert_eq!(max_error(&again.hidden_states(&ids, None).unwrap(), &got), 0.0, "{name}");
        let file = folder.path().join("x.gguf");
        let error = model.save_gguf(&file, GgmlType::F32, Metadata::default(), |_| {}).unwrap_err();
        assert!(error.to_string().contains("no architecture of GGUF has words for"), "{name}: {error}");
        let family = Family::named("state-spaces").unwrap();
        assert!(model.save_pretrained_as(family, folder.path(), DType::F32).is_err(), "{name}");
    }
    // Nor is there one under the scores of a classifier.
    let (_, ids, _) = input("jamba_classifier");
    let classifier = classifier("jamba_classifier", Pooling::Last);
    assert!(classifier.model().forward(&ids, None).unwrap_err().to_string().contains("has no head"));
}
