//! The block of Mamba-1: `mamba1_inner`, and the ops one after another.

use candle_core::{Result, Tensor};
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, Mamba1Inner, Packing, SelectiveScan, SelectiveStateUpdate,
    SequenceLayout, causal_conv1d, causal_conv1d_update, mamba1_inner, selective_scan,
    selective_state_update,
};

use super::{Block, channels, outputs, project};
use crate::laws::{self, GoldenTensors, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;

/// What is done to `[x | z]`.
#[derive(Debug, Clone)]
pub struct Mamba1 {
    pub batch: usize,
    pub seqlen: usize,
    pub dim: usize,
    pub d_state: usize,
    pub dt_rank: usize,
    pub width: usize,
    pub options: bool,
    pub out_proj: bool,
    pub states: bool,
    pub delta_softplus: bool,
    pub packing: Option<Packing>,
    pub recompute: bool,
    /// Whether the first projection is part of the block.
    pub in_proj: bool,
}

impl Mamba1 {
    pub fn new([batch, seqlen, dim, d_state, dt_rank]: [usize; 5]) -> Self {
        let (options, states, delta_softplus) = (true, true, true);
        Self {
            batch,
            seqlen,
            dim,
            d_state,
            dt_rank,
            width: 4,
            options,
            out_proj: false,
            states,
            delta_softplus,
            packing: None,
            recompute: true,
            in_proj: false,
        }
    }

    fn random(&self, random: &mut Random) -> Tensors {
        let Self { batch, seqlen, dim, d_state, dt_rank, width, .. } = *self;
        let mut inputs = Tensors::new();
        let mut insert = |name: &str, x| inputs.insert(name.to_owned(), x);
        insert("xz", random.normal(&[batch, seqlen, if self.in_proj { 5 } else { 2 * dim }]));
        if self.in_proj {
            insert("in_proj", (random.normal(&[2 * dim, 5]) * 0.5).unwrap());
        }
        insert("conv_weight", random.normal(&[dim, width]));
        insert("x_proj", (random.normal(&[dt_rank + 2 * d_state, dim]) * 0.5).unwrap());
        let dt_proj = random.normal(&[dim, dt_rank]);
        // Steps that are no softplus must not be negative for long, or the state grows.
        insert("dt_proj", if self.delta_softplus { dt_proj } else { (dt_proj * 0.01).unwrap() });
        insert("a", random.tensor(&[dim, d_state], -4.0, -0.2));
        if self.options {
            insert("conv_bias", random.normal(&[dim]));
            insert("delta_bias", random.tensor(&[dim], 0.1, 0.3));
            insert("d", random.normal(&[dim]));
        }
        if self.out_proj {
            insert("out_proj", random.normal(&[5, dim]));
        }
        if self.states {
            let sequences = self.packing.as_ref().map_or(batch, Packing::len);
            insert("initial_conv_state", random.normal(&[sequences, dim, width - 1]));
            insert("initial_ssm_state", random.normal(&[sequences, dim, d_state]));
        }
        inputs
    }

    fn run(&self, inputs: &Tensors) -> Result<Tensors> {
        let get = |name: &str| &inputs[name];
        let output = mamba1_inner(&Mamba1Inner {
            conv_bias: inputs.get("conv_bias"),
            delta_bias: inputs.get("delta_bias"),
            d: inputs.get("d"),
            out_proj: inputs.get("out_proj"),
            delta_softplus: self.delta_softplus,
            initial_conv_state: inputs.get("initial_conv_state"),
            initial_ssm_state: inputs.get("initial_ssm_state"),
            packing: self.packing.as_ref(),
            recompute: self.recompute,
            in_proj: inputs.get("in_proj"),
            ..Mamba1Inner::new(get("xz"), get("conv_weight"), get("x_proj"), get("dt_proj"), get("a"))
        })?;
        Ok(outputs(output.y, output.final_conv_state, output.final_ssm_state))
    }

    /// `delta`, `B` and `C` of the convolved `x`.
    fn coefficients(&self, x: &Tensor, inputs: &Tensors) -> Result<[Tensor; 3]> {
        let projected = project(x, &inputs["x_proj"])?;
        let delta = project(&channels(&projected, 0, self.dt_rank)?, &inputs["dt_proj"])?;
        let b = channels(&projected, self.dt_rank, self.d_state)?;
        let c = channels(&projected, self.dt_rank + self.d_state, self.d_state)?;
        Ok([delta, b, c])
    }

    fn unfused(&self, inputs: &Tensors) -> Result<Tensors> {
        let layout = SequenceLayout::ChannelsLast;
        let xz = self.projected(&inputs["xz"], inputs)?;
        let conv = causal_conv1d(&CausalConv1d {
            bias: inputs.get("conv_bias"),
            initial_state: inputs.get("initial_conv_state"),
            layout,
            packing: self.packing.as_ref(),
            ..CausalConv1d::new(&channels(&xz, 0, self.dim)?, &inputs["conv_weight"])
        })?;
        let [delta, b, c] = self.coefficients(&conv.y, inputs)?;
        let scan = selective_scan(&SelectiveScan {
            d: inputs.get("d"),
            z: Some(&channels(&xz, self.dim, self.dim)?),
            delta_bias: inputs.get("delta_bias"),
            delta_softplus: self.delta_softplus,
            initial_state: inputs.get("initial_ssm_state"),
            layout,
            packing: self.packing.as_ref(),
            ..SelectiveScan::new(&conv.y, &delta, &inputs["a"], &b, &c)
        })?;
        let y = match inputs.get("out_proj") {
            Some(weight) => project(&scan.y, weight)?,
            None => scan.y,
        };
        Ok(outputs(y, conv.final_state, scan.final_state))
    }

    /// What the first projection gives.
    fn projected(&self, x: &Tensor, inputs: &Tensors) -> Result<Tensor> {
        inputs.get("in_proj").map_or_else(|| Ok(x.clone()), |weight| project(x, weight))
    }

    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor> {
        let token = &self.projected(token, inputs)?;
        let x = causal_conv1d_update(&CausalConv1dUpdate {
            bias: inputs.get("conv_bias"),
            layout: SequenceLayout::ChannelsLast,
            ..CausalConv1dUpdate::new(&channels(token, 0, self.dim)?, conv, &inputs["conv_weight"])
        })?;
        let [delta, b, c] = self.coefficients(&x, inputs)?;
        let y = selective_state_update(&SelectiveStateUpdate {
            d: inputs.get("d"),
            z: Some(&channels(token, self.dim, self.dim)?.squeeze(1)?),
            dt_bias: inputs.get("delta_bias"),
            dt_softplus: self.delta_softplus,
            ..SelectiveStateUpdate::new(
                ssm,
                &x.squeeze(1)?,
                &delta.squeeze(1)?,
                &inputs["a"],
                &b.squeeze(1)?,
                &c.squeeze(1)?,
            )
        })?
        .unsqueeze(1)?;
        match inputs.get("out_proj") {
            Some(weight) => project(&y, weight),
            None => Ok(y),
        }
    }
}

impl Block for Mamba1 {
    const MAIN: &'static str = "xz";

    fn random(&self, random: &mut Random) -> Tensors {
        self.random(random)
    }

    fn run(&self, inputs: &Tensors) -> Result<Tensors> {
        self.run(inputs)
    }

    fn unfused(&self, inputs: &Tensors) -> Result<Tensors> {
        self.unfused(inputs)
    }

    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor> {
        self.step(inputs, token, conv, ssm)
    }

    fn keeping(&self) -> Self {
        Self { recompute: false, ..self.clone() }
    }

    fn with_seqlen(&self, seqlen: usize) -> Self {
        Self { seqlen, ..self.clone() }
    }

    fn with_packing(&self, packing: Option<Packing>) -> Self {
        let (batch, seqlen) =
            packing.as_ref().map_or((self.batch, self.seqlen), |packing| (packing.batch(), packing.seqlen()));
        Self { batch, seqlen, packing, ..self.clone() }
    }

    fn golden(golden: &Golden) -> (Self, GoldenTensors) {
        let mut tensors = GoldenTensors::read(golden, str::to_owned);
        // Upstream has time last.
        for xz in [tensors.inputs.get_mut("xz"), tensors.gradients.get_mut("xz")].into_iter().flatten() {
            *xz = xz.transpose(1, 2).unwrap().contiguous().unwrap();
        }
        let (batch, seqlen, channels) = tensors.inputs["xz"].dims3().unwrap();
        let case = Self {
            options: tensors.inputs.contains_key("d"),
            out_proj: tensors.inputs.contains_key("out_proj"),
            states: false,
            width: tensors.inputs["conv_weight"].dim(1).unwrap(),
            delta_softplus: golden.flag("delta_softplus"),
            ..Self::new([
                batch,
                seqlen,
                channels / 2,
                tensors.inputs["a"].dim(1).unwrap(),
                tensors.inputs["dt_proj"].dim(1).unwrap(),
            ])
        };
        (case, tensors)
    }
}

pub fn mamba1_cases() -> Vec<Mamba1> {
    let mut cases = vec![];
    for seqlen in [1, 2, 3, 16, 70] {
        cases.push(Mamba1::new([2, seqlen, 6, 4, 2]));
    }
    cases.push(Mamba1 { out_proj: true, ..Mamba1::new([2, 9, 6, 4, 1]) });
    cases.push(Mamba1 { in_proj: true, ..Mamba1::new([2, 9, 6, 4, 1]) });
    cases.push(Mamba1 { in_proj: true, out_proj: true, ..Mamba1::new([2, 9, 6, 4, 1]) });
    cases.push(Mamba1 { options: false, states: false, width: 2, ..Mamba1::new([2, 9, 17, 16, 3]) });
    cases.push(Mamba1 { delta_softplus: false, ..Mamba1::new([2, 9, 6, 4, 2]) });
    // Gradients of longer ones are beyond the largest number of f16, here and unfused.
    let short = |packing: &Packing| packing.seqlen() <= 500;
    for packing in laws::packings().into_iter().skip(3).filter(short) {
        cases.push(Mamba1::new([0, 0, 6, 4, 2]).with_packing(Some(packing)));
    }
    cases
}
