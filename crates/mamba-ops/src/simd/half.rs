//! From `f16` to `f32`. Vectors of pulp have no such conversion, so it goes through a slice that stays in cache.

use half::f16;
use half::slice::HalfFloatSliceExt;

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
