//! Filters against the logits processors of transformers, and draws against the distributions they leave.

use std::collections::BTreeMap;

use mamba_generate::{
    Candidates, Chain, History, LogitsFilter, MinP, RepetitionPenalty, SamplingConfig, Temperature, TopK,
    TopP, Typical,
};
use safetensors::SafeTensors;

const VOCAB: usize = 50;
const ROWS: usize = 5;

struct Golden {
    tensors: BTreeMap<String, Vec<f32>>,
    history: Vec<u32>,
    metadata: BTreeMap<String, String>,
}

impl Golden {
    fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/goldens/generate/logits_processors.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap();
        let (mut tensors, mut history) = (BTreeMap::new(), Vec::new());
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            if name == "history" {
                let ids = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                history = ids.map(|id| u32::try_from(id).unwrap()).collect();
            } else {
                let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                tensors.insert(name, values.collect());
            }
        }
        Self { tensors, history, metadata: metadata.into_iter().collect() }
    }

    fn row(&self, name: &str, row: usize) -> &[f32] {
        &self.tensors[name][row * VOCAB..][..VOCAB]
    }

    fn history(&self, row: usize) -> &[u32] {
        let len = self.history.len() / ROWS;
        &self.history[row * len..][..len]
    }

    /// Whether equal logits straddle the border of top-p there, so that transformers' choice among them depends on its sort.
    fn ties(&self, name: &str, row: usize) -> bool {
        self.metadata
            .get(&format!("ties.{name}"))
            .is_some_and(|rows| rows.split(',').any(|r| r == row.to_string()))
    }

    /// "top_k=30 top_p=0.95" for a chain, "top_p=0.9" for the tensor `top_p.0.9`.
    fn steps(&self, name: &str) -> Vec<(String, f64)> {
        let steps = match name.strip_prefix("chain.") {
            Some(_) => self.metadata[name].clone(),
            None => name.replacen('.', "=", 1),
        };
        let pairs = steps.split(' ').map(|step| step.split_once('=').unwrap());
        pairs.map(|(filter, value)| (filter.to_string(), value.parse().unwrap())).collect()
    }
}

fn chain(steps: &[(String, f64)]) -> mamba_generate::Result<Chain> {
    let mut chain = Chain::new();
    for (filter, value) in steps {
        match filter.as_str() {
            "temperature" => chain.push(Temperature::new(*value)?),
            "top_k" => chain.push(TopK::new(*value as usize)?),
            "top_p" => chain.push(TopP::new(*value)?),
            "min_p" => chain.push(MinP::new(*value)?),
            "typical" => chain.push(Typical::new(*value)?),
            "repetition_penalty" => chain.push(RepetitionPenalty::new(*value)?),
            other => panic!("no filter {other}"),
        }
    }
    Ok(chain)
}

/// The logits after the filters, minus infinity where a token was dropped.
fn apply(chain: &mut Chain, logits: &[f32], history: &[u32]) -> Vec<f32> {
    let mut candidates = Candidates::new();
    candidates.load(logits, history.len()).unwrap();
    chain.apply(&mut candidates, History::new(history, 0)).unwrap();
    let mut out = vec![f32::NEG_INFINITY; logits.len()];
    for candidate in candidates.as_slice() {
        out[candidate.id as usize] = candidate.logit;
    }
    out
}

fn kept(logits: &[f32]) -> usize {
    logits.iter().filter(|x| x.is_finite()).count()
}

/// Whether more than k logits are at least as large as the k-th when top-k is reached.
fn ties_at_top_k(steps: &[(String, f64)], logits: &[f32], history: &[u32]) -> bool {
    let Some(at) = steps.iter().position(|(filter, _)| filter == "top_k") else { return false };
    let mut logits = apply(&mut chain(&steps[..at]).unwrap(), logits, history);
    logits.sort_by(|a, b| b.total_cmp(a));
    let k = steps[at].1 as usize;
    k < logits.len() && logits[k - 1] == logits[k]
}

/// To the last bit, but for ties. Where equal logits stand at the border of top-k, transformers keeps all of them and we
/// keep k, those with the lowest ids. Where they stand at the border of top-p, which of them it keeps depends on its sort,
/// and we keep those with the lowest ids.
#[test]
fn filters_equal_the_processors_of_transformers() {
    let golden = Golden::read();
    let (mut exact, mut tied, mut refused) = (0, Vec::new(), 0);
    for name in golden.tensors.keys().filter(|name| *name != "logits") {
        let steps = golden.steps(name);
        // We refuse 0, which transformers takes to mean one token for top-p, and no filter for min-p.
        let Ok(mut chain) = chain(&steps) else {
            assert!(["top_p.0.0", "min_p.0.0"].contains(&name.as_str()), "{name}");
            refused += 1;
            continue;
        };
        for row in 0..ROWS {
            let (logits, history, expected) =
                (golden.row("logits", row), golden.history(row), golden.row(name, row));
            let out = apply(&mut chain, logits, history);
            let label = format!("{name}, row {row}: {out:?}, expected {expected:?}");
            let at_top_k = ties_at_top_k(&steps, logits, history);
            if !at_top_k && !golden.ties(name, row) {
                assert_eq!(out, expected, "{label}");
                exact += 1;
                continue;
            }
            tied.push(format!("{name}/{row}"));
            // We keep the same logits, in as many tokens, or in k if top-k did it.
            let (ours, theirs) = (descending(&out), descending(expected));
            assert_eq!(ours[..], theirs[..ours.len()], "{label}");
            match steps[..] {
                [(_, k)] if at_top_k => assert_eq!(ours.len(), k as usize, "{label}"),
                _ if at_top_k => assert!(ours.len() <= theirs.len(), "{label}"),
                _ => assert_eq!(ours.len(), theirs.len(), "{label}"),
            }
            // Of the equal ones at the border, we keep those that come first.
            if let [_] = steps[..] {
                let border = ours[ours.len() - 1];
                let kept: Vec<bool> =
                    (0..VOCAB).filter(|&i| logits[i] == border).map(|i| out[i] == border).collect();
                assert!(kept.is_sorted_by(|a, b| a >= b), "{label}");
            }
        }
    }
    assert_eq!((exact, tied.len(), refused), (143, 17, 2), "{tied:?}");
}

fn descending(logits: &[f32]) -> Vec<f32> {
    let mut logits: Vec<f32> = logits.iter().copied().filter(|x| x.is_finite()).collect();
    logits.sort_by(|a, b| b.total_cmp(a));
    logits
}

/// The probabilities that the filters leave, drawn: Pearson's test for many seeds, of which few may fail.
#[test]
fn draws_follow_what_the_filters_leave() {
    let golden = Golden::read();
    let config = SamplingConfig {
        temperature: 0.7,
        top_k: Some(30),
        top_p: Some(0.95),
        min_p: Some(0.02),
        repetition_penalty: Some(1.3),
        ..Default::default()
    };
    let expected = golden.row("chain.all", 0);
    let weights: Vec<f64> = expected.iter().map(|&x| f64::from(x).exp()).collect();
    let total: f64 = weights.iter().sum();
    let freedom = kept(expected) as f64 - 1.0;
    assert!(freedom >= 5.0);

    let (draws, mut sum) = (5000.0, 0.0);
    for seed in 0..40 {
        let mut sampling = SamplingConfig { seed, ..config.clone() }.build().unwrap();
        let mut counts = [0.0; VOCAB];
        for _ in 0..draws as usize {
            let history = History::new(golden.history(0), 0);
            counts[sampling.next_token(golden.row("logits", 0), history).unwrap() as usize] += 1.0;
        }
        for (count, weight) in counts.iter().zip(&weights) {
            let expected: f64 = draws * weight / total;
            match expected > 0.0 {
                true => sum += (count - expected).powi(2) / expected,
                false => assert_eq!(*count, 0.0),
            }
        }
    }
    // The sum over seeds is chi-squared as well, with 40 times the freedom; four standard deviations.
    let freedom = 40.0 * freedom;
    assert!((sum - freedom).abs() < 4.0 * (2.0 * freedom).sqrt(), "{sum} for {freedom} degrees of freedom");
}
