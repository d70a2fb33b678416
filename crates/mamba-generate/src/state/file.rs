//! The format of saved generations.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `MAMBAGEN` |
//! | 8 | the version, 2 |
//! | 8 + n | fingerprint of the model: its length, UTF-8 |
//! | 8 + 4 n | tokens: how many, then each |
//! | 24 | how many were read; where the prompt begins; where it ends |
//! | 8 + 4 n | logits: how many, then each |
//! | 8, 8 + 8 n | whether the sampling is kept, 0 or 1; its words: how many, then each |
//! | 8 + n | the state of the model: its length, as the model writes it |
//! | 32 | SHA-256 of everything before |
//!
//! All numbers are little endian and, where nothing else is said, of eight bytes.
//!
//! Version 1 had fingerprints that did not tell configurations apart: its files are refused by their version.

use sha2::{Digest, Sha256};

use super::GenerationState;
use crate::error::{Error, Result};
use crate::lm::StateLm;

const MAGIC: &[u8; 8] = b"MAMBAGEN";
const VERSION: u64 = 2;
const CHECKSUM: usize = 32;

fn bad(message: impl Into<String>) -> Error {
    Error::State(message.into())
}

impl<C> GenerationState<C> {
    /// The bytes of a file such as [`save`](Self::save) writes.
    ///
    /// # Errors
    /// If the model cannot say its state.
    pub fn to_bytes<M: StateLm<Cache = C> + ?Sized>(&self, model: &M) -> Result<Vec<u8>> {
        let fingerprint = model.fingerprint().map_err(Error::model("fingerprint", self.read))?;
        let cache = model.save_cache(&self.cache).map_err(Error::model("save_cache", self.read))?;
        let mut out = Vec::with_capacity(cache.len() + 4 * (self.tokens.len() + self.logits.len()) + 512);
        let number = |out: &mut Vec<u8>, n: u64| out.extend(n.to_le_bytes());
        out.extend(MAGIC);
        number(&mut out, VERSION);
        number(&mut out, fingerprint.len() as u64);
        out.extend(fingerprint.as_bytes());
        number(&mut out, self.tokens.len() as u64);
        out.extend(self.tokens.iter().flat_map(|id| id.to_le_bytes()));
        for n in [self.read, self.prompt.0, self.prompt.1] {
            number(&mut out, n as u64);
        }
        number(&mut out, self.logits.len() as u64);
        out.extend(self.logits.iter().flat_map(|x| x.to_le_bytes()));
        let words = self.sampling.as_deref().unwrap_or_default();
        number(&mut out, self.sampling.is_some().into());
        number(&mut out, words.len() as u64);
        out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        number(&mut out, cache.len() as u64);
        out.extend(cache);
        let checksum = Sha256::digest(&out);
        out.extend(checksum);
        Ok(out)
    }

    /// Reads what [`to_bytes`](Self::to_bytes) gave.
    ///
    /// # Errors
    /// If the bytes are damaged or cut short, are of another version, or belong to another model.
    pub fn from_bytes<M: StateLm<Cache = C> + ?Sized>(model: &M, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader(bytes);
        if reader.take(MAGIC.len()).ok() != Some(MAGIC.as_slice()) {
            return Err(bad("is not a saved generation"));
        }
        let version = reader.number()?;
        if version != VERSION as usize {
            return Err(bad(format!("is of version {version}, expected {VERSION}")));
        }
        let Some((content, checksum)) = bytes.split_last_chunk::<CHECKSUM>() else {
            return Err(bad("is cut short"));
        };
        if Sha256::digest(content)[..] != checksum[..] {
            return Err(bad("is damaged or cut short: its checksum is wrong"));
        }
        reader.0 = &content[content.len().min(MAGIC.len() + 8)..];
        let fingerprint = reader.bytes(1)?;
        let expected = model.fingerprint().map_err(Error::model("fingerprint", 0))?;
        if fingerprint != expected.as_bytes() {
            let found = String::from_utf8_lossy(fingerprint);
            return Err(bad(format!("belongs to the model {found}, expected {expected}")));
        }
        let tokens: Vec<u32> = reader.words()?.map(u32::from_le_bytes).collect();
        let (read, start, end) = (reader.number()?, reader.number()?, reader.number()?);
        let logits: Vec<f32> = reader.words()?.map(f32::from_le_bytes).collect();
        let kept = reader.number()? == 1;
        let words: Vec<u64> = reader.words()?.map(u64::from_le_bytes).collect();
        let cache = reader.bytes(1)?;
        let vocab_size = model.vocab_size();
        let place = match tokens.len() > end {
            true => read + 1 == tokens.len(),
            false => (start..=end).contains(&read),
        };
        let consistent = start <= end
            && end <= tokens.len()
            && place
            && logits.len() == if read == tokens.len() { vocab_size } else { 0 }
            && tokens.iter().all(|&id| (id as usize) < vocab_size)
            && reader.0.is_empty();
        if !consistent {
            return Err(bad("contradicts itself"));
        }
        let cache = model.load_cache(cache).map_err(Error::model("load_cache", read))?;
        Ok(Self { cache, tokens, read, prompt: (start, end), logits, sampling: kept.then_some(words) })
    }
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(n).ok_or_else(|| bad("is cut short"))?;
        self.0 = rest;
        Ok(first)
    }

    fn number(&mut self) -> Result<usize> {
        let bytes = self.take(8)?.first_chunk().copied().unwrap_or_default();
        usize::try_from(u64::from_le_bytes(bytes)).map_err(|_| bad("has a length that cannot be"))
    }

    /// A count, then as many pieces of `size` bytes.
    fn bytes(&mut self, size: usize) -> Result<&'a [u8]> {
        let length = self.number()?.checked_mul(size).ok_or_else(|| bad("has a length that cannot be"))?;
        self.take(length)
    }

    fn words<const N: usize>(&mut self) -> Result<impl Iterator<Item = [u8; N]> + use<'a, N>> {
        Ok(self.bytes(N)?.as_chunks::<N>().0.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::generator::Generator;

    fn saved(model: &Fake) -> Vec<u8> {
        let mut generator = Generator::builder(model).prompt(&[1, 2]).build().unwrap();
        generator.by_ref().take(2).for_each(drop);
        generator.state().unwrap().to_bytes(model).unwrap()
    }

    fn error(model: &Fake, bytes: &[u8]) -> String {
        GenerationState::<Vec<u32>>::from_bytes(model, bytes).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn what_is_cut_or_changed_is_refused() {
        let model = Fake::saying(2, &[5, 6, 7]);
        let whole = saved(&model);
        for length in 0..whole.len() {
            let error = error(&model, &whole[..length]);
            let known = ["is not a saved generation", "cut short"].iter().any(|m| error.contains(m));
            assert!(error.starts_with("saved generation: ") && known, "{length}: {error}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            let error = error(&model, &bytes);
            let expected = match at {
                0..8 => "is not a saved generation",
                8..16 => "of version",
                _ => "its checksum is wrong",
            };
            assert!(error.contains(expected) || error.contains("cannot be"), "{at}: {error}");
        }
        let longer = [&whole[..], &[0]].concat();
        assert!(error(&model, &longer).contains("checksum"));
    }

    #[test]
    fn another_model_or_version_is_refused() {
        let model = Fake::saying(2, &[5, 6, 7]);
        let whole = saved(&model);
        let other = Fake::saying(2, &[5, 6, 8]);
        assert!(
            error(&other, &whole)
                .contains("belongs to the model fake [0, 0, 5, 6, 7], expected fake [0, 0, 5, 6, 8]")
        );
        let mut next = whole.clone();
        for version in [1, 3] {
            next[8] = version;
            let expected = format!("saved generation: is of version {version}, expected 2");
            assert_eq!(error(&model, &next), expected);
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let model = Fake::saying(2, &[5, 6, 7]);
        let good = GenerationState::from_bytes(&model, &saved(&model)).unwrap();
        let changes: [fn(&mut GenerationState<Vec<u32>>); 9] = [
            |s| s.prompt = (3, 2),
            |s| s.prompt = (0, 9),
            |s| s.read = 5,
            |s| s.read = 2,
            |s| s.tokens[0] = 512,
            |s| s.logits = vec![0.0; 3],
            |s| s.logits = vec![0.0; 512],
            |s| s.prompt = (4, 4),
            |s| (s.prompt, s.read) = ((0, 4), 4),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            let mut state = good.clone();
            change(&mut state);
            let bytes = state.to_bytes(&model).unwrap();
            assert_eq!(error(&model, &bytes), "saved generation: contradicts itself", "change {i}");
        }
    }
}
