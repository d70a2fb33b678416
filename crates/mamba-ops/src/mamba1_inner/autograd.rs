//! The block as a node of candle's graph: the chain rule over its parts.

use candle_core::{Result, Tensor, bail};

use super::{Mamba1Inner, OP, Sizes};
use crate::autograd;
use crate::causal_conv1d::CausalConv1d;
use crate::host;
use crate::layout::SequenceLayout;
use crate::packing::Packing;
use crate::part::{Block, BlockNode, Part};
use crate::projection::{
    channels, output_backward, project, project_backward, project_both_backward, project_weight_backward,
    side_by_side,
};
use crate::selective_scan::SelectiveScan;

// Slots of the inputs.
const XZ: usize = 0;
const CONV_WEIGHT: usize = 1;
const CONV_BIAS: usize = 2;
const X_PROJ: usize = 3;
const DT_PROJ: usize = 4;
const DELTA_BIAS: usize = 5;
const A: usize = 6;
const D: usize = 7;
const OUT_PROJ: usize = 8;
const CONV_STATE: usize = 9;
const SSM_STATE: usize = 10;
const IN_PROJ: usize = 11;
const SLOTS: usize = 12;

type Inputs = [Option<Tensor>; SLOTS];

struct Node {
    sizes: Sizes,
    delta_softplus: bool,
    packing: Option<Packing>,
}

/// What lies between the inputs and the last projection.
struct Between {
    /// `[x | z]`.
    xz: Tensor,
    conv: Part,
    /// The convolved `x`.
    x: Tensor,
    /// `[dt | B | C]`.
    projected: Tensor,
    scan: Part,
    /// What the scan gives, where there is a last projection.
    y: Option<Tensor>,
}

pub(super) fn apply(args: &Mamba1Inner, sizes: Sizes) -> Result<[Tensor; 3]> {
    let node = Node { sizes, delta_softplus: args.delta_softplus, packing: args.packing.cloned() };
    let inputs = [
        Some(args.xz),
        Some(args.conv_weight),
        args.conv_bias,
        Some(args.x_proj),
        Some(args.dt_proj),
        args.delta_bias,
        Some(args.a),
        args.d,
        args.out_proj,
        args.initial_conv_state,
        args.initial_ssm_state,
        args.in_proj,
    ];
    autograd::apply(BlockNode::new(node, args.recompute), &inputs)
}

impl Block<SLOTS> for Node {
    const NAME: &'static str = OP;
    const OUT_PROJ: usize = OUT_PROJ;
    type Between = Between;

    fn run(&self, inputs: &Inputs, tracked: bool) -> Result<(Between, [Tensor; 3])> {
        let Sizes { dim, d_state, dt_rank } = self.sizes;
        let (layout, packing) = (SequenceLayout::ChannelsLast, self.packing.as_ref());
        let input = |slot: usize| host::slot(OP, inputs, slot);
        let xz = match &inputs[IN_PROJ] {
            Some(weight) => project(input(XZ)?, weight)?,
            None => input(XZ)?.clone(),
        };
        let (conv, [x, conv_state]) = CausalConv1d {
            bias: inputs[CONV_BIAS].as_ref(),
            initial_state: inputs[CONV_STATE].as_ref(),
            layout,
            packing,
            ..CausalConv1d::new(&channels(&xz, 0, dim)?, input(CONV_WEIGHT)?)
        }
        .part(tracked)?;
        let projected = project(&x, input(X_PROJ)?)?;
        let delta = project(&channels(&projected, 0, dt_rank)?, input(DT_PROJ)?)?;
        let (scan, [y, ssm_state]) = SelectiveScan {
            d: inputs[D].as_ref(),
            z: Some(&channels(&xz, dim, dim)?),
            delta_bias: inputs[DELTA_BIAS].as_ref(),
            delta_softplus: self.delta_softplus,
            initial_state: inputs[SSM_STATE].as_ref(),
            layout,
            packing,
            ..SelectiveScan::new(
                &x,
                &delta,
                input(A)?,
                &channels(&projected, dt_rank, d_state)?,
                &channels(&projected, dt_rank + d_state, d_state)?,
            )
        }
        .part(tracked)?;
        // Without a projection `y` is an output, which has its storage for itself.
        let kept = inputs[OUT_PROJ].is_some().then(|| y.clone());
        Ok((Between { xz, conv, x, projected, scan, y: kept }, [y, conv_state, ssm_state]))
    }

    fn gradients(
        &self,
        between: &Between,
        inputs: &Inputs,
        needs: &[bool; SLOTS],
        grads: &[Option<Tensor>; 3],
    ) -> Result<Inputs> {
        let Sizes { dim, d_state, dt_rank } = self.sizes;
        let [of_y, of_conv_state, of_ssm_state] = grads.clone();
        let input = |slot: usize| host::slot(OP, inputs, slot);
        let mut out = [const { None }; SLOTS];
        let [of_y, of_out_proj] = output_backward(&of_y, &between.y, &inputs[OUT_PROJ], needs[OUT_PROJ])?;
        out[OUT_PROJ] = of_out_proj;

        let varying = [true, true, needs[A], true, true];
        // Of the first projection, both factors need the gradient of what it gives.
        let needs_xz = needs[XZ] || needs[IN_PROJ];
        let scan_needs = |[u, delta, a, b, c]: [bool; 5]| {
            [u, delta, a, b, c, needs[D], needs_xz, needs[DELTA_BIAS], needs[SSM_STATE]]
        };
        let [of_u, of_delta, of_a, of_b, of_c, of_d, of_z, of_bias, of_state] =
            between.scan.backward(scan_needs(varying), &[of_y, of_ssm_state])?;
        let (Some(of_u), Some(of_delta)) = (of_u, of_delta) else { bail!("{OP}: the scan lost a gradient") };
        [out[A], out[D], out[DELTA_BIAS], out[SSM_STATE]] = [of_a, of_d, of_bias, of_state];

        let dt = channels(&between.projected, 0, dt_rank)?;
        if needs[DT_PROJ] {
            out[DT_PROJ] = Some(project_weight_backward(&of_delta, &dt, input(DT_PROJ)?)?);
        }
        let of_dt = project_backward(&of_delta, input(DT_PROJ)?)?;
        let parts = [(Some(of_dt), dt_rank), (of_b, d_state), (of_c, d_state)];
        let of_projected = side_by_side(&parts, &between.projected)?;
        if needs[X_PROJ] {
            out[X_PROJ] = Some(project_weight_backward(&of_projected, &between.x, input(X_PROJ)?)?);
        }
        let of_x = match of_u.elem_count() {
            0 => of_u,
            _ => (of_u + project_backward(&of_projected, input(X_PROJ)?)?)?,
        };

        let conv_needs = [needs_xz, needs[CONV_WEIGHT], needs[CONV_BIAS], needs[CONV_STATE]];
        let [of_x, of_weight, of_bias, of_state] =
            between.conv.backward(conv_needs, &[Some(of_x), of_conv_state])?;
        [out[CONV_WEIGHT], out[CONV_BIAS], out[CONV_STATE]] = [of_weight, of_bias, of_state];
        if needs_xz {
            let of_xz = side_by_side(&[(of_x, dim), (of_z, dim)], &between.xz)?;
            [out[XZ], out[IN_PROJ]] = match &inputs[IN_PROJ] {
                Some(weight) => {
                    project_both_backward(&of_xz, input(XZ)?, weight, [needs[XZ], needs[IN_PROJ]])?
                }
                None => [Some(of_xz), None],
            };
        }
        Ok(out)
    }
}
