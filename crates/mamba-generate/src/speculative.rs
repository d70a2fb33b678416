//! Several tokens a step: a drafter guesses, the model reads all guesses at once, and wrong ones are undone.

mod drafter;

use std::time::Instant;

pub use drafter::{Drafter, ModelDrafter, NgramDrafter};

use crate::error::{Error, Result};
use crate::generator::Generator;
use crate::lm::StateLm;
use crate::prompt::read_all;
use crate::sequence::{Sequence, State, check_logits};
use crate::timings::Timings;
use crate::token::{FinishReason, Token, Tokens};

/// How well guesses did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpeculativeStats {
    /// How often the model was evaluated after the prompt.
    pub rounds: u64,
    /// How many tokens were guessed.
    pub drafted: u64,
    /// How many of them were right.
    pub accepted: u64,
}

/// Generates the tokens that a [`Generator`] would, in fewer evaluations of the model.
///
/// A [`Drafter`] guesses the next tokens; the model reads the last token and all guesses at once, which costs about as much as
/// one token where the weights are what has to be read. Then each token is chosen as ever, from the model's logits, with the
/// generator's own sampling: as long as it is the one that was guessed, the logits after it are there already. So the
/// output has exactly the distribution of plain generation, and with the same seed it is the same text, whatever the
/// drafter says: a guess is never a reason to choose a token. (The logits of many tokens read at once are those of single steps
/// up to the rounding of sums.)
///
/// What was read in vain is undone exactly: the state before the guesses is kept, and the tokens that were right are read
/// again together with the next guesses. This holds for every model whose state can be forked; of attention's keys and values
/// nothing is copied for it, those of wrong guesses are overwritten.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use mamba_generate::{Generator, NgramDrafter, Speculative};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(20, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let generator = || Generator::builder(&model).prompt(&[3, 1, 4, 1, 5]).max_new_tokens(40).build();
///
/// let mut speculative = Speculative::new(generator()?, NgramDrafter::default(), 4)?;
/// let ids = speculative.by_ref().map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// let plain = generator()?.map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// assert_eq!(ids, plain);
/// assert!(speculative.stats().rounds < 40); // a greedy text of a random model repeats itself soon
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
///
/// # Source
/// Leviathan et al., 2022, Fast Inference from Transformers via Speculative Decoding; the acceptance is llama.cpp's, which
/// draws from the model and compares.
pub struct Speculative<'a, M: StateLm + ?Sized, D> {
    model: &'a M,
    sequence: Sequence,
    drafter: D,
    /// The most tokens to guess at once.
    most: usize,
    /// The state after the first `sequence.read` tokens, all of which are certain.
    cache: M::Cache,
    round: Option<Round<M::Cache>>,
    draft: Vec<u32>,
    stats: SpeculativeStats,
}

/// What was computed at once, and how much of it is used.
struct Round<C> {
    /// After the tokens that were certain, and all guesses.
    cache: C,
    /// What follows the last certain token, then each guess.
    logits: Vec<f32>,
    /// The guesses.
    draft: Vec<u32>,
    /// How many of them were right so far.
    right: usize,
}

/// How many certain tokens are read again with guesses at most; more are read once and for all.
const REREAD: usize = 8;

impl<'a, M: StateLm + ?Sized, D: Drafter> Speculative<'a, M, D> {
    /// Goes on with what `generator` was to do, guessing up to `most` tokens at once.
    ///
    /// # Errors
    /// If the drafter has another vocabulary than the model, `most` is 0, or the generator has been lent its cache.
    pub fn new(generator: Generator<'a, M>, drafter: D, most: usize) -> Result<Self> {
        let model = generator.model();
        if let Some(drafts) = drafter.vocab_size()
            && drafts != model.vocab_size()
        {
            return Err(Error::DraftVocabulary { draft: drafts, model: model.vocab_size() });
        }
        if most == 0 {
            return Err(Error::invalid("speculative", "most", most, "a number from 1"));
        }
        let (sequence, cache) = generator.into_parts()?;
        let stats = SpeculativeStats::default();
        Ok(Self { model, sequence, drafter, most, cache, round: None, draft: Vec::new(), stats })
    }

    /// How well guesses did so far.
    pub fn stats(&self) -> SpeculativeStats {
        self.stats
    }

    /// Why the generation ended; as [`Generator::finish_reason`].
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.sequence.finish_reason()
    }

    /// The tokens that were generated so far.
    pub fn generated(&self) -> &[u32] {
        self.sequence.generated()
    }

    /// How long it took so far.
    pub fn timings(&self) -> Timings {
        self.sequence.timings
    }

    /// Ends the guessing: a generator whose cache has read all tokens but the last one, and no guess.
    ///
    /// # Errors
    /// If the model fails where it reads what is certain.
    pub fn into_generator(mut self) -> Result<Generator<'a, M>> {
        let last = self.sequence.tokens.len() - 1;
        if self.sequence.pending().is_some() && self.sequence.read < last {
            self.catch_up(last)?;
        }
        Ok(Generator::from_parts(self.model, self.sequence, self.cache))
    }

    /// Reads certain tokens up to `end`, for good.
    fn catch_up(&mut self, end: usize) -> Result<()> {
        let mut logits = Vec::new();
        let ids = &self.sequence.tokens[self.sequence.read..end];
        read_all(self.model, ids, &mut self.cache, &mut logits, end)?;
        self.sequence.read = end;
        Ok(())
    }

    /// Guesses, and reads what is certain but not read, then the guesses.
    fn start_round(&mut self) -> Result<Round<M::Cache>> {
        let end = self.sequence.tokens.len();
        if end - self.sequence.read > REREAD {
            self.catch_up(end - 1)?;
        }
        let left = self.sequence.max_new_tokens - self.sequence.generated().len();
        self.draft.clear();
        let most = self.most.min(left.saturating_sub(1));
        if most > 0 {
            let sampling = self.sequence.sampling.state();
            self.drafter.draft(
                &self.sequence.tokens,
                self.sequence.prompt.1,
                &sampling,
                most,
                &mut self.draft,
            )?;
            self.draft.truncate(most);
        }
        let vocab_size = self.model.vocab_size();
        // A guess that is no token ends the guesses.
        let known = self.draft.iter().take_while(|&&id| (id as usize) < vocab_size).count();
        self.draft.truncate(known);
        let certain = end - self.sequence.read;
        let ids = [&self.sequence.tokens[self.sequence.read..], &self.draft].concat();
        let mut cache = self.model.fork(&self.cache).map_err(Error::model("fork", end))?;
        let mut logits = Vec::new();
        self.model.forward(&ids, &mut cache, &mut logits).map_err(Error::model("forward", end))?;
        check_logits(&logits, ids.len() * vocab_size, end)?;
        logits.drain(..(certain - 1) * vocab_size);
        self.stats.rounds += 1;
        self.stats.drafted += self.draft.len() as u64;
        Ok(Round { cache, logits, draft: self.draft.clone(), right: 0 })
    }

    /// The next token; none if someone cancelled while the prompt was read.
    fn advance(&mut self) -> Result<Option<Token>> {
        if self.sequence.state != State::Running {
            return self.sequence.next(self.model, &mut self.cache);
        }
        let mut round = match self.round.take() {
            Some(round) => round,
            None => self.start_round()?,
        };
        let vocab_size = self.model.vocab_size();
        let logits = &round.logits[round.right * vocab_size..][..vocab_size];
        let token = self.sequence.choose(logits)?;
        if round.draft.get(round.right) == Some(&token.id) {
            round.right += 1;
            self.stats.accepted += 1;
            self.round = Some(round);
        } else if round.right == round.draft.len() {
            // All guesses were right, and what follows them is a token that nobody read.
            self.cache = round.cache;
            self.sequence.read = self.sequence.tokens.len() - 1;
        }
        Ok(Some(token))
    }
}

impl<M: StateLm + ?Sized, D: Drafter> Iterator for Speculative<'_, M, D> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        self.sequence.heed();
        if self.sequence.is_done() {
            return None;
        }
        let (start, before) = (Instant::now(), self.sequence.state);
        let token = self.advance();
        if token.is_err() {
            self.sequence.state = State::Done(None);
        }
        self.sequence.note_time(before, start.elapsed());
        token.transpose()
    }
}

impl<M: StateLm + ?Sized, D: Drafter> Tokens for Speculative<'_, M, D> {
    fn prompt(&self) -> &[u32] {
        self.sequence.prompt()
    }

    fn generated(&self) -> &[u32] {
        self.sequence.generated()
    }

    fn finish_reason(&self) -> Option<FinishReason> {
        self.sequence.finish_reason()
    }
}
