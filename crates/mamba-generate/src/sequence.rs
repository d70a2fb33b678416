//! One text on its way: its tokens, how the next one is chosen, and when to stop.

use std::time::Duration;

use crate::cancel::CancelToken;
use crate::error::{Error, Result};
use crate::filter::History;
use crate::lm::CausalLm;
use crate::logprobs::Logprobs;
use crate::prompt::read_prompt;
use crate::sampling::Sampling;
use crate::state::GenerationState;
use crate::timings::Timings;
use crate::token::{FinishReason, Token};

/// What a generation is apart from the model and its state, so that several can share these.
pub(crate) struct Sequence {
    pub(crate) sampling: Sampling,
    pub(crate) logprobs: Option<usize>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) max_new_tokens: usize,
    /// How many tokens of the prompt to read at once.
    pub(crate) prompt_piece: usize,
    pub(crate) cancel: CancelToken,
    /// The history, the prompt and what was generated.
    pub(crate) tokens: Vec<u32>,
    /// How many of them the cache has read.
    pub(crate) read: usize,
    /// Where the prompt begins and ends.
    pub(crate) prompt: (usize, usize),
    /// What follows the last token, if all were read.
    pub(crate) logits: Vec<f32>,
    pub(crate) state: State,
    pub(crate) timings: Timings,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The prompt has not been read, or not to its end.
    Prompt,
    /// The prompt has been read, and the logits that follow it are there.
    Primed,
    /// At least one token has been generated.
    Running,
    /// No more tokens; without a reason if there was an error.
    Done(Option<FinishReason>),
}

impl Sequence {
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[self.prompt.0..self.prompt.1]
    }

    pub(crate) fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt.1..]
    }

    /// The last token, if it was generated and not read; none after an error, when nobody knows what was read.
    pub(crate) fn pending(&self) -> Option<u32> {
        self.generated().last().copied().filter(|_| !self.unread().is_empty())
    }

    /// The tokens that the cache has not read; none after an error, when nobody knows which.
    pub(crate) fn unread(&self) -> &[u32] {
        match self.state {
            State::Done(None) => &[],
            _ => &self.tokens[self.read..],
        }
    }

    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        match self.state {
            State::Done(reason) => reason,
            State::Prompt | State::Primed | State::Running => None,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        matches!(self.state, State::Done(_))
    }

    /// Ends the generation if someone asked for that.
    pub(crate) fn heed(&mut self) {
        if !self.is_done() && self.cancel.is_cancelled() {
            self.state = State::Done(Some(FinishReason::Cancelled));
        }
    }

    /// Sees to it that the logits are there from which the next token is chosen, unless someone cancels while the prompt is
    /// read: then the generation has ended.
    pub(crate) fn evaluate<M: CausalLm + ?Sized>(&mut self, model: &M, cache: &mut M::Cache) -> Result<()> {
        let position = self.tokens.len();
        match self.pending() {
            _ if self.read == position => return Ok(()),
            None => {
                let (ids, sizes) = (&self.tokens[self.read..], (self.prompt_piece, position));
                let go_on = || !self.cancel.is_cancelled();
                let read = read_prompt(model, ids, cache, &mut self.logits, sizes, go_on)?;
                return self.has_read(read, model.vocab_size());
            }
            Some(id) => {
                model.step(id, cache, &mut self.logits).map_err(Error::model("step", position))?;
            }
        }
        self.read = position;
        check_logits(&self.logits, model.vocab_size(), position)
    }

    /// Notes that so many more tokens of the prompt were read; if not all of them, someone has cancelled.
    pub(crate) fn has_read(&mut self, read: usize, vocab_size: usize) -> Result<()> {
        self.read += read;
        self.timings.prompt_tokens += read;
        if self.read < self.tokens.len() {
            self.logits.clear();
            self.state = State::Done(Some(FinishReason::Cancelled));
            return Ok(());
        }
        check_logits(&self.logits, vocab_size, self.read)
    }

    /// The next token: drawn by the model if it can, else chosen from its logits. None if someone cancelled meanwhile.
    pub(crate) fn next<M: CausalLm + ?Sized>(
        &mut self,
        model: &M,
        cache: &mut M::Cache,
    ) -> Result<Option<Token>> {
        if let (State::Running, true, Some(last)) = (self.state, self.can_draw(model), self.pending())
            && let Some(draw) = self.sampling.draw()
        {
            let position = self.tokens.len();
            let outcome = model.step_and_draw(last, cache, &draw, &mut self.logits);
            let drawn = outcome.map_err(Error::model("step_and_draw", position))?;
            self.read = position;
            let token = match drawn {
                Some(id) => self.take(id, model.vocab_size()),
                None => {
                    check_logits(&self.logits, model.vocab_size(), position)?;
                    self.choose_from_own()
                }
            };
            return token.map(Some);
        }
        self.evaluate(model, cache)?;
        if self.is_done() {
            return Ok(None);
        }
        self.choose_from_own().map(Some)
    }

    /// Whether the model may draw the next token, nobody else being interested in its logits.
    pub(crate) fn can_draw<M: CausalLm + ?Sized>(&self, model: &M) -> bool {
        model.draws() && self.logprobs.is_none() && self.sampling.can_draw()
    }

    /// Takes a token that the model drew.
    pub(crate) fn take(&mut self, id: u32, vocab_size: usize) -> Result<Token> {
        if id as usize >= vocab_size {
            let source = format!("token {id} of {vocab_size} was drawn").into();
            return Err(Error::Model { during: "step_and_draw", position: self.tokens.len(), source });
        }
        self.accept(id)?;
        Ok(Token { id, logprobs: None })
    }

    /// Chooses the next token from the logits that follow the last one, and says whether it is the last.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Result<Token> {
        let history = History::new(&self.tokens, self.prompt.1);
        let id = self.sampling.next_token(logits, history)?;
        self.accept(id)?;
        Ok(Token { id, logprobs: self.logprobs.map(|top| Logprobs::new(logits, id, top)) })
    }

    /// As [`choose`](Self::choose), from the logits that [`evaluate`](Self::evaluate) left.
    pub(crate) fn choose_from_own(&mut self) -> Result<Token> {
        let logits = std::mem::take(&mut self.logits);
        let token = self.choose(&logits);
        self.logits = logits;
        token
    }

    /// Notes that the prompt was read, as far as nobody cancelled, or could not be.
    pub(crate) fn primed(&mut self, time: Duration, outcome: Result<()>) -> Result<()> {
        self.timings.prompt += time;
        match outcome {
            Err(_) => self.state = State::Done(None),
            Ok(()) if !self.is_done() => self.state = State::Primed,
            Ok(()) => {}
        }
        outcome
    }

    /// Adds a token that was chosen.
    fn accept(&mut self, id: u32) -> Result<()> {
        self.tokens.push(id);
        self.timings.generated_tokens = self.generated().len();
        self.state = match self.reason_to_end()? {
            None => State::Running,
            reason => State::Done(reason),
        };
        Ok(())
    }

    /// Why nothing follows what was generated, if so.
    pub(crate) fn reason_to_end(&mut self) -> Result<Option<FinishReason>> {
        let (last, generated) = (self.generated().last(), self.generated().len());
        if last.is_some_and(|id| self.stop_tokens.contains(id)) {
            return Ok(Some(FinishReason::StopToken));
        }
        if generated > 0 && self.sampling.is_complete(History::new(&self.tokens, self.prompt.1))? {
            return Ok(Some(FinishReason::Complete));
        }
        Ok((generated >= self.max_new_tokens).then_some(FinishReason::Length))
    }

    /// Notes the time that a token took which was chosen in this state.
    pub(crate) fn note_time(&mut self, before: State, time: Duration) {
        match before {
            State::Prompt | State::Primed => self.timings.prompt += time,
            State::Running | State::Done(_) => self.timings.generation += time,
        }
    }

    /// With a copy of the state of the model, everything to go on from.
    pub(crate) fn with_cache<C>(&self, cache: C) -> GenerationState<C> {
        GenerationState {
            cache,
            tokens: self.tokens.clone(),
            read: self.read,
            prompt: self.prompt,
            // Whatever the state: who cancels between the prompt and the first token loses nothing.
            logits: if self.read == self.tokens.len() { self.logits.clone() } else { Vec::new() },
            sampling: Some(self.sampling.state()),
        }
    }
}

/// Errors if there are not as many logits as tokens in the vocabulary.
pub(crate) fn check_logits(logits: &[f32], expected: usize, position: usize) -> Result<()> {
    match logits.len() == expected {
        true => Ok(()),
        false => Err(Error::LogitsLength { got: logits.len(), expected, position }),
    }
}
