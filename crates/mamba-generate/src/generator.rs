//! The loop: prompt, choose, step, choose, until a reason to stop.

use std::iter::FusedIterator;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::filter::{History, MinNewTokens};
use crate::lm::{CausalLm, StateLm};
use crate::logprobs::Logprobs;
use crate::sampling::Sampling;
use crate::state::GenerationState;
use crate::timings::Timings;

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Token {
    /// The token id.
    pub id: u32,
    /// How likely the model thought it, if [asked for](GeneratorBuilder::logprobs).
    pub logprobs: Option<Logprobs>,
}

/// Why a generation ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model chose a token at which to stop.
    StopToken,
    /// The text came to a string at which to stop; only a [`TextGenerator`](crate::TextGenerator) says this.
    StopString,
    /// As many tokens were generated as were allowed.
    Length,
}

impl FinishReason {
    /// The name in snake case, for machines to read: `stop_token`, `stop_string` or `length`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StopToken => "stop_token",
            Self::StopString => "stop_string",
            Self::Length => "length",
        }
    }
}

impl std::fmt::Display for FinishReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The state of the model: the generator's own, or the caller's.
enum Cache<'a, C> {
    Own(C),
    Lent(&'a mut C),
}

impl<C> Cache<'_, C> {
    fn get(&self) -> &C {
        match self {
            Self::Own(cache) => cache,
            Self::Lent(cache) => cache,
        }
    }

    fn get_mut(&mut self) -> &mut C {
        match self {
            Self::Own(cache) => cache,
            Self::Lent(cache) => cache,
        }
    }
}

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
    logprobs: Option<usize>,
}

impl<'a, M: CausalLm + ?Sized> GeneratorBuilder<'a, M> {
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
    /// They are not read again; only the [`History`] that filters see, and the positions that errors name, start with them.
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

    /// Has each token come with its [`Logprobs`] and with those of the `top` likeliest tokens.
    pub fn logprobs(mut self, top: usize) -> Self {
        self.logprobs = Some(top);
        self
    }

    /// Makes the generator. The model is not evaluated before the first token is asked for.
    ///
    /// # Errors
    /// If the prompt is empty or holds an id that the model does not know, or if no cache was given and none can be made; if
    /// the state to resume is not of a sampling such as this.
    /// An empty prompt is an error also when the cache has read something: logits belong to a token that is read, and the
    /// cache does not keep them. See [`Generator::pending`] for what to continue with.
    pub fn build(self) -> Result<Generator<'a, M>> {
        if self.resumed.is_none() || !self.prompt.is_empty() {
            check_prompt(&self.prompt, self.model.vocab_size())?;
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
        let full = start.tokens.len() - start.prompt.1 >= self.max_new_tokens;
        Ok(Generator {
            model: self.model,
            cache: start.cache,
            sampling,
            logprobs: self.logprobs,
            stop_tokens,
            max_new_tokens: self.max_new_tokens,
            read: start.read,
            prompt: start.prompt,
            tokens: start.tokens,
            logits: start.logits,
            pending: start.pending,
            state: if full { State::Done(Some(FinishReason::Length)) } else { start.state },
            timings: Timings::default(),
        })
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
    pending: Option<u32>,
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
        Self { cache, tokens, read, prompt, logits: Vec::new(), pending: None, state: State::Prompt }
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
        let pending = tokens.last().copied().filter(|_| tokens.len() > saved.prompt.1);
        let state = match (pending, read == tokens.len()) {
            (Some(_), _) => State::Running,
            (None, true) if logits.is_empty() => return Err(Error::EmptyPrompt),
            (None, true) => State::Primed,
            (None, false) => State::Prompt,
        };
        Ok(Self { cache, tokens, read, prompt: saved.prompt, logits, pending, state })
    }
}

enum State {
    /// The prompt has not been read.
    Prompt,
    /// The prompt has been read, and the logits that follow it are there.
    Primed,
    /// At least one token has been generated.
    Running,
    /// No more tokens; without a reason if there was an error.
    Done(Option<FinishReason>),
}

/// Generates tokens: an iterator that reads the prompt when the first token is asked for, and steps the model once for each
/// further one.
///
/// A stop token is yielded, as the last; with [`finish_reason`](Self::finish_reason) it can be told apart. After an error
/// the iterator ends. Whoever has enough may drop it, or take only so many: no token is computed before it is asked for.
///
/// # What the cache has read
/// At any time, and so at the end: what it had read before, then the prompt, then all tokens that were yielded but the
/// last. The last is never read, as nobody asked for what follows it; it is [`pending`](Self::pending), and is the first
/// token of the prompt that continues the text. Before the first token the cache is untouched. After an error of the
/// model it is in no defined state.
///
/// # Example
/// Two turns, of which the second reads only what is new. (The model is the one of [`CausalLm`]'s example.)
/// ```
/// # use mamba_generate::{BoxError, CausalLm};
/// # struct Sum;
/// # impl CausalLm for Sum {
/// #     type Cache = u32;
/// #     fn vocab_size(&self) -> usize { 10 }
/// #     fn new_cache(&self) -> Result<u32, BoxError> { Ok(0) }
/// #     fn prefill(&self, ids: &[u32], sum: &mut u32, logits: &mut Vec<f32>) -> Result<(), BoxError> {
/// #         *sum += ids.iter().sum::<u32>();
/// #         logits.clear();
/// #         logits.resize(10, 0.0);
/// #         logits[(*sum % 10) as usize] = 1.0;
/// #         Ok(())
/// #     }
/// #     fn step(&self, id: u32, sum: &mut u32, logits: &mut Vec<f32>) -> Result<(), BoxError> {
/// #         self.prefill(&[id], sum, logits)
/// #     }
/// # }
/// # let model = Sum;
/// use mamba_generate::{FinishReason, Generator};
///
/// let mut cache = model.new_cache()?;
/// let mut first = Generator::builder(&model).cache(&mut cache).prompt(&[1]).max_new_tokens(4).build()?;
/// let ids = first.by_ref().map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// assert_eq!(ids, [1, 2, 4, 8]);
/// assert_eq!(first.finish_reason(), Some(FinishReason::Length));
///
/// let mut prompt: Vec<u32> = first.pending().into_iter().collect();
/// prompt.push(3);
/// let second = Generator::builder(&model).cache(&mut cache).prompt(&prompt).stop_tokens(&[8]).build()?;
/// let ids = second.map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// assert_eq!(ids, [9, 8]); // 1 + (1 + 2 + 4) + (8 + 3) = 19, 19 + 9 = 28
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
pub struct Generator<'a, M: CausalLm + ?Sized> {
    model: &'a M,
    cache: Cache<'a, M::Cache>,
    sampling: Sampling,
    logprobs: Option<usize>,
    stop_tokens: Vec<u32>,
    max_new_tokens: usize,
    /// The history, the prompt and what was generated.
    tokens: Vec<u32>,
    /// How many of them the cache has read.
    read: usize,
    /// Where the prompt begins and ends.
    prompt: (usize, usize),
    logits: Vec<f32>,
    pending: Option<u32>,
    state: State,
    timings: Timings,
}

impl<'a, M: CausalLm + ?Sized> Generator<'a, M> {
    /// Starts to describe a generation with `model`.
    pub fn builder(model: &'a M) -> GeneratorBuilder<'a, M> {
        GeneratorBuilder {
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
            logprobs: None,
        }
    }

    /// Why the generation ended, from the last token on; `None` before, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        match self.state {
            State::Done(reason) => reason,
            State::Prompt | State::Primed | State::Running => None,
        }
    }

    /// The tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[self.prompt.0..self.prompt.1]
    }

    /// The tokens that were generated so far, a stop token included.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt.1..]
    }

    /// The last token that was yielded, which the cache has not read; to continue, begin the next prompt with it.
    pub fn pending(&self) -> Option<u32> {
        self.pending
    }

    /// The state of the model after all tokens but the [`pending`](Self::pending) one.
    pub fn cache(&self) -> &M::Cache {
        self.cache.get()
    }

    /// How long it took so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Reads the prompt now, rather than when the first token is asked for. Does nothing if it was read.
    ///
    /// # Errors
    /// If the model fails; the generation has ended then.
    pub fn prefill(&mut self) -> Result<()> {
        if !matches!(self.state, State::Prompt) {
            return Ok(());
        }
        let start = Instant::now();
        let outcome = self.evaluate();
        self.timings.prompt = start.elapsed();
        self.state = if outcome.is_ok() { State::Primed } else { State::Done(None) };
        outcome
    }

    /// Everything that the generation goes on from, as a value: a copy, which what follows does not change.
    ///
    /// # Errors
    /// If the generation ended by an error, or the model cannot copy its state.
    pub fn state(&self) -> Result<GenerationState<M::Cache>>
    where
        M: StateLm,
    {
        if let State::Done(None) = self.state {
            return Err(Error::State("the generation failed, what the cache has read is not defined".into()));
        }
        let cache = self.model.fork(self.cache.get()).map_err(Error::model("fork", self.read))?;
        let primed = matches!(self.state, State::Primed);
        Ok(GenerationState {
            cache,
            tokens: self.tokens.clone(),
            read: self.read,
            prompt: self.prompt,
            logits: if primed { self.logits.clone() } else { Vec::new() },
            sampling: Some(self.sampling.state()),
        })
    }

    /// Sees to it that the logits are there from which the next token is chosen.
    fn evaluate(&mut self) -> Result<()> {
        let position = self.tokens.len();
        if let State::Primed = self.state {
            return Ok(());
        }
        match self.pending.take() {
            None => {
                let prompt = &self.tokens[self.prompt.0..self.prompt.1];
                self.timings.prompt_tokens = prompt.len();
                let outcome = self.model.prefill(prompt, self.cache.get_mut(), &mut self.logits);
                outcome.map_err(Error::model("prefill", position))?;
            }
            Some(id) => {
                let outcome = self.model.step(id, self.cache.get_mut(), &mut self.logits);
                outcome.map_err(Error::model("step", position))?;
            }
        }
        self.read = position;
        let (got, expected) = (self.logits.len(), self.model.vocab_size());
        if got == expected { Ok(()) } else { Err(Error::LogitsLength { got, expected, position }) }
    }

    fn advance(&mut self) -> Result<Token> {
        self.evaluate()?;
        let id = self.sampling.next_token(&self.logits, History::new(&self.tokens, self.prompt.1))?;
        self.tokens.push(id);
        self.pending = Some(id);
        Ok(Token { id, logprobs: self.logprobs.map(|top| Logprobs::new(&self.logits, id, top)) })
    }
}

impl<M: CausalLm + ?Sized> Iterator for Generator<'_, M> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if matches!(self.state, State::Done(_)) {
            return None;
        }
        let start = Instant::now();
        let token = self.advance();
        match self.state {
            State::Prompt | State::Primed => self.timings.prompt += start.elapsed(),
            _ => self.timings.generation += start.elapsed(),
        }
        self.timings.generated_tokens = self.generated().len();
        self.state = match &token {
            Err(_) => State::Done(None),
            Ok(token) if self.stop_tokens.contains(&token.id) => State::Done(Some(FinishReason::StopToken)),
            Ok(_) if self.generated().len() >= self.max_new_tokens => State::Done(Some(FinishReason::Length)),
            Ok(_) => State::Running,
        };
        Some(token)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self.state {
            State::Done(_) => (0, Some(0)),
            _ => (1, Some(self.max_new_tokens - self.generated().len())),
        }
    }
}

impl<M: CausalLm + ?Sized> FusedIterator for Generator<'_, M> {}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::BoxError;
    use crate::fake::Fake;
    use crate::sampling::SamplingConfig;

    fn ids(generator: impl Iterator<Item = Result<Token>>) -> Vec<u32> {
        generator.map(|token| token.unwrap().id).collect()
    }

    #[test]
    fn no_step_is_wasted() {
        let model = Fake::saying(3, &[5, 6, 7, 8]);
        let mut cache = Vec::new();
        let mut generator = Generator::builder(&model)
            .prompt(&[1, 2, 3])
            .cache(&mut cache)
            .max_new_tokens(3)
            .build()
            .unwrap();
        assert_eq!(model.calls(), [""; 0]);
        assert_eq!(generator.size_hint(), (1, Some(3)));
        assert_eq!(generator.finish_reason(), None);
        assert_eq!(ids(&mut generator), [5, 6, 7]);
        assert_eq!(generator.finish_reason(), Some(FinishReason::Length));
        assert_eq!((generator.prompt(), generator.generated()), (&[1, 2, 3][..], &[5, 6, 7][..]));
        assert_eq!(generator.pending(), Some(7));
        assert!(generator.next().is_none() && generator.next().is_none());
        assert_eq!(generator.size_hint(), (0, Some(0)));
        assert_eq!(model.calls(), ["prefill 3", "step", "step"]);
        assert_eq!(cache, [1, 2, 3, 5, 6]);
    }

    #[test]
    fn a_caller_may_take_fewer() {
        let model = Fake::saying(1, &[5, 6, 7]);
        let generator = Generator::builder(&model).prompt(&[1]).build().unwrap();
        assert_eq!(ids(generator.take(2)), [5, 6]);
        assert_eq!(model.calls(), ["new_cache", "prefill 1", "step"]);
    }

    #[test]
    fn no_tokens_wanted_none_computed() {
        let model = Fake::saying(1, &[5]);
        let mut generator = Generator::builder(&model).prompt(&[1]).max_new_tokens(0).build().unwrap();
        assert!(generator.next().is_none());
        assert_eq!(generator.finish_reason(), Some(FinishReason::Length));
        assert_eq!((generator.pending(), generator.cache().len()), (None, 0));
        assert_eq!(model.calls(), ["new_cache"]);
    }

    #[test]
    fn stops_at_eos_or_at_a_stop_token_and_yields_it() {
        let model = Fake::saying(1, &[5, 6, 7, 8]);
        let builder = || Generator::builder(&model).prompt(&[1]).eos_tokens(&[6, 60]).max_new_tokens(4);
        for (ignore, expected, reason) in
            [(false, &[5, 6][..], FinishReason::StopToken), (true, &[5, 6, 7, 8][..], FinishReason::Length)]
        {
            let mut generator = builder().ignore_eos(ignore).build().unwrap();
            assert_eq!(ids(&mut generator), expected);
            assert_eq!(generator.finish_reason(), Some(reason));
            assert_eq!(generator.cache()[..], [&[1], &expected[..expected.len() - 1]].concat());
        }
        let mut generator = builder().ignore_eos(true).stop_tokens(&[7]).build().unwrap();
        assert_eq!(ids(&mut generator), [5, 6, 7]);
        // A stop token that is also the last one allowed.
        let mut generator = builder().stop_tokens(&[8]).ignore_eos(true).build().unwrap();
        assert_eq!(ids(&mut generator).len(), 4);
        assert_eq!(generator.finish_reason(), Some(FinishReason::StopToken));
    }

    #[test]
    fn no_stop_token_before_the_least_number() {
        let model = Fake::saying(1, &[5, 6, 6, 6]);
        let mut generator = Generator::builder(&model)
            .prompt(&[1])
            .eos_tokens(&[5])
            .stop_tokens(&[6])
            .min_new_tokens(3)
            .build()
            .unwrap();
        // Neither 5 nor 6 before, but what comes first among equals.
        assert_eq!(ids(&mut generator), [0, 0, 0, 6]);
        assert_eq!(generator.finish_reason(), Some(FinishReason::StopToken));
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let model = Fake::saying(1, &[5, 6]);
        let sampling =
            SamplingConfig { banned_tokens: vec![vec![5]], temperature: 0.0, ..Default::default() };
        let generator = Generator::builder(&model).prompt(&[1]).sampling(sampling.build().unwrap());
        let mut generator = generator.logprobs(2).max_new_tokens(2).build().unwrap();
        // One logit of 20 among 511 of 0.
        let norm = (20f64.exp() + 511.0).ln();
        let token = generator.next().unwrap().unwrap();
        let logprobs = token.logprobs.unwrap();
        assert_eq!((token.id, logprobs.top[0].id, logprobs.top[1].id), (0, 5, 0));
        assert!((f64::from(logprobs.chosen) + norm).abs() < 1e-5);
        assert!((f64::from(logprobs.top[0].logprob) - (20.0 - norm)).abs() < 1e-7);
        let mut plain = Generator::builder(&model).prompt(&[1]).build().unwrap();
        assert_eq!(plain.next().unwrap().unwrap().logprobs, None);
    }

    #[test]
    fn continued_equals_uninterrupted() {
        let model = Fake::saying(2, &[5, 6, 7, 8, 9]);
        let config = SamplingConfig { temperature: 0.0, repetition_penalty: Some(1.1), ..Default::default() };
        let mut cache = Vec::new();
        let mut tokens = vec![1, 2];
        let mut first = Generator::builder(&model)
            .prompt(&tokens)
            .cache(&mut cache)
            .sampling(config.build().unwrap())
            .max_new_tokens(2)
            .build()
            .unwrap();
        tokens.extend(ids(&mut first));
        let pending = first.pending().unwrap();
        let history = tokens[..tokens.len() - 1].to_vec();
        let second = Generator::builder(&model)
            .history(&history)
            .prompt(&[pending])
            .cache(&mut cache)
            .sampling(config.build().unwrap())
            .max_new_tokens(3)
            .build()
            .unwrap();
        assert_eq!(second.prompt(), [6]);
        tokens.extend(ids(second));
        assert_eq!(tokens, [1, 2, 5, 6, 7, 8, 9]);
        assert_eq!(cache, [1, 2, 5, 6, 7, 8]);
    }

    #[test]
    fn filters_see_history_prompt_and_what_was_generated() {
        use std::sync::{Arc, Mutex};

        use crate::{ArgMax, Candidates, Chain, LogitsFilter};
        type Seen = Arc<Mutex<Vec<(Vec<u32>, Vec<u32>)>>>;
        struct Spy(Seen);
        impl LogitsFilter for Spy {
            fn apply(&mut self, _: &mut Candidates, history: History<'_>) -> Result<()> {
                self.0.lock().unwrap().push((history.tokens().to_vec(), history.generated().to_vec()));
                Ok(())
            }
        }
        let seen = Seen::default();
        let model = Fake::saying(1, &[5, 6]);
        let generator = Generator::builder(&model)
            .history(&[9])
            .prompt(&[1])
            .sampling(Sampling::new(Chain::new().with(Spy(seen.clone())), ArgMax))
            .max_new_tokens(2)
            .build()
            .unwrap();
        ids(generator);
        assert_eq!(*seen.lock().unwrap(), [(vec![9, 1], vec![]), (vec![9, 1, 5], vec![5])]);
    }

    #[test]
    fn a_prompt_can_be_read_beforehand() {
        let model = Fake::saying(2, &[5, 6]);
        let mut generator = Generator::builder(&model).prompt(&[1, 2]).max_new_tokens(2).build().unwrap();
        generator.prefill().unwrap();
        generator.prefill().unwrap();
        assert_eq!(
            (generator.cache().len(), generator.pending(), generator.size_hint()),
            (2, None, (1, Some(2)))
        );
        assert_eq!(ids(&mut generator), [5, 6]);
        generator.prefill().unwrap();
        assert_eq!(model.calls(), ["new_cache", "prefill 2", "step"]);
        let model = Fake { fail_at: Some(2), ..Fake::saying(2, &[5]) };
        let mut generator = Generator::builder(&model).prompt(&[1, 2]).build().unwrap();
        assert!(generator.prefill().is_err() && generator.state().is_err() && generator.next().is_none());
    }

    #[test]
    fn resumed_equals_uninterrupted_wherever_it_was_cut() {
        let model = Fake::saying(2, &[5, 6, 7, 8, 9]);
        let config =
            SamplingConfig { temperature: 0.9, xtc: Some((0.1, 0.3)), seed: 4, ..Default::default() };
        let builder = || {
            let sampling = config.build().unwrap();
            Generator::builder(&model)
                .sampling(sampling)
                .min_new_tokens(2)
                .stop_tokens(&[9])
                .max_new_tokens(9)
        };
        let mut whole = builder().prompt(&[1, 2]).build().unwrap();
        let expected = ids(&mut whole);
        for cut in 0..expected.len() {
            let mut first = builder().prompt(&[1, 2]).build().unwrap();
            let before: Vec<u32> = first.by_ref().take(cut).map(|token| token.unwrap().id).collect();
            let states = [first.state().unwrap(), {
                first.prefill().unwrap();
                first.state().unwrap()
            }];
            for state in states {
                let saved = state.to_bytes(&model).unwrap();
                let state = GenerationState::from_bytes(&model, &saved).unwrap();
                assert_eq!(state.generated(), before);
                let mut second = builder().resume(state).build().unwrap();
                let after = ids(&mut second);
                assert_eq!([before.clone(), after].concat(), expected, "cut at {cut}");
                assert_eq!((second.prompt(), second.generated()), (whole.prompt(), whole.generated()));
                assert_eq!((second.pending(), second.cache()), (whole.pending(), whole.cache()));
                assert_eq!(second.finish_reason(), whole.finish_reason());
            }
        }
        // At its end, it is at its end.
        let mut over =
            builder().resume(whole.state().unwrap()).max_new_tokens(whole.generated().len()).build().unwrap();
        assert!(over.next().is_none());
        assert_eq!(over.finish_reason(), Some(FinishReason::Length));
    }

    #[test]
    fn a_turn_reads_only_what_is_new() {
        let model = Fake::saying(2, &[5, 6, 7, 8, 9]);
        let mut first = Generator::builder(&model).prompt(&[1, 2]).max_new_tokens(2).build().unwrap();
        assert_eq!(ids(&mut first), [5, 6]);
        let state = first.state().unwrap();
        assert_eq!((state.tokens(), state.read(), state.cache().len()), (&[1, 2, 5, 6][..], 3, 3));
        model.calls.borrow_mut().clear();
        let second = Generator::builder(&model).resume(state).prompt(&[4]).max_new_tokens(2);
        let mut second = second.build().unwrap();
        assert_eq!(ids(&mut second), [8, 9]);
        assert_eq!(model.calls(), ["prefill 2", "step"]);
        assert_eq!(second.prompt(), [6, 4]);
        assert_eq!(second.cache()[..], [1, 2, 5, 6, 4, 8]);
        // Of another sampling, unless it is told to forget.
        let config = SamplingConfig { temperature: 0.5, ..Default::default() };
        let other = |state| {
            Generator::builder(&model).resume(state).prompt(&[4]).sampling(config.build().unwrap()).build()
        };
        let error = other(second.state().unwrap()).err().unwrap().to_string();
        assert!(error.contains("expected the state of a sampling with the same options"), "{error}");
        assert!(other(second.state().unwrap().without_sampling()).is_ok());
    }

    #[test]
    fn bad_prompts_are_refused() {
        let model = Fake::saying(1, &[]);
        let error = Generator::builder(&model).build().err().unwrap();
        assert_eq!(error.to_string(), "generator: `prompt` is empty, expected at least one token id");
        let error = Generator::builder(&model).prompt(&[1, 512]).build().err().unwrap();
        assert_eq!(
            error.to_string(),
            "generator: `prompt` holds token 512 at position 1, expected ids below 512"
        );
        assert_eq!(model.calls(), [""; 0]);
    }

    #[test]
    fn the_error_of_the_model_is_kept_and_ends_the_iterator() {
        for (fail_at, during, yielded) in [(2, "prefill", 0), (4, "step", 2)] {
            let model = Fake { fail_at: Some(fail_at), ..Fake::saying(2, &[5, 6, 7]) };
            let mut generator = Generator::builder(&model).prompt(&[1, 2]).build().unwrap();
            assert_eq!(ids(generator.by_ref().take(yielded)).len(), yielded);
            let error = generator.next().unwrap().unwrap_err();
            let source = std::error::Error::source(&error).unwrap();
            assert_eq!(source.to_string(), "out of fake memory");
            assert!(error.to_string().contains(during), "{error}");
            assert!(generator.next().is_none() && generator.next().is_none());
            assert_eq!((generator.finish_reason(), generator.pending()), (None, None));
            assert_eq!(generator.generated().len(), yielded);
        }
    }

    #[test]
    fn nan_is_an_error_that_names_position_and_token() {
        let model = Fake { nan_at: Some(3), ..Fake::saying(2, &[5, 6, 7]) };
        for config in [SamplingConfig::default(), SamplingConfig { temperature: 0.0, ..Default::default() }] {
            let sampling = config.build().unwrap();
            let mut generator =
                Generator::builder(&model).prompt(&[1, 2]).sampling(sampling).build().unwrap();
            assert_eq!(generator.next().unwrap().unwrap().id, 5);
            let error = generator.next().unwrap().unwrap_err();
            assert!(matches!(error, Error::InvalidLogit { id: 3, position: 3, .. }), "{error}");
            assert!(generator.next().is_none());
        }
    }

    #[test]
    fn a_wrong_number_of_logits_is_an_error() {
        struct Short;
        impl CausalLm for Short {
            type Cache = ();
            fn vocab_size(&self) -> usize {
                4
            }
            fn new_cache(&self) -> Result<(), BoxError> {
                Ok(())
            }
            fn prefill(&self, _: &[u32], _: &mut (), logits: &mut Vec<f32>) -> Result<(), BoxError> {
                logits.push(1.0);
                Ok(())
            }
            fn step(&self, id: u32, cache: &mut (), logits: &mut Vec<f32>) -> Result<(), BoxError> {
                self.prefill(&[id], cache, logits)
            }
        }
        let mut generator = Generator::builder(&Short).prompt(&[1]).build().unwrap();
        let error = generator.next().unwrap().unwrap_err();
        assert!(matches!(error, Error::LogitsLength { got: 1, expected: 4, position: 1 }), "{error}");
    }

    #[test]
    fn timings_count_tokens_and_time() {
        let model = Fake::saying(2, &[5, 6, 7]);
        let mut generator = Generator::builder(&model).prompt(&[1, 2]).max_new_tokens(3).build().unwrap();
        assert_eq!(generator.timings(), Timings::default());
        ids(&mut generator);
        let timings = generator.timings();
        assert_eq!((timings.prompt_tokens, timings.generated_tokens), (2, 3));
        assert!(timings.prompt > Duration::ZERO && timings.generation > Duration::ZERO);
        assert!(timings.prompt_tokens_per_s().is_some() && timings.tokens_per_s().is_some());
    }
}
