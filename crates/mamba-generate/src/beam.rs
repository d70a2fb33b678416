//! Beam search: the likeliest texts rather than the likeliest tokens.

use crate::error::{Error, Result};
use crate::generator::check_prompt;
use crate::lm::BatchLm;
use crate::logprobs::LogSum;
use crate::prompt::read_all;
use crate::sequence::check_logits;

/// When a beam search ends before its texts are as long as they may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EarlyStopping {
    /// As soon as as many texts have ended as there are beams.
    WhenFull,
    /// When as many texts have ended, and no beam would be better than the worst of them if it ended now.
    #[default]
    Heuristic,
    /// When as many texts have ended, and no beam can become better than the worst of them, however long it gets.
    Never,
}

/// The options of [`beam_search`].
#[derive(Debug, Clone, PartialEq)]
pub struct BeamOptions {
    /// How many texts to follow at once. 4 by default.
    pub beams: usize,
    /// How many tokens to generate at most. 100 by default.
    pub max_new_tokens: usize,
    /// The tokens that end a text.
    pub eos_tokens: Vec<u32>,
    /// The power of the length by which log-probabilities are divided: above 0 favours long texts. 1 by default.
    pub length_penalty: f64,
    /// When to end early.
    pub early_stopping: EarlyStopping,
}

impl Default for BeamOptions {
    fn default() -> Self {
        Self {
            beams: 4,
            max_new_tokens: 100,
            eos_tokens: Vec::new(),
            length_penalty: 1.0,
            early_stopping: EarlyStopping::default(),
        }
    }
}

/// A text that a beam search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// The generated tokens, the one that ended the text included.
    pub ids: Vec<u32>,
    /// The logarithm of their probability.
    pub logprob: f64,
    /// The same divided by the number of tokens to the power of the length penalty: what texts are compared by.
    pub score: f64,
}

/// A text that goes on.
struct Beam {
    ids: Vec<u32>,
    logprob: f64,
    /// The row of the batch whose state it goes on from.
    row: usize,
}

/// Follows several texts at once and returns those that ended, the best first, at most as many as there are beams.
///
/// In each step every beam is continued with every token; of these, as many of the likeliest go on as there are beams.
/// A text ends with a token of `eos_tokens`, if it is among the `beams` likeliest then, or at the largest length.
///
/// # Errors
/// If the prompt is empty or holds an id that the model does not know, `beams` or `max_new_tokens` is 0, the length penalty is
/// not a finite number, or the model fails.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use mamba_generate::{BeamOptions, beam_search};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(20, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let options = BeamOptions { beams: 3, max_new_tokens: 8, ..BeamOptions::default() };
/// let found = beam_search(&model, &[3, 1, 4], &options)?;
/// assert_eq!((found.len(), found[0].ids.len()), (3, 8));
/// assert!(found[0].score >= found[1].score);
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
///
/// # Source
/// `generate(num_beams=…)` of transformers.
pub fn beam_search<M: BatchLm + ?Sized>(
    model: &M,
    prompt: &[u32],
    options: &BeamOptions,
) -> Result<Vec<Hypothesis>> {
    let vocab_size = model.vocab_size();
    check_prompt(prompt, vocab_size)?;
    options.check()?;
    let (mut cache, mut logits) = (model.new_cache().map_err(Error::model("new_cache", 0))?, Vec::new());
    read_all(model, prompt, &mut cache, &mut logits, prompt.len())?;
    let mut beams = vec![Beam { ids: Vec::new(), logprob: 0.0, row: 0 }];
    let mut finished: Vec<Hypothesis> = Vec::new();
    loop {
        let length = beams.first().map_or(0, |beam| beam.ids.len()) + 1;
        let position = prompt.len() + length - 1;
        check_logits(&logits, beams.len() * vocab_size, position)?;
        let continued = options.continue_all(&beams, &logits, position)?;
        let mut next = Vec::new();
        for (rank, beam) in continued.into_iter().enumerate() {
            let ended = beam.ids.last().is_some_and(|id| options.eos_tokens.contains(id));
            if !ended && length < options.max_new_tokens {
                next.push(beam);
            } else if rank < options.beams {
                let score = options.score(beam.logprob, length);
                finished.push(Hypothesis { ids: beam.ids, logprob: beam.logprob, score });
            }
        }
        finished.sort_by(|a, b| b.score.total_cmp(&a.score)); // stable: of equals the one that ended first
        finished.truncate(options.beams);
        next.truncate(options.beams);
        if next.is_empty() || options.is_over(&finished, &next, length) {
            return Ok(finished);
        }
        let rows: Vec<usize> = next.iter().map(|beam| beam.row).collect();
        cache = model.select(&cache, &rows).map_err(Error::model("select", position))?;
        let ids: Vec<u32> = next.iter().filter_map(|beam| beam.ids.last().copied()).collect();
        model.step_batch(&ids, &mut cache, &mut logits).map_err(Error::model("step_batch", position))?;
        beams = next;
    }
}

impl BeamOptions {
    fn check(&self) -> Result<()> {
        for (argument, value) in [("beams", self.beams), ("max_new_tokens", self.max_new_tokens)] {
            if value == 0 {
                return Err(Error::invalid("beam_search", argument, value, "a number from 1"));
            }
        }
        match self.length_penalty.is_finite() {
            true => Ok(()),
            false => {
                Err(Error::invalid("beam_search", "length_penalty", self.length_penalty, "a finite number"))
            }
        }
    }

    fn score(&self, logprob: f64, length: usize) -> f64 {
        logprob / (length as f64).powf(self.length_penalty)
    }

    /// The likeliest continuations, likeliest first: so many that enough are left if all that can end do.
    fn continue_all(&self, beams: &[Beam], logits: &[f32], position: usize) -> Result<Vec<Beam>> {
        let vocab_size = logits.len() / beams.len();
        let kept = self.beams * (1 + self.eos_tokens.len()).max(2);
        let mut all: Vec<(f64, usize, u32)> = Vec::with_capacity(logits.len());
        for (row, (beam, logits)) in beams.iter().zip(logits.chunks_exact(vocab_size)).enumerate() {
            let sum = LogSum::of(logits);
            for (id, &logit) in (0u32..).zip(logits) {
                let logprob = beam.logprob + sum.logprob(logit);
                if logit.is_nan() || logit == f32::INFINITY {
                    return Err(Error::InvalidLogit { id, position, value: logit });
                }
                if logprob > f64::NEG_INFINITY {
                    all.push((logprob, row, id));
                }
            }
        }
        if all.is_empty() {
            return Err(Error::NoCandidates { position });
        }
        // A total order, so that the result does not depend on how it is found.
        let rank = |a: &(f64, usize, u32), b: &(f64, usize, u32)| {
            b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2)))
        };
        if kept < all.len() {
            all.select_nth_unstable_by(kept, rank);
            all.truncate(kept);
        }
        all.sort_unstable_by(rank);
        let beam = |(logprob, row, id): (f64, usize, u32)| {
            let mut ids = beams[row].ids.clone();
            ids.push(id);
            Beam { ids, logprob, row }
        };
        Ok(all.into_iter().map(beam).collect())
    }

    /// Whether what goes on cannot matter any more.
    fn is_over(&self, finished: &[Hypothesis], next: &[Beam], length: usize) -> bool {
        let (Some(worst), Some(best)) = (finished.last(), next.first()) else { return false };
        if finished.len() < self.beams {
            return false;
        }
        let attainable = match self.early_stopping {
            EarlyStopping::WhenFull => return true,
            EarlyStopping::Never if self.length_penalty > 0.0 => self.max_new_tokens,
            EarlyStopping::Heuristic | EarlyStopping::Never => length,
        };
        self.score(best.logprob, attainable) <= worst.score
    }
}
