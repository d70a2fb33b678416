//! The loop: prompt, choose, step, choose, until a reason to stop.

mod builder;
#[cfg(test)]
mod tests;

use std::iter::FusedIterator;
use std::ops::ControlFlow;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::lm::{CausalLm, StateLm};
use crate::prefix_cache::{PrefixCache, Reuse};
use crate::sequence::{Sequence, State};
use crate::state::GenerationState;
use crate::timings::Timings;
use crate::token::{FinishReason, Token, Tokens};

pub use builder::GeneratorBuilder;
pub(crate) use builder::check_prompt;

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

/// Generates tokens: an iterator that reads the prompt when the first token is asked for, and steps the model once for each
/// further one.
///
/// A stop token is yielded, as the last; with [`finish_reason`](Self::finish_reason) it can be told apart. After an error
/// the iterator ends. Whoever has enough may drop it, or take only so many: no token is computed before it is asked for.
///
/// # What the cache has read
/// At any time, and so at the end: what it had read before, then the prompt, then all tokens that were yielded but the
/// last. The last is never read, as nobody asked for what follows it; it is [`pending`](Self::pending), and is the first
/// token of the prompt that continues the text. Of a prompt during which someone cancelled, the cache has read a part: the rest
/// is [`unread`](Self::unread). After an error of the model it is in no defined state.
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
    sequence: Sequence,
}

impl<'a, M: CausalLm + ?Sized> Generator<'a, M> {
    /// Starts to describe a generation with `model`.
    pub fn builder(model: &'a M) -> GeneratorBuilder<'a, M> {
        GeneratorBuilder::new(model)
    }

    /// Why the generation ended, from the last token on; `None` before, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.sequence.finish_reason()
    }

    /// The tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        self.sequence.prompt()
    }

    /// The tokens that were generated so far, a stop token included.
    pub fn generated(&self) -> &[u32] {
        self.sequence.generated()
    }

    /// The last token that was yielded, which the cache has not read; to continue, begin the next prompt with it.
    pub fn pending(&self) -> Option<u32> {
        self.sequence.pending()
    }

    /// The tokens that the cache has not read: the [`pending`](Self::pending) one; or the prompt, before it is read, or what is
    /// left of it if someone cancelled meanwhile. To continue, begin the next prompt with them.
    pub fn unread(&self) -> &[u32] {
        self.sequence.unread()
    }

    /// The state of the model after all tokens but those that are [`unread`](Self::unread).
    pub fn cache(&self) -> &M::Cache {
        self.cache.get()
    }

    /// How long it took so far.
    pub fn timings(&self) -> Timings {
        self.sequence.timings
    }

    /// Reads the prompt now, rather than when the first token is asked for. Does nothing if it was read.
    ///
    /// If someone cancels meanwhile, the generation has ended, and its [state](Self::state) goes on in the middle of the prompt.
    ///
    /// # Errors
    /// If the model fails; the generation has ended then.
    pub fn prefill(&mut self) -> Result<()> {
        if self.sequence.state != State::Prompt {
            return Ok(());
        }
        let start = Instant::now();
        let outcome = self.sequence.evaluate(self.model, self.cache.get_mut());
        self.sequence.primed(start.elapsed(), outcome)
    }

    /// As [`prefill`](Self::prefill), but what `prefixes` knows of the prompt is not read, and the rest is kept there.
    ///
    /// # Errors
    /// If the generation goes on from tokens that were read before: the prefix cache would not know them. If the states of
    /// the prefix cache belong to another model, or the model fails; the generation has ended then.
    pub fn prefill_with(&mut self, prefixes: &mut PrefixCache<M::Cache>) -> Result<Reuse>
    where
        M: StateLm,
    {
        let sequence = &mut self.sequence;
        if sequence.state != State::Prompt || sequence.read > 0 {
            let got = format_args!("{} tokens that were read before", sequence.read);
            return Err(Error::invalid("prefill_with", "generator", got, "one that has read nothing"));
        }
        let start = Instant::now();
        let mut reuse = Reuse { known: 0, reused: 0, read: 0 };
        let (piece, go_on) = (sequence.prompt_piece, || !sequence.cancel.is_cancelled());
        let outcome = prefixes.read(self.model, sequence.prompt(), piece, go_on);
        let outcome = outcome.and_then(|(cache, logits, found)| {
            reuse = found;
            *self.cache.get_mut() = cache;
            sequence.logits = logits;
            sequence.read = reuse.reused;
            sequence.has_read(reuse.read, self.model.vocab_size())
        });
        sequence.primed(start.elapsed(), outcome)?;
        Ok(reuse)
    }

    /// Everything that the generation goes on from, as a value: a copy, which what follows does not change.
    ///
    /// # Errors
    /// If the generation ended by an error, or the model cannot copy its state.
    pub fn state(&self) -> Result<GenerationState<M::Cache>>
    where
        M: StateLm,
    {
        if self.sequence.state == State::Done(None) {
            return Err(Error::State("the generation failed, what the cache has read is not defined".into()));
        }
        let cache = self.model.fork(self.cache.get()).map_err(Error::model("fork", self.sequence.read))?;
        Ok(self.sequence.with_cache(cache))
    }

    /// Generates to the end, and shows every token to `on_token` as soon as it is there, which may break off.
    ///
    /// Returns why it ended; nothing if it was broken off, and can be gone on with.
    ///
    /// # Errors
    /// As the iterator.
    pub fn run(
        &mut self,
        mut on_token: impl FnMut(&Token) -> ControlFlow<()>,
    ) -> Result<Option<FinishReason>> {
        for token in self.by_ref() {
            if on_token(&token?).is_break() {
                break;
            }
        }
        Ok(self.finish_reason())
    }

    /// Takes the generator apart, to share the model with others.
    pub(crate) fn into_parts(self) -> Result<(Sequence, M::Cache)> {
        match self.cache {
            Cache::Own(cache) => Ok((self.sequence, cache)),
            Cache::Lent(_) => Err(Error::invalid("generator", "cache", "lent", "one of the generator's own")),
        }
    }

    pub(crate) fn from_parts(model: &'a M, sequence: Sequence, cache: M::Cache) -> Self {
        Self { model, cache: Cache::Own(cache), sequence }
    }

    pub(crate) fn model(&self) -> &'a M {
        self.model
    }
}

impl<M: CausalLm + ?Sized> Iterator for Generator<'_, M> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        let sequence = &mut self.sequence;
        sequence.heed();
        if sequence.is_done() {
            return None;
        }
        let (start, before) = (Instant::now(), sequence.state);
        let token = sequence.next(self.model, self.cache.get_mut());
        if token.is_err() {
            sequence.state = State::Done(None);
        }
        sequence.note_time(before, start.elapsed());
        token.transpose()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match self.sequence.state {
            State::Done(_) => (0, Some(0)),
            // One at least, if nobody cancels.
            _ => (0, Some(self.sequence.max_new_tokens - self.generated().len())),
        }
    }
}

impl<M: CausalLm + ?Sized> FusedIterator for Generator<'_, M> {}

impl<M: CausalLm + ?Sized> Tokens for Generator<'_, M> {
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
