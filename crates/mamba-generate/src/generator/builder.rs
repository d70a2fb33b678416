//! What a generation is to do, and where it starts.

use super::{Cache, Generator};
use crate::cancel::CancelToken;
use crate::error::{Error, Result};
use crate::filter::MinNewTokens;
use crate::lm::CausalLm;
use crate::prompt::PROMPT_PIECE;
use crate::sampling::Sampling;
use crate::sequence::{Sequence, State};
use crate::state::GenerationState;
use crate::timings::Timings;

/// What a [`Generator`] is made from; see [`Generator::builder`].
#[must_use]
pub struct GeneratorBuilder<'a, M: CausalLm + ?Sized> {
    model: &'a M,
    cache: Option<&'a mut M::Cache>,
    resumed: Option<GenerationState<M::Cache>>,
    history: Vec<u32>,
    prompt: Vec<u32>,
    sampling: Sampling,
    max_new_tokens: usize,
    eos_tokens: Vec<u32>,
    stop_tokens: Vec<u32>,
    ignore_eos: bool,
    min_new_tokens: usize,
    prompt_piece: usize,
    logprobs: Option<usize>,
    cancel: CancelToken,
}

impl<'a, M: CausalLm + ?Sized> GeneratorBuilder<'a, M> {
    pub(super) fn new(model: &'a M) -> Self {
        Self {
            model,
            cache: None,
            resumed: None,
            history: Vec::new(),
            prompt: Vec::new(),
            sampling: Sampling::greedy(),
            max_new_tokens: usize::MAX,
            eos_tokens: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            min_new_tokens: 0,
            prompt_piece: PROMPT_PIECE,
            logprobs: None,
            cancel: CancelToken::new(),
        }
    }

    /// Sets the tokens to read before the first is generated; at least one.
    pub fn prompt(mut self, ids: &[u32]) -> Self {
        self.prompt = ids.to_vec();
        self
    }

    /// Continues from what `cache` has read, and leaves there what this generation reads.
    ///
    /// Without it the generation starts from a new cache of its own.
    pub fn cache(mut self, cache: &'a mut M::Cache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// Tells the filters which tokens the cache has read already, such as those of earlier turns.
    ///
    /// They are not read again; only the [`History`](crate::History) that filters see, and the positions that errors name, start with them.
    pub fn history(mut self, ids: &[u32]) -> Self {
        self.history = ids.to_vec();
        self
    }

    /// Goes on from where another generation was, in the place of [`cache`](Self::cache) and [`history`](Self::history).
    ///
    /// Without a prompt it goes on in the middle: with the same options the same tokens follow as would have followed there,
    /// and [`max_new_tokens`](Self::max_new_tokens) counts those that were generated before. With a prompt a new turn
    /// begins: what was not read yet is read first, then the prompt. In both cases the sampling goes on where it was,
    /// unless the state is [without](GenerationState::without_sampling) it.
    ///
    /// One that ended at a stop token has ended here too, with options that have the same one. One that was cancelled, even in the
    /// middle of its prompt, goes on there.
    pub fn resume(mut self, state: GenerationState<M::Cache>) -> Self {
        self.resumed = Some(state);
        self
    }

    /// Sets how tokens are chosen; greedily by default.
    pub fn sampling(mut self, sampling: Sampling) -> Self {
        self.sampling = sampling;
        self
    }

    /// Sets how many tokens to generate at most; no limit by default.
    ///
    /// With 0 nothing happens at all: the prompt is not read either.
    pub fn max_new_tokens(mut self, n: usize) -> Self {
        self.max_new_tokens = n;
        self
    }

    /// Sets the model's own tokens for the end of a text, at which generation ends unless told to
    /// [ignore](Self::ignore_eos) them.
    pub fn eos_tokens(mut self, ids: &[u32]) -> Self {
        self.eos_tokens = ids.to_vec();
        self
    }

    /// Sets further tokens at which generation ends.
    pub fn stop_tokens(mut self, ids: &[u32]) -> Self {
        self.stop_tokens = ids.to_vec();
        self
    }

    /// Sets whether to go on after the tokens of [`eos_tokens`](Self::eos_tokens).
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.ignore_eos = ignore;
        self
    }

    /// Sets how many tokens to generate at least: before that, no token at which generation ends is chosen. 0 by default.
    pub fn min_new_tokens(mut self, n: usize) -> Self {
        self.min_new_tokens = n;
        self
    }

    /// Sets how many tokens of the prompt are read at once: [`PROMPT_PIECE`] by default. More are read faster on large
    /// devices, and take more memory.
    pub fn prompt_piece(mut self, tokens: usize) -> Self {
        self.prompt_piece = tokens;
        self
    }

    /// Has each token come with its [`Logprobs`](crate::Logprobs) and with those of the `top` likeliest tokens.
    pub fn logprobs(mut self, top: usize) -> Self {
        self.logprobs = Some(top);
        self
    }

    /// Lets whoever has a copy of `token` stop the generation, also from another thread.
    pub fn cancel_token(mut self, token: &CancelToken) -> Self {
        self.cancel = token.clone();
        self
    }

    /// Makes the generator. The model is not evaluated before the first token is asked for.
    ///
    /// # Errors
    /// If the prompt is empty or holds an id that the model does not know, or is to be read in pieces of no tokens; if no cache was
    /// given and none can be made; if the state to resume is not of a sampling such as this.
    /// An empty prompt is an error also when the cache has read something: logits belong to a token that is read, and the
    /// cache does not keep them. See [`Generator::pending`] for what to continue with.
    pub fn build(self) -> Result<Generator<'a, M>> {
        if self.resumed.is_none() || !self.prompt.is_empty() {
            check_prompt(&self.prompt, self.model.vocab_size())?;
        }
        if self.prompt_piece == 0 {
            return Err(Error::invalid("generator", "prompt_piece", 0, "a number from 1"));
        }
        let mut stop_tokens = self.stop_tokens;
        if !self.ignore_eos {
            stop_tokens.extend(self.eos_tokens);
        }
        let mut sampling = self.sampling;
        let start = match self.resumed {
            Some(state) => Start::resume(state, &self.prompt, &mut sampling)?,
            None => Start::fresh(self.model, self.cache, self.history, &self.prompt)?,
        };
        if self.min_new_tokens > 0 {
            sampling.push_front(MinNewTokens::new(self.min_new_tokens, &stop_tokens));
        }
        let mut sequence = Sequence {
            sampling,
            logprobs: self.logprobs,
            stop_tokens,
            max_new_tokens: self.max_new_tokens,
            prompt_piece: self.prompt_piece,
            cancel: self.cancel,
            read: start.read,
            prompt: start.prompt,
            tokens: start.tokens,
            logits: start.logits,
            state: start.state,
            timings: Timings::default(),
        };
        if let reason @ Some(_) = sequence.reason_to_end()? {
            sequence.state = State::Done(reason);
        }
        Ok(Generator { model: self.model, cache: start.cache, sequence })
    }
}

/// Errors if there is no token, or one that the model does not know.
pub(crate) fn check_prompt(ids: &[u32], vocab_size: usize) -> Result<()> {
    if ids.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(position) => Err(Error::TokenOutOfRange { id: ids[position], position, vocab_size }),
        None => Ok(()),
    }
}

/// Where a generation starts.
struct Start<'a, C> {
    cache: Cache<'a, C>,
    tokens: Vec<u32>,
    read: usize,
    prompt: (usize, usize),
    logits: Vec<f32>,
    state: State,
}

impl<'a, C> Start<'a, C> {
    /// With a prompt to read, after what the cache has read.
    fn fresh<M: CausalLm<Cache = C> + ?Sized>(
        model: &M,
        cache: Option<&'a mut C>,
        history: Vec<u32>,
        prompt: &[u32],
    ) -> Result<Self> {
        let cache = match cache {
            Some(cache) => Cache::Lent(cache),
            None => Cache::Own(model.new_cache().map_err(Error::model("new_cache", history.len()))?),
        };
        let read = history.len();
        Ok(Self::at(cache, history, read, prompt))
    }

    /// With the tokens that were not read, then a prompt.
    fn at(cache: Cache<'a, C>, mut tokens: Vec<u32>, read: usize, prompt: &[u32]) -> Self {
        tokens.extend(prompt);
        let prompt = (read, tokens.len());
        Self { cache, tokens, read, prompt, logits: Vec::new(), state: State::Prompt }
    }

    fn resume(saved: GenerationState<C>, prompt: &[u32], sampling: &mut Sampling) -> Result<Self> {
        if let Some(words) = &saved.sampling {
            sampling.restore(words)?;
        }
        let GenerationState { cache, tokens, read, logits, .. } = saved;
        let cache = Cache::Own(cache);
        if !prompt.is_empty() {
            return Ok(Self::at(cache, tokens, read, prompt));
        }
        let state = match (tokens.len() > saved.prompt.1, read == tokens.len()) {
            (true, _) => State::Running,
            (false, true) => State::Primed,
            (false, false) => State::Prompt,
        };
        Ok(Self { cache, tokens, read, prompt: saved.prompt, logits, state })
    }
}
