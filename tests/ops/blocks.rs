//! Cases of the fused blocks: `mamba2_split_conv1d_scan` and `mamba1_inner` against the ops one after another.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::{
    CausalConv1d, CausalConv1dUpdate, GatedRmsNorm, Mamba1Inner, Mamba2SplitConv1dScan, Norm, Packing,
    SelectiveScan, SelectiveStateUpdate, SequenceLayout, SsdChunkScan, causal_conv1d, causal_conv1d_update,
    mamba1_inner, mamba2_split_conv1d_scan, norm, selective_scan, selective_state_update, ssd_chunk_scan,
};

use crate::laws::{self, GoldenTensors, Op, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::tolerance::{of_rounding, relative_rms};

const F64_TOLERANCE: f64 = 1e-10;
const F32_TOLERANCE: f64 = 1e-5;

fn role(name: &str) -> Role {
    match name {
        "zxbcdt" | "xz" => Role::Activation,
        "initial_conv_state" | "initial_ssm_state" => Role::State,
        _ => Role::Parameter,
    }
}

fn cast(inputs: &Tensors, dtype: DType) -> Tensors {
    let of = |name: &str| match (dtype, role(name)) {
        (DType::F64, _) | (_, Role::Activation) => dtype,
        _ => DType::F32,
    };
    inputs.iter().map(|(name, x)| (name.clone(), x.to_dtype(of(name)).unwrap())).collect()
}

fn outputs(y: Tensor, conv: Tensor, ssm: Tensor) -> Tensors {
    [("y".into(), y), ("final_conv_state".into(), conv), ("final_ssm_state".into(), ssm)].into()
}

/// `x Wᵀ` over the last axis.
fn project(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, seqlen, d_in) = x.dims3()?;
    let weight = weight.to_dtype(x.dtype())?;
    if x.elem_count() == 0 {
        return Tensor::zeros((batch, seqlen, weight.dim(0)?), x.dtype(), x.device());
    }
    x.reshape((batch * seqlen, d_in))?.matmul(&weight.t()?)?.reshape((batch, seqlen, ()))
}

/// Some channels; of an empty tensor a new one, for candle panics on some of its views.
fn channels(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    match x.elem_count() {
        0 => Tensor::zeros((x.dim(0)?, x.dim(1)?, len), x.dtype(), x.device()),
        _ => x.narrow(2, start, len),
    }
}

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
        insert("zxbcdt", random.normal(&[batch, seqlen, self.d_ssm() + self.conv_dim() + nheads]));
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
        let [z, xbc, dt] = self.split(&inputs["zxbcdt"])?;
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

    /// One token, states changed in place.
    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor> {
        let Self { batch, nheads, headdim, ngroups, d_state, .. } = *self;
        let [z, xbc, dt] = self.split(token)?;
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
        }
    }

    fn random(&self, random: &mut Random) -> Tensors {
        let Self { batch, seqlen, dim, d_state, dt_rank, width, .. } = *self;
        let mut inputs = Tensors::new();
        let mut insert = |name: &str, x| inputs.insert(name.to_owned(), x);
        insert("xz", random.normal(&[batch, seqlen, 2 * dim]));
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
        let conv = causal_conv1d(&CausalConv1d {
            bias: inputs.get("conv_bias"),
            initial_state: inputs.get("initial_conv_state"),
            layout,
            packing: self.packing.as_ref(),
            ..CausalConv1d::new(&channels(&inputs["xz"], 0, self.dim)?, &inputs["conv_weight"])
        })?;
        let [delta, b, c] = self.coefficients(&conv.y, inputs)?;
        let scan = selective_scan(&SelectiveScan {
            d: inputs.get("d"),
            z: Some(&channels(&inputs["xz"], self.dim, self.dim)?),
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

    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor> {
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

/// A block, and what its laws need of it.
pub trait Block: std::fmt::Debug + Clone + Sync {
    /// The name of the main input.
    const MAIN: &'static str;
    fn random(&self, random: &mut Random) -> Tensors;
    fn run(&self, inputs: &Tensors) -> Result<Tensors>;
    fn unfused(&self, inputs: &Tensors) -> Result<Tensors>;
    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor>;
    fn with_seqlen(&self, seqlen: usize) -> Self;
    fn with_packing(&self, packing: Option<Packing>) -> Self;
    /// The case of a golden file, with its tensors by our names.
    fn golden(golden: &Golden) -> (Self, GoldenTensors);
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

/// The laws with the block itself as the reference of finite differences, else with the ops one after another.
pub struct Subject<B, const ITSELF: bool>(std::marker::PhantomData<B>);

impl<B: Block, const ITSELF: bool> Op for Subject<B, ITSELF> {
    type Case = B;

    fn inputs(case: &B, random: &mut Random) -> Tensors {
        case.random(random)
    }

    fn role(name: &str) -> Role {
        role(name)
    }

    fn time_axis(_: &B, name: &str) -> Option<usize> {
        (name == B::MAIN || name == "y").then_some(1)
    }

    fn run(case: &B, inputs: &Tensors) -> Result<Tensors> {
        case.run(inputs)
    }

    fn reference(case: &B, inputs: &Tensors) -> Result<Tensors> {
        if ITSELF { case.run(inputs) } else { case.unfused(inputs) }
    }

    fn golden(golden: &Golden) -> std::result::Result<(B, GoldenTensors), String> {
        Ok(B::golden(golden))
    }
}

impl<B: Block, const ITSELF: bool> laws::PackedOp for Subject<B, ITSELF> {
    fn packed(case: &B, packing: Option<Packing>) -> B {
        case.with_packing(packing)
    }
}

fn mamba2_cases() -> Vec<Mamba2> {
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
    cases.push(Mamba2 { d_has_headdim: true, width: 3, ..Mamba2::new([2, 9, 2, 4, 2, 3]) });
    cases.push(Mamba2 { options: false, states: false, ..Mamba2::new([2, 9, 4, 4, 2, 3]) });
    cases.push(Mamba2 { dt_limit: (0.2, 0.7), chunk_size: 64, ..Mamba2::new([2, 70, 4, 4, 2, 3]) });
    for packing in laws::packings().into_iter().skip(3) {
        cases.push(Mamba2 { out_proj: true, ..Mamba2::new([0, 0, 4, 3, 2, 5]) }.with_packing(Some(packing)));
    }
    cases
}

fn mamba1_cases() -> Vec<Mamba1> {
    let mut cases = vec![];
    for seqlen in [1, 2, 3, 16, 70] {
        cases.push(Mamba1::new([2, seqlen, 6, 4, 2]));
    }
    cases.push(Mamba1 { out_proj: true, ..Mamba1::new([2, 9, 6, 4, 1]) });
    cases.push(Mamba1 { options: false, states: false, width: 2, ..Mamba1::new([2, 9, 17, 16, 3]) });
    cases.push(Mamba1 { delta_softplus: false, ..Mamba1::new([2, 9, 6, 4, 2]) });
    for packing in laws::packings().into_iter().skip(3) {
        cases.push(Mamba1::new([0, 0, 6, 4, 2]).with_packing(Some(packing)));
    }
    cases
}

/// Outputs and the gradients of a random weighted sum of them.
fn differentiate(run: impl Fn(&Tensors) -> Result<Tensors>, inputs: &Tensors) -> (Tensors, Tensors) {
    let vars: Vec<(&String, Var)> =
        inputs.iter().map(|(name, x)| (name, Var::from_tensor(x).unwrap())).collect();
    let tracked = vars.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
    let outputs = run(&tracked).unwrap();
    let mut random = Random::new(77);
    let loss = outputs
        .values()
        .map(|y| {
            let weight = random.normal(y.dims());
            (y.to_dtype(DType::F64).unwrap() * weight).unwrap().sum_all().unwrap()
        })
        .reduce(|a, b| (a + b).unwrap())
        .unwrap();
    let store = loss.backward().unwrap();
    let gradients = vars.iter().map(|(name, var)| {
        let gradient = match store.get(var) {
            Some(gradient) => gradient.clone(),
            // From padding nothing leads to an input in a reference.
            None if var.dtype() == DType::F64 => var.zeros_like().unwrap(),
            None => panic!("no gradient reached `{name}`"),
        };
        ((*name).clone(), gradient)
    });
    (outputs.iter().map(|(name, y)| (name.clone(), y.detach())).collect(), gradients.collect())
}

/// Outputs, states and gradients are those of the ops one after another, in every dtype.
fn equals_unfused<B: Block>(cases: &[B]) {
    for (seed, case) in cases.iter().enumerate() {
        let exact = case.random(&mut Random::new(seed as u64));
        for (dtype, tolerance) in [
            (DType::F64, F64_TOLERANCE),
            (DType::F32, F32_TOLERANCE),
            // The same roundings in the same places.
            (DType::BF16, F32_TOLERANCE),
            (DType::F16, F32_TOLERANCE),
        ] {
            let inputs = cast(&exact, dtype);
            let untracked = case.run(&inputs).unwrap();
            let got = differentiate(|x| case.run(x), &inputs);
            let want = differentiate(|x| case.unfused(x), &inputs);
            for (what, got, want) in
                [("untracked ", &untracked, &want.0), ("", &got.0, &want.0), ("d", &got.1, &want.1)]
            {
                assert_eq!(got.len(), want.len());
                for (name, want) in want {
                    let got = &got[name];
                    assert_eq!(got.dtype(), want.dtype(), "{case:?}: {what}{name}");
                    let error = relative_rms(got, want);
                    assert!(error <= tolerance, "{case:?} {dtype:?}: {what}`{name}` is off by {error:.1e}");
                }
            }
            assert!(untracked.values().all(|y| !y.track_op()), "{case:?}: a graph without need");
        }
    }
}

/// A prefill by the block, with the states it leaves, and 64 steps by the in-place updates equal one whole sequence.
fn prefill_and_decode<B: Block>(cases: &[B]) {
    const STEPS: usize = 64;
    for (seed, case) in cases.iter().enumerate() {
        for prefill in [0, 1, 19] {
            let case = case.with_seqlen(prefill + STEPS);
            let exact = case.random(&mut Random::new(seed as u64 + 100));
            for (dtype, tolerance) in
                [(DType::F64, F64_TOLERANCE), (DType::F32, F32_TOLERANCE), (DType::BF16, F32_TOLERANCE)]
            {
                let inputs = cast(&exact, dtype);
                let whole = case.run(&inputs).unwrap();
                let mut first = inputs.clone();
                first.insert(B::MAIN.into(), inputs[B::MAIN].narrow(1, 0, prefill).unwrap());
                let first = case.with_seqlen(prefill).run(&first).unwrap();
                let (conv, ssm) = (&first["final_conv_state"], &first["final_ssm_state"]);
                let mut ys = vec![first["y"].clone()];
                for t in prefill..prefill + STEPS {
                    let token = inputs[B::MAIN].narrow(1, t, 1).unwrap();
                    ys.push(case.step(&inputs, &token, conv, ssm).unwrap());
                }
                let got = outputs(Tensor::cat(&ys, 1).unwrap(), conv.clone(), ssm.clone());
                for (name, want) in &whole {
                    let (error, bound) =
                        (relative_rms(&got[name], want), of_rounding(want, want.dtype(), tolerance));
                    // In bf16 the step rounds `y` before the gate, the scan after it, and projections round too.
                    let bound = if dtype == DType::BF16 { bound.max(1e-2) } else { bound };
                    assert!(
                        error <= bound,
                        "{case:?} {dtype:?} after {prefill}: `{name}` is off by {error:.1e}"
                    );
                }
            }
        }
    }
}

#[test]
fn mamba2_equals_unfused() {
    equals_unfused(&mamba2_cases());
}

#[test]
fn mamba1_equals_unfused() {
    equals_unfused(&mamba1_cases());
}

#[test]
fn mamba2_prefill_and_decode() {
    let mut cases = vec![];
    for ngroups in [1, 2, 4] {
        cases.push(Mamba2::new([2, 0, 4, 3, ngroups, 5]));
        cases.push(Mamba2 { norm: None, states: false, ..Mamba2::new([1, 0, 4, 3, ngroups, 5]) });
    }
    cases.push(Mamba2 { norm: Some((None, true)), out_proj: true, ..Mamba2::new([2, 0, 4, 3, 2, 5]) });
    prefill_and_decode(&cases);
}

#[test]
fn mamba1_prefill_and_decode() {
    prefill_and_decode(&[
        Mamba1::new([2, 0, 6, 4, 2]),
        Mamba1 { out_proj: true, states: false, width: 3, ..Mamba1::new([1, 0, 17, 16, 1]) },
    ]);
}

/// What upstream's own fused functions give.
#[test]
fn golden() {
    assert_eq!(laws::golden::<Subject<Mamba2, false>>("ops/mamba2_split_conv1d_scan", &[]), 10);
    assert_eq!(laws::golden::<Subject<Mamba1, false>>("ops/mamba1_inner", &[]), 4);
}

#[test]
fn packed() {
    laws::packed::<Subject<Mamba2, false>>(&Mamba2::new([0, 0, 4, 3, 2, 5]));
    let case = Mamba2 { norm: None, out_proj: true, chunk_size: 64, ..Mamba2::new([0, 0, 2, 5, 1, 3]) };
    laws::packed::<Subject<Mamba2, false>>(&case);
    laws::packed::<Subject<Mamba1, false>>(&Mamba1 { out_proj: true, ..Mamba1::new([0, 0, 6, 4, 2]) });
    laws::packed::<Subject<Mamba1, false>>(&Mamba1 { states: false, ..Mamba1::new([0, 0, 5, 3, 1]) });
}

#[test]
fn partial_gradients() {
    laws::partial_gradients::<Subject<Mamba2, false>>(&Mamba2::new([2, 20, 4, 3, 2, 5]));
    laws::partial_gradients::<Subject<Mamba1, false>>(&Mamba1::new([2, 20, 6, 4, 2]));
}

#[test]
fn layout() {
    laws::layout::<Subject<Mamba2, false>>(&Mamba2::new([2, 20, 4, 3, 2, 5]));
    laws::layout::<Subject<Mamba1, false>>(&Mamba1::new([2, 20, 6, 4, 2]));
}

#[test]
fn threads() {
    laws::threads::<Subject<Mamba2, false>>(&Mamba2::new([2, 100, 8, 16, 2, 16]));
    laws::threads::<Subject<Mamba1, false>>(&Mamba1::new([2, 100, 64, 8, 4]));
}

#[test]
fn finite_differences() {
    laws::finite_differences::<Subject<Mamba2, true>>(&[
        Mamba2::new([2, 5, 4, 3, 2, 3]),
        Mamba2 { out_proj: true, norm: None, ..Mamba2::new([1, 5, 2, 3, 1, 3]) },
        Mamba2 { norm: Some((Some(3), true)), d_has_headdim: true, ..Mamba2::new([1, 5, 2, 3, 1, 3]) },
    ]);
    laws::finite_differences::<Subject<Mamba1, true>>(&[
        Mamba1::new([2, 5, 4, 3, 2]),
        Mamba1 { out_proj: true, ..Mamba1::new([1, 5, 4, 3, 2]) },
    ]);
}

/// Empty batches and sequences pass through, states too, and their gradients are there.
#[test]
fn empty() {
    for (batch, seqlen) in [(0, 5), (2, 0)] {
        let case = Mamba2 { out_proj: true, ..Mamba2::new([batch, seqlen, 4, 3, 2, 5]) };
        let inputs = cast(&case.random(&mut Random::new(1)), DType::F32);
        let (got, gradients) = differentiate(|x| case.run(x), &inputs);
        assert_eq!(got["y"].dims(), [batch, seqlen, 5]);
        for name in ["conv", "ssm"] {
            assert_eq!(
                relative_rms(&got[&format!("final_{name}_state")], &inputs[&format!("initial_{name}_state")]),
                0.0
            );
        }
        assert_eq!(gradients.len(), inputs.len());
        let case = Mamba1 { out_proj: true, ..Mamba1::new([batch, seqlen, 6, 4, 2]) };
        let inputs = cast(&case.random(&mut Random::new(1)), DType::F32);
        let (got, gradients) = differentiate(|x| case.run(x), &inputs);
        assert_eq!(got["y"].dims(), [batch, seqlen, 5]);
        assert_eq!(relative_rms(&got["final_ssm_state"], &inputs["initial_ssm_state"]), 0.0);
        assert_eq!(gradients.len(), inputs.len());
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    // 4 heads of 3 channels, 2 groups of 5 states.
    let (zxbcdt, conv, a) = (zeros(&[2, 7, 48]), zeros(&[32, 4]), zeros(&[4]));
    let good = Mamba2SplitConv1dScan { ngroups: 2, ..Mamba2SplitConv1dScan::new(&zxbcdt, &conv, &a, 3) };
    assert!(mamba2_split_conv1d_scan(&good).is_ok());
    let fails = |args: Mamba2SplitConv1dScan, want: &str| {
        let message = mamba2_split_conv1d_scan(&args).unwrap_err().to_string();
        assert!(message.starts_with("mamba2_split_conv1d_scan: ") & message.contains(want), "{message}");
    };
    let expected =
        "`zxbcdt` has shape [2, 7, 48], expected (batch, seqlen, 2 d_ssm + 2 ngroups d_state + nheads)";
    fails(Mamba2SplitConv1dScan { headdim: 4, ngroups: 4, ..good }, expected);
    fails(Mamba2SplitConv1dScan { headdim: 40, ..good }, expected);
    fails(Mamba2SplitConv1dScan { headdim: usize::MAX, ..good }, "`headdim` is");
    fails(Mamba2SplitConv1dScan { ngroups: 3, ..good }, "`ngroups` is 3, expected a divisor of nheads 4");
    fails(Mamba2SplitConv1dScan { ngroups: 0, ..good }, "`ngroups` is 0");
    fails(Mamba2SplitConv1dScan { chunk_size: 0, ..good }, "`chunk_size` is 0");
    let weight = zeros(&[12]);
    let norm = GatedRmsNorm { weight: &weight, eps: 1e-5, group_size: None, norm_before_gate: false };
    fails(
        Mamba2SplitConv1dScan { norm: Some(GatedRmsNorm { eps: f64::NAN, ..norm }), ..good },
        "`norm.eps` is NaN",
    );
    fails(
        Mamba2SplitConv1dScan { norm: Some(GatedRmsNorm { group_size: Some(5), ..norm }), ..good },
        "`norm.group_size` is 5, expected a divisor of d_ssm 12",
    );
}

crate::on_cuda!(golden);
