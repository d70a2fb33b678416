//! The op as a node of candle's graph.

use candle_core::{DType, Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Embedding, OP, cpu, reference};
use crate::autograd::{self, Forward, FusedFn};
use crate::{args, host, part};

// Slots of the inputs.
const IDS: usize = 0;
const WEIGHT: usize = 1;
const SLOTS: usize = 2;

struct Node;

pub(super) fn apply(args: &Embedding) -> Result<Tensor> {
    let [y] = autograd::apply(Node, &[Some(args.ids), Some(args.weight)])?;
    Ok(y)
}

impl FusedFn<SLOTS, 1> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], _tracked: bool) -> Result<Forward<1>> {
        let (ids, weight) = (host::slot(OP, inputs, IDS)?, host::slot(OP, inputs, WEIGHT)?);
        let y = reference::forward(&Embedding { ids, weight })?;
        Ok(Forward { outputs: [part::take(&y)?], saved: vec![] })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        _needs: &[bool; SLOTS],
        _saved: &[Tensor],
        grads: &[Option<Tensor>; 1],
    ) -> Result<[Option<Tensor>; SLOTS]> {
        let (ids, weight) = (host::slot(OP, inputs, IDS)?, host::slot(OP, inputs, WEIGHT)?);
        let (rows, dim) = weight.dims2()?;
        let [Some(grad)] = grads else { return Ok([None, Some(weight.zeros_like()?)]) };
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() && args::fused(weight) {
            return Ok([None, Some(cuda::backward(ids, grad, weight)?)]);
        }
        let of_weight = if args::fused_on_cpu(weight) {
            let ids = ids.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
            if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
                bail!("{OP}: `ids` has {id}, expected 0 to {}", rows - 1)
            }
            let grad = host::read("gradient of y", grad)?;
            host::tensor(cpu::backward(&ids, &grad, rows, dim), (rows, dim), weight.dtype())?
        } else {
            let grad = grad.contiguous()?.reshape(((), dim))?;
            weight.zeros_like()?.index_add(&ids.flatten_all()?, &grad, 0)?
        };
        Ok([None, Some(of_weight)])
    }
}
