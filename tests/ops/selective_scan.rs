//! Cases of `selective_scan`.

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::{Packing, SelectiveScan, SequenceLayout, selective_scan};

use crate::laws::{self, GoldenTensors, Op, PackedOp, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target::Target;
use crate::support::tolerance::{self, relative_rms, values};

use SequenceLayout::{ChannelsFirst, ChannelsLast};

#[derive(Debug, Clone)]
pub struct Case {
    pub batch: usize,
    pub dim: usize,
    pub seqlen: usize,
    pub d_state: usize,
    /// Groups of varying `b` and `c`; none if constant.
    pub b: Option<usize>,
    pub c: Option<usize>,
    pub d: bool,
    pub z: bool,
    pub delta_bias: bool,
    pub delta_softplus: bool,
    pub state: bool,
    pub layout: SequenceLayout,
    pub packing: Option<Packing>,
}

impl Case {
    pub fn new([batch, dim, seqlen, d_state]: [usize; 4], layout: SequenceLayout) -> Self {
        Self {
            batch,
            dim,
            seqlen,
            d_state,
            b: Some(1),
            c: Some(1),
            d: true,
            z: true,
            delta_bias: true,
            delta_softplus: true,
            state: true,
            layout,
            packing: None,
        }
    }
}

pub struct Scan;

fn arguments<'a>(case: &'a Case, inputs: &'a Tensors) -> SelectiveScan<'a> {
    let get = |name: &str| &inputs[name];
    SelectiveScan {
        d: inputs.get("d"),
        z: inputs.get("z"),
        delta_bias: inputs.get("delta_bias"),
        delta_softplus: case.delta_softplus,
        initial_state: inputs.get("initial_state"),
        layout: case.layout,
        packing: case.packing.as_ref(),
        ..SelectiveScan::new(get("u"), get("delta"), get("a"), get("b"), get("c"))
    }
}

impl Op for Scan {
    type Case = Case;

    fn inputs(case: &Case, random: &mut Random) -> Tensors {
        let Case { batch, dim, seqlen, d_state, .. } = *case;
        let activation = match case.layout {
            ChannelsFirst => [batch, dim, seqlen],
            ChannelsLast => [batch, seqlen, dim],
        };
        let mut coefficient = |groups: Option<usize>| match (groups, case.layout) {
            (None, _) => random.normal(&[dim, d_state]),
            (Some(g), ChannelsFirst) => random.normal(&[batch, g, d_state, seqlen]),
            (Some(g), ChannelsLast) => random.normal(&[batch, seqlen, g, d_state]),
        };
        let (b, c) = (coefficient(case.b), coefficient(case.c));
        let mut inputs: Tensors = [("b".into(), b), ("c".into(), c)].into();
        inputs.insert("u".into(), random.normal(&activation));
        let delta = if case.delta_softplus {
            random.tensor(&activation, -4.0, 1.0)
        } else {
            random.tensor(&activation, 0.01, 0.5)
        };
        inputs.insert("delta".into(), delta);
        inputs.insert("a".into(), random.tensor(&[dim, d_state], -4.0, -0.2));
        if case.d {
            inputs.insert("d".into(), random.normal(&[dim]));
        }
        if case.z {
            inputs.insert("z".into(), random.normal(&activation));
        }
        if case.delta_bias {
            inputs.insert("delta_bias".into(), random.tensor(&[dim], 0.0, 0.3));
        }
        if case.state {
            let sequences = case.packing.as_ref().map_or(batch, Packing::len);
            inputs.insert("initial_state".into(), random.normal(&[sequences, dim, d_state]));
        }
        inputs
    }

    fn role(name: &str) -> Role {
        match name {
            "u" | "delta" | "z" => Role::Activation,
            // Varying ones are activations; a constant one may be of that dtype too.
            "b" | "c" => Role::Activation,
            "initial_state" => Role::State,
            _ => Role::Parameter,
        }
    }

    fn time_axis(case: &Case, name: &str) -> Option<usize> {
        let varies = match name {
            "b" => case.b.is_some(),
            "c" => case.c.is_some(),
            _ => false,
        };
        match (name, case.layout) {
            ("u" | "delta" | "z" | "y", ChannelsFirst) => Some(2),
            ("u" | "delta" | "z" | "y", ChannelsLast) => Some(1),
            ("b" | "c", layout) if varies => Some(if layout == ChannelsFirst { 3 } else { 1 }),
            _ => None,
        }
    }

    fn run(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        let output = selective_scan(&arguments(case, inputs))?;
        Ok([("y".into(), output.y), ("final_state".into(), output.final_state)].into())
    }

    fn reference(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        let output = mamba_ops::selective_scan::reference::forward(&arguments(case, inputs))?;
        Ok([("y".into(), output.y), ("final_state".into(), output.final_state)].into())
    }

    fn golden(golden: &Golden) -> std::result::Result<(Case, GoldenTensors), String> {
        let tensors = GoldenTensors::read(golden, str::to_owned);
        let (batch, dim, seqlen) = tensors.inputs["u"].dims3().unwrap();
        let groups = |name: &str| match tensors.inputs[name].rank() {
            2 => None,
            _ => Some(tensors.inputs[name].dim(1).unwrap()),
        };
        let has = |name: &str| tensors.inputs.contains_key(name);
        let case = Case {
            batch,
            dim,
            seqlen,
            d_state: tensors.inputs["a"].dim(1).unwrap(),
            b: groups("b"),
            c: groups("c"),
            d: has("d"),
            z: has("z"),
            delta_bias: has("delta_bias"),
            delta_softplus: golden.flag("delta_softplus"),
            state: false,
            layout: ChannelsFirst,
            packing: laws::packing(golden),
        };
        Ok((case, tensors))
    }
}

impl PackedOp for Scan {
    fn packed(case: &Case, packing: Option<Packing>) -> Case {
        let (batch, seqlen) =
            packing.as_ref().map_or((case.batch, case.seqlen), |packing| (packing.batch(), packing.seqlen()));
        Case { batch, seqlen, packing, ..case.clone() }
    }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for layout in [ChannelsFirst, ChannelsLast] {
        for d_state in [1, 8, 16, 24, 64] {
            cases.push(Case::new([2, 5, 7, d_state], layout));
        }
        for seqlen in [0, 1, 2, 63, 64, 65, 130] {
            cases.push(Case::new([2, 18, seqlen, 3], layout));
        }
        // On a GPU other kernels take large states, many channels, whole tiles.
        cases.push(Case::new([1, 5, 7, 80], layout));
        cases.push(Case::new([2, 64, 64, 16], layout));
        cases.push(Case::new([0, 4, 7, 4], layout));
        cases.push(Case::new([3, 150, 5, 4], layout));
        for (b, c) in
            [(Some(2), Some(2)), (Some(8), Some(8)), (Some(2), Some(4)), (None, Some(2)), (Some(4), None)]
        {
            cases.push(Case { b, c, ..Case::new([2, 24, 9, 4], layout) });
        }
        cases.push(Case { b: None, c: None, ..Case::new([2, 24, 9, 4], layout) });
        // Groups that begin where no pack of a GPU does.
        cases.push(Case { b: Some(4), c: Some(4), ..Case::new([1, 136, 40, 4], layout) });
        cases.push(Case { d: false, z: false, ..Case::new([2, 20, 70, 4], layout) });
        cases.push(Case { delta_bias: false, state: false, ..Case::new([1, 20, 70, 4], layout) });
        cases.push(Case { delta_softplus: false, ..Case::new([1, 20, 70, 4], layout) });
        for packing in laws::packings() {
            cases.push(Scan::packed(&Case::new([0, 18, 0, 3], layout), Some(packing)));
        }
        let packing = Some(laws::packings()[7].clone());
        cases.push(Scan::packed(&Case::new([0, 128, 0, 16], layout), packing));
    }
    cases
}

#[test]
fn reference() {
    laws::reference::<Scan>(&cases());
}

#[test]
fn packed() {
    for layout in [ChannelsFirst, ChannelsLast] {
        for (b, c) in [(Some(1), Some(1)), (Some(2), Some(3)), (None, Some(1)), (Some(6), None), (None, None)]
        {
            laws::packed::<Scan>(&Case { b, c, ..Case::new([0, 6, 0, 3], layout) });
        }
        laws::packed::<Scan>(&Case { state: false, z: false, ..Case::new([0, 18, 0, 4], layout) });
        laws::packed::<Scan>(&Case::new([0, 128, 0, 16], layout));
        laws::packed::<Scan>(&Case { d: false, delta_softplus: false, ..Case::new([0, 140, 0, 2], layout) });
    }
}

#[test]
fn partial_gradients() {
    for layout in [ChannelsFirst, ChannelsLast] {
        laws::partial_gradients::<Scan>(&Case::new([2, 5, 70, 4], layout));
        laws::partial_gradients::<Scan>(&Case { b: None, c: None, ..Case::new([2, 5, 5, 4], layout) });
    }
}

#[test]
fn split() {
    for layout in [ChannelsFirst, ChannelsLast] {
        laws::split::<Scan>(&Case::new([2, 6, 9, 4], layout));
        laws::split::<Scan>(&Case { b: None, state: false, ..Case::new([1, 20, 7, 4], layout) });
    }
}

#[test]
fn layout() {
    for layout in [ChannelsFirst, ChannelsLast] {
        let case = Case { b: Some(3), ..Case::new([2, 6, 9, 4], layout) };
        laws::layout::<Scan>(&case);
        laws::layout::<Scan>(&Scan::packed(&case, Some(laws::packings()[6].clone())));
    }
}

#[test]
fn threads() {
    for layout in [ChannelsFirst, ChannelsLast] {
        let case = Case { b: Some(2), ..Case::new([2, 300, 140, 4], layout) };
        laws::threads::<Scan>(&case);
        laws::threads::<Scan>(&Scan::packed(&case, Some(laws::packings()[5].clone())));
    }
}

#[test]
fn repeats() {
    for layout in [ChannelsFirst, ChannelsLast] {
        let case = Case { b: Some(2), ..Case::new([2, 300, 140, 4], layout) };
        laws::repeats::<Scan>(&case);
        laws::repeats::<Scan>(&Scan::packed(&case, Some(laws::packings()[9].clone())));
    }
}

#[test]
fn finite_differences() {
    let mut cases = vec![];
    for layout in [ChannelsFirst, ChannelsLast] {
        cases.push(Case::new([2, 4, 5, 3], layout));
        cases.push(Case { b: None, c: Some(2), delta_softplus: false, ..Case::new([2, 4, 5, 3], layout) });
        cases.push(Case { b: Some(2), c: None, ..Case::new([2, 4, 5, 3], layout) });
    }
    cases.push(Scan::packed(&Case::new([0, 4, 0, 3], ChannelsLast), Some(laws::packings()[3].clone())));
    laws::finite_differences::<Scan>(&cases);
}

#[test]
fn golden() {
    assert_eq!(laws::golden::<Scan>("ops/selective_scan", &[]), 27 + 15);
}

/// Decays from almost 1 to 0 and steps up to 1000 give what the `f64` recurrence gives, never inf or NaN.
#[test]
fn extreme_decays() {
    let (dim, seqlen, d_state) = (6, 65, 5);
    let case = Case {
        z: false,
        delta_bias: false,
        delta_softplus: false,
        ..Case::new([1, dim, seqlen, d_state], ChannelsFirst)
    };
    let mut random = Random::new(11);
    let mut inputs = Scan::inputs(&case, &mut random);
    let a: Vec<f64> = (0..dim * d_state).map(|i| -(10f64.powf(-30.0 + 33.0 * i as f64 / 29.0))).collect();
    inputs.insert("a".into(), Tensor::from_vec(a, (dim, d_state), &Device::Cpu).unwrap());
    let delta: Vec<f64> = (0..dim * seqlen)
        .map(|i| 10f64.powf(random.uniform(-6.0, 3.0)) * (i % 7 != 0) as u8 as f64)
        .collect();
    inputs.insert("delta".into(), Tensor::from_vec(delta, (1, dim, seqlen), &Device::Cpu).unwrap());
    let single: Tensors = inputs.iter().map(|(n, x)| (n.clone(), x.to_dtype(DType::F32).unwrap())).collect();
    let exact: Tensors = single.iter().map(|(n, x)| (n.clone(), x.to_dtype(DType::F64).unwrap())).collect();
    let want = Scan::reference(&case, &exact).unwrap();
    for isa in Target::available() {
        let got = isa.scope(|| Scan::fused(&case, &single)).unwrap();
        for (name, want) in &want {
            assert!(values(&got[name]).iter().all(|v| v.is_finite()), "{} `{name}`", isa.name());
            let error = relative_rms(&got[name], want);
            assert!(error <= tolerance::FORWARD, "{} `{name}` is off by {error:.1e}", isa.name());
        }
    }
}

/// 65,536 tokens against the recurrence in `f64`, written out here.
#[test]
fn long_sequence() {
    let (dim, seqlen, d_state) = (3, 65_536, 4);
    let case = Case { b: None, c: None, z: false, ..Case::new([1, dim, seqlen, d_state], ChannelsLast) };
    let inputs: Tensors = Scan::inputs(&case, &mut Random::new(12))
        .into_iter()
        .map(|(n, x)| (n, x.to_dtype(DType::F32).unwrap()))
        .collect();
    let v: std::collections::BTreeMap<&str, Vec<f64>> =
        inputs.iter().map(|(n, x)| (n.as_str(), values(x))).collect();
    let mut h = v["initial_state"].clone();
    let mut y = vec![0.0; seqlen * dim];
    for t in 0..seqlen {
        for c in 0..dim {
            let u = v["u"][t * dim + c];
            let delta = (v["delta"][t * dim + c] + v["delta_bias"][c]).exp().ln_1p();
            y[t * dim + c] = v["d"][c] * u;
            for n in c * d_state..(c + 1) * d_state {
                h[n] = (delta * v["a"][n]).exp() * h[n] + delta * v["b"][n] * u;
                y[t * dim + c] += v["c"][n] * h[n];
            }
        }
    }
    let got = Scan::fused(&case, &inputs).unwrap();
    let want = Tensor::from_vec(y, (1, seqlen, dim), &Device::Cpu).unwrap();
    assert!(relative_rms(&got["y"], &want) <= tolerance::FORWARD);
    let want = Tensor::from_vec(h, (1, dim, d_state), &Device::Cpu).unwrap();
    assert!(relative_rms(&got["final_state"], &want) <= tolerance::FORWARD);
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (u, a, b) = (zeros(&[2, 6, 5]), zeros(&[6, 4]), zeros(&[2, 3, 4, 5]));
    let good = SelectiveScan::new(&u, &u, &a, &b, &b);
    let fails = |args: SelectiveScan, want: &str| {
        let message = selective_scan(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    assert!(selective_scan(&good).is_ok());
    let short = zeros(&[2, 6, 4]);
    let expected = "selective_scan: `delta` has shape [2, 6, 4], expected (batch 2, dim 6, seqlen 5)";
    fails(SelectiveScan { delta: &short, ..good }, expected);
    fails(SelectiveScan { z: Some(&short), ..good }, "`z` has shape [2, 6, 4]");
    fails(SelectiveScan { a: &zeros(&[5, 4]), ..good }, "`a` has shape [5, 4], expected (dim 6, d_state 4)");
    fails(
        SelectiveScan { b: &zeros(&[2, 4, 4, 5]), ..good },
        "`b` has 4 groups, expected a divisor of dim 6",
    );
    fails(
        SelectiveScan { c: &zeros(&[2, 3, 3, 5]), ..good },
        "expected (batch 2, ngroups 3, d_state 4, seqlen 5)",
    );
    fails(SelectiveScan { d: Some(&zeros(&[5])), ..good }, "`d` has shape [5], expected (dim 6)");
    let half = u.to_dtype(DType::BF16).unwrap();
    fails(SelectiveScan { delta: &half, ..good }, "`delta` has dtype bf16, expected f32 as `u`");
    let state = zeros(&[2, 6, 4]).to_dtype(DType::BF16).unwrap();
    fails(
        SelectiveScan { initial_state: Some(&state), ..good },
        "`initial_state` has dtype bf16, expected f32",
    );
}

crate::on_cuda!(
    reference,
    packed,
    partial_gradients,
    split,
    layout,
    repeats,
    golden,
    extreme_decays,
    long_sequence,
);
