//! A model for the tests of this crate: it says a script, and remembers what it was fed.

use std::cell::RefCell;

use crate::cancel::CancelToken;
use crate::error::BoxError;
use crate::lm::{CausalLm, StateLm};

/// After `n` tokens, its greedy choice is `script[n]`.
pub(crate) struct Fake {
    pub(crate) vocab_size: usize,
    pub(crate) script: Vec<u32>,
    /// The calls so far: "prefill 3" or "step".
    pub(crate) calls: RefCell<Vec<String>>,
    /// Fail when this many tokens would have been read.
    pub(crate) fail_at: Option<usize>,
    /// Return a NaN after this many tokens.
    pub(crate) nan_at: Option<usize>,
    /// Cancel while the token of this number is read.
    pub(crate) cancel_at: Option<(usize, CancelToken)>,
}

impl Fake {
    /// A model that says `reply` after a prompt of `prompt_len` tokens, then token 0 for ever.
    pub(crate) fn saying(prompt_len: usize, reply: &[u32]) -> Self {
        let mut script = vec![0; prompt_len];
        script.extend(reply);
        Self {
            vocab_size: 512,
            script,
            calls: RefCell::default(),
            fail_at: None,
            nan_at: None,
            cancel_at: None,
        }
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.borrow().clone()
    }

    fn read(&self, ids: &[u32], read: &mut Vec<u32>, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        let before = read.len();
        read.extend(ids);
        if self.fail_at.is_some_and(|n| read.len() >= n) {
            return Err("out of fake memory".into());
        }
        if let Some((n, token)) = &self.cancel_at
            && (before + 1..=read.len()).contains(n)
        {
            token.cancel();
        }
        logits.clear();
        logits.resize(self.vocab_size, 0.0);
        logits[self.script.get(read.len()).map_or(0, |&id| id as usize)] = 20.0;
        if self.nan_at == Some(read.len()) {
            logits[3] = f32::NAN;
        }
        Ok(())
    }
}

impl CausalLm for Fake {
    type Cache = Vec<u32>;

    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn new_cache(&self) -> Result<Vec<u32>, BoxError> {
        self.calls.borrow_mut().push("new_cache".into());
        Ok(Vec::new())
    }

    fn prefill(&self, ids: &[u32], read: &mut Vec<u32>, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        self.calls.borrow_mut().push(format!("prefill {}", ids.len()));
        self.read(ids, read, logits)
    }

    fn step(&self, id: u32, read: &mut Vec<u32>, logits: &mut Vec<f32>) -> Result<(), BoxError> {
        self.calls.borrow_mut().push("step".into());
        self.read(&[id], read, logits)
    }
}

impl StateLm for Fake {
    fn fork(&self, read: &Vec<u32>) -> Result<Vec<u32>, BoxError> {
        Ok(read.clone())
    }

    fn cache_bytes(&self, read: &Vec<u32>) -> usize {
        4 * read.len()
    }

    fn fingerprint(&self) -> Result<String, BoxError> {
        Ok(format!("fake {:?}", self.script))
    }

    fn save_cache(&self, read: &Vec<u32>) -> Result<Vec<u8>, BoxError> {
        Ok(read.iter().flat_map(|id| id.to_le_bytes()).collect())
    }

    fn load_cache(&self, bytes: &[u8]) -> Result<Vec<u32>, BoxError> {
        Ok(bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id)).collect())
    }
}
