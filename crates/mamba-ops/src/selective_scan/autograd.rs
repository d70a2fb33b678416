//! The op as a node of candle's graph; the states before each tile are what it saves.

use candle_core::{Device, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{OP, SelectiveScan, SelectiveScanOutput, Sizes, cpu};
use crate::autograd::{self, Forward, FusedFn};
use crate::host;
use crate::layout::SequenceLayout;
use crate::packing::Packing;
use crate::simd::Isa;

// Slots of the inputs.
pub(super) const U: usize = 0;
pub(super) const DELTA: usize = 1;
pub(super) const A: usize = 2;
pub(super) const B: usize = 3;
pub(super) const C: usize = 4;
pub(super) const D: usize = 5;
pub(super) const Z: usize = 6;
pub(super) const DELTA_BIAS: usize = 7;
pub(super) const INITIAL_STATE: usize = 8;
pub(super) const SLOTS: usize = 9;

pub(super) struct Node {
    pub sizes: Sizes,
    pub packing: Packing,
    pub layout: SequenceLayout,
    pub delta_softplus: bool,
    /// Kept states are in the order of the vectors of one instruction set.
    pub isa: Isa,
}

pub(super) fn apply(args: &SelectiveScan, sizes: Sizes) -> Result<SelectiveScanOutput> {
    let [y, final_state] = autograd::apply(Node::new(args, sizes), &inputs(args))?;
    Ok(SelectiveScanOutput { y, final_state })
}

pub(super) fn inputs<'a>(args: &SelectiveScan<'a>) -> [Option<&'a Tensor>; SLOTS] {
    let SelectiveScan { u, delta, a, b, c, d, z, delta_bias, initial_state, .. } = *args;
    [Some(u), Some(delta), Some(a), Some(b), Some(c), d, z, delta_bias, initial_state]
}

impl Node {
    pub(super) fn new(args: &SelectiveScan, sizes: Sizes) -> Self {
        let packing = args.packing.cloned().unwrap_or_else(|| Packing::rows(sizes.batch, sizes.seqlen));
        let SelectiveScan { layout, delta_softplus, .. } = *args;
        Self { sizes, packing, layout, delta_softplus, isa: Isa::current() }
    }

    /// Reads the inputs and hands them to `f` as slices.
    fn with<R>(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        f: impl FnOnce(&cpu::Scan) -> Result<R>,
    ) -> Result<R> {
        let Self { sizes, layout, delta_softplus, .. } = *self;
        let (u, delta) = (host::read_slot(OP, inputs, U)?, host::read_slot(OP, inputs, DELTA)?);
        let a = host::read_slot(OP, inputs, A)?;
        let (b, c) = (host::read_slot(OP, inputs, B)?, host::read_slot(OP, inputs, C)?);
        let d = host::read_opt("d", inputs[D].as_ref())?;
        let z = host::read_opt("z", inputs[Z].as_ref())?;
        let delta_bias = host::read_opt("delta_bias", inputs[DELTA_BIAS].as_ref())?;
        let initial_state = host::read_opt("initial_state", inputs[INITIAL_STATE].as_ref())?;
        f(&cpu::Scan {
            sizes,
            packing: &self.packing,
            layout,
            u: &u,
            delta: &delta,
            a: &a,
            b: cpu::Coefficients::new(&b, sizes, sizes.b_groups, layout),
            c: cpu::Coefficients::new(&c, sizes, sizes.c_groups, layout),
            d: d.as_deref(),
            z: z.as_deref(),
            delta_bias: delta_bias.as_deref(),
            delta_softplus,
            initial_state: initial_state.as_deref(),
        })
    }
}

impl FusedFn<SLOTS, 2> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], tracked: bool) -> Result<Forward<2>> {
        let u = host::slot(OP, inputs, U)?;
        #[cfg(feature = "cuda")]
        if u.device().is_cuda() {
            return cuda::forward(self, inputs, tracked);
        }
        self.with(inputs, |scan| {
            let cpu::Forward { y, final_state, checkpoints } = cpu::forward(scan, self.isa, tracked);
            let y = host::output(y, u.shape().clone(), u.dtype())?;
            let state = host::output(final_state, self.sizes.state_shape(), candle_core::DType::F32)?;
            let len = checkpoints.len();
            let saved =
                if tracked { vec![Tensor::from_vec(checkpoints, len, &Device::Cpu)?] } else { vec![] };
            Ok(Forward { outputs: [y, state], saved })
        })
    }

    fn backward(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        needs: &[bool; SLOTS],
        saved: &[Tensor],
        grads: &[Option<Tensor>; 2],
    ) -> Result<[Option<Tensor>; SLOTS]> {
        #[cfg(feature = "cuda")]
        if host::slot(OP, inputs, U)?.device().is_cuda() {
            return cuda::backward(self, inputs, needs, saved, grads);
        }
        let checkpoints = host::read("checkpoints", &saved[0])?;
        let grad_y = host::read_opt("gradient of y", grads[0].as_ref())?;
        let grad_state = host::read_opt("gradient of final_state", grads[1].as_ref())?;
        self.with(inputs, |scan| {
            let g = cpu::backward(scan, self.isa, &checkpoints, grad_y.as_deref(), grad_state.as_deref());
            let values = [g.u, g.delta, g.a, g.b, g.c, g.d, g.z, g.delta_bias, g.initial_state];
            host::gradients(inputs, needs, values)
        })
    }
}
