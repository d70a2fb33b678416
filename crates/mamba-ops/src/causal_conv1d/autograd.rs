//! The op as a node of candle's graph.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{CausalConv1d, CausalConv1dOutput, OP, Sizes, cpu, window_dtype};
use crate::autograd::{self, Forward, FusedFn};
use crate::host;
use crate::layout::{Activation, SequenceLayout};
use crate::packing::Packing;
use crate::simd::Isa;

// Slots of the inputs.
pub(super) const X: usize = 0;
pub(super) const WEIGHT: usize = 1;
pub(super) const BIAS: usize = 2;
pub(super) const INITIAL_STATE: usize = 3;
pub(super) const SLOTS: usize = 4;

pub(super) struct Node {
    pub sizes: Sizes,
    pub packing: Packing,
    pub layout: SequenceLayout,
    pub activation: Activation,
}

pub(super) fn apply(args: &CausalConv1d, sizes: Sizes) -> Result<CausalConv1dOutput> {
    let [y, final_state] = autograd::apply(Node::new(args, sizes), &inputs(args))?;
    Ok(CausalConv1dOutput { y, final_state })
}

pub(super) fn inputs<'a>(args: &CausalConv1d<'a>) -> [Option<&'a Tensor>; SLOTS] {
    [Some(args.x), Some(args.weight), args.bias, args.initial_state]
}

impl Node {
    pub(super) fn new(args: &CausalConv1d, sizes: Sizes) -> Self {
        let packing = args.packing.cloned().unwrap_or_else(|| Packing::rows(sizes.batch, sizes.seqlen));
        Self { sizes, packing, layout: args.layout, activation: args.activation }
    }

    /// Reads the inputs and hands them to `f` as slices.
    fn with<R>(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        f: impl FnOnce(&cpu::Conv) -> Result<R>,
    ) -> Result<R> {
        let x = host::read_slot(OP, inputs, X)?;
        let weight = host::read_slot(OP, inputs, WEIGHT)?;
        let bias = host::read_opt("bias", inputs[BIAS].as_ref())?;
        let initial_state = host::read_opt("initial_state", inputs[INITIAL_STATE].as_ref())?;
        f(&cpu::Conv {
            sizes: self.sizes,
            packing: &self.packing,
            layout: self.layout,
            activation: self.activation,
            x: &x,
            weight: &weight,
            bias: bias.as_deref(),
            initial_state: initial_state.as_deref(),
        })
    }
}

impl FusedFn<SLOTS, 2> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], _tracked: bool) -> Result<Forward<2>> {
        let x = host::slot(OP, inputs, X)?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::forward(self, inputs);
        }
        self.with(inputs, |conv| {
            let y = host::output(cpu::forward(conv, Isa::current()), x.shape().clone(), x.dtype())?;
            let state = host::output(cpu::final_state(conv), self.sizes.state_shape(), window_dtype(x))?;
            Ok(Forward { outputs: [y, state], saved: vec![] })
        })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        needs: &[bool; SLOTS],
        _saved: &[Tensor],
        grads: &[Option<Tensor>; 2],
    ) -> Result<[Option<Tensor>; SLOTS]> {
        #[cfg(feature = "cuda")]
        if host::slot(OP, inputs, X)?.device().is_cuda() {
            return cuda::backward(self, inputs, needs, grads);
        }
        let grad_y = host::read_opt("gradient of y", grads[0].as_ref())?;
        let grad_state = host::read_opt("gradient of final_state", grads[1].as_ref())?;
        self.with(inputs, |conv| {
            let g = cpu::backward(conv, Isa::current(), grad_y.as_deref(), grad_state.as_deref());
            host::gradients(inputs, needs, [g.x, g.weight, g.bias, g.initial_state])
        })
    }
}
