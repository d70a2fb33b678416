//! Beam search against transformers.

use mamba_generate::{BeamOptions, EarlyStopping, Generator, beam_search, score};

use crate::models;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::values;

#[test]
fn hypotheses_equal_those_of_transformers() {
    let golden = Golden::read(&path("generate/beam_search.safetensors"));
    let cases: Vec<serde_json::Value> = serde_json::from_str(golden.option("cases").unwrap()).unwrap();
    let mut compared = 0;
    for (i, case) in cases.iter().enumerate() {
        let number = |name: &str| case[name].as_u64().unwrap() as usize;
        let model = models::open(case["model"].as_str().unwrap());
        let ids =
            |name: &str| -> Vec<u32> { values(&golden.tensors[name]).iter().map(|&id| id as u32).collect() };
        let options = BeamOptions {
            beams: number("beams"),
            max_new_tokens: number("max_new_tokens"),
            eos_tokens: case["eos"]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_u64().unwrap() as u32)
                .collect(),
            length_penalty: case["length_penalty"].as_f64().unwrap(),
            early_stopping: match case["early_stopping"].as_str().unwrap() {
                "true" => EarlyStopping::WhenFull,
                "false" => EarlyStopping::Heuristic,
                _ => EarlyStopping::Never,
            },
        };
        let found = beam_search(&model, &ids("prompt")[..number("prompt")], &options).unwrap();
        let scores = values(&golden.tensors[&format!("{i}.scores")]);
        assert_eq!(found.len(), scores.len(), "{case}");
        for (rank, hypothesis) in found.iter().enumerate() {
            let expected = ids(&format!("{i}.{rank}"));
            assert_eq!(hypothesis.ids, expected, "{case}, rank {rank}");
            assert!(
                (hypothesis.score - scores[rank]).abs() < 1e-4,
                "{case}: {}, {}",
                hypothesis.score,
                scores[rank]
            );
            compared += 1;
        }
    }
    assert!(compared >= 30, "{compared}");
}

#[test]
fn one_beam_is_greedy_and_log_probabilities_are_those_of_the_text() {
    for (name, model) in models::all() {
        let prompt = models::ids(&model, 7, 1);
        let options = BeamOptions { beams: 1, max_new_tokens: 12, ..BeamOptions::default() };
        let found = beam_search(&model, &prompt, &options).unwrap();
        let greedy = Generator::builder(&model).prompt(&prompt).max_new_tokens(12).build().unwrap();
        let greedy: Vec<u32> = greedy.map(|token| token.unwrap().id).collect();
        assert_eq!((found.len(), &found[0].ids), (1, &greedy), "{name}");

        let several = beam_search(&model, &prompt, &BeamOptions { beams: 5, ..options }).unwrap();
        assert_eq!(several.len(), 5);
        assert!(several.is_sorted_by(|a, b| a.score >= b.score));
        for hypothesis in &several {
            let text = [&prompt[..], &hypothesis.ids].concat();
            let mut cache = mamba_generate::CausalLm::new_cache(&model).unwrap();
            let losses = score(&model, &text, &mut cache).unwrap().losses;
            let logprob: f64 = -losses[prompt.len() - 1..].iter().map(|&x| f64::from(x)).sum::<f64>();
            assert!((logprob - hypothesis.logprob).abs() < 1e-3, "{name}: {logprob}, {}", hypothesis.logprob);
        }
    }
}

#[test]
fn misuse() {
    let model = models::open("mamba_tied");
    for bad in [
        BeamOptions { beams: 0, ..BeamOptions::default() },
        BeamOptions { max_new_tokens: 0, ..BeamOptions::default() },
        BeamOptions { length_penalty: f64::NAN, ..BeamOptions::default() },
    ] {
        assert!(beam_search(&model, &[1], &bad).is_err(), "{bad:?}");
    }
    assert!(beam_search(&model, &[], &BeamOptions::default()).is_err());
}
