//! The block as a node of candle's graph: the chain rule over its parts.

use candle_core::{Result, Tensor};

use super::{Mamba2SplitConv1dScan, OP, Sizes};
use crate::autograd;
use crate::causal_conv1d::CausalConv1d;
use crate::host;
use crate::layout::SequenceLayout;
use crate::norm::Norm;
use crate::packing::Packing;
use crate::part::{Block, BlockNode, Part};
use crate::projection::{channels, groups, output_backward, project, project_both_backward, side_by_side};
use crate::ssd::SsdChunkScan;

// Slots of the inputs.
const ZXBCDT: usize = 0;
const CONV_WEIGHT: usize = 1;
const CONV_BIAS: usize = 2;
const DT_BIAS: usize = 3;
const A: usize = 4;
const D: usize = 5;
const NORM_WEIGHT: usize = 6;
const OUT_PROJ: usize = 7;
const CONV_STATE: usize = 8;
const SSM_STATE: usize = 9;
const IN_PROJ: usize = 10;
const SLOTS: usize = 11;

type Inputs = [Option<Tensor>; SLOTS];

struct Node {
    sizes: Sizes,
    /// Eps, group size, norm before gate.
    norm: (f64, Option<usize>, bool),
    dt_softplus: bool,
    dt_limit: (f64, f64),
    chunk_size: usize,
    packing: Option<Packing>,
}

/// What lies between the inputs and the last projection.
struct Between {
    /// `[z | x | B | C | dt]`.
    zxbcdt: Tensor,
    conv: Part,
    scan: Part,
    norm: Option<Part>,
    /// What is projected, where there is a last projection.
    y: Option<Tensor>,
}

pub(super) fn apply(args: &Mamba2SplitConv1dScan, sizes: Sizes) -> Result<[Tensor; 3]> {
    let Mamba2SplitConv1dScan { dt_softplus, dt_limit, chunk_size, .. } = *args;
    let norm =
        args.norm.map_or((0.0, None, false), |norm| (norm.eps, norm.group_size, norm.norm_before_gate));
    let node = Node { sizes, norm, dt_softplus, dt_limit, chunk_size, packing: args.packing.cloned() };
    let inputs = [
        Some(args.zxbcdt),
        Some(args.conv_weight),
        args.conv_bias,
        args.dt_bias,
        Some(args.a),
        args.d,
        args.norm.map(|norm| norm.weight),
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
        let Sizes { batch, seqlen, nheads, headdim, ngroups, d_state } = self.sizes;
        let (d_ssm, bc) = (nheads * headdim, ngroups * d_state);
        let input = |slot: usize| host::slot(OP, inputs, slot);
        let zxbcdt = match &inputs[IN_PROJ] {
            Some(weight) => project(input(ZXBCDT)?, weight)?,
            None => input(ZXBCDT)?.clone(),
        };
        let z = channels(&zxbcdt, 0, d_ssm)?;
        let (conv, [xbc, conv_state]) = CausalConv1d {
            bias: inputs[CONV_BIAS].as_ref(),
            initial_state: inputs[CONV_STATE].as_ref(),
            layout: SequenceLayout::ChannelsLast,
            packing: self.packing.as_ref(),
            ..CausalConv1d::new(&channels(&zxbcdt, d_ssm, d_ssm + 2 * bc)?, input(CONV_WEIGHT)?)
        }
        .part(tracked)?;
        // Without a norm the scan applies the gate itself.
        let gate = match &inputs[NORM_WEIGHT] {
            None => Some(groups(&zxbcdt, 0, nheads, headdim)?),
            Some(_) => None,
        };
        let (scan, [y, ssm_state]) = SsdChunkScan {
            d: inputs[D].as_ref(),
            z: gate.as_ref(),
            dt_bias: inputs[DT_BIAS].as_ref(),
            dt_softplus: self.dt_softplus,
            dt_limit: self.dt_limit,
            chunk_size: self.chunk_size,
            initial_state: inputs[SSM_STATE].as_ref(),
            packing: self.packing.as_ref(),
            ..SsdChunkScan::new(
                &groups(&xbc, 0, nheads, headdim)?,
                &channels(&zxbcdt, 2 * d_ssm + 2 * bc, nheads)?,
                input(A)?,
                &groups(&xbc, d_ssm, ngroups, d_state)?,
                &groups(&xbc, d_ssm + bc, ngroups, d_state)?,
            )
        }
        .part(tracked)?;
        let y = y.reshape((batch, seqlen, d_ssm))?;
        let (norm, y) = match &inputs[NORM_WEIGHT] {
            None => (None, y),
            Some(weight) => {
                let (eps, group_size, norm_before_gate) = self.norm;
                let norm = Norm { z: Some(&z), group_size, norm_before_gate, ..Norm::rms(&y, weight, eps) };
                let (norm, [y]) = norm.part(tracked)?;
                (Some(norm), y)
            }
        };
        // Without a projection `y` is an output, which has its storage for itself.
        let kept = inputs[OUT_PROJ].is_some().then(|| y.clone());
        Ok((Between { zxbcdt, conv, scan, norm, y: kept }, [y, conv_state, ssm_state]))
    }

    fn gradients(
        &self,
        between: &Between,
        inputs: &Inputs,
        needs: &[bool; SLOTS],
        grads: &[Option<Tensor>; 3],
    ) -> Result<Inputs> {
        let Sizes { batch, seqlen, nheads, headdim, ngroups, d_state } = self.sizes;
        let (d_ssm, bc) = (nheads * headdim, ngroups * d_state);
        let [of_y, of_conv_state, of_ssm_state] = grads.clone();
        // Of the first projection, both factors need the gradient of what it gives.
        let needs_zxbcdt = needs[ZXBCDT] || needs[IN_PROJ];
        let mut out = [const { None }; SLOTS];
        let [of_y, of_out_proj] = output_backward(&of_y, &between.y, &inputs[OUT_PROJ], needs[OUT_PROJ])?;
        out[OUT_PROJ] = of_out_proj;
        // Where `y` is not used, neither are the norm and its gate.
        let (of_y, of_gate) = match (&between.norm, of_y) {
            (Some(norm), Some(of_y)) => {
                let needs = [true, needs[NORM_WEIGHT], false, false, needs_zxbcdt];
                let [of_y, of_weight, _, _, of_z] = norm.backward(needs, &[Some(of_y)])?;
                out[NORM_WEIGHT] = of_weight;
                (of_y, of_z)
            }
            (_, of_y) => {
                out[NORM_WEIGHT] = inputs[NORM_WEIGHT].as_ref().map(Tensor::zeros_like).transpose()?;
                (of_y, None)
            }
        };

        let of_y = of_y.map(|y| y.reshape((batch, seqlen, nheads, headdim))).transpose()?;
        let gated_by_scan = inputs[NORM_WEIGHT].is_none();
        let scan_needs = [
            true,
            needs_zxbcdt,
            needs[A],
            true,
            true,
            needs[D],
            needs_zxbcdt && gated_by_scan,
            needs[DT_BIAS],
            needs[SSM_STATE],
        ];
        let [of_x, of_dt, of_a, of_b, of_c, of_d, of_z, of_bias, of_state] =
            between.scan.backward(scan_needs, &[of_y, of_ssm_state])?;
        [out[A], out[D], out[DT_BIAS], out[SSM_STATE]] = [of_a, of_d, of_bias, of_state];

        let like = channels(&between.zxbcdt, d_ssm, d_ssm + 2 * bc)?;
        let of_xbc = side_by_side(&[(of_x, d_ssm), (of_b, bc), (of_c, bc)], &like)?;
        let conv_needs = [needs_zxbcdt, needs[CONV_WEIGHT], needs[CONV_BIAS], needs[CONV_STATE]];
        let [of_xbc, of_weight, of_bias, of_state] =
            between.conv.backward(conv_needs, &[Some(of_xbc), of_conv_state])?;
        [out[CONV_WEIGHT], out[CONV_BIAS], out[CONV_STATE]] = [of_weight, of_bias, of_state];
        if needs_zxbcdt {
            let parts = [(of_gate.or(of_z), d_ssm), (of_xbc, d_ssm + 2 * bc), (of_dt, nheads)];
            let of_zxbcdt = side_by_side(&parts, &between.zxbcdt)?;
            [out[ZXBCDT], out[IN_PROJ]] = match &inputs[IN_PROJ] {
                Some(weight) => {
                    let needs = [needs[ZXBCDT], needs[IN_PROJ]];
                    project_both_backward(&of_zxbcdt, host::slot(OP, inputs, ZXBCDT)?, weight, needs)?
                }
                None => [Some(of_zxbcdt), None],
            };
        }
        Ok(out)
    }
}
