//! States of prompts that were read before, so that what prompts share is read once.

mod tree;

use crate::error::{Error, Result};
use crate::generator::check_prompt;
use crate::lm::StateLm;
use crate::prompt::{PROMPT_PIECE, read_prompt};
use crate::sequence::check_logits;
use tree::Tree;

/// The options of a [`PrefixCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixCacheOptions {
    /// How many bytes of states and tokens to keep at most; what states share counts once. 1 GiB by default.
    pub max_bytes: usize,
    /// A state is kept after each multiple of so many tokens; with 0 after none. 512 by default.
    pub chunk: usize,
}

impl Default for PrefixCacheOptions {
    fn default() -> Self {
        Self { max_bytes: 1 << 30, chunk: 512 }
    }
}

/// What a prompt took from a [`PrefixCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reuse {
    /// How many of its first tokens had been seen, whether or not a state was kept there.
    pub known: usize,
    /// How many of its first tokens a kept state stood for.
    pub reused: usize,
    /// How many tokens were read: the others.
    pub read: usize,
}

/// What a [`PrefixCache`] did so far, and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefixStats {
    /// Prompts of which nothing had to be read.
    pub hits: u64,
    /// Prompts that began with a kept state.
    pub partial: u64,
    /// Prompts that were read from the start.
    pub misses: u64,
    /// Misses, and partial hits, whose prompts were known further than a state was kept for.
    pub short: u64,
    /// Tokens that kept states stood for.
    pub reused_tokens: u64,
    /// Tokens that were read.
    pub read_tokens: u64,
    /// States that were dropped to stay within the budget.
    pub evictions: u64,
    /// States that are kept.
    pub states: usize,
    /// Bytes of states and tokens that are kept; what states share counts once.
    pub bytes: usize,
}

/// Keeps the states of a model after prompts, and after parts of them that other prompts share.
///
/// A radix tree over tokens. States are kept at the ends of prompts, after each chunk, and where a prompt leaves what is
/// known: whoever comes third with the same beginning finds its state exactly there. A state stands for all tokens before it,
/// whatever the model, so a hit costs a copy. The states that were not used for the longest time make room for new ones.
///
/// What follows a kept state is what would follow had the prompt been read again in the same pieces, to the last bit; in
/// other pieces sums are rounded in another order.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use mamba_generate::{Generator, PrefixCache, PrefixCacheOptions};
/// use mamba_model::Model;
/// use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
///
/// let config = ModelConfig::uniform(50, 16, 2, MixerSpec::Mamba1(Mamba1Config::new(16)));
/// let model = Model::random(&config, 0, &Device::Cpu)?;
/// let mut prefixes = PrefixCache::new(PrefixCacheOptions { max_bytes: 1 << 20, chunk: 4 });
///
/// let mut generator = Generator::builder(&model).prompt(&[1, 2, 3, 4, 5, 6, 7]).max_new_tokens(3).build()?;
/// assert_eq!(generator.prefill_with(&mut prefixes)?.reused, 0);
/// let mut generator = Generator::builder(&model).prompt(&[1, 2, 3, 4, 5, 9]).max_new_tokens(3).build()?;
/// let reuse = generator.prefill_with(&mut prefixes)?;
/// assert_eq!((reuse.known, reuse.reused, reuse.read), (5, 4, 2));
/// assert_eq!(generator.count(), 3);
/// assert_eq!((prefixes.stats().misses, prefixes.stats().partial), (1, 1));
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
#[derive(Debug)]
pub struct PrefixCache<C> {
    options: PrefixCacheOptions,
    tree: Tree<Kept<C>>,
    /// The model that the states belong to.
    fingerprint: Option<String>,
    stats: PrefixStats,
}

/// A state, and the logits that follow it if a prompt ended there.
#[derive(Debug)]
struct Kept<C> {
    cache: C,
    logits: Vec<f32>,
}

impl<C> PrefixCache<C> {
    /// Makes one that keeps nothing yet.
    pub fn new(options: PrefixCacheOptions) -> Self {
        Self { options, tree: Tree::new(), fingerprint: None, stats: PrefixStats::default() }
    }

    /// What it did so far, and holds.
    pub fn stats(&self) -> PrefixStats {
        PrefixStats { states: self.tree.states(), bytes: self.tree.bytes(), ..self.stats }
    }

    /// Forgets all states; the counters stay.
    pub fn clear(&mut self) {
        self.tree = Tree::new();
        self.fingerprint = None;
    }

    /// Reads a prompt from where a kept state ends, and keeps states on the way: the state after the prompt, the logits that
    /// follow it, and how much was read.
    ///
    /// # Errors
    /// If `ids` is empty or holds an id that the model does not know, if the states belong to another model, or if the model
    /// fails.
    pub fn prefill<M>(&mut self, model: &M, ids: &[u32]) -> Result<(C, Vec<f32>, Reuse)>
    where
        M: StateLm<Cache = C> + ?Sized,
    {
        self.read(model, ids, PROMPT_PIECE, || true)
    }

    /// As [`prefill`](Self::prefill), in pieces of so many tokens at most, and only as long as `go_on` says so before each: what was
    /// read then is told, and the state is the one after it.
    pub(crate) fn read<M>(
        &mut self,
        model: &M,
        ids: &[u32],
        piece: usize,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<(C, Vec<f32>, Reuse)>
    where
        M: StateLm<Cache = C> + ?Sized,
    {
        check_prompt(ids, model.vocab_size())?;
        self.check_model(model)?;
        // The state at the very end serves only with what follows it.
        let found = self.tree.find(ids, |depth, kept| depth < ids.len() || !kept.logits.is_empty());
        let (mut cache, mut logits) = match found.state {
            Some(kept) => {
                (model.fork(&kept.cache).map_err(Error::model("fork", found.depth))?, kept.logits.clone())
            }
            None => (model.new_cache().map_err(Error::model("new_cache", 0))?, Vec::new()),
        };
        let (known, reused) = (found.known, found.depth);
        let mut read = reused;
        for end in self.places(reused, known, ids.len()) {
            let (new, sizes) = (&ids[read..end], (piece, end));
            read += read_prompt(model, new, &mut cache, &mut logits, sizes, &mut go_on)?;
            if read < end {
                break; // what was known does not serve a prompt that was not read
            }
            check_logits(&logits, model.vocab_size(), end)?;
            let after = if end == ids.len() { logits.as_slice() } else { &[] };
            self.keep(model, &ids[..end], &cache, after)?;
        }
        let reuse = Reuse { known, reused, read: read - reused };
        self.count(reuse);
        Ok((cache, logits, reuse))
    }

    /// Keeps the state after `ids`, such as a whole conversation; with the logits that follow, a prompt that ends there need
    /// not be read at all.
    ///
    /// # Errors
    /// If `ids` is empty or holds an id that the model does not know, or there are logits and not one for each; if the states belong to
    /// another model, or the model cannot copy this one.
    pub fn insert<M>(&mut self, model: &M, ids: &[u32], cache: &C, logits: &[f32]) -> Result<()>
    where
        M: StateLm<Cache = C> + ?Sized,
    {
        check_prompt(ids, model.vocab_size())?;
        if !logits.is_empty() {
            check_logits(logits, model.vocab_size(), ids.len())?;
        }
        self.check_model(model)?;
        self.keep(model, ids, cache, logits)
    }

    /// Where to stop and keep a state between what is reused and the end: after chunks, and where the prompt leaves what is
    /// known.
    fn places(&self, reused: usize, known: usize, end: usize) -> Vec<usize> {
        let mut places: Vec<usize> = match self.options.chunk {
            0 => Vec::new(),
            chunk => (reused / chunk + 1..).map(|i| i * chunk).take_while(|&at| at < end).collect(),
        };
        places.extend([known, end].iter().filter(|&&at| at > reused));
        places.sort_unstable();
        places.dedup();
        places
    }

    fn keep<M>(&mut self, model: &M, ids: &[u32], cache: &C, logits: &[f32]) -> Result<()>
    where
        M: StateLm<Cache = C> + ?Sized,
    {
        let bytes = model.cache_bytes(cache) + size_of_val(logits);
        // Nor is anything dropped for what cannot be kept.
        if bytes + size_of_val(ids) > self.options.max_bytes {
            return Ok(());
        }
        let cache = model.fork(cache).map_err(Error::model("fork", ids.len()))?;
        let shared = model.shared_memory(&cache);
        let own = bytes - shared.iter().map(|(_, bytes)| bytes).sum::<usize>().min(bytes);
        self.tree.insert(ids, Kept { cache, logits: logits.to_vec() }, own, shared);
        while self.tree.bytes() > self.options.max_bytes && self.tree.evict() {
            self.stats.evictions += 1;
        }
        Ok(())
    }

    fn check_model<M: StateLm<Cache = C> + ?Sized>(&mut self, model: &M) -> Result<()> {
        let fingerprint = model.fingerprint().map_err(Error::model("fingerprint", 0))?;
        match &self.fingerprint {
            Some(mine) if *mine != fingerprint => Err(Error::State(format!(
                "the prefix cache belongs to the model {mine}, not to {fingerprint}"
            ))),
            _ => {
                self.fingerprint = Some(fingerprint);
                Ok(())
            }
        }
    }

    fn count(&mut self, reuse: Reuse) {
        let stats = &mut self.stats;
        match (reuse.reused, reuse.read) {
            (_, 0) => stats.hits += 1,
            (0, _) => stats.misses += 1,
            _ => stats.partial += 1,
        }
        stats.short += u64::from(reuse.known > reuse.reused);
        stats.reused_tokens += reuse.reused as u64;
        stats.read_tokens += reuse.read as u64;
    }
}
