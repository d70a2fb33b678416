//! What generation needs from a model.

use mamba_ops::Draw;

use crate::error::BoxError;

/// A language model that reads tokens and says how likely each next token is.
///
/// Generation asks no more of a model than this, so tests and examples can use a fake one, and a model that runs
/// elsewhere can be driven alike. The state lives in a [`Cache`](Self::Cache) outside the model: one model serves many
/// conversations.
///
/// `prefill` and `step` write the logits of the last position, `vocab_size` of them, into a buffer that the caller
/// reuses: they clear it first, and allocate nothing once it has grown.
///
/// # Errors
/// Methods return any error as a [`BoxError`], so `?` works on the errors of every library.
///
/// # Example
/// ```
/// use mamba_generate::{BoxError, CausalLm};
///
/// /// Says that the next token is the sum of all tokens so far, modulo 10.
/// struct Sum;
///
/// impl CausalLm for Sum {
///     type Cache = u32;
///
///     fn vocab_size(&self) -> usize {
///         10
///     }
///     fn new_cache(&self) -> Result<u32, BoxError> {
///         Ok(0)
///     }
///     fn prefill(&self, ids: &[u32], sum: &mut u32, logits: &mut Vec<f32>) -> Result<(), BoxError> {
///         *sum += ids.iter().sum::<u32>();
///         logits.clear();
///         logits.resize(10, 0.0);
///         logits[(*sum % 10) as usize] = 1.0;
///         Ok(())
///     }
///     fn step(&self, id: u32, sum: &mut u32, logits: &mut Vec<f32>) -> Result<(), BoxError> {
///         self.prefill(&[id], sum, logits)
///     }
/// }
///
/// let (mut cache, mut logits) = (Sum.new_cache()?, Vec::new());
/// Sum.prefill(&[3, 4], &mut cache, &mut logits)?;
/// assert_eq!(logits[7], 1.0);
/// # Ok::<(), BoxError>(())
/// ```
pub trait CausalLm {
    /// Everything the model remembers of the tokens it has read.
    type Cache;

    /// The number of tokens the model knows, which is the number of logits it returns.
    fn vocab_size(&self) -> usize;

    /// Makes the state of a model that has read nothing.
    ///
    /// # Errors
    /// If the state cannot be allocated.
    fn new_cache(&self) -> Result<Self::Cache, BoxError>;

    /// Reads `ids`, at least one, after whatever `cache` has read, and writes the logits that follow the last of them.
    ///
    /// # Errors
    /// If the model cannot be evaluated. The cache is then in no defined state.
    fn prefill(&self, ids: &[u32], cache: &mut Self::Cache, logits: &mut Vec<f32>) -> Result<(), BoxError>;

    /// Reads one token after whatever `cache` has read, and writes the logits that follow it.
    ///
    /// # Errors
    /// If the model cannot be evaluated. The cache is then in no defined state.
    fn step(&self, id: u32, cache: &mut Self::Cache, logits: &mut Vec<f32>) -> Result<(), BoxError>;

    /// Reads `ids` after whatever `cache` has read, and writes the logits that follow each of them, one after the other.
    ///
    /// By default one [`step`](Self::step) a token; a model that can read many tokens at once does better.
    ///
    /// # Errors
    /// If the model cannot be evaluated. The cache is then in no defined state.
    fn forward(&self, ids: &[u32], cache: &mut Self::Cache, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        let mut last = Vec::new();
        logits.clear();
        for &id in ids {
            self.step(id, cache, &mut last)?;
            logits.extend_from_slice(&last);
        }
        Ok(())
    }

    /// Whether the model can choose tokens where its logits are, by [`step_and_draw`](Self::step_and_draw): worth while where they
    /// are far from who reads them, as on a GPU. Not by default.
    fn draws(&self) -> bool {
        false
    }

    /// Reads one token after whatever `cache` has read, and draws the one that follows it, as the [`Draw`] says.
    ///
    /// `None` if there is none to be drawn, as where a logit is not a number: then the logits are written, as by
    /// [`step`](Self::step). That is all that happens by default.
    ///
    /// # Errors
    /// If the model cannot be evaluated. The cache is then in no defined state.
    fn step_and_draw(
        &self,
        id: u32,
        cache: &mut Self::Cache,
        draw: &Draw,
        logits: &mut Vec<f32>,
    ) -> Result<Option<u32>, BoxError> {
        let _ = draw;
        self.step(id, cache, logits)?;
        Ok(None)
    }
}

/// A language model whose states are values: copied, measured, kept as bytes.
///
/// # Example
/// ```
/// use mamba_generate::{BoxError, CausalLm, StateLm};
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
///
/// // The model of the example of `CausalLm`, whose state is a number.
/// impl StateLm for Sum {
///     fn fork(&self, cache: &u32) -> Result<u32, BoxError> {
///         Ok(*cache)
///     }
///     fn cache_bytes(&self, _: &u32) -> usize {
///         4
///     }
///     fn fingerprint(&self) -> Result<String, BoxError> {
///         Ok("sum modulo 10".into())
///     }
///     fn save_cache(&self, cache: &u32) -> Result<Vec<u8>, BoxError> {
///         Ok(cache.to_le_bytes().to_vec())
///     }
///     fn load_cache(&self, bytes: &[u8]) -> Result<u32, BoxError> {
///         Ok(u32::from_le_bytes(bytes.try_into()?))
///     }
/// }
///
/// let (mut cache, mut logits) = (Sum.new_cache()?, Vec::new());
/// Sum.prefill(&[3, 4], &mut cache, &mut logits)?;
/// let mut other = Sum.fork(&cache)?;
/// Sum.step(1, &mut other, &mut logits)?;
/// assert_eq!((cache, other), (7, 8));
/// assert_eq!(Sum.load_cache(&Sum.save_cache(&other)?)?, 8);
/// # Ok::<(), BoxError>(())
/// ```
pub trait StateLm: CausalLm {
    /// A copy of a state that goes its own way from here.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn fork(&self, cache: &Self::Cache) -> Result<Self::Cache, BoxError>;

    /// The memory of a state, in bytes, as if it were alone.
    fn cache_bytes(&self, cache: &Self::Cache) -> usize;

    /// What of that memory forks share: parts of it, each by a number that no other has as long as the state holds it, and
    /// their bytes. Nothing, unless a model says otherwise.
    fn shared_memory(&self, _cache: &Self::Cache) -> Vec<(usize, usize)> {
        Vec::new()
    }

    /// A name for exactly this model: states that are kept belong to it alone.
    ///
    /// # Errors
    /// If the model cannot be read.
    fn fingerprint(&self) -> Result<String, BoxError>;

    /// A state as bytes.
    ///
    /// # Errors
    /// If the state cannot be read.
    fn save_cache(&self, cache: &Self::Cache) -> Result<Vec<u8>, BoxError>;

    /// The state that [`save_cache`](Self::save_cache) made these bytes of.
    ///
    /// # Errors
    /// If the bytes are not of a state of a model such as this.
    fn load_cache(&self, bytes: &[u8]) -> Result<Self::Cache, BoxError>;
}

/// A language model that steps several sequences at once, whose states stand beside each other as rows.
///
/// The rows may have read different tokens, and different numbers of them.
pub trait BatchLm: StateLm {
    /// Reads one token a row, and writes the logits that follow each of them, row by row.
    ///
    /// # Errors
    /// If the model cannot be evaluated, or there are more or fewer tokens than rows. The cache is then in no defined state.
    fn step_batch(&self, ids: &[u32], cache: &mut Self::Cache, logits: &mut Vec<f32>)
    -> Result<(), BoxError>;

    /// Reads one token a row, and draws the one that follows each, as the [`Draw`]s of the rows say: see
    /// [`step_and_draw`](CausalLm::step_and_draw). If there is a row without one, the logits of all are written.
    ///
    /// # Errors
    /// As [`step_batch`](Self::step_batch).
    fn step_batch_and_draw(
        &self,
        ids: &[u32],
        cache: &mut Self::Cache,
        draws: &[Draw],
        logits: &mut Vec<f32>,
    ) -> Result<Vec<Option<u32>>, BoxError> {
        let _ = draws;
        self.step_batch(ids, cache, logits)?;
        Ok(vec![None; ids.len()])
    }

    /// The states of all rows of several, in order.
    ///
    /// # Errors
    /// If there is no memory for it, or the states are not of one model.
    fn concat(&self, caches: &[&Self::Cache]) -> Result<Self::Cache, BoxError>;

    /// The states of some rows, in the given order; a row may be taken more than once.
    ///
    /// # Errors
    /// If there is no memory for it, or no such row.
    fn select(&self, cache: &Self::Cache, rows: &[usize]) -> Result<Self::Cache, BoxError>;
}
