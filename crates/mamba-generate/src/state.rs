//! Generations as values: copied, saved, and gone on with.

mod file;

use std::path::Path;

use crate::error::{Error, Result};
use crate::lm::StateLm;

/// Everything that a generation goes on from: the state of the model, the tokens, and what the sampling remembers.
///
/// [`Generator::state`](crate::Generator::state) takes one at any time, in the middle of a reply too, and
/// [`GeneratorBuilder::resume`](crate::GeneratorBuilder::resume) goes on from it: the same tokens follow as if nothing had
/// happened. [`save`](Self::save) and [`load`](Self::load) keep it in a file.
///
/// # Example
/// A prompt that is read once and continued twice. (The model is the one of the examples of
/// [`CausalLm`](crate::CausalLm) and [`StateLm`].)
/// ```
/// # use mamba_generate::{BoxError, CausalLm, StateLm};
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
/// # impl StateLm for Sum {
/// #     fn fork(&self, cache: &u32) -> Result<u32, BoxError> { Ok(*cache) }
/// #     fn cache_bytes(&self, _: &u32) -> usize { 4 }
/// #     fn fingerprint(&self) -> Result<String, BoxError> { Ok("sum modulo 10".into()) }
/// #     fn save_cache(&self, cache: &u32) -> Result<Vec<u8>, BoxError> { Ok(cache.to_le_bytes().to_vec()) }
/// #     fn load_cache(&self, bytes: &[u8]) -> Result<u32, BoxError> { Ok(u32::from_le_bytes(bytes.try_into()?)) }
/// # }
/// # let model = Sum;
/// use mamba_generate::{GenerationState, Generator};
///
/// let mut prompt = Generator::builder(&model).prompt(&[1, 1, 1]).build()?;
/// prompt.prefill()?;
/// let path = std::env::temp_dir().join(format!("sum-{}.state", std::process::id()));
/// prompt.state()?.save(&model, &path)?;
///
/// // Later, elsewhere: nothing is read again.
/// let state = GenerationState::load(&model, &path)?;
/// let plain = Generator::builder(&model).resume(state.fork(&model)?).max_new_tokens(3).build()?;
/// let ids = plain.map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// assert_eq!(ids, [3, 6, 2]);
/// // Or with more of a prompt.
/// let longer = Generator::builder(&model).resume(state).prompt(&[4]).max_new_tokens(2).build()?;
/// let ids = longer.map(|token| Ok(token?.id)).collect::<mamba_generate::Result<Vec<_>>>()?;
/// assert_eq!(ids, [7, 4]);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), BoxError>(())
/// ```
#[derive(Debug, Clone)]
pub struct GenerationState<C> {
    pub(crate) cache: C,
    /// All tokens, read and not.
    pub(crate) tokens: Vec<u32>,
    /// How many of them the cache has read.
    pub(crate) read: usize,
    /// Where the prompt begins and ends among them.
    pub(crate) prompt: (usize, usize),
    /// What follows the last token, if all were read.
    pub(crate) logits: Vec<f32>,
    /// What the sampling remembers.
    pub(crate) sampling: Option<Vec<u64>>,
}

impl<C> GenerationState<C> {
    /// All tokens, given and generated.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens that were generated.
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt.1..]
    }

    /// How many tokens the cache has read: all but the last, which was generated; or, before the first is, all, those before the
    /// prompt, or as many as were read when someone cancelled.
    pub fn read(&self) -> usize {
        self.read
    }

    /// The state of the model.
    pub fn cache(&self) -> &C {
        &self.cache
    }

    /// Forgets what the sampling remembers, so that the generation can go on with another one.
    #[must_use]
    pub fn without_sampling(mut self) -> Self {
        self.sampling = None;
        self
    }

    /// A copy that goes its own way from here.
    ///
    /// # Errors
    /// If the model cannot copy its state.
    pub fn fork<M: StateLm<Cache = C> + ?Sized>(&self, model: &M) -> Result<Self> {
        Ok(Self {
            cache: model.fork(&self.cache).map_err(Error::model("fork", self.read))?,
            tokens: self.tokens.clone(),
            read: self.read,
            prompt: self.prompt,
            logits: self.logits.clone(),
            sampling: self.sampling.clone(),
        })
    }

    /// Writes it to a file, with a checksum and the fingerprint of the model. The file is there whole or as it was before.
    ///
    /// # Errors
    /// If the model cannot say its state, or the file cannot be written.
    pub fn save<M: StateLm<Cache = C> + ?Sized>(&self, model: &M, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        mamba_model::write_atomically(path, &self.to_bytes(model)?)
            .map_err(|cause| Error::Io { path: path.into(), cause })
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged or cut short, is of another version, or belongs to another model.
    pub fn load<M: StateLm<Cache = C> + ?Sized>(model: &M, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|cause| Error::Io { path: path.into(), cause })?;
        Self::from_bytes(model, &bytes).map_err(|error| match error {
            Error::State(message) => Error::State(format!("{}: {message}", path.display())),
            other => other,
        })
    }
}
