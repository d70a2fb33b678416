//! Filters that allow and forbid tokens, against the processors of transformers.

use mamba_generate::{
    BannedTokens, Candidates, ForcedTokens, History, LogitBias, LogitsFilter, MinNewTokens, NoRepeatNgram,
};

use crate::support::golden::{Golden, path};
use crate::support::tolerance::values;

/// The filter that the golden was made with, from its name and its parameter.
fn filter(name: &str, parameter: &serde_json::Value) -> Box<dyn LogitsFilter> {
    let number = |value: &serde_json::Value| value.as_u64().unwrap() as usize;
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| number(id) as u32).collect()
    };
    let list = || parameter.as_array().unwrap();
    match name.split('.').next().unwrap() {
        "no_repeat_ngram" => Box::new(NoRepeatNgram::new(number(parameter)).unwrap()),
        "banned_tokens" => Box::new(BannedTokens::new(list().iter().map(ids)).unwrap()),
        "suppressed" => Box::new(BannedTokens::new(ids(parameter).into_iter().map(|id| vec![id])).unwrap()),
        "logit_bias" => {
            let pairs = list().iter().map(|pair| (number(&pair[0]) as u32, pair[1].as_f64().unwrap() as f32));
            Box::new(LogitBias::new(pairs).unwrap())
        }
        "min_new_tokens" => Box::new(MinNewTokens::new(number(&parameter[0]), &ids(&parameter[1]))),
        "forced_last" | "forced_first" => {
            Box::new(ForcedTokens::new(list().iter().map(|pair| (number(&pair[0]), number(&pair[1]) as u32))))
        }
        other => panic!("no filter {other}"),
    }
}

#[test]
fn rules_equal_the_processors_of_transformers() {
    let golden = Golden::read(&path("generate/token_rules.safetensors"));
    let prompt = golden.number("prompt").unwrap() as usize;
    let rows = |name: &str| -> Vec<Vec<f64>> {
        let tensor = &golden.tensors[name];
        (0..tensor.dim(0).unwrap()).map(|row| values(&tensor.get(row).unwrap())).collect()
    };
    let (logits, histories) = (rows("logits"), rows("history"));
    let mut compared = 0;
    for name in golden.tensors.keys().filter(|name| !["logits", "history"].contains(&name.as_str())) {
        let parameter = serde_json::from_str(golden.option(name).unwrap()).unwrap();
        let mut filter = filter(name, &parameter);
        for (row, expected) in rows(name).iter().enumerate() {
            let row_logits: Vec<f32> = logits[row].iter().map(|&x| x as f32).collect();
            let mut history: Vec<u32> = histories[row].iter().map(|&id| id as u32).collect();
            if name == "forced_first" {
                history.truncate(prompt);
            }
            let mut candidates = Candidates::new();
            candidates.load(&row_logits, history.len()).unwrap();
            filter.apply(&mut candidates, History::new(&history, prompt)).unwrap();
            let mut out = vec![f64::NEG_INFINITY; row_logits.len()];
            for candidate in candidates.as_slice() {
                out[candidate.id as usize] = candidate.logit.into();
            }
            assert_eq!(&out, expected, "{name}, row {row}");
            compared += 1;
        }
    }
    assert_eq!(compared, 11 * 6);
}
