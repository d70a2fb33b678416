//! The loss of a language model, straight from what its head would multiply.

mod autograd;
mod chunks;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{DType, Result, Tensor, bail};

use crate::args::Checker;

const OP: &str = "linear_cross_entropy";

/// Arguments of [`linear_cross_entropy`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct LinearCrossEntropy<'a> {
    /// What the head multiplies, `(rows, dim)`.
    pub x: &'a Tensor,
    /// The head, `(classes, dim)`.
    pub weight: &'a Tensor,
    /// The right class of each row, `(rows,)`, i64 or u32.
    pub targets: &'a Tensor,
    /// Rows with this target count nothing.
    pub ignore_index: i64,
    /// What the logits are multiplied with.
    pub logit_scale: f64,
    /// Rows of logits that exist at once; chosen by their size if absent.
    pub chunk_rows: Option<usize>,
}

impl<'a> LinearCrossEntropy<'a> {
    /// The required arguments; -100 is ignored, logits are not scaled.
    pub fn new(x: &'a Tensor, weight: &'a Tensor, targets: &'a Tensor) -> Self {
        Self { x, weight, targets, ignore_index: -100, logit_scale: 1.0, chunk_rows: None }
    }

    fn sizes(&self) -> Result<Sizes> {
        let check = Checker::new(OP, "x", self.x)?;
        let [rows, dim] = check.main_dims(["rows", "dim"])?;
        let classes = self.weight.dims().first().copied().unwrap_or(0);
        check.parameter("weight", self.weight, &[("classes", classes), ("dim", dim)])?;
        check.require(classes > 0, || "`weight` has no rows, expected at least 1".into())?;
        if !matches!(self.targets.dtype(), DType::I64 | DType::U32) {
            bail!("{OP}: `targets` has dtype {}, expected i64 or u32", self.targets.dtype().as_str())
        }
        if self.targets.dims() != [rows] {
            bail!("{OP}: `targets` has shape {:?}, expected (rows {rows})", self.targets.dims())
        }
        check.device("targets", self.targets)?;
        check.require(self.chunk_rows != Some(0), || "`chunk_rows` is 0, expected at least 1".into())?;
        Ok(Sizes { rows, dim, classes })
    }
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    dim: usize,
    classes: usize,
}

/// Computes the sum of the cross-entropies of rows of logits that never exist all at once.
///
/// `loss = Σ_i (log Σ_j exp(s x_i·w_j) - s x_i·w_{t_i})` over the rows whose target `t_i` is not ignored, with `s` the
/// `logit_scale`. Divide by the number of such rows for the mean. Logits are computed for some rows at a time; while
/// training, their gradients at once with them, so that `backward()` has no product left to do, and the graph holds the
/// gradients of `x` and `weight` in the place of `(rows, classes)` logits.
///
/// # Shapes
/// `x`: `(rows, dim)`, f32, f16, bf16 or f64 · `weight`: `(classes, dim)` · `targets`: `(rows,)` · the loss is a scalar, `f32`
/// (`f64` if `x` is). Softmax and sums are `f32`.
/// # Gradients
/// For `x` and `weight`, if they track.
/// # Errors
/// If a shape, dtype or device disagrees with `x`, or a target is neither ignored nor a class; on a GPU, which is not waited
/// for, such a target makes the loss NaN.
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_ops::{LinearCrossEntropy, linear_cross_entropy};
/// # fn main() -> candle_core::Result<()> {
/// let (rows, dim, classes) = (6, 4, 10);
/// let x = Var::randn(0f32, 1.0, (rows, dim), &Device::Cpu)?;
/// let weight = Var::randn(0f32, 1.0, (classes, dim), &Device::Cpu)?;
/// let targets = Tensor::new(&[1i64, 7, -100, 0, 9, 3], &Device::Cpu)?;
/// let loss = linear_cross_entropy(&LinearCrossEntropy::new(&x, &weight, &targets))?;
/// let grads = (loss / 5.0)?.backward()?;
/// assert!(grads.get(&x).is_some() && grads.get(&weight).is_some());
/// # Ok(()) }
/// ```
/// # Source
/// `torch.nn.functional.cross_entropy` of `linear`, with `reduction="sum"`; the order of work is that of Hsu et al., 2024,
/// "Liger Kernel".
pub fn linear_cross_entropy(args: &LinearCrossEntropy) -> Result<Tensor> {
    let sizes = args.sizes()?;
    let targets = args.targets.to_dtype(DType::I64)?;
    if targets.device().is_cpu() {
        let known = 0..sizes.classes as i64;
        let wrong = |t: &i64| *t != args.ignore_index && !known.contains(t);
        if let Some(target) = targets.to_vec1::<i64>()?.into_iter().find(wrong) {
            let (classes, ignored) = (sizes.classes - 1, args.ignore_index);
            bail!("{OP}: `targets` has {target}, expected 0 to {classes}, or {ignored} to ignore the row")
        }
    }
    autograd::apply(&LinearCrossEntropy { targets: &targets, ..*args }, sizes)
}
