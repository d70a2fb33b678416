//! `exp2`, `exp`, sigmoid, SiLU and softplus on vectors, each with its bound; NaN stays NaN.
//!
//! Bounds hold on every instruction set and are checked at the foot of this file against f64.

use pulp::Simd;

/// Coefficients of a relative minimax polynomial of `2^f` on `[-1/2, 1/2]` (error 1.9e-9).
const EXP2: [f32; 7] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_226_46,
    0.055_503_286,
    0.009_618_489,
    0.001_339_993_1,
    0.000_153_458_12,
];

/// Coefficients in `s²` of a relative minimax polynomial of `atanh(s) / s` on `s² ∈ [0, 1/9]` (error 4.0e-9).
const ATANH: [f32; 5] = [1.0, 0.333_331_58, 0.200_124_55, 0.139_803, 0.140_891_67];

/// `2^x` within 2 ULP where the result is normal; 0 below 2^-127, infinity from 2^128.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = clamp(simd, x, -127.0, 128.0);
    // Adding 1.5·2^23 leaves round(x) in the low bits of the mantissa.
    let magic = simd.splat_f32s(12_582_912.0);
    let shifted = simd.add_f32s(x, magic);
    let fraction = simd.sub_f32s(x, simd.sub_f32s(shifted, magic));
    let mut p = simd.splat_f32s(EXP2[6]);
    for &c in EXP2[..6].iter().rev() {
        p = simd.mul_add_e_f32s(p, fraction, simd.splat_f32s(c));
    }
    // Adding round(x) to the exponent field multiplies by 2^round(x); at the clamps it gives exactly 0 and infinity.
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(p), exponent))
}

/// `min(max(x, low), high)`, but NaN for NaN.
#[inline(always)]
pub(crate) fn clamp<S: Simd>(simd: S, x: S::f32s, low: f32, high: f32) -> S::f32s {
    let (low, high) = (simd.splat_f32s(low), simd.splat_f32s(high));
    if S::IS_SCALAR {
        // The scalar `max` drops NaN; a comparison with NaN is false and keeps it.
        let x = simd.select_f32s(simd.less_than_f32s(x, low), low, x);
        simd.select_f32s(simd.greater_than_f32s(x, high), high, x)
    } else {
        // The vector instructions return their second operand if either is NaN, or NaN itself.
        simd.min_f32s(high, simd.max_f32s(low, x))
    }
}

/// `e^x`; relative error below `2e-7 + 8e-8·|x|` (the product with log2 e is rounded once).
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    exp2(simd, simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E)))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(one, simd.add_f32s(one, exp(simd, simd.neg_f32s(x))))
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    simd.mul_f32s(x, sigmoid(simd, x))
}

/// `silu(x)` and its derivative `σ(x)·(1 + x·(1 - σ(x)))`, which is off by less than `1e-7·(3 + |x|)`.
#[inline(always)]
pub(crate) fn silu_with_derivative<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let one = simd.splat_f32s(1.0);
    let sigmoid = sigmoid(simd, x);
    let slope = simd.mul_add_e_f32s(x, simd.sub_f32s(one, sigmoid), one);
    (simd.mul_f32s(x, sigmoid), simd.mul_f32s(sigmoid, slope))
}

/// `ln(1 + e^x)` as `max(x, 0) + log1p(e^-|x|)`: no overflow, and exact to rounding for large `|x|`.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let e = exp(simd, simd.neg_f32s(simd.abs_f32s(x)));
    // log1p(e) = 2 atanh(s) with s = e / (2 + e), which loses nothing for small e.
    let s = simd.div_f32s(e, simd.add_f32s(simd.splat_f32s(2.0), e));
    let s2 = simd.mul_f32s(s, s);
    let mut p = simd.splat_f32s(ATANH[4]);
    for &c in ATANH[..4].iter().rev() {
        p = simd.mul_add_e_f32s(p, s2, simd.splat_f32s(c));
    }
    let log1p = simd.mul_f32s(simd.add_f32s(s, s), p);
    simd.add_f32s(clamp(simd, x, 0.0, f32::INFINITY), log1p)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, WithSimd};

    /// Applies the function number `which` to every element.
    struct Map<'a>(usize, &'a mut [f32]);
    impl WithSimd for Map<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for chunk in self.1.chunks_mut(S::F32_LANES) {
                let x = simd.partial_load_f32s(chunk);
                let y = match self.0 {
                    0 => exp2(simd, x),
                    1 => exp(simd, x),
                    2 => sigmoid(simd, x),
                    3 => silu(simd, x),
                    4 => softplus(simd, x),
                    _ => silu_with_derivative(simd, x).1,
                };
                simd.partial_store_f32s(chunk, y);
            }
        }
    }

    fn inputs() -> Vec<f32> {
        let dense = (-12_000..12_000).map(|i| i as f32 * 0.01);
        let tiny = (0..60).map(|i| -(2f32.powi(-i)));
        dense.chain(tiny).chain([0.0, -0.0, 1e-30, -1e-30]).collect()
    }

    #[test]
    fn every_isa_keeps_its_bounds() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        type Exact<'a> = (&'a dyn Fn(f64) -> f64, f64, f64);
        let exact: [Exact; 6] = [
            (&|x| x.exp2(), 2.4e-7, 0.0),
            (&|x| x.exp(), 2e-7, 8e-8),
            (&sigmoid, 3e-7, 8e-8),
            (&|x| x * sigmoid(x), 3e-7, 8e-8),
            (&|x| x.max(0.0) + (-x.abs()).exp().ln_1p(), 3e-7, 8e-8),
            (&|x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))), f64::INFINITY, 0.0),
        ];
        for isa in Isa::available() {
            for (which, (f, constant, slope)) in exact.iter().enumerate() {
                let mut ys = inputs();
                isa.dispatch(Map(which, &mut ys));
                for (x, y) in inputs().into_iter().zip(ys) {
                    let (want, error) = (f(x as f64), y as f64 - f(x as f64));
                    // Below the normal numbers results are flushed. The derivative of SiLU has a zero, and multiplies
                    // the rounding of the sigmoid by x: its bound is absolute.
                    let size = (x as f64).abs();
                    let absolute = if which == 5 { 1e-7 * (3.0 + size) } else { 1.2e-38 * size.max(1.0) };
                    let relative = constant + slope * size;
                    let ok = error.abs() <= absolute + if which == 5 { 0.0 } else { relative * want.abs() };
                    let overflow = want > f32::MAX as f64 * 0.99999 && y == f32::INFINITY;
                    assert!(ok || overflow, "{} f{which}({x}) = {y}, want {want}", isa.name());
                }
            }
        }
    }

    #[test]
    fn extremes() {
        for isa in Isa::available() {
            let mut ys = [f32::NEG_INFINITY, -1e30, -127.0, 128.0, 1e30, f32::INFINITY, f32::NAN, 0.0];
            isa.dispatch(Map(0, &mut ys));
            assert_eq!(ys[..3], [0.0; 3], "{}", isa.name());
            assert_eq!(ys[3..6], [f32::INFINITY; 3], "{}", isa.name());
            assert!(ys[6].is_nan(), "{}", isa.name());
            assert_eq!(ys[7], 1.0);
            for which in 1..6 {
                let mut nan = [f32::NAN; 3];
                isa.dispatch(Map(which, &mut nan));
                assert!(nan.iter().all(|y| y.is_nan()), "{} f{which}(NaN)", isa.name());
            }
            let mut ys = [1e30, 88.0, 1000.0, -1000.0];
            isa.dispatch(Map(4, &mut ys));
            assert_eq!(ys, [1e30, 88.0, 1000.0, 0.0], "{}", isa.name());
        }
    }
}
