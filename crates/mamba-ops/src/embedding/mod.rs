//! The rows of a table by their numbers.

mod autograd;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;

use candle_core::{DType, Result, Tensor, bail};

const OP: &str = "embedding";

/// Arguments of [`embedding`]; see there for shapes.
#[derive(Debug, Clone, Copy)]
pub struct Embedding<'a> {
    /// The rows to take, any shape.
    pub ids: &'a Tensor,
    /// The table, `(rows, dim)`.
    pub weight: &'a Tensor,
}

impl<'a> Embedding<'a> {
    /// All arguments.
    pub fn new(ids: &'a Tensor, weight: &'a Tensor) -> Self {
        Self { ids, weight }
    }

    fn check(&self) -> Result<()> {
        let Self { ids, weight } = self;
        if !matches!(ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
            bail!("{OP}: `ids` has dtype {}, expected u8, u32 or i64", ids.dtype().as_str())
        }
        if !weight.dtype().is_float() {
            bail!("{OP}: `weight` has dtype {}, expected a floating one", weight.dtype().as_str())
        }
        if weight.rank() != 2 {
            bail!("{OP}: `weight` has shape {:?}, expected (rows, dim)", weight.dims())
        }
        if !ids.device().same_device(weight.device()) {
            bail!("{OP}: `ids` and `weight` are on different devices")
        }
        Ok(())
    }
}

/// Takes rows of a table.
///
/// `y[i] = weight[ids[i]]`. Backward adds the gradients of equal ids in the order of their positions, in `f32`, whatever
/// the number of threads, and rounds once.
///
/// # Shapes
/// `ids`: any shape, u8, u32 or i64 · `weight`: `(rows, dim)`, any floating dtype · `y`: that of `ids`, then `dim`.
/// # Gradients
/// For `weight`.
/// # Errors
/// If an id is out of range, a shape or dtype is wrong, or the devices differ.
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use mamba_ops::{Embedding, embedding};
/// # fn main() -> candle_core::Result<()> {
/// let weight = Var::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let ids = Tensor::new(&[2u32, 0, 2], &Device::Cpu)?;
/// let y = embedding(&Embedding::new(&ids, &weight))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]]);
/// let grads = y.sum_all()?.backward()?;
/// let grad = grads.get(&weight).map(|grad| grad.to_vec2::<f32>()).transpose()?;
/// assert_eq!(grad, Some(vec![vec![1.0, 1.0], vec![0.0, 0.0], vec![2.0, 2.0]]));
/// # Ok(()) }
/// ```
/// # Source
/// `torch.nn.functional.embedding`.
pub fn embedding(args: &Embedding) -> Result<Tensor> {
    args.check()?;
    if args.weight.track_op() && args.ids.elem_count() > 0 {
        return autograd::apply(args);
    }
    reference::forward(args)
}
