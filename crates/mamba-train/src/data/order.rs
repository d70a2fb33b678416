//! A shuffled order that needs no list.

/// A permutation of `0..len` by a seed, in constant memory.
///
/// # Example
/// ```
/// use mamba_train::data::Permutation;
/// let order = Permutation::new(10, 3);
/// let mut seen: Vec<u64> = (0..10).map(|i| order.at(i)).collect();
/// assert_ne!(seen, (0..10).collect::<Vec<_>>());
/// seen.sort();
/// assert_eq!(seen, (0..10).collect::<Vec<_>>());
/// ```
/// # Source
/// A Feistel network over the smallest even number of bits that holds `len`, walked until it is back in range: Black and
/// Rogaway, 2002, "Ciphers with arbitrary finite domains".
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    len: u64,
    seed: u64,
    half_bits: u32,
}

const ROUNDS: u64 = 6;

impl Permutation {
    /// The permutation of `0..len` that belongs to `seed`.
    pub fn new(len: u64, seed: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, seed, half_bits: bits.div_ceil(2).max(1) }
    }

    /// Where `index` goes; `index` is below the length.
    pub fn at(&self, index: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for round in 0..ROUNDS {
                let key = self.seed.wrapping_add((round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                (left, right) = (right, left ^ (mix(right ^ mix(key)) & mask));
            }
            value = left << self.half_bits | right;
            if value < self.len || self.len == 0 {
                return value;
            }
        }
    }
}

/// The finaliser of SplitMix64.
pub(super) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_once_for_every_length() {
        for len in [1, 2, 3, 7, 64, 65, 1000] {
            for seed in 0..3 {
                let mut seen: Vec<u64> = (0..len).map(|i| Permutation::new(len, seed).at(i)).collect();
                seen.sort();
                assert_eq!(seen, (0..len).collect::<Vec<_>>(), "{len} {seed}");
            }
        }
    }

    /// Neighbours are far apart, and seeds differ.
    #[test]
    fn it_shuffles() {
        let order = Permutation::new(10_000, 1);
        let distance: u64 = (0..9_999).map(|i| order.at(i).abs_diff(order.at(i + 1))).sum();
        assert!((3_000..3_700).contains(&(distance / 9_999)), "{}", distance / 9_999); // a third is expected
        let other = Permutation::new(10_000, 2);
        let fixed = (0..10_000).filter(|i| order.at(*i) == other.at(*i)).count();
        assert!(fixed < 10, "{fixed}");
    }
}
