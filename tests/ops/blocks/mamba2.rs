//! The block of Mamba-2: `mamba2_split_conv1d_scan`, and the ops one after another.

use candle_core::{DType, Result, Tensor};
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, GatedRmsNorm, Mamba2SplitConv1dScan, Norm, Packing,
    SelectiveStateUpdate, SequenceLayout, SsdChunkScan, causal_conv1d, causal_conv1d_update,
    mamba2_split_conv1d_scan, norm, selective_state_update, ssd_chunk_scan,
};

use super::{Block, channels, outputs, project};
use crate::laws::{self, GoldenTensors, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;

/// What is done to `[z | x | B | C | dt]`.
#[derive(Debug, Clone)]
pub struct Mamba2 {
    pub batch: usize,
    pub seqlen: usize,
    pub nheads: usize,
    pub headdim: usize,
    pub ngroups: usize,
    pub d_state: usize,
    pub width: usize,
    /// Group size and whether the norm comes before the gate; none: the gate alone.
    pub norm: Option<(Option<usize>, bool)>,
    /// `conv_bias`, `dt_bias`, `d`.
    pub options: bool,
    pub d_has_headdim: bool,
    pub out_proj: bool,
    pub states: bool,
    pub dt_limit: (f64, f64),
    pub chunk_size: usize,
    pub packing: Option<Packing>,
    pub recompute: bool,
    /// Whether the first projection is part of the block.
    pub in_proj: bool,
}

impl Mamba2 {
    pub fn new([batch, seqlen, nheads, headdim, ngroups, d_state]: [usize; 6]) -> Self {
        Self {
            batch,
            seqlen,
            nheads,
            headdim,
            ngroups,
            d_state,
            width: 4,
            norm: Some((Some(nheads * headdim / ngroups), false)),
            options: true,
            d_has_headdim: false,
            out_proj: false,
            states: true,
            dt_limit: (0.0, f64::INFINITY),
            chunk_size: 16,
            packing: None,
            recompute: true,
            in_proj: false,
        }
    }

    fn d_ssm(&self) -> usize {
        self.nheads * self.headdim
    }

    fn conv_dim(&self) -> usize {
        self.d_ssm() + 2 * self.ngroups * self.d_state
    }

    fn random(&self, random: &mut Random) -> Tensors {
        let Self { batch, seqlen, nheads, headdim, d_state, width, .. } = *self;
        let mut inputs = Tensors::new();
        let mut insert = |name: &str, x| inputs.insert(name.to_owned(), x);
        let channels = self.d_ssm() + self.conv_dim() + nheads;
        insert("zxbcdt", random.normal(&[batch, seqlen, if self.in_proj { 5 } else { channels }]));
        if self.in_proj {
            insert("in_proj", (random.normal(&[channels, 5]) * 0.5).unwrap());
        }
        insert("conv_weight", random.normal(&[self.conv_dim(), width]));
        insert("a", random.tensor(&[nheads], -4.0, -0.2));
        if self.options {
            insert("conv_bias", random.normal(&[self.conv_dim()]));
            insert("dt_bias", random.tensor(&[nheads], -2.0, 0.3));
            let rank = if self.d_has_headdim { 2 } else { 1 };
            insert("d", random.normal(&[nheads, headdim][..rank]));
        }
        if self.norm.is_some() {
            insert("norm.weight", random.normal(&[self.d_ssm()]));
        }
        if self.out_proj {
            insert("out_proj", random.normal(&[5, self.d_ssm()]));
        }
        if self.states {
            let sequences = self.packing.as_ref().map_or(batch, Packing::len);
            insert("initial_conv_state", random.normal(&[sequences, self.conv_dim(), width - 1]));
            insert("initial_ssm_state", random.normal(&[sequences, nheads, headdim, d_state]));
        }
        inputs
    }

    fn run(&self, inputs: &Tensors) -> Result<Tensors> {
        let weight = inputs.get("norm.weight");
        let norm = self.norm.zip(weight).map(|((group_size, norm_before_gate), weight)| GatedRmsNorm {
            weight,
            eps: 1e-5,
            group_size,
            norm_before_gate,
        });
        let output = mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan {
            conv_bias: inputs.get("conv_bias"),
            dt_bias: inputs.get("dt_bias"),
            d: inputs.get("d"),
            norm,
            out_proj: inputs.get("out_proj"),
            ngroups: self.ngroups,
            dt_limit: self.dt_limit,
            chunk_size: self.chunk_size,
            initial_conv_state: inputs.get("initial_conv_state"),
            initial_ssm_state: inputs.get("initial_ssm_state"),
            packing: self.packing.as_ref(),
            recompute: self.recompute,
            in_proj: inputs.get("in_proj"),
            ..Mamba2SplitConv1dScan::new(
                &inputs["zxbcdt"],
                &inputs["conv_weight"],
                &inputs["a"],
                self.headdim,
            )
        })?;
        Ok(outputs(output.y, output.final_conv_state, output.final_ssm_state))
    }

    /// The pieces `z`, `[x | B | C]` and `dt`.
    fn split(&self, zxbcdt: &Tensor) -> Result<[Tensor; 3]> {
        let (d_ssm, conv_dim) = (self.d_ssm(), self.conv_dim());
        Ok([
            channels(zxbcdt, 0, d_ssm)?,
            channels(zxbcdt, d_ssm, conv_dim)?,
            channels(zxbcdt, d_ssm + conv_dim, self.nheads)?,
        ])
    }

    /// Norm and gate, or the gate alone, and the second projection.
    fn finish(&self, y: &Tensor, z: &Tensor, inputs: &Tensors) -> Result<Tensor> {
        let mut y = match (self.norm, inputs.get("norm.weight")) {
            (Some((group_size, norm_before_gate)), Some(weight)) => {
                norm(&Norm { z: Some(z), group_size, norm_before_gate, ..Norm::rms(y, weight, 1e-5) })?.y
            }
            // The ops round once after the gate: so does this.
            _ => {
                let wide = if y.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                (y.to_dtype(wide)? * z.to_dtype(wide)?.silu()?)?.to_dtype(y.dtype())?
            }
        };
        if let Some(weight) = inputs.get("out_proj") {
            y = project(&y, weight)?;
        }
        Ok(y)
    }

    /// The ops one after another, as a model without fusion calls them.
    fn unfused(&self, inputs: &Tensors) -> Result<Tensors> {
        let Self { nheads, headdim, ngroups, d_state, .. } = *self;
        let (batch, seqlen, _) = inputs["zxbcdt"].dims3()?;
        let [z, xbc, dt] = self.split(&self.projected(&inputs["zxbcdt"], inputs)?)?;
        let conv = causal_conv1d(&CausalConv1d {
            bias: inputs.get("conv_bias"),
            initial_state: inputs.get("initial_conv_state"),
            layout: SequenceLayout::ChannelsLast,
            packing: self.packing.as_ref(),
            ..CausalConv1d::new(&xbc, &inputs["conv_weight"])
        })?;
        let (d_ssm, bc) = (self.d_ssm(), ngroups * d_state);
        let x = channels(&conv.y, 0, d_ssm)?.reshape((batch, seqlen, nheads, headdim))?;
        let b = channels(&conv.y, d_ssm, bc)?.reshape((batch, seqlen, ngroups, d_state))?;
        let c = channels(&conv.y, d_ssm + bc, bc)?.reshape((batch, seqlen, ngroups, d_state))?;
        let gate = z.reshape((batch, seqlen, nheads, headdim))?;
        let scan = ssd_chunk_scan(&SsdChunkScan {
            d: inputs.get("d"),
            z: self.norm.is_none().then_some(&gate),
            dt_bias: inputs.get("dt_bias"),
            dt_softplus: true,
            dt_limit: self.dt_limit,
            chunk_size: self.chunk_size,
            initial_state: inputs.get("initial_ssm_state"),
            packing: self.packing.as_ref(),
            ..SsdChunkScan::new(&x, &dt, &inputs["a"], &b, &c)
        })?;
        let y = scan.y.reshape((batch, seqlen, d_ssm))?;
        let y = match (self.norm, inputs.get("out_proj")) {
            (Some(_), _) => self.finish(&y, &z, inputs)?,
            (None, Some(weight)) => project(&y, weight)?,
            (None, None) => y,
        };
        Ok(outputs(y, conv.final_state, scan.final_state))
    }

    /// What the first projection gives.
    fn projected(&self, x: &Tensor, inputs: &Tensors) -> Result<Tensor> {
        inputs.get("in_proj").map_or_else(|| Ok(x.clone()), |weight| project(x, weight))
    }

    /// One token, states changed in place.
    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor> {
        let Self { batch, nheads, headdim, ngroups, d_state, .. } = *self;
        let [z, xbc, dt] = self.split(&self.projected(token, inputs)?)?;
        let xbc = causal_conv1d_update(&CausalConv1dUpdate {
            bias: inputs.get("conv_bias"),
            layout: SequenceLayout::ChannelsLast,
            ..CausalConv1dUpdate::new(&xbc, conv, &inputs["conv_weight"])
        })?;
        let (d_ssm, bc) = (self.d_ssm(), ngroups * d_state);
        let y = selective_state_update(&SelectiveStateUpdate {
            d: inputs.get("d"),
            dt_bias: inputs.get("dt_bias"),
            dt_softplus: true,
            dt_limit: self.dt_limit,
            ..SelectiveStateUpdate::new(
                ssm,
                &channels(&xbc, 0, d_ssm)?.reshape((batch, nheads, headdim))?,
                &dt.squeeze(1)?,
                &inputs["a"],
                &channels(&xbc, d_ssm, bc)?.reshape((batch, ngroups, d_state))?,
                &channels(&xbc, d_ssm + bc, bc)?.reshape((batch, ngroups, d_state))?,
            )
        })?;
        self.finish(&y.reshape((batch, 1, d_ssm))?, &z, inputs)
    }
}

impl Block for Mamba2 {
    const MAIN: &'static str = "zxbcdt";

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
        let tensors = GoldenTensors::read(golden, |name| name.replace("norm_weight", "norm.weight"));
        let (batch, seqlen, _) = tensors.inputs["zxbcdt"].dims3().unwrap();
        let number = |name: &str| golden.number(name).unwrap() as usize;
        let (nheads, headdim, ngroups) =
            (tensors.inputs["a"].dim(0).unwrap(), number("headdim"), number("ngroups"));
        let (conv_dim, width) = tensors.inputs["conv_weight"].dims2().unwrap();
        let d_state = (conv_dim - nheads * headdim) / (2 * ngroups);
        let (low, high) = golden.option("dt_limit").unwrap().split_once(',').unwrap();
        let has = |name: &str| tensors.inputs.contains_key(name);
        let group_size = Some(nheads * headdim / ngroups);
        let case = Self {
            width,
            norm: has("norm.weight").then(|| (group_size, golden.flag("norm_before_gate"))),
            d_has_headdim: tensors.inputs["d"].rank() == 2,
            out_proj: has("out_proj"),
            states: has("initial_ssm_state"),
            dt_limit: (low.parse().unwrap(), high.parse().unwrap()),
            chunk_size: number("chunk_size"),
            packing: laws::packing(golden),
            ..Self::new([batch, seqlen, nheads, headdim, ngroups, d_state])
        };
        (case, tensors)
    }
}

pub fn mamba2_cases() -> Vec<Mamba2> {
    let mut cases = vec![];
    for ngroups in [1, 2, 4] {
        cases.push(Mamba2::new([2, 20, 4, 3, ngroups, 5]));
        cases.push(Mamba2 { norm: None, ..Mamba2::new([2, 20, 4, 3, ngroups, 5]) });
        cases.push(Mamba2 { norm: Some((None, true)), ..Mamba2::new([1, 33, 4, 3, ngroups, 5]) });
    }
    for seqlen in [1, 2, 3, 16, 17] {
        cases.push(Mamba2::new([2, seqlen, 2, 4, 1, 3]));
    }
    cases.push(Mamba2 { out_proj: true, ..Mamba2::new([2, 9, 2, 4, 1, 3]) });
    cases.push(Mamba2 { out_proj: true, norm: None, ..Mamba2::new([2, 9, 2, 4, 1, 3]) });
    cases.push(Mamba2 { in_proj: true, norm: None, ..Mamba2::new([2, 9, 2, 4, 1, 3]) });
    cases.push(Mamba2 { in_proj: true, out_proj: true, ..Mamba2::new([2, 9, 2, 4, 2, 3]) });
    cases.push(Mamba2 { d_has_headdim: true, width: 3, ..Mamba2::new([2, 9, 2, 4, 2, 3]) });
    cases.push(Mamba2 { options: false, states: false, ..Mamba2::new([2, 9, 4, 4, 2, 3]) });
    cases.push(Mamba2 { dt_limit: (0.2, 0.7), chunk_size: 64, ..Mamba2::new([2, 70, 4, 4, 2, 3]) });
    // Gradients of longer ones are beyond the largest number of f16, here and unfused.
    let short = |packing: &Packing| packing.seqlen() <= 500;
    for packing in laws::packings().into_iter().skip(3).filter(short) {
        cases.push(Mamba2 { out_proj: true, ..Mamba2::new([0, 0, 4, 3, 2, 5]) }.with_packing(Some(packing)));
    }
    cases
}
