//! The product with a weight matrix as checkpoints store it, and a bias.

mod autograd;
mod blocks;
pub(crate) mod cpu;
pub mod reference;

use candle_core::{DType, Result, Tensor, bail};

use crate::args::{self, Checker, Dim};
use crate::host;
use crate::simd::Isa;

const OP: &str = "linear";

/// Arguments of [`linear`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// The input, `(.., in)`.
    pub x: &'a Tensor,
    /// `(out, in)`.
    pub weight: &'a Tensor,
    /// `(out,)`.
    pub bias: Option<&'a Tensor>,
}

impl<'a> Linear<'a> {
    /// Without a bias.
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Self {
        Self { x, weight, bias: None }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "x", self.x)?;
        let [leading @ .., d_in] = self.x.dims() else { bail!("{OP}: `x` is a scalar, expected (.., in)") };
        let [d_out, _] = self.weight.dims() else {
            bail!("{OP}: `weight` has shape {:?}, expected (out, in {d_in})", self.weight.dims())
        };
        let out: Dim = ("out", *d_out);
        check.parameter("weight", self.weight, &[out, ("in", *d_in)])?;
        if let Some(bias) = self.bias {
            check.parameter("bias", bias, &[out])?;
        }
        Ok(Sizes { rows: leading.iter().product(), d_in: *d_in, d_out: *d_out })
    }

    fn tracked(&self) -> bool {
        [Some(self.x), Some(self.weight), self.bias].into_iter().flatten().any(Tensor::track_op)
    }

    /// The shape of the result.
    fn shape(&self) -> Vec<usize> {
        let mut shape = self.x.dims().to_vec();
        if let (Some(last), [d_out, ..]) = (shape.last_mut(), self.weight.dims()) {
            *last = *d_out;
        }
        shape
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// The product of all extents of `x` but the last.
    pub rows: usize,
    pub d_in: usize,
    pub d_out: usize,
}

/// Multiplies rows with a matrix that is stored by rows of weights of one output each.
///
/// `y = x Wᵀ + bias`. For few rows the weight is read once, as it is stored: generating a token costs the time of that.
///
/// # Shapes
/// `x`: `(.., in)`, any rank from 1 · `weight`: `(out, in)` · `bias`: `(out,)` · `y`: `(.., out)`. `x` is f32, f16, bf16
/// or f64, and `y` has its dtype; `weight` and `bias` may have another of these. Sums are `f32` and rounded once
/// (for `f64` everything is `f64`). For many rows, and for a weight that is not contiguous, the product is candle's.
/// # Gradients
/// For those of `x`, `weight` and `bias` that track: a frozen weight costs no product in `backward()`.
/// # Errors
/// If a shape or device disagrees, or a dtype is not a floating one.
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_ops::{Linear, linear};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[1f32, 0.0], [0.0, 1.0], [1.0, 1.0]], &Device::Cpu)?.to_dtype(DType::BF16)?;
/// let bias = Tensor::new(&[0f32, 0.0, 0.5], &Device::Cpu)?;
/// let y = linear(&Linear { bias: Some(&bias), ..Linear::new(&x, &weight) })?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1.0, 2.0, 3.5], [3.0, 4.0, 7.5]]);
/// # Ok(()) }
/// ```
/// # Source
/// `torch.nn.functional.linear`.
pub fn linear(args: &Linear) -> Result<Tensor> {
    let sizes = args.sizes()?;
    let empty = sizes.rows * sizes.d_in * sizes.d_out == 0;
    if args.tracked() && !empty {
        return autograd::apply(args, sizes);
    }
    if !args::fused_on_cpu(args.x) || empty {
        return reference::forward(args);
    }
    if sizes.rows <= cpu::FEW_ROWS
        && let Some(y) = few_rows(args, sizes)?
    {
        return host::tensor(y, args.shape(), args.x.dtype());
    }
    match args.weight.dtype() {
        DType::F16 | DType::BF16 => blocks::forward(args, sizes),
        _ => reference::forward(args),
    }
}

/// What the kernels give, if they read a weight such as this one.
fn few_rows(args: &Linear, sizes: Sizes) -> Result<Option<Vec<f32>>> {
    let Some(weight) = host::stored(args.weight) else { return Ok(None) };
    let Some(weight) = weight.values() else { return Ok(None) };
    let (x, bias) = (host::read("x", args.x)?, host::read_opt("bias", args.bias)?);
    Ok(Some(cpu::forward(sizes, &x, weight, bias.as_deref(), Isa::current())))
}
