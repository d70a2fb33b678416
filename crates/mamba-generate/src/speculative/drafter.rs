//! Who guesses tokens.

use crate::error::{Error, Result};
use crate::filter::History;
use crate::lm::StateLm;
use crate::prompt::read_all;
use crate::sampling::Sampling;

/// Guesses what comes next.
///
/// A guess costs time if it is wrong, and is never wrong in another sense: see [`Speculative`](crate::Speculative).
pub trait Drafter {
    /// How many tokens the drafter knows, if it has a vocabulary of its own.
    fn vocab_size(&self) -> Option<usize> {
        None
    }

    /// Appends up to `most` guesses of what follows `tokens`, of which the first `prompt_end` were given.
    ///
    /// `sampling` is the [state](Sampling::state) of the sampling that will choose: who draws with the same random numbers
    /// guesses better.
    ///
    /// # Errors
    /// If it cannot guess for a reason that the user should know.
    fn draft(
        &mut self,
        tokens: &[u32],
        prompt_end: usize,
        sampling: &[u64],
        most: usize,
        guesses: &mut Vec<u32>,
    ) -> Result<()>;
}

/// Guesses that what followed the last tokens before will follow them again: prompt lookup.
///
/// It looks for the latest earlier place of the last `longest` tokens, then of fewer, down to `shortest`. Costs next to
/// nothing, and does well where a text quotes itself or its prompt: summaries, code, chats.
///
/// # Example
/// ```
/// use mamba_generate::{Drafter, NgramDrafter};
///
/// let mut guesses = Vec::new();
/// NgramDrafter::default().draft(&[7, 1, 2, 3, 4, 5, 9, 1, 2], 9, &[], 3, &mut guesses)?;
/// assert_eq!(guesses, [3, 4, 5]);
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// Saxena, 2023, Prompt Lookup Decoding; `prompt_lookup_num_tokens` in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramDrafter {
    shortest: usize,
    longest: usize,
}

impl Default for NgramDrafter {
    /// From 3 tokens down to 1.
    fn default() -> Self {
        Self { shortest: 1, longest: 3 }
    }
}

impl NgramDrafter {
    /// Looks for the last `longest` tokens down to the last `shortest`.
    ///
    /// # Errors
    /// If `shortest` is 0 or above `longest`.
    pub fn new(shortest: usize, longest: usize) -> Result<Self> {
        match shortest > 0 && shortest <= longest {
            true => Ok(Self { shortest, longest }),
            false => {
                let got = format_args!("{shortest} to {longest}");
                Err(Error::invalid("ngram_drafter", "lengths", got, "a range from at least 1"))
            }
        }
    }
}

impl Drafter for NgramDrafter {
    fn draft(
        &mut self,
        tokens: &[u32],
        _: usize,
        _: &[u64],
        most: usize,
        guesses: &mut Vec<u32>,
    ) -> Result<()> {
        for n in (self.shortest..=self.longest).rev() {
            let Some(start) = tokens.len().checked_sub(n) else { continue };
            let end = &tokens[start..];
            // The last place but the end itself.
            if let Some(at) = tokens[..tokens.len() - 1].windows(n).rposition(|window| window == end) {
                let follows = &tokens[at + n..];
                // What ran up to the end goes on with itself.
                guesses.extend(follows.iter().cycle().take(most));
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Has a smaller model guess.
///
/// It draws with the same random numbers as the model that is helped, if its sampling is made with the same options, so that
/// the same tokens are drawn wherever the two models agree. It must have the same vocabulary. Where its sampling leaves nothing to
/// choose it guesses nothing.
pub struct ModelDrafter<'d, D: StateLm + ?Sized> {
    model: &'d D,
    sampling: Sampling,
    cache: D::Cache,
    /// The tokens that the cache has read, all of which are certain.
    read: Vec<u32>,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

impl<'d, D: StateLm + ?Sized> ModelDrafter<'d, D> {
    /// Has `model` guess with `sampling`: one with the same options as that of the generator it helps, or greedy.
    ///
    /// # Errors
    /// If the model cannot make a state.
    pub fn new(model: &'d D, sampling: Sampling) -> Result<Self> {
        let cache = model.new_cache().map_err(Error::model("new_cache", 0))?;
        Ok(Self { model, sampling, cache, read: Vec::new(), logits: Vec::new(), tokens: Vec::new() })
    }
}

impl<D: StateLm + ?Sized> Drafter for ModelDrafter<'_, D> {
    fn vocab_size(&self) -> Option<usize> {
        Some(self.model.vocab_size())
    }

    fn draft(
        &mut self,
        tokens: &[u32],
        prompt_end: usize,
        sampling: &[u64],
        most: usize,
        guesses: &mut Vec<u32>,
    ) -> Result<()> {
        let position = tokens.len();
        if !tokens.starts_with(&self.read) || self.read.len() >= position {
            self.cache = self.model.new_cache().map_err(Error::model("new_cache", 0))?;
            self.read.clear();
        }
        let new = &tokens[self.read.len()..];
        read_all(self.model, new, &mut self.cache, &mut self.logits, position)?;
        self.read.extend(new);
        // With other options it has random numbers of its own, which is no error.
        let _ = self.sampling.restore(sampling);
        let mut ahead = None;
        self.tokens.clear();
        self.tokens.extend(tokens);
        for n in 0..most {
            if let Some(&id) = self.tokens.last().filter(|_| n > 0) {
                let cache = match &mut ahead {
                    Some(cache) => cache,
                    None => {
                        ahead.insert(self.model.fork(&self.cache).map_err(Error::model("fork", position))?)
                    }
                };
                let outcome = self.model.step(id, cache, &mut self.logits);
                outcome.map_err(Error::model("step", position + n))?;
            }
            match self.sampling.next_token(&self.logits, History::new(&self.tokens, prompt_end)) {
                Ok(id) => {
                    guesses.push(id);
                    self.tokens.push(id);
                }
                // Where it has nothing to choose from it has nothing to guess, which is no reason to end the text.
                Err(Error::NoCandidates { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
