//! Rows that come and go, with real models: each is what it would be alone, to the last bit.

use std::collections::BTreeMap;

use mamba_generate::{
    Batch, BatchEvent, BatchLm, CancelToken, CausalLm, Error, FinishReason, Generator, GeneratorBuilder,
    RowId, SamplingConfig,
};
use mamba_model::Model;

use crate::draws::Drawing;
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
    check_rows(models::all());
    check_rows(models::in_bf16());
}

fn check_rows(models: Vec<(String, Model)>) {
    for (name, model) in models {
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
    check_bits(models::all());
    check_bits(models::in_bf16());
}

fn check_bits(models: Vec<(String, Model)>) {
    for (name, model) in models {
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

/// Whatever fails, and however often, each row has all of its tokens once.
#[test]
fn no_event_is_lost_when_the_model_fails() {
    let model = models::open("mamba2_g8");
    let drawing = Drawing::new(&model, false);
    let lengths = [3, 5, 5, 2, 6];
    let builder =
        |k: usize| Generator::builder(&drawing).prompt(&[1 + k as u32, 2]).max_new_tokens(lengths[k]);
    let alone =
        |k: usize| -> Vec<u32> { builder(k).build().unwrap().map(|token| token.unwrap().id).collect() };
    let (mut failures, mut lost) = (0, 0);
    for method in ["select", "concat", "step_batch"] {
        for fails_at in 0..8 {
            drawing.failing.set("");
            let mut batch = Batch::new(&drawing);
            let mut rows = BTreeMap::new();
            let mut texts: BTreeMap<RowId, (Vec<u32>, Option<FinishReason>)> = BTreeMap::new();
            let mut failed_rows = vec![];
            for step in 0..40 {
                for k in 0..lengths.len() {
                    if k == step {
                        rows.insert(batch.add(builder(k).build().unwrap()).unwrap(), k);
                    }
                }
                // Twice in a row.
                drawing.failing.set(if (fails_at..fails_at + 2).contains(&step) { method } else { "" });
                let before: Vec<RowId> = batch.rows().collect();
                match batch.step() {
                    Ok(events) => {
                        for event in events {
                            let text = texts.entry(event.row).or_default();
                            assert_eq!(text.1, None, "nothing comes after the end");
                            text.0.extend(event.token.map(|token| token.unwrap().id));
                            text.1 = event.finished.and_then(|generator| generator.finish_reason());
                        }
                    }
                    Err(error) => {
                        failures += 1;
                        assert!(matches!(error, Error::Model { during, .. } if during == method), "{error}");
                        if method == "step_batch" {
                            let left: Vec<RowId> = batch.rows().collect();
                            failed_rows.extend(before.into_iter().filter(|row| !left.contains(row)));
                        }
                    }
                }
            }
            assert!(batch.is_empty());
            for (row, k) in rows {
                let (ids, reason) = &texts[&row];
                let expected = alone(k);
                if failed_rows.contains(&row) {
                    assert!(expected.starts_with(ids) && reason.is_none(), "{method} at {fails_at}, row {k}");
                    lost += 1;
                } else {
                    let label = format!("{method} at {fails_at}, row {k}");
                    assert_eq!((ids, *reason), (&expected, Some(FinishReason::Length)), "{label}");
                }
            }
        }
    }
    assert!(failures > 20 && lost > 5, "{failures}, {lost}");
}

/// On a GPU other sizes of batches have other kernels, which round otherwise. What holds there: in batches of one size a row is
/// to the last bit what it is beside any other rows, unless experts divide the rows among them, and rows are what they would be alone but
/// for rounding.
mod cuda {
    use super::*;
    use crate::support::target::with_gpu;

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        with_gpu(|device| {
            let mut models = models::on(device);
            models.retain(|(name, _)| !name.starts_with("jamba")); // its experts
            for (name, model) in &models {
                let state = |seed: u64| {
                    let (mut cache, mut logits) = (CausalLm::new_cache(model).unwrap(), Vec::new());
                    let prompt = models::ids(model, 1 + seed as usize % 7, seed);
                    CausalLm::prefill(model, &prompt, &mut cache, &mut logits).unwrap();
                    cache
                };
                for size in [2, 4, 7, 16, 33] {
                    // Row 1 is the same each time, and so is what it reads.
                    let steps = |others: u64| -> Vec<Vec<u32>> {
                        let seed = |row: u64| if row == 1 { 1 } else { others + row };
                        let caches: Vec<_> = (0..size).map(|row| state(seed(row))).collect();
                        let mut cache = BatchLm::concat(model, &caches.iter().collect::<Vec<_>>()).unwrap();
                        let mut logits = Vec::new();
                        let steps = (0..4).map(|step| {
                            let id = |row: u64| models::ids(model, 4, 50 + seed(row))[step];
                            let ids: Vec<u32> = (0..size).map(id).collect();
                            model.step_batch(&ids, &mut cache, &mut logits).unwrap();
                            let vocab = model.config().vocab_size;
                            logits[vocab..2 * vocab].iter().map(|x| x.to_bits()).collect()
                        });
                        steps.collect()
                    };
                    assert_eq!(steps(100), steps(200), "{name}: a row of {size}");
                }
            }
            Ok(models.len())
        });
    }

    #[test]
    fn greedy_rows_are_what_they_would_be_alone() {
        with_gpu(|device| {
            let models = models::on(device);
            for (name, model) in &models {
                let greedy = |k: usize| {
                    let prompt = models::ids(model, [5, 1, 17, 3, 40][k % 5], 100 + k as u64);
                    Generator::builder(model).prompt(&prompt).max_new_tokens([12, 7, 1, 20, 9][k % 5])
                };
                let (mut batch, mut texts) = (Batch::new(model), BTreeMap::<RowId, Vec<u32>>::new());
                let mut rows = Vec::new();
                for k in 0..9 {
                    rows.push(batch.add(greedy(k).build().unwrap()).unwrap());
                    for event in batch.step().unwrap() {
                        texts
                            .entry(event.row)
                            .or_default()
                            .extend(event.token.map(|token| token.unwrap().id));
                    }
                }
                while !batch.is_empty() {
                    for event in batch.step().unwrap() {
                        texts
                            .entry(event.row)
                            .or_default()
                            .extend(event.token.map(|token| token.unwrap().id));
                    }
                }
                for (k, row) in rows.iter().enumerate() {
                    let mut alone = greedy(k).build().unwrap();
                    let text: Vec<u32> = alone.by_ref().map(|token| token.unwrap().id).collect();
                    let label = format!("{name}, row {k}");
                    models::assert_same_text(model, alone.prompt(), &text, &texts[row], &label);
                }
            }
            Ok(models.len())
        });
    }
}
