//! The op as a node of candle's graph: backward is forward of another tensor.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Mask, OP, cpu};
use crate::autograd::{self, Forward, FusedFn, Output};
use crate::host;

struct Node(Mask);

pub(super) fn apply(x: &Tensor, mask: Mask) -> Result<Tensor> {
    let [y] = autograd::apply(Node(mask), &[Some(x)])?;
    Ok(y)
}

impl Node {
    fn run(&self, x: &Tensor) -> Result<Output> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::apply(self.0, x);
        }
        host::output(cpu::apply(self.0, &host::read("x", x)?), x.shape().clone(), x.dtype())
    }
}

impl FusedFn<1, 1> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; 1], _tracked: bool) -> Result<Forward<1>> {
        Ok(Forward { outputs: [self.run(host::slot(OP, inputs, 0)?)?], saved: vec![] })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; 1],
        _needs: &[bool; 1],
        _saved: &[Tensor],
        grads: &[Option<Tensor>; 1],
    ) -> Result<[Option<Tensor>; 1]> {
        match &grads[0] {
            Some(grad) => Ok([Some(Tensor::from(self.run(grad)?))]),
            None => Ok([Some(host::slot(OP, inputs, 0)?.zeros_like()?)]),
        }
    }
}
