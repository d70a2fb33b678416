//! Where random numbers come from: a seed, by a published cipher, with a place in the stream that can be kept.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::Result;
use crate::saved::take;

/// ChaCha12 with a key whose first eight bytes are the seed (little endian) and whose others are 0.
///
/// Who draws for another purpose with the same seed takes another stream, so that draws have nothing to do with each other.
#[derive(Debug, Clone)]
pub(crate) struct Rng {
    seed: u64,
    source: ChaCha12Rng,
}

impl Rng {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        // `seed_from_u64` would do, but its expansion of the seed has changed between versions of the crate.
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut source = ChaCha12Rng::from_seed(key);
        source.set_stream(stream);
        Self { seed, source }
    }

    /// A number in `[0, 1)` from the upper 53 bits of one 64-bit word.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.source.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// The seed, and how far its stream was read.
    pub(crate) fn save(&self, words: &mut Vec<u64>) {
        let position = self.source.get_word_pos();
        words.extend([self.seed, position as u64, (position >> 64) as u64]);
    }

    pub(crate) fn restore(&mut self, words: &mut &[u64]) -> Result<()> {
        let [seed, low, high] = take(words)?;
        *self = Self::new(seed, self.source.get_stream());
        self.source.set_word_pos(u128::from(low) | u128::from(high) << 64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_chacha12_keyed_with_the_seed() {
        // The keystream of ChaCha12 for the zero key and nonce (test vector TC1 of draft-strombergson-chacha-test-vectors).
        let mut rng = Rng::new(0, 0).source;
        assert_eq!(rng.next_u64().to_le_bytes(), [0x9b, 0xf4, 0x9a, 0x6a, 0x07, 0x55, 0xf9, 0x53]);
    }

    #[test]
    fn goes_on_where_it_was_saved_and_streams_differ() {
        let mut rng = Rng::new(7, 3);
        for _ in 0..37 {
            rng.uniform();
        }
        let mut words = vec![];
        rng.save(&mut words);
        // Another seed, but the same purpose: the saved seed counts.
        let mut again = Rng::new(8, 3);
        again.restore(&mut &words[..]).unwrap();
        let next = |rng: &mut Rng| (0..20).map(|_| rng.uniform()).collect::<Vec<_>>();
        assert_eq!(next(&mut again), next(&mut rng));
        assert_ne!(next(&mut Rng::new(7, 0)), next(&mut Rng::new(7, 1)));
        assert!(again.restore(&mut &words[1..]).is_err());
    }
}
