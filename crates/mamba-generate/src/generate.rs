//! `generate` with the options of mamba_ssm.

use std::time::Instant;

use crate::candidates::Candidates;
use crate::error::{Error, Result};
use crate::filter::{Chain, History, LogitsFilter, MinP, RepetitionPenalty, Temperature, TopK, TopP};
use crate::generator::check_prompt;
use crate::lm::BatchLm;
use crate::sampler::{ArgMax, Multinomial, Sampler};
use crate::sequence::check_logits;
use crate::timings::Timings;

/// Sees tokens as they come; see [`GenerateOptions::streamer`].
pub trait Streamer {
    /// Takes the tokens of a prompt, once a row and before all others, or the next token of every row.
    fn put(&mut self, ids: &[u32]);

    /// Is called last, after an error too.
    fn end(&mut self);
}

/// The options of [`generate`], with the names, the meanings and the defaults of mamba_ssm.
pub struct GenerateOptions<'s> {
    /// How many tokens a row has at most, those of the prompt included.
    pub max_length: usize,
    /// How many of the likeliest tokens to keep; 1, the default, is greedy whatever the other options say, 0 keeps all.
    pub top_k: usize,
    /// The probability that the kept tokens reach; 0, the default, for all.
    pub top_p: f64,
    /// The least probability, relative to the largest; 0 by default. (In mamba_ssm the logit of token 0 stands for the
    /// largest, and `top_k` switches it off: mistakes that are not repeated here.)
    pub min_p: f64,
    /// Divides the logits. 1 by default.
    pub temperature: f64,
    /// See [`RepetitionPenalty`]. 1 by default.
    pub repetition_penalty: f64,
    /// After this token a row has nothing but it; when all rows have come to it, generation ends.
    pub eos_token_id: Option<u32>,
    /// The tokens to take in the place of those that would be chosen: row by row, from the start of the prompt, as far as
    /// they go.
    pub teacher_outputs: Option<&'s [Vec<u32>]>,
    /// How many tokens there are to choose from, if fewer than the model has logits.
    pub vocab_size: Option<usize>,
    /// Asked for by scripts of mamba_ssm, and without effect: on a GPU a model captures its step as a CUDA graph anyway if it can,
    /// elsewhere there is none.
    pub cg: bool,
    /// Whether to return the logits that tokens are chosen from, after the repetition penalty and before any filter.
    pub output_scores: bool,
    /// Who sees tokens as they come.
    pub streamer: Option<&'s mut dyn Streamer>,
    /// What draws follow from; row `i` has the seed `seed + i`. 0 by default.
    pub seed: u64,
}

impl GenerateOptions<'_> {
    /// Greedy generation of rows of up to `max_length` tokens.
    pub fn new(max_length: usize) -> Self {
        Self {
            max_length,
            top_k: 1,
            top_p: 0.0,
            min_p: 0.0,
            temperature: 1.0,
            repetition_penalty: 1.0,
            eos_token_id: None,
            teacher_outputs: None,
            vocab_size: None,
            cg: false,
            output_scores: false,
            streamer: None,
            seed: 0,
        }
    }
}

/// What [`generate`] returns.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The tokens of each row, prompt included.
    pub sequences: Vec<Vec<u32>>,
    /// For each step and row the logits that the token was chosen from, if asked for.
    pub scores: Vec<Vec<Vec<f32>>>,
    /// How long it took; tokens are those of one row.
    pub timings: Timings,
}

/// Generates rows of one length as `generate` of mamba_ssm does, with its options.
///
/// For rows of different lengths, and rules of their own, see [`Batch`](crate::Batch); for one row, [`Generator`](crate::Generator).
///
/// # Errors
/// If there are no rows, or their lengths differ; if an option is outside its domain, or asks for what the model cannot do; if
/// the teacher has another number of rows; or if the model fails. The streamer is told the end in any case.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use mamba_generate::{GenerateOptions, generate};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(20, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let output = generate(&model, &[vec![3, 1, 4], vec![1, 5, 9]], GenerateOptions::new(8))?;
/// assert!(output.sequences.iter().all(|row| row.len() == 8));
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
///
/// # Source
/// `mamba_ssm/utils/generation.py`.
pub fn generate<M: BatchLm + ?Sized>(
    model: &M,
    input_ids: &[Vec<u32>],
    mut options: GenerateOptions<'_>,
) -> Result<Generated> {
    let mut streamer = options.streamer.take();
    let mut put = |ids: &[u32]| {
        if let Some(streamer) = &mut streamer {
            streamer.put(ids);
        }
    };
    let outcome = Rows::new(model, input_ids, &options).and_then(|rows| rows.run(&mut put));
    if let Some(streamer) = streamer {
        streamer.end();
    }
    outcome
}

/// The filters and the draw of one row.
struct Choice {
    penalty: Chain,
    filters: Chain,
    sampler: Box<dyn Sampler>,
}

impl Choice {
    fn new(options: &GenerateOptions<'_>, row: usize) -> Result<Self> {
        let mut penalty = Chain::new();
        if options.repetition_penalty != 1.0 {
            penalty.push(RepetitionPenalty::new(options.repetition_penalty)?);
        }
        let temperature = Temperature::new(options.temperature)?;
        let mut filters = Chain::new();
        let everything = options.top_k == 0 && options.top_p == 0.0 && options.min_p == 0.0;
        if options.top_k == 1 || everything {
            return Ok(Self { penalty, filters, sampler: Box::new(ArgMax) });
        }
        filters.push(temperature);
        if options.top_k > 0 {
            filters.push(TopK::new(options.top_k)?);
        }
        if options.top_p != 0.0 {
            filters.push(TopP::new(options.top_p)?);
        }
        if options.min_p != 0.0 {
            filters.push(MinP::new(options.min_p)?);
        }
        let seed = options.seed.wrapping_add(row as u64);
        Ok(Self { penalty, filters, sampler: Box::new(Multinomial::with_seed(seed)) })
    }
}

struct Rows<'a, 's, M: BatchLm + ?Sized> {
    model: &'a M,
    options: &'a GenerateOptions<'s>,
    choices: Vec<Choice>,
    prompt: usize,
    vocab_size: usize,
    output: Generated,
}

impl<'a, 's, M: BatchLm + ?Sized> Rows<'a, 's, M> {
    fn new(model: &'a M, input_ids: &[Vec<u32>], options: &'a GenerateOptions<'s>) -> Result<Self> {
        let bad = |argument, got: String, expected| Err(Error::invalid("generate", argument, got, expected));
        let Some(prompt) = input_ids.first().map(Vec::len) else {
            return bad("input_ids", "[]".into(), "at least one row");
        };
        for row in input_ids {
            check_prompt(row, model.vocab_size())?;
            if row.len() != prompt {
                let got = format!("rows of {prompt} and {} tokens", row.len());
                return bad("input_ids", got, "rows of one length");
            }
        }
        if options.max_length == 0 {
            return bad("max_length", "0".into(), "a number from 1");
        }
        if let Some(teacher) = options.teacher_outputs {
            if teacher.len() != input_ids.len() {
                return bad(
                    "teacher_outputs",
                    format!("{} rows", teacher.len()),
                    "as many rows as `input_ids`",
                );
            }
            for row in teacher.iter().filter(|row| !row.is_empty()) {
                check_prompt(row, model.vocab_size())?;
            }
        }
        let vocab_size = options.vocab_size.unwrap_or(model.vocab_size());
        if vocab_size == 0 || vocab_size > model.vocab_size() {
            return bad("vocab_size", vocab_size.to_string(), "a number from 1 to the model's");
        }
        let choices = (0..input_ids.len()).map(|row| Choice::new(options, row)).collect::<Result<_>>()?;
        let sequences = input_ids.iter().map(|row| row[..prompt.min(options.max_length)].to_vec()).collect();
        let output = Generated { sequences, scores: Vec::new(), timings: Timings::default() };
        Ok(Self { model, options, choices, prompt, vocab_size, output })
    }

    fn run(mut self, put: &mut dyn FnMut(&[u32])) -> Result<Generated> {
        self.output.sequences.iter().for_each(|row| put(row));
        if self.options.max_length <= self.prompt {
            return Ok(self.output);
        }
        let start = Instant::now();
        let (mut cache, mut logits) = self.read_prompts()?;
        let mut position = self.prompt;
        loop {
            let ids = self.choose(&logits, position)?;
            put(&ids);
            position += 1;
            if position == self.prompt + 1 {
                self.output.timings.prompt = start.elapsed();
                self.output.timings.prompt_tokens = self.prompt;
            }
            let ended = |row: &Vec<u32>| {
                self.options.eos_token_id.is_some() && row.last() == self.options.eos_token_id.as_ref()
            };
            if position == self.options.max_length || self.output.sequences.iter().all(ended) {
                break;
            }
            let outcome = self.model.step_batch(&ids, &mut cache, &mut logits);
            outcome.map_err(Error::model("step_batch", position))?;
        }
        self.output.timings.generated_tokens = position - self.prompt;
        self.output.timings.generation = start.elapsed() - self.output.timings.prompt;
        Ok(self.output)
    }

    /// Row by row, so that none depends on the others; then their states beside each other.
    fn read_prompts(&self) -> Result<(M::Cache, Vec<f32>)> {
        let (mut caches, mut all, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for row in &self.output.sequences {
            let mut cache = self.model.new_cache().map_err(Error::model("new_cache", 0))?;
            let outcome = self.model.prefill(row, &mut cache, &mut logits);
            outcome.map_err(Error::model("prefill", row.len()))?;
            all.extend_from_slice(&logits);
            caches.push(cache);
        }
        let cache = self.model.concat(&caches.iter().collect::<Vec<_>>());
        Ok((cache.map_err(Error::model("concat", self.prompt))?, all))
    }

    /// The next token of each row.
    fn choose(&mut self, logits: &[f32], position: usize) -> Result<Vec<u32>> {
        let rows = self.output.sequences.len();
        check_logits(logits, rows * self.model.vocab_size(), position)?;
        let (mut ids, mut scores) = (Vec::with_capacity(rows), Vec::new());
        for (row, logits) in logits.chunks_exact(self.model.vocab_size()).enumerate() {
            let choice = &mut self.choices[row];
            let history = History::new(&self.output.sequences[row], self.prompt);
            let mut candidates = Candidates::new();
            candidates.load(&logits[..self.vocab_size], position)?;
            choice.penalty.apply(&mut candidates, history)?;
            if self.options.output_scores {
                scores.push(candidates.as_slice().iter().map(|c| c.logit).collect());
            }
            choice.filters.apply(&mut candidates, history)?;
            let chosen = choice.sampler.sample(&mut candidates)?;
            let taught = self.options.teacher_outputs.and_then(|rows| rows[row].get(position));
            let eos = self.options.eos_token_id.filter(|eos| history.generated().contains(eos));
            ids.push(eos.or(taught.copied()).unwrap_or(chosen));
        }
        for (row, &id) in self.output.sequences.iter_mut().zip(&ids) {
            row.push(id);
        }
        if self.options.output_scores {
            self.output.scores.push(scores);
        }
        Ok(ids)
    }
}
