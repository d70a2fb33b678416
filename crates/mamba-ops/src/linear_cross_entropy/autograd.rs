//! The op as a node of candle's graph: the gradients are computed in forward, and scaled in backward.

use candle_core::{Result, Tensor};

use super::chunks::{self, Needs, Sums};
use super::{LinearCrossEntropy, OP, Sizes};
use crate::autograd::{self, Forward, FusedFn};
use crate::{args, host, part};

// Slots of the inputs.
const X: usize = 0;
const WEIGHT: usize = 1;
const TARGETS: usize = 2;
const SLOTS: usize = 3;

struct Node {
    sizes: Sizes,
    needs: Needs,
    ignore_index: i64,
    logit_scale: f64,
    chunk_rows: Option<usize>,
}

pub(super) fn apply(args: &LinearCrossEntropy, sizes: Sizes) -> Result<Tensor> {
    let LinearCrossEntropy { x, weight, targets, ignore_index, logit_scale, chunk_rows } = *args;
    let needs = Needs { x: autograd::needs_gradient(x), weight: autograd::needs_gradient(weight) };
    let node = Node { sizes, needs, ignore_index, logit_scale, chunk_rows };
    let [loss] = autograd::apply(node, &[Some(x), Some(weight), Some(targets)])?;
    Ok(loss)
}

fn compute(args: &LinearCrossEntropy, sizes: Sizes, needs: Needs) -> Result<Sums> {
    #[cfg(feature = "cuda")]
    if args.x.device().is_cuda() && args::fused(args.x) && sizes.rows * sizes.dim > 0 {
        return super::cuda::run(args, sizes, needs);
    }
    chunks::run(args, sizes, needs)
}

/// A gradient of the loss times that of something by the loss: one rounding, and none of the factor, which may be tiny.
fn scaled(of_sum: &Tensor, grad: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if of_sum.device().is_cuda() && args::fused(of_sum) && of_sum.elem_count() > 0 {
        return super::cuda::scaled(of_sum, grad);
    }
    let wide = args::state_dtype(of_sum.dtype());
    of_sum.to_dtype(wide)?.broadcast_mul(&grad.to_dtype(wide)?)?.to_dtype(of_sum.dtype())
}

impl FusedFn<SLOTS, 1> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], _tracked: bool) -> Result<Forward<1>> {
        let args = LinearCrossEntropy {
            ignore_index: self.ignore_index,
            logit_scale: self.logit_scale,
            chunk_rows: self.chunk_rows,
            ..LinearCrossEntropy::new(
                host::slot(OP, inputs, X)?,
                host::slot(OP, inputs, WEIGHT)?,
                host::slot(OP, inputs, TARGETS)?,
            )
        };
        let Sums { loss, x, weight } = compute(&args, self.sizes, self.needs)?;
        // In the order of the slots; what is not needed is not there.
        let saved = [x, weight].into_iter().flatten().collect();
        Ok(Forward { outputs: [part::take(&loss)?], saved })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        needs: &[bool; SLOTS],
        saved: &[Tensor],
        grads: &[Option<Tensor>; 1],
    ) -> Result<[Option<Tensor>; SLOTS]> {
        let mut saved = saved.iter();
        let mut out = [const { None }; SLOTS];
        for slot in [X, WEIGHT] {
            let Some(of_sum) = needs[slot].then(|| saved.next()).flatten() else { continue };
            out[slot] = Some(match &grads[0] {
                Some(grad) => scaled(of_sum, grad)?,
                None => host::slot(OP, inputs, slot)?.zeros_like()?,
            });
        }
        Ok(out)
    }
}
