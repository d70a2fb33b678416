//! Many texts at once: each with its own rules, while the model reads one token of every text at a time.

use std::time::Instant;

use crate::error::{BoxError, Error, Result};
use crate::generator::Generator;
use crate::lm::BatchLm;
use crate::sequence::{Sequence, State, check_logits};
use crate::token::Token;

/// Names a row of a [`Batch`], for as long as there is the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId(u64);

/// What happened to a row in a step of a [`Batch`].
pub struct BatchEvent<'a, M: BatchLm + ?Sized> {
    /// The row.
    pub row: RowId,
    /// Its next token; none if it was cancelled; an error if none could be chosen, which ends this row only.
    pub token: Option<Result<Token>>,
    /// The generator as it was added, if this was its last token and it has left the batch.
    pub finished: Option<Generator<'a, M>>,
}

/// Generates many texts at once: a [`Generator`] is a row, and each step of the batch gives every row its next token.
///
/// Rows may join and leave at any time, and nothing is computed again: a prompt is read alone, and then its state is put
/// beside the others; a row that leaves takes its state along, and can go on alone or in another batch. Each row has its own
/// sampling, seed, and reasons to stop.
///
/// A row's tokens do not depend on the others: for the models of this workspace on the CPU its logits have the same bits as if
/// it were alone, in batches of up to 64 rows.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use mamba_generate::{Batch, Generator, SamplingConfig};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};
///
/// let mixer = Mamba2Config { d_state: 16, headdim: 8, ..Mamba2Config::new(16) };
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba2(mixer));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let generator = |prompt: &[u32], seed, n| {
///     let sampling = SamplingConfig { seed, ..Default::default() }.build()?;
///     Generator::builder(&model).prompt(prompt).sampling(sampling).max_new_tokens(n).build()
/// };
///
/// let mut batch = Batch::new(&model);
/// let first = batch.add(generator(&[3, 1, 4], 1, 5)?)?;
/// let second = batch.add(generator(&[2, 7], 2, 3)?)?;
/// let mut texts = std::collections::BTreeMap::<_, Vec<u32>>::new();
/// while !batch.is_empty() {
///     for event in batch.step()? {
///         texts.entry(event.row).or_default().extend(event.token.transpose()?.map(|token| token.id));
///     }
/// }
/// assert_eq!((texts[&first].len(), texts[&second].len()), (5, 3));
/// // As if it had been alone.
/// let alone = generator(&[2, 7], 2, 3)?.map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// assert_eq!(texts[&second], alone);
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
pub struct Batch<'a, M: BatchLm + ?Sized> {
    model: &'a M,
    /// In the order of the rows of the cache.
    rows: Vec<(RowId, Sequence)>,
    cache: Option<M::Cache>,
    /// Rows with states of their own, which join the others at the next step.
    joining: Vec<(RowId, Sequence, M::Cache)>,
    /// What happened since the last step.
    events: Vec<BatchEvent<'a, M>>,
    next: u64,
    logits: Vec<f32>,
}

impl<'a, M: BatchLm + ?Sized> Batch<'a, M> {
    /// Makes a batch without rows.
    pub fn new(model: &'a M) -> Self {
        Self {
            model,
            rows: Vec::new(),
            cache: None,
            joining: Vec::new(),
            events: Vec::new(),
            next: 0,
            logits: Vec::new(),
        }
    }

    /// How many rows have not ended.
    pub fn len(&self) -> usize {
        self.rows.len() + self.joining.len()
    }

    /// Whether no row is left and all that happened was told.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && self.events.is_empty()
    }

    /// The rows that have not ended, in no particular order.
    pub fn rows(&self) -> impl Iterator<Item = RowId> {
        self.rows.iter().map(|(id, _)| *id).chain(self.joining.iter().map(|(id, ..)| *id))
    }

    /// Takes a generation in: reads its prompt if that was not read, and chooses its first token, which the next
    /// [`step`](Self::step) tells. A generation that has begun goes on where it is.
    ///
    /// # Errors
    /// If the cache of the generation is lent to it, or the model fails at the prompt. The batch is as before then.
    pub fn add(&mut self, generator: Generator<'a, M>) -> Result<RowId> {
        let (mut sequence, mut cache) = generator.into_parts()?;
        let row = RowId(self.next);
        sequence.heed();
        let before = sequence.state;
        let mut token = None;
        if matches!(before, State::Prompt | State::Primed) {
            let start = Instant::now();
            sequence.evaluate(self.model, &mut cache)?;
            let logits = std::mem::take(&mut sequence.logits);
            let chosen = sequence.choose(&logits);
            token = Some(ended_by_error(&mut sequence, chosen));
            sequence.note_time(before, start.elapsed());
        }
        self.next += 1;
        let finished = if sequence.is_done() {
            Some(Generator::from_parts(self.model, sequence, cache))
        } else {
            self.joining.push((row, sequence, cache));
            None
        };
        if token.is_some() || finished.is_some() {
            self.events.push(BatchEvent { row, token, finished });
        }
        Ok(row)
    }

    /// Takes a row out, with its state; none if it has ended or left before.
    ///
    /// What happened to it and was not told yet is still told by the next [`step`](Self::step).
    ///
    /// # Errors
    /// If the model cannot take its state from the batch, which is as before then.
    pub fn remove(&mut self, row: RowId) -> Result<Option<Generator<'a, M>>> {
        if let Some(at) = self.joining.iter().position(|(id, ..)| *id == row) {
            let (_, sequence, cache) = self.joining.remove(at);
            return Ok(Some(Generator::from_parts(self.model, sequence, cache)));
        }
        let Some(at) = self.rows.iter().position(|(id, _)| *id == row) else { return Ok(None) };
        let mut left = self.split(&[at])?;
        Ok(left.pop().map(|(_, generator)| generator))
    }

    /// Gives every row its next token: a step of the model for all of them, then each chooses.
    ///
    /// Rows that were added since the last step have their first token already, which is told, and join the others now.
    ///
    /// # Errors
    /// If the model fails: then all rows are lost. What fails in one row is told in its event, and ends that row only.
    pub fn step(&mut self) -> Result<Vec<BatchEvent<'a, M>>> {
        let mut events = std::mem::take(&mut self.events);
        self.rows.iter_mut().for_each(|(_, sequence)| sequence.heed());
        self.leave(&mut events, |_| None)?;
        if !self.rows.is_empty() {
            self.advance(&mut events)?;
        }
        self.join()?;
        Ok(events)
    }

    /// One token for each row that has joined.
    fn advance(&mut self, events: &mut Vec<BatchEvent<'a, M>>) -> Result<()> {
        let start = Instant::now();
        let ids: Vec<u32> = self.rows.iter().filter_map(|(_, sequence)| sequence.pending()).collect();
        let position = self.rows.iter().map(|(_, sequence)| sequence.tokens.len()).max().unwrap_or_default();
        let vocab_size = self.model.vocab_size();
        let outcome = self.read(&ids).map_err(Error::model("step_batch", position)).and_then(|drawn| {
            if drawn.contains(&None) {
                check_logits(&self.logits, ids.len() * vocab_size, position)?;
            }
            Ok(drawn)
        });
        let drawn = match outcome {
            Ok(drawn) => drawn,
            Err(error) => {
                self.rows.clear();
                self.cache = None;
                return Err(error);
            }
        };
        let mut tokens = Vec::with_capacity(ids.len());
        for (at, ((_, sequence), drawn)) in self.rows.iter_mut().zip(drawn).enumerate() {
            sequence.read = sequence.tokens.len();
            let token = match drawn {
                Some(id) => sequence.take(id, vocab_size),
                None => sequence.choose(&self.logits[at * vocab_size..][..vocab_size]),
            };
            tokens.push(Some(ended_by_error(sequence, token)));
            sequence.note_time(State::Running, start.elapsed());
        }
        let mut left = Vec::new();
        for ((row, sequence), token) in self.rows.iter().zip(&mut tokens) {
            match sequence.is_done() {
                true => left.push((*row, token.take())),
                false => events.push(BatchEvent { row: *row, token: token.take(), finished: None }),
            }
        }
        self.leave(events, |row| {
            left.iter_mut().find(|(id, _)| *id == row).and_then(|(_, token)| token.take())
        })
    }

    /// A step of the model, which draws the tokens that follow if it can, and if no row wants its logits.
    fn read(&mut self, ids: &[u32]) -> std::result::Result<Vec<Option<u32>>, BoxError> {
        let Some(cache) = &mut self.cache else { return Err("a batch without a state".into()) };
        if self.rows.iter().all(|(_, sequence)| sequence.can_draw(self.model)) {
            let draws = self.rows.iter_mut().map(|(_, sequence)| sequence.sampling.draw());
            if let Some(draws) = draws.collect::<Option<Vec<_>>>() {
                return self.model.step_batch_and_draw(ids, cache, &draws, &mut self.logits);
            }
        }
        self.model.step_batch(ids, cache, &mut self.logits)?;
        Ok(vec![None; ids.len()])
    }

    /// Takes out the rows that have ended, and tells so, with the token of each.
    fn leave(
        &mut self,
        events: &mut Vec<BatchEvent<'a, M>>,
        mut token: impl FnMut(RowId) -> Option<Result<Token>>,
    ) -> Result<()> {
        let done: Vec<usize> = (0..self.rows.len()).filter(|&at| self.rows[at].1.is_done()).collect();
        for (row, generator) in self.split(&done)? {
            events.push(BatchEvent { row, token: token(row), finished: Some(generator) });
        }
        Ok(())
    }

    /// Takes some rows out, by their places in ascending order.
    fn split(&mut self, places: &[usize]) -> Result<Vec<(RowId, Generator<'a, M>)>> {
        let Some(cache) = self.cache.as_ref().filter(|_| !places.is_empty()) else { return Ok(Vec::new()) };
        let fail = |source| Error::Model { during: "select", position: 0, source };
        let mut caches = Vec::with_capacity(places.len());
        for &at in places {
            caches.push(self.model.select(cache, &[at]).map_err(fail)?);
        }
        let rest: Vec<usize> = (0..self.rows.len()).filter(|at| !places.contains(at)).collect();
        self.cache = match rest.is_empty() {
            true => None,
            false => Some(self.model.select(cache, &rest).map_err(fail)?),
        };
        let mut left = Vec::with_capacity(places.len());
        for (&at, cache) in places.iter().zip(caches).rev() {
            let (row, sequence) = self.rows.remove(at);
            left.push((row, Generator::from_parts(self.model, sequence, cache)));
        }
        left.reverse();
        Ok(left)
    }

    /// Puts the states of new rows beside the others, so that they take part from the next step on.
    fn join(&mut self) -> Result<()> {
        if self.joining.is_empty() {
            return Ok(());
        }
        let caches: Vec<&M::Cache> =
            self.cache.iter().chain(self.joining.iter().map(|(.., cache)| cache)).collect();
        let joined = match caches.as_slice() {
            [_] if self.cache.is_none() => None,
            _ => Some(self.model.concat(&caches).map_err(Error::model("concat", 0))?),
        };
        drop(caches);
        for (row, sequence, cache) in self.joining.drain(..) {
            self.rows.push((row, sequence));
            if joined.is_none() {
                self.cache = Some(cache);
            }
        }
        if joined.is_some() {
            self.cache = joined;
        }
        Ok(())
    }
}

/// The next token of a sequence, which ends if there is none.
fn ended_by_error(sequence: &mut Sequence, token: Result<Token>) -> Result<Token> {
    if token.is_err() {
        sequence.state = State::Done(None);
    }
    token
}
