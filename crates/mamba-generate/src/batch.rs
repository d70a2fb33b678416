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
/// it were alone, in batches of up to 64 rows. On a GPU they have the same bits whatever the other rows of a batch of one size, but batches
/// of other sizes, and a row alone, may have other kernels, which round otherwise; so may rows that experts divide among them.
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
    rows: Vec<Row>,
    cache: Option<M::Cache>,
    /// Rows with states of their own, which join the others at the next step.
    joining: Vec<(Row, M::Cache)>,
    /// What happened and was not told.
    events: Vec<BatchEvent<'a, M>>,
    next: u64,
    logits: Vec<f32>,
}

struct Row {
    id: RowId,
    sequence: Sequence,
    /// Its last token, until it leaves: then both are told.
    last: Option<Result<Token>>,
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
        self.rows.iter().chain(self.joining.iter().map(|(row, _)| row)).map(|row| row.id)
    }

    /// Takes a generation in: reads its prompt if that was not read, and chooses its first token, which the next
    /// [`step`](Self::step) tells. A generation that has begun goes on where it is.
    ///
    /// # Errors
    /// If the cache of the generation is lent to it, or the model fails at the prompt. The batch is as before then.
    pub fn add(&mut self, generator: Generator<'a, M>) -> Result<RowId> {
        let (mut sequence, mut cache) = generator.into_parts()?;
        let id = RowId(self.next);
        sequence.heed();
        let before = sequence.state;
        let mut token = None;
        if matches!(before, State::Prompt | State::Primed) {
            let start = Instant::now();
            sequence.evaluate(self.model, &mut cache)?;
            if !sequence.is_done() {
                let chosen = sequence.choose_from_own();
                token = Some(ended_by_error(&mut sequence, chosen));
            }
            sequence.note_time(before, start.elapsed());
        }
        self.next += 1;
        if sequence.is_done() {
            let finished = Some(Generator::from_parts(self.model, sequence, cache));
            self.events.push(BatchEvent { row: id, token, finished });
            return Ok(id);
        }
        if token.is_some() {
            self.events.push(BatchEvent { row: id, token, finished: None });
        }
        self.joining.push((Row { id, sequence, last: None }, cache));
        Ok(id)
    }

    /// Takes a row out, with its state; none if it has ended or left before.
    ///
    /// What happened to it and was not told yet is still told by the next [`step`](Self::step).
    ///
    /// # Errors
    /// If the model cannot take its state from the batch, which is as before then.
    pub fn remove(&mut self, row: RowId) -> Result<Option<Generator<'a, M>>> {
        if let Some(at) = self.joining.iter().position(|(joining, _)| joining.id == row) {
            let (row, cache) = self.joining.remove(at);
            return Ok(Some(Generator::from_parts(self.model, row.sequence, cache)));
        }
        let Some(at) = self.rows.iter().position(|has| has.id == row) else { return Ok(None) };
        let mut left = self.split(&[at])?;
        let Some((Row { sequence, last: token, .. }, cache)) = left.pop() else { return Ok(None) };
        if token.is_some() {
            self.events.push(BatchEvent { row, token, finished: None });
        }
        Ok(Some(Generator::from_parts(self.model, sequence, cache)))
    }

    /// Gives every row its next token: a step of the model for all of them, then each chooses.
    ///
    /// Rows that were added since the last step have their first token already, which is told, and join the others now.
    ///
    /// # Errors
    /// If the model fails. Where it fails to read, the rows that it read for are lost, and are among [`rows`](Self::rows) no longer;
    /// those that were added since the last step are not. Where it fails to take states apart or together, no row is lost, and
    /// the next step tries again. In either case what had happened is told by the next step that does not fail, so a row may
    /// have several events there. What fails in one row is told in its event, and ends that row only.
    pub fn step(&mut self) -> Result<Vec<BatchEvent<'a, M>>> {
        self.rows.iter_mut().for_each(|row| row.sequence.heed());
        self.leave()?;
        if !self.rows.is_empty() {
            self.advance()?;
            self.leave()?;
        }
        self.join()?;
        Ok(std::mem::take(&mut self.events))
    }

    /// One token for each row that has joined; that of a row which has ended waits until it leaves.
    fn advance(&mut self) -> Result<()> {
        let start = Instant::now();
        let ids: Vec<u32> = self.rows.iter().filter_map(|row| row.sequence.pending()).collect();
        let position = self.rows.iter().map(|row| row.sequence.tokens.len()).max().unwrap_or_default();
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
        for (at, (Row { id, sequence, last }, drawn)) in self.rows.iter_mut().zip(drawn).enumerate() {
            sequence.read = sequence.tokens.len();
            let token = match drawn {
                Some(id) => sequence.take(id, vocab_size),
                None => sequence.choose(&self.logits[at * vocab_size..][..vocab_size]),
            };
            let token = Some(ended_by_error(sequence, token));
            match sequence.is_done() {
                true => *last = token,
                false => self.events.push(BatchEvent { row: *id, token, finished: None }),
            }
        }
        let time = start.elapsed();
        self.rows.iter_mut().for_each(|row| row.sequence.note_time(State::Running, time));
        Ok(())
    }

    /// A step of the model, which draws the tokens that follow if it can, and if no row wants its logits.
    fn read(&mut self, ids: &[u32]) -> std::result::Result<Vec<Option<u32>>, BoxError> {
        let Some(cache) = &mut self.cache else { return Err("a batch without a state".into()) };
        if self.rows.iter().all(|row| row.sequence.can_draw(self.model)) {
            let draws = self.rows.iter_mut().map(|row| row.sequence.sampling.draw());
            if let Some(draws) = draws.collect::<Option<Vec<_>>>() {
                return self.model.step_batch_and_draw(ids, cache, &draws, &mut self.logits);
            }
        }
        self.model.step_batch(ids, cache, &mut self.logits)?;
        Ok(vec![None; ids.len()])
    }

    /// Takes out the rows that have ended, and notes so, with the last token of each.
    fn leave(&mut self) -> Result<()> {
        let done: Vec<usize> = (0..self.rows.len()).filter(|&at| self.rows[at].sequence.is_done()).collect();
        for (Row { id, sequence, last: token }, cache) in self.split(&done)? {
            let finished = Some(Generator::from_parts(self.model, sequence, cache));
            self.events.push(BatchEvent { row: id, token, finished });
        }
        Ok(())
    }

    /// Takes some rows out, by their places in ascending order.
    fn split(&mut self, places: &[usize]) -> Result<Vec<(Row, M::Cache)>> {
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
            left.push((self.rows.remove(at), cache));
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
            self.cache.iter().chain(self.joining.iter().map(|(_, cache)| cache)).collect();
        let joined = match caches.as_slice() {
            [_] if self.cache.is_none() => None,
            _ => Some(self.model.concat(&caches).map_err(Error::model("concat", 0))?),
        };
        drop(caches);
        for (row, cache) in self.joining.drain(..) {
            self.rows.push(row);
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
