//! `generate` with the options of mamba_ssm.

use std::time::Instant;

use mamba_ops::Draw;

use crate::error::{Error, Result};
use crate::filter::{History, Temperature};
use crate::generator::check_prompt;
use crate::lm::BatchLm;
use crate::prompt::read_all;
use crate::sampling::{Sampling, SamplingConfig};
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
    /// See [`RepetitionPenalty`](crate::RepetitionPenalty). 1 by default.
    pub repetition_penalty: f64,
    /// After this token a row has nothing but it; when all rows have come to it, generation ends. (In mamba_ssm rows that have come to
    /// it go on until all come to it in one step.)
    pub eos_token_id: Option<u32>,
    /// The tokens to take in the place of those that would be chosen: row by row, from the start of the prompt, as far as
    /// they go. They are taken after [`eos_token_id`](Self::eos_token_id) too.
    pub teacher_outputs: Option<&'s [Vec<u32>]>,
    /// How many tokens there are to choose from, if fewer than the model has logits.
    pub vocab_size: Option<usize>,
    /// Asked for by scripts of mamba_ssm, and without effect: on a GPU a model captures its step as a CUDA graph anyway if it can,
    /// elsewhere there is none.
    pub cg: bool,
    /// Whether to return the logits of the model that tokens are chosen from: before the repetition penalty and all filters, of the
    /// tokens that there are to choose from.
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
    /// For each step and row the logits of the model that the token was chosen from, if asked for.
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

/// How the tokens of one row are chosen.
fn sampling(options: &GenerateOptions<'_>, row: usize) -> Result<Sampling> {
    Temperature::new(options.temperature)?; // which is not 0, here the sign for greedy
    let config = SamplingConfig {
        repetition_penalty: Some(options.repetition_penalty),
        seed: options.seed.wrapping_add(row as u64),
        ..Default::default()
    };
    match options.top_k {
        1 => SamplingConfig { temperature: 0.0, ..config },
        top_k => SamplingConfig {
            temperature: options.temperature,
            top_k: Some(top_k).filter(|k| *k > 0),
            top_p: Some(options.top_p).filter(|p| *p != 0.0),
            min_p: Some(options.min_p).filter(|p| *p != 0.0),
            ..config
        },
    }
    .build()
}

struct Rows<'a, 's, M: BatchLm + ?Sized> {
    model: &'a M,
    options: &'a GenerateOptions<'s>,
    samplings: Vec<Sampling>,
    /// Which rows have come to their end.
    ended: Vec<bool>,
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
        let samplings = (0..input_ids.len()).map(|row| sampling(options, row)).collect::<Result<_>>()?;
        let sequences = input_ids.iter().map(|row| row[..prompt.min(options.max_length)].to_vec()).collect();
        let output = Generated { sequences, scores: Vec::new(), timings: Timings::default() };
        let ended = vec![false; input_ids.len()];
        Ok(Self { model, options, samplings, ended, prompt, vocab_size, output })
    }

    fn run(mut self, put: &mut dyn FnMut(&[u32])) -> Result<Generated> {
        self.output.sequences.iter().for_each(|row| put(row));
        if self.options.max_length <= self.prompt {
            return Ok(self.output);
        }
        let start = Instant::now();
        let (mut cache, mut logits) = self.read_prompts()?;
        let mut drawn = vec![None; self.ended.len()];
        let mut position = self.prompt;
        loop {
            let ids = self.choose(&drawn, &logits, position)?;
            put(&ids);
            position += 1;
            if position == self.prompt + 1 {
                self.output.timings.prompt = start.elapsed();
                self.output.timings.prompt_tokens = self.prompt;
            }
            let is_end = |id: &u32| Some(*id) == self.options.eos_token_id;
            if position == self.options.max_length || ids.iter().all(is_end) {
                break;
            }
            drawn = self.step(&ids, &mut cache, &mut logits, position)?;
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
            read_all(self.model, row, &mut cache, &mut logits, row.len())?;
            all.extend_from_slice(&logits);
            caches.push(cache);
        }
        let cache = self.model.concat(&caches.iter().collect::<Vec<_>>());
        Ok((cache.map_err(Error::model("concat", self.prompt))?, all))
    }

    /// Reads a token of each row; the next ones too if the model can draw them, and nobody else wants the logits.
    fn step(
        &mut self,
        ids: &[u32],
        cache: &mut M::Cache,
        logits: &mut Vec<f32>,
        position: usize,
    ) -> Result<Vec<Option<u32>>> {
        let of_all = self.vocab_size == self.model.vocab_size() && !self.options.output_scores;
        if self.model.draws() && of_all && self.samplings.iter().all(Sampling::can_draw) {
            let draws = (0..ids.len()).map(|row| match self.given(row, position) {
                Some(_) => Some(Draw::GREEDY), // nobody asks for it
                None => self.samplings[row].draw(),
            });
            if let Some(draws) = draws.collect::<Option<Vec<_>>>() {
                let drawn = self.model.step_batch_and_draw(ids, cache, &draws, logits);
                return drawn.map_err(Error::model("step_batch_and_draw", position));
            }
        }
        let outcome = self.model.step_batch(ids, cache, logits);
        outcome.map_err(Error::model("step_batch", position))?;
        Ok(vec![None; ids.len()])
    }

    /// The token that a row has at `position` whatever the model says: that of the teacher, or the one after which there are no
    /// others.
    fn given(&self, row: usize, position: usize) -> Option<u32> {
        let taught = self.options.teacher_outputs.and_then(|rows| rows[row].get(position));
        taught.copied().or(self.options.eos_token_id.filter(|_| self.ended[row]))
    }

    /// The next token of each row: the one that is given, the one that was drawn, or one of our choice.
    fn choose(&mut self, drawn: &[Option<u32>], logits: &[f32], position: usize) -> Result<Vec<u32>> {
        let model_size = self.model.vocab_size();
        if drawn.contains(&None) {
            check_logits(logits, drawn.len() * model_size, position)?;
        }
        let mut ids = Vec::with_capacity(drawn.len());
        for (row, drawn) in drawn.iter().enumerate() {
            let id = match (self.given(row, position), drawn) {
                (Some(id), _) => id,
                (None, Some(id)) => *id,
                (None, None) => {
                    let logits = &logits[row * model_size..][..self.vocab_size];
                    let history = History::new(&self.output.sequences[row], self.prompt);
                    self.samplings[row].next_token(logits, history)?
                }
            };
            ids.push(id);
        }
        if self.options.output_scores {
            let scores = logits.chunks_exact(model_size).map(|row| row[..self.vocab_size].to_vec());
            self.output.scores.push(scores.collect());
        }
        for (row, &id) in ids.iter().enumerate() {
            self.output.sequences[row].push(id);
            self.ended[row] |= Some(id) == self.options.eos_token_id;
        }
        Ok(ids)
    }
}
