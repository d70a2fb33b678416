//! Embeddings in the place of ids.

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_nn::VarBuilder;
use mamba_model::{Batch, Model, Pooling};

use crate::laws::MODELS;
use crate::open;
use crate::support::random::Random;
use crate::support::tolerance::{relative_rms, values};

const SHAPE: (usize, usize) = (2, 13);

fn ids(model: &Model) -> Tensor {
    let ids = Random::new(5).ids(SHAPE.0 * SHAPE.1, model.config().vocab_size as u32);
    Tensor::from_vec(ids, SHAPE, &Device::Cpu).unwrap()
}

fn table(model: &Model) -> &Tensor {
    &model.parameters().iter().find(|(name, _)| name == "embedding.weight").unwrap().1
}

/// The rows of the table of a model.
fn embeddings(model: &Model, ids: &Tensor) -> Tensor {
    let rows = table(model).index_select(&ids.flatten_all().unwrap(), 0).unwrap();
    rows.reshape([ids.dims(), &[model.config().d_model]].concat()).unwrap()
}

/// Rows of the table are the tokens, to the bit: at once, padded, packed, and step by step.
#[test]
fn rows_of_the_table_are_tokens() {
    for name in MODELS {
        let model = open(name, DType::F32);
        let ids = ids(&model);
        let embedded = embeddings(&model, &ids);
        let logits = |batch: Batch| values(&model.forward(batch, None).unwrap());
        assert_eq!(logits((&embedded).into()), logits((&ids).into()), "{name}");
        let wide = embedded.to_dtype(DType::F64).unwrap();
        assert_eq!(logits((&wide).into()), logits((&ids).into()), "{name}");
        let lengths = [13, 6];
        for pad in [Batch::left_padded, Batch::right_padded] {
            let (got, want) = (pad(&embedded, &lengths).unwrap(), pad(&ids, &lengths).unwrap());
            assert_eq!(logits(got), logits(want), "{name}");
        }
        let mask = Tensor::ones(SHAPE, DType::U8, &Device::Cpu).unwrap();
        let masked = Batch::masked(&embedded, &mask).unwrap();
        assert_eq!(logits(masked), logits((&ids).into()), "{name}");
        let (flat_ids, flat) = (ids.flatten_all().unwrap(), embedded.flatten(0, 1).unwrap());
        let ends = [0, 4, 15, 26];
        let want = logits(Batch::packed(&flat_ids, &ends).unwrap());
        for flat in [flat.clone(), flat.unsqueeze(0).unwrap()] {
            assert_eq!(logits(Batch::packed(&flat, &ends).unwrap()), want, "{name}");
        }
        let pooled = |x: &Tensor| values(&model.pooled(x, Pooling::Mean).unwrap());
        assert_eq!(pooled(&embedded), pooled(&ids), "{name}");

        let (mut a, mut b) = (model.new_cache(2).unwrap(), model.new_cache(2).unwrap());
        let prompt = |x: &Tensor| x.narrow(1, 0, 9).unwrap();
        let want = model.prefill(&prompt(&ids), &mut a).unwrap();
        assert_eq!(values(&model.prefill(&prompt(&embedded), &mut b).unwrap()), values(&want), "{name}");
        for t in 9..13 {
            // A token of ids goes through a decoder, whose sums round elsewhere, unless it is a prompt.
            let want = model.prefill(&ids.narrow(1, t, 1).unwrap(), &mut a).unwrap();
            let got = model.step(&embedded.i((.., t)).unwrap(), &mut b).unwrap();
            assert_eq!(values(&got), values(&want), "{name} {t}");
        }
    }
}

/// The gradients of embeddings, added up by their ids, are that of the table; the multiplier of a family is in both.
#[test]
fn gradients_go_on_into_embeddings() {
    for name in ["mamba_untied_bias", "mamba2_g8", "zamba2"] {
        let source = open(name, DType::F64);
        let ids = ids(&source);
        let var = Var::from_tensor(table(&source)).unwrap();
        let mut tensors: HashMap<String, Tensor> = source.parameters().iter().cloned().collect();
        tensors.insert("embedding.weight".into(), var.as_tensor().clone());
        let weights = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
        let model = Model::new(source.config(), weights).unwrap();
        let weights = Random::new(2).normal(&[SHAPE.0, SHAPE.1, source.config().d_model]);
        let loss = |hidden: Tensor| (hidden * &weights).unwrap().sum_all().unwrap();
        let want = loss(model.hidden_states(&ids, None).unwrap()).backward().unwrap();
        let embedded = Var::from_tensor(&embeddings(&source, &ids)).unwrap();
        let grads = loss(source.hidden_states(embedded.as_tensor(), None).unwrap()).backward().unwrap();
        let rows = grads.get(&embedded).unwrap().flatten(0, 1).unwrap();
        let sums = var.zeros_like().unwrap().index_add(&ids.flatten_all().unwrap(), &rows, 0).unwrap();
        let error = relative_rms(&sums, want.get(&var).unwrap());
        assert!(error < 1e-12, "{name}: {error}");
    }
}

#[test]
fn wrong_embeddings_are_errors() {
    let model = open("mamba_tied", DType::F32);
    let d_model = model.config().d_model;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let error = |x: &Tensor| model.forward(x, None).unwrap_err().to_string();
    let message = error(&zeros(&[2, 3, d_model + 1]));
    assert!(
        message.contains(&format!("have {} channels, expected d_model {d_model}", d_model + 1)),
        "{message}"
    );
    let message = error(&zeros(&[2, d_model]));
    assert!(message.contains("expected (batch, seqlen, d_model)"), "{message}");
    let x = zeros(&[2, 3, d_model]);
    assert!(Batch::packed(&x, &[0, 6]).unwrap_err().to_string().contains("(total, d_model)"));
    assert!(Batch::right_padded(&x, &[4, 1]).is_err());
    assert_eq!(model.forward(&zeros(&[2, 0, d_model]), None).unwrap().dims()[..2], [2, 0]);
}
