//! More of a small text: rows that differ from epoch to epoch.

use std::collections::HashMap;
use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokenizers::Tokenizer;

use super::dataset::{Dataset, Position};
use super::order::mix;
use crate::error::require;
use crate::{Error, Result};

/// What is done to the rows of a training, as a function of its seed and the [`Position`]: one that is resumed sees what one that was
/// not interrupted sees.
#[derive(Debug, Clone, Default)]
pub struct Augmentation {
    /// Whether documents of more than a row are cut elsewhere in each epoch, so that a token is not always seen behind the same
    /// ones. The first tokens of such a document, less than a row, are left out then.
    pub shift: bool,
    /// Writes tokens as others, at random.
    pub splits: Option<TokenSplits>,
}

impl Augmentation {
    /// A row as it is seen at a position: at least two tokens, at most those of a full row.
    pub(super) fn row(
        &self,
        dataset: &Dataset,
        index: usize,
        seed: u64,
        Position { epoch, row }: Position,
    ) -> Result<Vec<u32>> {
        let of_epoch = mix(mix(seed ^ 0x5bf0_3635_dcd1_4d3d).wrapping_add(epoch));
        let shift = if self.shift { of_epoch % dataset.seqlen() as u64 } else { 0 };
        let tokens = dataset.shifted_row(index, shift as usize)?;
        Ok(match &self.splits {
            None => tokens,
            Some(splits) => {
                let mut random = ChaCha8Rng::seed_from_u64(mix(of_epoch.wrapping_add(row)));
                splits.apply(&tokens, dataset.seqlen() + 1, &mut random)
            }
        })
    }
}

/// Splits tokens of byte-pair encoding into the two that they were merged of, and these again, each with some probability: the
/// same text in other tokens, so that a model learns what tokens are made of, and meets no passage twice in the same ones.
///
/// # Example
/// ```
/// use mamba_train::data::TokenSplits;
/// use tokenizers::Tokenizer;
///
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/mamba2-shakespeare/tokenizer.json");
/// let tokenizer = Tokenizer::from_file(path)?;
/// let splits = TokenSplits::new(&tokenizer, 0.1)?;
/// let ing = tokenizer.token_to_id("ing").unwrap();
/// let pair = splits.pair(ing).unwrap().map(|id| tokenizer.id_to_token(id).unwrap());
/// assert_eq!(pair.concat(), "ing");
/// # Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
/// ```
/// # Source
/// As in Sims et al., 2025, "StochasTok: improving fine-grained subword understanding in LLMs"; the merges that are not done as in
/// Provilkov et al., 2020, "BPE-dropout".
#[derive(Debug, Clone)]
pub struct TokenSplits {
    pairs: Arc<HashMap<u32, [u32; 2]>>,
    probability: f64,
}

impl TokenSplits {
    /// Takes the merges of a tokenizer.
    ///
    /// # Errors
    /// If the tokenizer is not of byte-pair encoding, or the probability not from 0 to less than 1.
    pub fn new(tokenizer: &Tokenizer, probability: f64) -> Result<Self> {
        require((0.0..1.0).contains(&probability), "splits", || {
            format!("is {probability}, expected at least 0 and less than 1")
        })?;
        let no_merges =
            || Error::Data("tokens cannot be split: the tokenizer is not of byte-pair encoding".into());
        let model = serde_json::to_value(tokenizer.get_model()).map_err(|_| no_merges())?;
        if model["type"] != "BPE"
            || model["continuing_subword_prefix"].as_str().is_some_and(|p| !p.is_empty())
        {
            return Err(no_merges());
        }
        let mut pairs = HashMap::new();
        for merge in model["merges"].as_array().ok_or_else(no_merges)? {
            let (left, right) = match merge {
                serde_json::Value::String(text) => text.split_once(' '),
                pair => pair[0].as_str().zip(pair[1].as_str()),
            }
            .ok_or_else(no_merges)?;
            let id = |token: &str| tokenizer.token_to_id(token);
            if let (Some(whole), Some(left), Some(right)) = (id(&[left, right].concat()), id(left), id(right))
            {
                pairs.entry(whole).or_insert([left, right]); // the first merge is the one that is done
            }
        }
        Ok(Self { pairs: Arc::new(pairs), probability })
    }

    /// What a token was merged of.
    pub fn pair(&self, id: u32) -> Option<[u32; 2]> {
        self.pairs.get(&id).copied()
    }

    /// The first `limit` tokens after splitting.
    fn apply(&self, ids: &[u32], limit: usize, random: &mut impl Rng) -> Vec<u32> {
        let mut out = Vec::with_capacity(limit);
        let mut waiting = vec![];
        for &id in ids {
            waiting.push(id);
            while let Some(id) = waiting.pop() {
                match self.pair(id).filter(|_| random.random::<f64>() < self.probability) {
                    Some([left, right]) => waiting.extend([right, left]),
                    None => out.push(id),
                }
            }
            if out.len() >= limit {
                break;
            }
        }
        out.truncate(limit);
        out
    }
}
