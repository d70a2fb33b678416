//! From `f16` and `bf16` to `f32`, exactly, and back, rounding to the nearest: slices, and vectors of `f16` in registers.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd, bytemuck};

use super::Isa;

/// `out[i] = x[i]` for slices of one length.
pub(crate) fn widen(x: &[f16], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") && std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has these features.
        return unsafe { widen_f16c(x, out) };
    }
    x.convert_to_f32_slice(out);
}

/// The crate `half` does the same by a call for every 8 values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn widen_f16c(x: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
    let (x_chunks, x_rest) = x.as_chunks::<8>();
    let (out_chunks, out_rest) = out[..x.len()].as_chunks_mut::<8>();
    for (x, out) in x_chunks.iter().zip(out_chunks) {
        // SAFETY: 8 values of 16 bits are read and 8 of 32 bits written, at any alignment.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()))) };
    }
    out_rest.iter_mut().zip(x_rest).for_each(|(out, x)| *out = x.to_f32());
}

/// `out[i] = x[i]` for slices of one length.
pub(crate) fn narrow(x: &[f32], out: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") && std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has these features.
        return unsafe { narrow_f16c(x, out) };
    }
    out.convert_from_f32_slice(x);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn narrow_f16c(x: &[f32], out: &mut [f16]) {
    use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps};
    let (x_chunks, x_rest) = x.as_chunks::<8>();
    let (out_chunks, out_rest) = out[..x.len()].as_chunks_mut::<8>();
    for (x, out) in x_chunks.iter().zip(out_chunks) {
        // SAFETY: 8 values of 32 bits are read and 8 of 16 bits written, at any alignment.
        unsafe {
            let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(x.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), rounded);
        }
    }
    out_rest.iter_mut().zip(x_rest).for_each(|(out, x)| *out = f16::from_f32(*x));
}

/// `out[i] = x[i]` for slices of one length.
pub(crate) fn widen_bf16(x: &[bf16], out: &mut [f32]) {
    Isa::best().dispatch(WidenBf16 { x, out });
}

/// `out[i] = x[i]` for slices of one length.
pub(crate) fn narrow_bf16(x: &[f32], out: &mut [bf16]) {
    Isa::best().dispatch(NarrowBf16 { x, out });
}

// Loops that the compiler makes vectors of, with the instructions of the kernel that they stand in.

struct WidenBf16<'a> {
    x: &'a [bf16],
    out: &'a mut [f32],
}

impl WithSimd for WidenBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

struct NarrowBf16<'a> {
    x: &'a [f32],
    out: &'a mut [bf16],
}

impl WithSimd for NarrowBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            let bits = x.to_bits();
            // To the nearest, and to the even one of two; a NaN keeps a bit of its mantissa.
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            let nan = bits | 0x0040_0000;
            let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
            *out = bf16::from_bits(((if is_nan { nan } else { rounded }) >> 16) as u16);
        }
    }
}

/// Whether [`widen_vector`] leaves the elements of a vector in their order, for vectors of so many `f32`: with the
/// instructions that x86 has for it. Else the even elements are first.
#[inline(always)]
pub(crate) const fn in_order(lanes: usize) -> bool {
    cfg!(target_arch = "x86_64") && (lanes == 8 || lanes == 16)
}

/// A vector of the bits of `f16`, not of a scalar instruction set, as two vectors of `f32`; see [`in_order`].
#[inline(always)]
pub(crate) fn widen_vector<S: Simd>(simd: S, vector: S::u16s) -> [S::f32s; 2] {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        if S::F32_LANES == 16 {
            let vector: __m512i = bytemuck::cast(vector);
            // SAFETY: vectors of 512 bits are those of AVX-512.
            let halves: [__m512; 2] = unsafe {
                let high = _mm512_extracti64x4_epi64::<1>(vector);
                [_mm512_cvtph_ps(_mm512_castsi512_si256(vector)), _mm512_cvtph_ps(high)]
            };
            return bytemuck::cast(halves);
        }
        if S::F32_LANES == 8 {
            let vector: __m256i = bytemuck::cast(vector);
            // SAFETY: vectors of 256 bits are those of AVX2, which `Isa` has with F16C only.
            let halves: [__m256; 2] = unsafe {
                let high = _mm256_extracti128_si256::<1>(vector);
                [_mm256_cvtph_ps(_mm256_castsi256_si128(vector)), _mm256_cvtph_ps(high)]
            };
            return bytemuck::cast(halves);
        }
    }
    widen_words(simd, vector)
}

/// The same by operations on integers, the even elements first.
#[inline(always)]
fn widen_words<S: Simd>(simd: S, vector: S::u16s) -> [S::f32s; 2] {
    let words: S::u32s = bytemuck::cast(vector);
    let low = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
    let high = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
    let (even, odd) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
    [upper(simd, even), upper(simd, odd)]
}

/// The `f16` in the upper half of each word.
#[inline(always)]
fn upper<S: Simd>(simd: S, words: S::u32s) -> S::f32s {
    /// 2⁻¹⁴, the smallest normal `f16`, as the bits of an `f32`.
    const SMALLEST: u32 = 113 << 23;
    /// Between the biases of the two exponents, 127 and 15.
    const BIAS: u32 = 112 << 23;
    let splat = |x: u32| simd.splat_u32s(x);
    let sign = simd.and_u32s(words, splat(0x8000_0000));
    let magnitude = simd.and_u32s(words, splat(0x7fff_0000));
    // Exponent and mantissa where those of an f32 are.
    let bits = simd.wrapping_dyn_shr_u32s(magnitude, splat(3));
    let normal = simd.add_u32s(bits, splat(BIAS));
    // The largest exponent stands for infinity and NaN, and stays the largest.
    let finite = simd.less_than_u32s(bits, splat(31 << 23));
    let normal = simd.select_u32s(finite, normal, simd.add_u32s(normal, splat(BIAS)));
    // Without a leading one: as the mantissa of 2⁻¹⁴, of which that is taken away again.
    let subnormal = simd.transmute_f32s_u32s(simd.add_u32s(bits, splat(SMALLEST)));
    let subnormal = simd.sub_f32s(subnormal, simd.splat_f32s(f32::from_bits(SMALLEST)));
    let subnormal = simd.transmute_u32s_f32s(subnormal);
    let small = simd.less_than_u32s(bits, splat(1 << 23));
    let value = simd.select_u32s(small, subnormal, normal);
    simd.transmute_f32s_u32s(simd.or_u32s(value, sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the one function and the other.
    struct All<'a>(&'a [f16]);

    impl WithSimd for All<'_> {
        type Output = [Vec<f32>; 2];

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> [Vec<f32>; 2] {
            let mut out = [vec![], vec![]];
            if S::IS_SCALAR {
                return out; // has no vectors
            }
            let (vectors, rest) = S::as_simd_u16s(self.0.reinterpret_cast());
            assert!(rest.is_empty());
            let lanes = S::F32_LANES;
            for vector in vectors {
                for (to, pair, in_order) in [
                    (0, widen_vector(simd, *vector), in_order(lanes)),
                    (1, widen_words(simd, *vector), false),
                ] {
                    let values: &[f32] = bytemuck::cast_slice(&pair);
                    let place = |i: usize| if in_order { i } else { i % 2 * lanes + i / 2 };
                    out[to].extend((0..2 * lanes).map(|i| values[place(i)]));
                }
            }
            out
        }
    }

    #[test]
    fn every_value() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for isa in Isa::available() {
            for got in isa.dispatch(All(&all)) {
                assert!(got.len() == all.len() || isa.name() == "scalar");
                for (x, got) in all.iter().zip(got) {
                    let same = got.to_bits() == x.to_f32().to_bits() || (x.is_nan() && got.is_nan());
                    assert!(same, "{}: {:#06x} gives {got}", isa.name(), x.to_bits());
                }
            }
        }
    }

    /// Every `bf16` and `f16`, what lies halfway between two neighbours, and a little to both sides of that.
    #[test]
    fn rounds_as_half_does() {
        let halfway = |x: f32, y: f32| f32::from_bits(x.to_bits().midpoint(y.to_bits()));
        let mut values = vec![];
        for bits in 0..u16::MAX {
            for pair in [
                [bits, bits + 1].map(|bits| bf16::from_bits(bits).to_f32()),
                [bits, bits + 1].map(|bits| f16::from_bits(bits).to_f32()),
            ] {
                let middle = halfway(pair[0], pair[1]);
                let near = [middle.to_bits().wrapping_sub(1), middle.to_bits().wrapping_add(1)];
                values.extend([pair[0], middle, f32::from_bits(near[0]), f32::from_bits(near[1])]);
            }
        }
        let (mut bf16s, mut f16s) = (vec![bf16::ZERO; values.len()], vec![f16::ZERO; values.len()]);
        narrow_bf16(&values, &mut bf16s);
        narrow(&values, &mut f16s);
        let mut back = vec![0.0; values.len()];
        widen_bf16(&bf16s, &mut back);
        for (((x, bf16), f16), back) in values.iter().zip(bf16s).zip(f16s).zip(back) {
            let want = (bf16::from_f32(*x), f16::from_f32(*x));
            if x.is_nan() {
                assert!(bf16.is_nan() && f16.is_nan() && back.is_nan(), "{:#x}", x.to_bits());
                continue;
            }
            assert_eq!((bf16.to_bits(), f16.to_bits()), (want.0.to_bits(), want.1.to_bits()), "{x:e}");
            assert_eq!(back.to_bits(), bf16.to_f32().to_bits(), "{x:e}");
        }
    }
}
