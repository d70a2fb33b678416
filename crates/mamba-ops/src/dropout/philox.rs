//! The counter-based generator Philox 4×32-10: random words as a function of a key and a counter.

/// The words `4 · block` to `4 · block + 3` of a stream.
#[inline(always)]
pub(super) fn words(seed: u64, stream: u64, block: u64) -> [u32; 4] {
    let low = |x: u64| x as u32;
    let high = |x: u64| (x >> 32) as u32;
    let mut counter = [low(block), high(block), low(stream), high(stream)];
    let mut key = [low(seed), high(seed)];
    for _ in 0..10 {
        let product = [0xd251_1f53 * u64::from(counter[0]), 0xcd9e_8d57 * u64::from(counter[2])];
        counter = [
            high(product[1]) ^ counter[1] ^ key[0],
            low(product[1]),
            high(product[0]) ^ counter[3] ^ key[1],
            low(product[0]),
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 publishes (`kat_vectors`).
    #[test]
    fn known_answers() {
        assert_eq!(words(0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(words(u64::MAX, u64::MAX, u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let (block, stream, seed) = (0x85a3_08d3_243f_6a88, 0x0370_7344_1319_8a2e, 0x299f_31d0_a409_3822);
        assert_eq!(words(seed, stream, block), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }
}
