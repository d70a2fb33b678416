//! The op as a node of candle's graph; on CPUs the states before each chunk are what it saves.

use candle_core::{DType, Device, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{OP, Sizes, SsdChunkScan, SsdChunkScanOutput, cpu};
use crate::autograd::{self, Forward, FusedFn};
use crate::host;
use crate::packing::Packing;
use crate::simd::Isa;

// Slots of the inputs.
pub(super) const X: usize = 0;
pub(super) const DT: usize = 1;
pub(super) const A: usize = 2;
pub(super) const B: usize = 3;
pub(super) const C: usize = 4;
pub(super) const D: usize = 5;
pub(super) const Z: usize = 6;
pub(super) const DT_BIAS: usize = 7;
pub(super) const INITIAL_STATE: usize = 8;
pub(super) const SLOTS: usize = 9;

pub(super) struct Node {
    pub sizes: Sizes,
    pub packing: Packing,
    pub dt_softplus: bool,
    pub dt_limit: (f32, f32),
    pub chunk_size: usize,
}

pub(super) fn apply(args: &SsdChunkScan, sizes: Sizes) -> Result<SsdChunkScanOutput> {
    let [y, final_state] = autograd::apply(Node::new(args, sizes), &inputs(args))?;
    Ok(SsdChunkScanOutput { y, final_state })
}

pub(super) fn inputs<'a>(args: &SsdChunkScan<'a>) -> [Option<&'a Tensor>; SLOTS] {
    let SsdChunkScan { x, dt, a, b, c, d, z, dt_bias, initial_state, .. } = *args;
    [Some(x), Some(dt), Some(a), Some(b), Some(c), d, z, dt_bias, initial_state]
}

impl Node {
    pub(super) fn new(args: &SsdChunkScan, sizes: Sizes) -> Self {
        let packing = args.packing.cloned().unwrap_or_else(|| Packing::rows(sizes.batch, sizes.seqlen));
        let SsdChunkScan { dt_softplus, dt_limit: (low, high), chunk_size, .. } = *args;
        Self { sizes, packing, dt_softplus, dt_limit: (low as f32, high as f32), chunk_size }
    }

    /// Reads the inputs and hands them to `f` as slices.
    fn with<R>(
        &self,
        inputs: &[Option<Tensor>; SLOTS],
        f: impl FnOnce(&cpu::Scan) -> Result<R>,
    ) -> Result<R> {
        let (x, dt) = (host::read_slot(OP, inputs, X)?, host::read_slot(OP, inputs, DT)?);
        let a = host::read_slot(OP, inputs, A)?;
        let (b, c) = (host::read_slot(OP, inputs, B)?, host::read_slot(OP, inputs, C)?);
        let d = host::read_opt("d", inputs[D].as_ref())?;
        let z = host::read_opt("z", inputs[Z].as_ref())?;
        let dt_bias = host::read_opt("dt_bias", inputs[DT_BIAS].as_ref())?;
        let initial_state = host::read_opt("initial_state", inputs[INITIAL_STATE].as_ref())?;
        f(&cpu::Scan {
            sizes: self.sizes,
            packing: &self.packing,
            chunk: cpu::chunk_len(self.chunk_size, &self.packing),
            x: &x,
            dt: &dt,
            a: &a,
            b: &b,
            c: &c,
            d: d.as_deref(),
            d_per_channel: inputs[D].as_ref().is_some_and(|d| d.rank() == 2),
            z: z.as_deref(),
            dt_bias: dt_bias.as_deref(),
            dt_softplus: self.dt_softplus,
            dt_limit: self.dt_limit,
            initial_state: initial_state.as_deref(),
        })
    }
}

impl FusedFn<SLOTS, 2> for Node {
    const NAME: &'static str = OP;

    fn forward(&self, inputs: &[Option<Tensor>; SLOTS], tracked: bool) -> Result<Forward<2>> {
        let x = host::slot(OP, inputs, X)?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return cuda::forward(self, inputs);
        }
        self.with(inputs, |scan| {
            let cpu::Forward { y, final_state, checkpoints } = cpu::forward(scan, Isa::current(), tracked);
            let y = host::output(y, x.shape().clone(), x.dtype())?;
            let state = host::output(final_state, self.sizes.state_shape(), DType::F32)?;
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
        if host::slot(OP, inputs, X)?.device().is_cuda() {
            return cuda::backward(self, inputs, needs, grads);
        }
        let checkpoints = host::read("checkpoints", &saved[0])?;
        let grad_y = host::read_opt("gradient of y", grads[0].as_ref())?;
        let grad_state = host::read_opt("gradient of final_state", grads[1].as_ref())?;
        self.with(inputs, |scan| {
            let g =
                cpu::backward(scan, Isa::current(), &checkpoints, grad_y.as_deref(), grad_state.as_deref());
            let values = [g.x, g.dt, g.a, g.b, g.c, g.d, g.z, g.dt_bias, g.initial_state];
            host::gradients(inputs, needs, values)
        })
    }
}
