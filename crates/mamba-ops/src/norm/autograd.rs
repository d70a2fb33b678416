//! The op as a node of candle's graph; the sum with the residual is an output unless it is just `x`.

use candle_core::{Result, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{Norm, NormKind, NormOutput, OP, Sizes, cpu};
use crate::autograd::{self, Forward, FusedFn, Output};
use crate::host;
use crate::simd::Isa;

// Slots of the inputs.
pub(super) const X: usize = 0;
pub(super) const WEIGHT: usize = 1;
pub(super) const BIAS: usize = 2;
pub(super) const RESIDUAL: usize = 3;
pub(super) const Z: usize = 4;
pub(super) const SLOTS: usize = 5;

pub(super) struct Node {
    pub sizes: Sizes,
    pub kind: NormKind,
    pub eps: f64,
    pub norm_before_gate: bool,
    pub residual_dtype: candle_core::DType,
}

pub(super) fn apply(args: &Norm, sizes: Sizes) -> Result<NormOutput> {
    let (node, inputs) = (Node::new(args, sizes), inputs(args));
    if args.residual.is_some() || node.residual_dtype != args.x.dtype() {
        let [y, residual] = autograd::apply(node, &inputs)?;
        Ok(NormOutput { y, residual })
    } else {
        let [y] = autograd::apply(node, &inputs)?;
        Ok(NormOutput { y, residual: args.x.clone() })
    }
}

pub(super) fn inputs<'a>(args: &Norm<'a>) -> [Option<&'a Tensor>; SLOTS] {
    [Some(args.x), args.weight, args.bias, args.residual, args.z]
}

impl Node {
    pub(super) fn new(args: &Norm, sizes: Sizes) -> Self {
        let Norm { kind, eps, norm_before_gate, .. } = *args;
        Self { sizes, kind, eps, norm_before_gate, residual_dtype: args.residual_dtype() }
    }

    /// Reads the inputs and hands them to `f` as slices.
    fn with<R>(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        f: impl FnOnce(&cpu::Rows) -> Result<R>,
    ) -> Result<R> {
        let x = host::read_slot(OP, inputs, X)?;
        let weight = host::read_opt("weight", inputs[WEIGHT].as_ref())?;
        let bias = host::read_opt("bias", inputs[BIAS].as_ref())?;
        let residual = host::read_opt("residual", inputs[RESIDUAL].as_ref())?;
        let z = host::read_opt("z", inputs[Z].as_ref())?;
        f(&cpu::Rows {
            sizes: self.sizes,
            kind: self.kind,
            eps: self.eps as f32,
            norm_before_gate: self.norm_before_gate,
            x: &x,
            weight: weight.as_deref(),
            bias: bias.as_deref(),
            residual: residual.as_deref(),
            z: z.as_deref(),
        })
    }

    fn gradients(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        needs: &[bool; SLOTS],
        grad_y: Option<&Tensor>,
        grad_sum: Option<&Tensor>,
    ) -> Result<[Option<Tensor>; SLOTS]> {
        #[cfg(feature = "cuda")]
        if host::slot(OP, inputs, X)?.device().is_cuda() {
            return cuda::backward(self, inputs, needs, [grad_y, grad_sum]);
        }
        let grad_y = host::read_opt("gradient of y", grad_y)?;
        let grad_sum = host::read_opt("gradient of residual", grad_sum)?;
        self.with(inputs, |rows| {
            let g = cpu::backward(rows, Isa::current(), grad_y.as_deref(), grad_sum.as_deref());
            let residual = if needs[RESIDUAL] { g.sum.clone() } else { vec![] };
            host::gradients(inputs, needs, [g.sum, g.weight, g.bias, residual, g.z])
        })
    }
}

fn outputs<const OUTPUTS: usize>(outputs: Vec<Output>) -> Result<Forward<OUTPUTS>> {
    let outputs = outputs.try_into().or_else(|_| bail!("{OP}: lost an output"))?;
    Ok(Forward { outputs, saved: vec![] })
}

/// One output, `y`, or two, the sum with the residual after it.
impl<const OUTPUTS: usize> FusedFn<SLOTS, OUTPUTS> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], _tracked: bool) -> Result<Forward<OUTPUTS>> {
        let x = host::slot(OP, inputs, X)?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return outputs(cuda::forward(self, inputs, OUTPUTS > 1)?);
        }
        self.with(inputs, |rows| {
            let cpu::Forward { y, sum } = cpu::forward(rows, Isa::current(), OUTPUTS > 1);
            let mut all = vec![host::output(y, x.shape().clone(), x.dtype())?];
            if let Some(sum) = sum {
                all.push(host::output(sum, x.shape().clone(), self.residual_dtype)?);
            }
            outputs(all)
        })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        needs: &[bool; SLOTS],
        _saved: &[Tensor],
        grads: &[Option<Tensor>; OUTPUTS],
    ) -> Result<[Option<Tensor>; SLOTS]> {
        let [grad_y, grad_sum] = [grads[0].as_ref(), grads.get(1).and_then(Option::as_ref)];
        let dtype = |slot: usize| inputs[slot].as_ref().map(Tensor::dtype);
        // The gradient of the sum is that of both its terms.
        let shared = needs[X] && needs[RESIDUAL] && dtype(X) == dtype(RESIDUAL);
        let mut separate = *needs;
        separate[RESIDUAL] &= !shared;
        let mut grads = self.gradients(inputs, &separate, grad_y, grad_sum)?;
        if shared {
            grads[RESIDUAL] = grads[X].clone();
        }
        Ok(grads)
    }
}
