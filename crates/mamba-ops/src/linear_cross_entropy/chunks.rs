//! Some rows of logits at a time: their losses and, while training, the gradients of both factors.

use candle_core::{DType, Result, Tensor};

use super::{LinearCrossEntropy, Sizes, cpu};
use crate::args::state_dtype;
use crate::host;
use crate::simd::Isa;

/// Logits that exist at once, about.
const ELEMENTS: usize = 1 << 22;
/// Rows at least: products of fewer are slow.
const ROWS: usize = 64;

/// Which gradients are asked for.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    pub x: bool,
    pub weight: bool,
}

pub(super) struct Sums {
    /// A scalar.
    pub loss: Tensor,
    /// The gradient of the loss by `x`, in its dtype.
    pub x: Option<Tensor>,
    /// That by `weight`, in its dtype.
    pub weight: Option<Tensor>,
}

/// Everything at once, of detached arguments.
pub(super) fn run(args: &LinearCrossEntropy, sizes: Sizes, needs: Needs) -> Result<Sums> {
    let Sizes { rows, dim, classes } = sizes;
    let (x, device) = (args.x, args.x.device());
    let sums = state_dtype(x.dtype());
    // On the CPU candle's products of half floats convert their operands anyway.
    let products = if device.is_cpu() { sums } else { x.dtype() };
    let weight = args.weight.to_dtype(products)?;
    let transposed = weight.t()?;
    let chunk = args.chunk_rows.unwrap_or((ELEMENTS / classes).max(ROWS));
    let mut loss = Tensor::zeros((), sums, device)?;
    let (mut of_x, mut of_weight) = (vec![], None::<Tensor>);
    for start in (0..if dim == 0 { 0 } else { rows }).step_by(chunk) {
        let count = chunk.min(rows - start);
        let x = x.narrow(0, start, count)?.to_dtype(products)?.contiguous()?;
        let logits = x.matmul(&transposed)?;
        let targets = args.targets.narrow(0, start, count)?;
        let (part, grad) = if device.is_cpu() && sums == DType::F32 {
            on_slices(args, &logits, &targets, classes)?
        } else {
            on_tensors(args, &logits.to_dtype(sums)?, &targets)?
        };
        loss = (loss + part)?;
        let grad = grad.to_dtype(products)?;
        if needs.x {
            of_x.push(grad.matmul(&weight)?.to_dtype(args.x.dtype())?);
        }
        if needs.weight {
            let part = grad.t()?.matmul(&x)?.to_dtype(sums)?;
            of_weight = Some(match of_weight {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
    }
    let of_x = match (needs.x, of_x.is_empty()) {
        (false, _) => None,
        (true, true) => Some(args.x.zeros_like()?),
        (true, false) => Some(Tensor::cat(&of_x, 0)?),
    };
    let of_weight = match (needs.weight, of_weight) {
        (false, _) => None,
        (true, None) => Some(args.weight.zeros_like()?),
        (true, Some(sum)) => Some(sum.to_dtype(args.weight.dtype())?),
    };
    Ok(Sums { loss, x: of_x, weight: of_weight })
}

/// The sum of the losses, and the gradient by the logits, which takes their place.
fn on_slices(
    args: &LinearCrossEntropy,
    logits: &Tensor,
    targets: &Tensor,
    classes: usize,
) -> Result<(Tensor, Tensor)> {
    let targets = targets.to_vec1::<i64>()?;
    let scale = args.logit_scale as f32;
    let rows = cpu::Rows { classes, targets: &targets, ignore_index: args.ignore_index, scale };
    let losses = host::modify(super::OP, logits, |logits| Ok(cpu::losses(&rows, logits, Isa::current())))?;
    let sum: f64 = losses.into_iter().map(f64::from).sum();
    Ok((Tensor::new(sum as f32, logits.device())?, logits.clone()))
}

/// The same in tensor operations.
fn on_tensors(args: &LinearCrossEntropy, logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let dtype = logits.dtype();
    let logits = (logits * args.logit_scale)?;
    let ignored = targets.eq(args.ignore_index)?;
    let classes = ignored.where_cond(&targets.zeros_like()?, targets)?.unsqueeze(1)?;
    let counted = (1.0 - ignored.to_dtype(dtype)?.unsqueeze(1)?)?;
    let max = logits.max_keepdim(1)?;
    let wanted = logits.gather(&classes, 1)?;
    let exp = logits.broadcast_sub(&max)?.exp()?;
    let total = exp.sum_keepdim(1)?;
    let losses = ((total.log()? + max)? - wanted)?.mul(&counted)?;
    let softmax = exp.broadcast_div(&total)?;
    let minus_one = Tensor::full(-1.0f64, classes.shape(), logits.device())?.to_dtype(dtype)?;
    let grad = softmax.scatter_add(&classes, &minus_one, 1)?.broadcast_mul(&counted)?;
    Ok((losses.sum_all()?, (grad * args.logit_scale)?))
}
