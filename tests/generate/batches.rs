//! Rows that come and go, with real models: each is what it would be alone, to the last bit.

use std::collections::BTreeMap;

use mamba_generate::{
    Batch, BatchEvent, BatchLm, CancelToken, CausalLm, FinishReason, Generator, GeneratorBuilder, RowId,
    SamplingConfig,
};
use mamba_model::Model;

use crate::models;

/// The k-th of some rows, each with its own prompt, length, sampling and reasons to stop.
fn row(model: &Model, k: usize) -> GeneratorBuilder<'_, Model> {
    let config = SamplingConfig {
        temperature: [0.0, 1.0, 0.7, 1.3][k % 4],
        top_k: (k % 3 == 1).then_some(20),
        xtc: (k % 5 == 2).then_some((0.5, 0.05)),
        repetition_penalty: (k % 2 == 1).then_some(1.2),
        mirostat: (k % 4 == 3).then_some((3.0, 0.1)),
        seed: k as u64,
        ..Default::default()
    };
    Generator::builder(model)
        .prompt(&models::ids(model, [5, 1, 17, 3, 40][k % 5], 100 + k as u64))
        .sampling(config.build().unwrap())
        .max_new_tokens([12, 7, 1, 20, 9][k % 5])
        .stop_tokens(&[k as u32, 7])
        .logprobs(2)
}

/// Ids and log-probabilities, and why it ended.
type Text = (Vec<(u32, f32)>, Option<FinishReason>);

fn alone(model: &Model, k: usize) -> Text {
    let mut generator = row(model, k).build().unwrap();
    let tokens = generator.by_ref().map(|token| token.unwrap());
    (tokens.map(|token| (token.id, token.logprobs.unwrap().chosen)).collect(), generator.finish_reason())
}

fn tell(texts: &mut BTreeMap<RowId, Text>, events: Vec<BatchEvent<'_, Model>>) {
    for event in events {
        let text = texts.entry(event.row).or_default();
        if let Some(token) = event.token {
            let token = token.unwrap();
            text.0.push((token.id, token.logprobs.unwrap().chosen));
        }
        if let Some(generator) = event.finished {
            let ids: Vec<u32> = text.0.iter().map(|(id, _)| *id).collect();
            assert!(generator.generated().ends_with(&ids));
            text.1 = generator.finish_reason();
        }
    }
}

#[test]
fn rows_that_come_and_go_are_what_they_would_be_alone() {
    for (name, model) in models::all() {
        let mut batch = Batch::new(&model);
        let (mut texts, mut rows) = (BTreeMap::new(), Vec::new());
        for k in 0..9 {
            rows.push(batch.add(row(&model, k).build().unwrap()).unwrap());
            // Another one or two steps before the next one joins.
            for _ in 0..k % 3 {
                tell(&mut texts, batch.step().unwrap());
            }
        }
        while !batch.is_empty() {
            tell(&mut texts, batch.step().unwrap());
        }
        for (k, id) in rows.iter().enumerate() {
            assert_eq!(texts[id], alone(&model, k), "{name}, row {k}");
        }
        assert_eq!((batch.len(), texts.len()), (0, 9));
    }
}

/// Not only tokens: every bit of the logits, in batches of all sizes.
#[test]
fn logits_have_the_bits_of_a_row_alone() {
    for (name, model) in models::all() {
        for size in [2usize, 3, 5, 17, 33, 64] {
            let mut caches = Vec::new();
            let (mut logits, mut ids) = (Vec::new(), Vec::new());
            for k in 0..size {
                let mut cache = CausalLm::new_cache(&model).unwrap();
                let prompt = models::ids(&model, 1 + k % 7, k as u64);
                CausalLm::prefill(&model, &prompt, &mut cache, &mut logits).unwrap();
                caches.push(cache);
                ids.push(prompt[0]);
            }
            let mut together = BatchLm::concat(&model, &caches.iter().collect::<Vec<_>>()).unwrap();
            for _ in 0..3 {
                let mut all = Vec::new();
                model.step_batch(&ids, &mut together, &mut all).unwrap();
                for (k, cache) in caches.iter_mut().enumerate() {
                    CausalLm::step(&model, ids[k], cache, &mut logits).unwrap();
                    let row = &all[k * logits.len()..][..logits.len()];
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(row), bits(&logits), "{name}: row {k} of {size}");
                }
            }
        }
    }
}

/// A row leaves in the middle, goes on alone for a while, and joins another batch.
#[test]
fn a_row_moves_between_batches() {
    for name in ["mamba_tied", "mamba2_g8"] {
        let model = models::open(name);
        let (mut one, mut two) = (Batch::new(&model), Batch::new(&model));
        let mut texts = BTreeMap::new();
        let [a, b, c] = [0, 3, 4].map(|k| one.add(row(&model, k).build().unwrap()).unwrap());
        for _ in 0..4 {
            tell(&mut texts, one.step().unwrap());
        }
        let mut generator = one.remove(b).unwrap().unwrap();
        assert!(one.remove(b).unwrap().is_none());
        let mut text = texts.remove(&b).unwrap().0;
        assert_eq!(text.len(), generator.generated().len());
        let next = generator.by_ref().take(2).map(|token| token.unwrap());
        text.extend(next.map(|token| (token.id, token.logprobs.unwrap().chosen)));
        two.add(row(&model, 1).build().unwrap()).unwrap();
        let b = two.add(generator).unwrap();
        let mut others = BTreeMap::new();
        while !two.is_empty() {
            tell(&mut others, two.step().unwrap());
        }
        while !one.is_empty() {
            tell(&mut texts, one.step().unwrap());
        }
        text.extend(&others[&b].0);
        assert_eq!((text, others[&b].1), alone(&model, 3), "{name}");
        assert_eq!((&texts[&a], &texts[&c]), (&alone(&model, 0), &alone(&model, 4)), "{name}");
    }
}

#[test]
fn a_cancelled_row_leaves_and_the_others_do_not_notice() {
    let model = models::open("mamba2_g8");
    let token = CancelToken::new();
    let mut batch = Batch::new(&model);
    let first = batch.add(row(&model, 0).build().unwrap()).unwrap();
    let second = batch.add(row(&model, 3).cancel_token(&token).build().unwrap()).unwrap();
    let mut texts = BTreeMap::new();
    for _ in 0..3 {
        tell(&mut texts, batch.step().unwrap());
    }
    token.cancel();
    while !batch.is_empty() {
        tell(&mut texts, batch.step().unwrap());
    }
    assert_eq!(texts[&first], alone(&model, 0));
    let (ids, reason) = &texts[&second];
    assert_eq!((ids.len(), *reason), (3, Some(FinishReason::Cancelled)));
    assert_eq!(ids[..], alone(&model, 3).0[..3]);
}

#[test]
fn what_fails_in_one_row_ends_that_row_only() {
    let model = models::open("mamba_tied");
    let vocab = model.config().vocab_size as u32;
    let nothing = SamplingConfig {
        banned_tokens: (0..vocab).map(|id| vec![id]).collect(),
        forced_tokens: vec![],
        ..Default::default()
    };
    let mut batch = Batch::new(&model);
    let good = batch.add(row(&model, 0).build().unwrap()).unwrap();
    let bad = Generator::builder(&model).prompt(&[1]).sampling(nothing.build().unwrap()).build().unwrap();
    let bad = batch.add(bad).unwrap();
    let (mut texts, mut errors) = (BTreeMap::new(), 0);
    while !batch.is_empty() {
        let (failed, fine): (Vec<_>, Vec<_>) =
            batch.step().unwrap().into_iter().partition(|event| event.row == bad);
        for event in failed {
            let error = event.token.unwrap().unwrap_err().to_string();
            assert!(error.contains("no token at position 1 has a logit above minus infinity"), "{error}");
            assert_eq!(event.finished.unwrap().finish_reason(), None);
            errors += 1;
        }
        tell(&mut texts, fine);
    }
    assert_eq!((errors, &texts[&good]), (1, &alone(&model, 0)));
    // A lent cache cannot join others.
    let mut cache = CausalLm::new_cache(&model).unwrap();
    let lent = Generator::builder(&model).prompt(&[1]).cache(&mut cache).build().unwrap();
    let error = batch.add(lent).unwrap_err().to_string();
    assert_eq!(error, "generator: `cache` is lent, expected one of the generator's own");
}
