//! The op as a node of candle's graph; the sum with the residual is an output unless it is just `x`.

use candle_core::{Result, Tensor, bail};

use super::{Norm, NormKind, NormOutput, OP, Sizes, cpu};
use crate::autograd::{self, Forward, FusedFn};
use crate::host;
use crate::simd::Isa;

// Slots of the inputs.
const X: usize = 0;
const WEIGHT: usize = 1;
const BIAS: usize = 2;
const RESIDUAL: usize = 3;
const Z: usize = 4;
const SLOTS: usize = 5;

struct Node {
    sizes: Sizes,
    kind: NormKind,
    eps: f64,
    norm_before_gate: bool,
    residual_dtype: candle_core::DType,
}

pub(super) fn apply(args: &Norm, sizes: Sizes) -> Result<NormOutput> {
    let Norm { x, weight, bias, residual, z, kind, eps, norm_before_gate, .. } = *args;
    let residual_dtype = args.residual_dtype();
    let node = Node { sizes, kind, eps, norm_before_gate, residual_dtype };
    let inputs = [Some(x), weight, bias, residual, z];
    if residual.is_some() || residual_dtype != x.dtype() {
        let [y, residual] = autograd::apply(node, &inputs)?;
        Ok(NormOutput { y, residual })
    } else {
        let [y] = autograd::apply(node, &inputs)?;
        Ok(NormOutput { y, residual: x.clone() })
    }
}

impl Node {
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
}

/// One output, `y`, or two, the sum with the residual after it.
impl<const OUTPUTS: usize> FusedFn<SLOTS, OUTPUTS> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], _tracked: bool) -> Result<Forward<OUTPUTS>> {
        let x = host::slot(OP, inputs, X)?;
        self.with(inputs, |rows| {
            let cpu::Forward { y, sum } = cpu::forward(rows, Isa::current(), OUTPUTS > 1);
            let mut outputs = vec![host::output(y, x.shape().clone(), x.dtype())?];
            if let Some(sum) = sum {
                outputs.push(host::output(sum, x.shape().clone(), self.residual_dtype)?);
            }
            let outputs = outputs.try_into().or_else(|_| bail!("{OP}: lost an output"))?;
            Ok(Forward { outputs, saved: vec![] })
        })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        needs: &[bool; SLOTS],
        _saved: &[Tensor],
        grads: &[Option<Tensor>; OUTPUTS],
    ) -> Result<[Option<Tensor>; SLOTS]> {
        let grad_y = host::read_opt("gradient of y", grads[0].as_ref())?;
        let grad_sum = host::read_opt("gradient of residual", grads.get(1).and_then(Option::as_ref))?;
        let dtype = |slot: usize| inputs[slot].as_ref().map(Tensor::dtype);
        // The gradient of the sum is that of both its terms.
        let shared = needs[X] && needs[RESIDUAL] && dtype(X) == dtype(RESIDUAL);
        let mut separate = *needs;
        separate[RESIDUAL] &= !shared;
        let mut grads = self.with(inputs, |rows| {
            let g = cpu::backward(rows, Isa::current(), grad_y.as_deref(), grad_sum.as_deref());
            let residual = if separate[RESIDUAL] { g.sum.clone() } else { vec![] };
            host::gradients(inputs, &separate, [g.sum, g.weight, g.bias, residual, g.z])
        })?;
        if shared {
            grads[RESIDUAL] = grads[X].clone();
        }
        Ok(grads)
    }
}
