//! `generate` with the options of mamba_ssm.

use mamba_generate::{
    BatchLm, BoxError, CausalLm, GenerateOptions, Generator, SamplingConfig, StateLm, Streamer, generate,
};
use mamba_model::Model;

use crate::draws::Drawing;
use crate::models;
use crate::support::golden::{Golden, path};
use crate::support::tolerance::values;

#[derive(Default)]
struct Log(Vec<Vec<u32>>, usize);

impl Streamer for Log {
    fn put(&mut self, ids: &[u32]) {
        assert_eq!(self.1, 0, "nothing comes after the end");
        self.0.push(ids.to_vec());
    }
    fn end(&mut self) {
        self.1 += 1;
    }
}

fn prompts(model: &Model, rows: usize) -> Vec<Vec<u32>> {
    (0..rows).map(|row| models::ids(model, 6, row as u64)).collect()
}

#[test]
fn greedy_tokens_are_those_of_mamba_ssm() {
    for name in ["mamba-shakespeare", "mamba2-shakespeare"] {
        let model = models::open(name);
        let golden = Golden::read(&path("models").join(name).join("io.safetensors"));
        let ids =
            |name: &str| -> Vec<u32> { values(&golden.tensors[name]).iter().map(|&id| id as u32).collect() };
        let (prompt, all) = (ids("prompt_ids"), ids("greedy_ids"));
        let output = generate(
            &model,
            &[prompt.clone(), prompt.clone()],
            GenerateOptions { cg: true, ..GenerateOptions::new(all.len()) },
        )
        .unwrap();
        assert_eq!(output.sequences, [all.clone(), all.clone()], "{name}");
        assert_eq!(
            (output.timings.prompt_tokens, output.timings.generated_tokens),
            (prompt.len(), all.len() - prompt.len())
        );
    }
}

#[test]
fn rows_are_generators_with_seeds_of_their_own() {
    let model = models::open("mamba2_g8");
    let inputs = prompts(&model, 3);
    let options = GenerateOptions {
        top_k: 20,
        top_p: 0.9,
        temperature: 0.8,
        repetition_penalty: 1.2,
        seed: 5,
        ..GenerateOptions::new(15)
    };
    let output = generate(&model, &inputs, options).unwrap();
    for (row, prompt) in inputs.iter().enumerate() {
        let config = SamplingConfig {
            top_k: Some(20),
            top_p: Some(0.9),
            temperature: 0.8,
            repetition_penalty: Some(1.2),
            seed: 5 + row as u64,
            ..Default::default()
        };
        let alone =
            Generator::builder(&model).prompt(prompt).sampling(config.build().unwrap()).max_new_tokens(9);
        let alone: Vec<u32> = alone.build().unwrap().map(|token| token.unwrap().id).collect();
        assert_eq!(output.sequences[row][6..], alone);
    }
}

#[test]
fn a_row_that_ended_has_nothing_but_eos_and_the_streamer_sees_all() {
    let model = models::open("mamba_tied");
    let inputs = prompts(&model, 3);
    let free = generate(&model, &inputs, GenerateOptions::new(16)).unwrap().sequences;
    // A token that one row generates, and not at once.
    let eos = free[1][9];
    let mut log = Log::default();
    let options =
        GenerateOptions { eos_token_id: Some(eos), streamer: Some(&mut log), ..GenerateOptions::new(16) };
    let output = generate(&model, &inputs, options).unwrap();
    for (row, free) in output.sequences.iter().zip(&free) {
        let end =
            free[6..].iter().position(|id| *id == eos).map_or(free.len(), |at| 6 + at + 1).min(row.len());
        assert_eq!(row[..end], free[..end]);
        assert!(row[end..].iter().all(|id| *id == eos));
    }
    // Each prompt, then each step, the last one too; then the end, once.
    assert_eq!(log.0[..3], inputs);
    assert_eq!((log.0.len(), log.1), (3 + output.sequences[0].len() - 6, 1));
    for (step, ids) in log.0[3..].iter().enumerate() {
        assert_eq!(*ids, output.sequences.iter().map(|row| row[6 + step]).collect::<Vec<_>>());
    }
}

#[test]
fn a_teacher_says_the_tokens_and_scores_are_those_of_its_text() {
    let model = models::open("mamba_untied_bias");
    let teacher: Vec<Vec<u32>> = (0..2).map(|row| models::ids(&model, 12, 50 + row)).collect();
    let inputs: Vec<Vec<u32>> = teacher.iter().map(|row| row[..4].to_vec()).collect();
    let options =
        GenerateOptions { teacher_outputs: Some(&teacher), output_scores: true, ..GenerateOptions::new(12) };
    let output = generate(&model, &inputs, options).unwrap();
    assert_eq!(output.sequences, teacher);
    assert_eq!(output.scores.len(), 8);
    for (row, text) in teacher.iter().enumerate() {
        let (mut cache, mut logits) = (mamba_generate::CausalLm::new_cache(&model).unwrap(), Vec::new());
        mamba_generate::CausalLm::forward(&model, text, &mut cache, &mut logits).unwrap();
        let vocab = model.config().vocab_size;
        for (step, scores) in output.scores.iter().enumerate() {
            let expected = &logits[(3 + step) * vocab..][..vocab];
            let gap = scores[row].iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(gap < 1e-4, "row {row}, step {step}: {gap}");
        }
    }
    // As far as it goes.
    let short: Vec<Vec<u32>> = teacher.iter().map(|row| row[..7].to_vec()).collect();
    let options = GenerateOptions { teacher_outputs: Some(&short), ..GenerateOptions::new(12) };
    let output = generate(&model, &inputs, options).unwrap();
    assert!(
        output.sequences.iter().zip(&short).all(|(row, short)| row.starts_with(short) && row.len() == 12)
    );
}

#[test]
fn edges_and_misuse() {
    let model = models::open("mamba_tied");
    let inputs = prompts(&model, 2);
    let vocab = model.config().vocab_size;
    // A prompt that is long enough already.
    for max_length in [6, 4] {
        let mut log = Log::default();
        let options = GenerateOptions { streamer: Some(&mut log), ..GenerateOptions::new(max_length) };
        let output = generate(&model, &inputs, options).unwrap();
        assert!(output.sequences.iter().zip(&inputs).all(|(row, input)| row[..] == input[..max_length]));
        assert_eq!((output.timings, log.1), (mamba_generate::Timings::default(), 1));
    }
    // Fewer tokens to choose from than logits.
    let options = GenerateOptions { vocab_size: Some(5), output_scores: true, ..GenerateOptions::new(30) };
    let output = generate(&model, &inputs, options).unwrap();
    assert!(output.sequences.iter().all(|row| row[6..].iter().all(|&id| id < 5)));
    assert!(output.scores.iter().flatten().all(|scores| scores.len() == 5));

    let new = || GenerateOptions::new(10);
    let three = vec![vec![1u32]; 3];
    for (bad, message) in [
        (GenerateOptions::new(0), "generate: `max_length` is 0, expected a number from 1"),
        (GenerateOptions { temperature: 0.0, ..new() }, "temperature"),
        (GenerateOptions { repetition_penalty: 0.0, ..new() }, "repetition_penalty"),
        (GenerateOptions { top_k: 5, top_p: 1.5, ..new() }, "top_p"),
        (GenerateOptions { top_k: 5, min_p: -0.5, ..new() }, "min_p"),
        (GenerateOptions { vocab_size: Some(vocab + 1), ..new() }, "vocab_size"),
        (
            GenerateOptions { teacher_outputs: Some(&three), ..new() },
            "`teacher_outputs` is 3 rows, expected as many rows",
        ),
    ] {
        let mut log = Log::default();
        let error = generate(&model, &inputs, GenerateOptions { streamer: Some(&mut log), ..bad })
            .unwrap_err()
            .to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(log.1, 1, "the streamer is told the end");
    }
    assert!(generate(&model, &[], new()).is_err());
    let error = generate(&model, &[vec![1, 2], vec![3]], new()).unwrap_err().to_string();
    assert_eq!(error, "generate: `input_ids` is rows of 2 and 1 tokens, expected rows of one length");
}

/// The model of the golden: what follows tokens a, b has the logits `first[a] + second[b]`. A state is the last two tokens of each row.
struct Tables {
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
}

type Last = Vec<[u32; 2]>;

impl CausalLm for Tables {
    type Cache = Last;

    fn vocab_size(&self) -> usize {
        self.first.len()
    }
    fn new_cache(&self) -> Result<Last, BoxError> {
        Ok(vec![[0; 2]])
    }
    fn prefill(&self, ids: &[u32], last: &mut Last, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        ids.iter().try_for_each(|id| self.step_batch(&[*id], last, logits))
    }
    fn step(&self, id: u32, last: &mut Last, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        self.step_batch(&[id], last, logits)
    }
}

impl StateLm for Tables {
    fn fork(&self, last: &Last) -> Result<Last, BoxError> {
        Ok(last.clone())
    }
    fn cache_bytes(&self, last: &Last) -> usize {
        8 * last.len()
    }
    fn fingerprint(&self) -> Result<String, BoxError> {
        Ok("tables".into())
    }
    fn save_cache(&self, _: &Last) -> Result<Vec<u8>, BoxError> {
        Err("not kept".into())
    }
    fn load_cache(&self, _: &[u8]) -> Result<Last, BoxError> {
        Err("not kept".into())
    }
}

impl BatchLm for Tables {
    fn step_batch(&self, ids: &[u32], last: &mut Last, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        logits.clear();
        for (&id, last) in ids.iter().zip(last) {
            *last = [last[1], id];
            let [first, second] = [&self.first[last[0] as usize], &self.second[last[1] as usize]];
            logits.extend(first.iter().zip(second).map(|(a, b)| a + b));
        }
        Ok(())
    }
    fn concat(&self, caches: &[&Last]) -> Result<Last, BoxError> {
        Ok(caches.iter().flat_map(|last| last.iter().copied()).collect())
    }
    fn select(&self, last: &Last, rows: &[usize]) -> Result<Last, BoxError> {
        Ok(rows.iter().map(|row| last[*row]).collect())
    }
}

/// Its own `generate`, run on a model of two tables: tokens, and the scores before the penalty, bit by bit.
#[test]
fn options_have_the_meaning_that_mamba_ssm_gives_them() {
    let golden = Golden::read(&path("generate/upstream_generate.safetensors"));
    let rows = |name: &str| -> Vec<Vec<f64>> {
        let tensor = &golden.tensors[name];
        (0..tensor.dim(0).unwrap()).map(|row| values(&tensor.get(row).unwrap())).collect()
    };
    let ids = |name: &str| -> Vec<Vec<u32>> {
        rows(name).iter().map(|row| row.iter().map(|&id| id as u32).collect()).collect()
    };
    let table = |name| rows(name).iter().map(|row| row.iter().map(|&x| x as f32).collect()).collect();
    let model = Tables { first: table("first"), second: table("second") };
    let mut compared = 0;
    for name in ["plain", "penalty", "vocab_size", "eos", "teacher", "teacher_and_eos"] {
        let given: serde_json::Value = serde_json::from_str(golden.option(name).unwrap()).unwrap();
        let teacher = format!("{name}.teacher");
        let teacher = golden.tensors.contains_key(&teacher).then(|| ids(&teacher));
        let options = GenerateOptions {
            repetition_penalty: given["repetition_penalty"].as_f64().unwrap_or(1.0),
            vocab_size: given["vocab_size"].as_u64().map(|n| n as usize),
            eos_token_id: given["eos_token_id"].as_u64().map(|id| id as u32),
            teacher_outputs: teacher.as_deref(),
            output_scores: true,
            ..GenerateOptions::new(golden.number("max_length").unwrap() as usize)
        };
        let output = generate(&model, &ids(&format!("{name}.input_ids")), options).unwrap();
        assert_eq!(output.sequences, ids(&format!("{name}.sequences")), "{name}");
        let scores: Vec<f64> = output.scores.iter().flatten().flatten().map(|&x| x.into()).collect();
        assert_eq!(scores, values(&golden.tensors[&format!("{name}.scores")]), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 6);
}

/// `top_k` 0 keeps all: draws from the whole distribution, not the likeliest token.
#[test]
fn without_a_top_k_tokens_are_drawn_from_all() {
    let model = models::open("mamba_tied");
    let inputs = prompts(&model, 2);
    let options = GenerateOptions { top_k: 0, temperature: 30.0, seed: 3, ..GenerateOptions::new(30) };
    let output = generate(&model, &inputs, options).unwrap();
    for (row, prompt) in inputs.iter().enumerate() {
        let config = SamplingConfig { temperature: 30.0, seed: 3 + row as u64, ..Default::default() };
        let alone = Generator::builder(&model).prompt(prompt).sampling(config.build().unwrap());
        let alone: Vec<u32> =
            alone.max_new_tokens(24).build().unwrap().map(|token| token.unwrap().id).collect();
        assert_eq!(output.sequences[row][6..], alone);
    }
    assert_ne!(output.sequences, generate(&model, &inputs, GenerateOptions::new(30)).unwrap().sequences);
}

/// Where a model draws, no logits come here that nobody needs; and the text is the same.
#[test]
fn a_model_that_draws_is_asked_to() {
    let model = models::open("mamba_tied");
    let inputs = prompts(&model, 3);
    let (here, there) = (Drawing::new(&model, false), Drawing::new(&model, true));
    let teacher: Vec<Vec<u32>> = (0..3).map(|row| models::ids(&model, 12, 60 + row)).collect();
    let eos = generate(&model, &inputs, GenerateOptions::new(16)).unwrap().sequences[1][9];
    let options = |case: &str| {
        let new = GenerateOptions::new(20);
        match case {
            "all" => GenerateOptions { top_k: 0, seed: 2, ..new },
            "filters" => GenerateOptions { top_k: 9, top_p: 0.8, min_p: 0.01, temperature: 1.3, ..new },
            "eos" => GenerateOptions { eos_token_id: Some(eos), ..new },
            "teacher" => GenerateOptions { teacher_outputs: Some(&teacher), top_k: 0, ..new },
            "penalty" => GenerateOptions { repetition_penalty: 1.2, ..new },
            "scores" => GenerateOptions { output_scores: true, ..new },
            "fewer tokens" => GenerateOptions { vocab_size: Some(8), ..new },
            _ => new,
        }
    };
    let drawn = ["greedy", "all", "filters", "eos", "teacher"].map(|case| (case, true));
    let chosen = ["penalty", "scores", "fewer tokens"].map(|case| (case, false));
    for (case, draws) in drawn.into_iter().chain(chosen) {
        there.drawn.set(0);
        let expected = generate(&here, &inputs, options(case)).unwrap();
        let output = generate(&there, &inputs, options(case)).unwrap();
        assert_eq!((output.sequences, output.scores), (expected.sequences, expected.scores), "{case}");
        assert_eq!(there.drawn.get() > 0, draws, "{case}");
    }
}
