//! The one table of tolerances, and how errors are measured.

use candle_core::{DType, Tensor};

/// Largest relative RMS error of an `f32` forward against the `f64` reference.
pub const FORWARD: f64 = 2e-6;
/// The same for gradients.
pub const BACKWARD: f64 = 2e-5;
/// How many times those, where f16 or bf16 go to tensor cores of a GPU: what is computed on the way has 16 bits there.
pub const TENSOR_CORES: f64 = 10.0;
/// In f16 and bf16: how many times the error of computing exactly and rounding once.
pub const HALF_FACTOR: f64 = 1.5;
/// Results in `f32` on a GPU against those on the CPU, by the largest value.
pub const CPU_AND_GPU: f64 = 1e-3;
/// Finite differences against autograd, both in `f64`.
pub const FINITE_DIFFERENCES: f64 = 1e-6;
/// `f64` references against `f64` goldens.
pub const GOLDEN_F64: f64 = 1e-10;

/// All elements as `f64`.
pub fn values(x: &Tensor) -> Vec<f64> {
    if x.elem_count() == 0 {
        return vec![]; // candle panics on an empty view that begins past the end of its storage
    }
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// `‖got - want‖ / ‖want‖`; infinite if a value is not finite where the wanted one is.
pub fn relative_rms(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes differ");
    let (got, want) = (values(got), values(want));
    let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w) * (g - w)).sum();
    let scale: f64 = want.iter().map(|w| w * w).sum();
    match (error == 0.0, error.is_finite()) {
        (true, _) => 0.0,
        (_, false) => f64::INFINITY,
        _ => (error / scale.max(f64::MIN_POSITIVE)).sqrt(),
    }
}

/// `max |got - want| / max(1, max |want|)`.
pub fn max_error(got: &Tensor, want: &Tensor) -> f64 {
    max_error_by(1.0, got, want)
}

/// `max |got - want| / max |want|`.
pub fn error_by_largest(got: &Tensor, want: &Tensor) -> f64 {
    max_error_by(f64::MIN_POSITIVE, got, want)
}

fn max_error_by(least: f64, got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims(), "shapes differ");
    let (got, want) = (values(got), values(want));
    let scale = want.iter().fold(least, |m, w| m.max(w.abs()));
    let error = got.iter().zip(&want).map(|(g, w)| if g == w { 0.0 } else { (g - w).abs() });
    error.fold(0.0, |m: f64, e| if e.is_nan() { f64::INFINITY } else { m.max(e) }) / scale
}

/// The tolerance of a result that is computed in `f32` and rounded once to `dtype`.
pub fn of_rounding(want: &Tensor, dtype: DType, f32_tolerance: f64) -> f64 {
    if matches!(dtype, DType::F32 | DType::F64) {
        return f32_tolerance;
    }
    let rounded = want.to_dtype(dtype).unwrap();
    HALF_FACTOR * relative_rms(&rounded, want) + f32_tolerance
}
