//! Products of cuBLAS.

use std::ffi::c_void;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys as cublas;
use candle_core::{DType, Result, bail};

use super::{Gpu, Pointer, int};

/// `y = scale · a b`, or added to `y`: a product of cuBLAS whose sums are f32, where `y` is f32 or as the factors.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    /// `(rows, inner)`.
    pub(crate) a: Factor,
    /// `(inner, columns)`.
    pub(crate) b: Factor,
    /// `(rows, columns)`, rows `y_stride` apart.
    pub(crate) y: Pointer,
    pub(crate) y_stride: usize,
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
    /// Of the factors: f32, f16 or bf16.
    pub(crate) dtype: DType,
    pub(crate) scale: f32,
    pub(crate) add: bool,
}

/// A factor of a product, in row-major order.
#[derive(Clone, Copy)]
pub(crate) struct Factor {
    pub(crate) address: u64,
    /// From row to row as they are stored.
    pub(crate) stride: usize,
    /// Whether rows and columns are stored the other way round.
    pub(crate) transposed: bool,
}

impl Gpu {
    /// Enqueues a product of cuBLAS.
    ///
    /// # Safety
    /// The addresses are of matrices of those sizes.
    pub(crate) unsafe fn gemm(&self, gemm: Gemm) -> Result<()> {
        let Gemm { a, b, y, y_stride, rows, inner, columns, dtype, scale, add } = gemm;
        let factors = match dtype {
            DType::F32 => cublas::cudaDataType::CUDA_R_32F,
            DType::F16 => cublas::cudaDataType::CUDA_R_16F,
            DType::BF16 => cublas::cudaDataType::CUDA_R_16BF,
            other => bail!("no product of {}", other.as_str()),
        };
        let sums = if y.dtype == 0 { cublas::cudaDataType::CUDA_R_32F } else { factors };
        let size = |n: usize| int("a product", n);
        let (alpha, beta) = (scale, if add { 1f32 } else { 0f32 });
        let order = |factor: Factor| match factor.transposed {
            true => cublas::cublasOperation_t::CUBLAS_OP_T,
            false => cublas::cublasOperation_t::CUBLAS_OP_N,
        };
        // Column by column, as cuBLAS has it, yᵀ = bᵀ aᵀ.
        // SAFETY: by the contract of this function; alpha and beta are read before this returns.
        unsafe {
            gemm_ex(
                *self.device.cublas_handle().handle(),
                order(b),
                order(a),
                size(columns)?,
                size(rows)?,
                size(inner)?,
                (&raw const alpha).cast(),
                b.address as *const c_void,
                factors,
                size(b.stride)?,
                a.address as *const c_void,
                factors,
                size(a.stride)?,
                (&raw const beta).cast(),
                y.address as *mut c_void,
                sums,
                size(y_stride)?,
                cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
    }
}
