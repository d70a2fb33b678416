//! Cases of `ssd_chunk_scan`.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::{Packing, SsdChunkScan, ssd_chunk_scan};

use crate::laws::{self, GoldenTensors, Op, PackedOp, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, relative_rms, values};

#[derive(Debug, Clone)]
pub struct Case {
    pub batch: usize,
    pub seqlen: usize,
    pub nheads: usize,
    pub headdim: usize,
    pub ngroups: usize,
    pub d_state: usize,
    /// The rank of `d`, if there is one.
    pub d: Option<usize>,
    pub z: bool,
    pub dt_bias: bool,
    pub dt_softplus: bool,
    pub dt_limit: (f64, f64),
    pub chunk_size: usize,
    pub state: bool,
    pub packing: Option<Packing>,
}

impl Case {
    pub fn new([batch, seqlen, nheads, headdim, ngroups, d_state]: [usize; 6]) -> Self {
        Self {
            batch,
            seqlen,
            nheads,
            headdim,
            ngroups,
            d_state,
            d: Some(1),
            z: true,
            dt_bias: true,
            dt_softplus: true,
            dt_limit: (0.0, f64::INFINITY),
            chunk_size: 16,
            state: true,
            packing: None,
        }
    }

    /// Nothing optional, and `dt` taken as it is.
    pub fn bare(sizes: [usize; 6]) -> Self {
        Self { d: None, z: false, dt_bias: false, dt_softplus: false, state: false, ..Self::new(sizes) }
    }
}

pub struct Ssd;

fn arguments<'a>(case: &'a Case, inputs: &'a Tensors) -> SsdChunkScan<'a> {
    let get = |name: &str| &inputs[name];
    SsdChunkScan {
        d: inputs.get("d"),
        z: inputs.get("z"),
        dt_bias: inputs.get("dt_bias"),
        dt_softplus: case.dt_softplus,
        dt_limit: case.dt_limit,
        chunk_size: case.chunk_size,
        initial_state: inputs.get("initial_state"),
        packing: case.packing.as_ref(),
        ..SsdChunkScan::new(get("x"), get("dt"), get("a"), get("b"), get("c"))
    }
}

impl Op for Ssd {
    type Case = Case;

    fn inputs(case: &Case, random: &mut Random) -> Tensors {
        let Case { batch, seqlen, nheads, headdim, ngroups, d_state, .. } = *case;
        let mut inputs = Tensors::new();
        inputs.insert("x".into(), random.normal(&[batch, seqlen, nheads, headdim]));
        let (low, high) = if case.dt_softplus { (-4.0, 1.0) } else { (0.01, 0.5) };
        inputs.insert("dt".into(), random.tensor(&[batch, seqlen, nheads], low, high));
        inputs.insert("a".into(), random.tensor(&[nheads], -4.0, -0.2));
        inputs.insert("b".into(), random.normal(&[batch, seqlen, ngroups, d_state]));
        inputs.insert("c".into(), random.normal(&[batch, seqlen, ngroups, d_state]));
        if let Some(rank) = case.d {
            inputs.insert("d".into(), random.normal(&[nheads, headdim][..rank]));
        }
        if case.z {
            inputs.insert("z".into(), random.normal(&[batch, seqlen, nheads, headdim]));
        }
        if case.dt_bias {
            inputs.insert("dt_bias".into(), random.tensor(&[nheads], 0.0, 0.3));
        }
        if case.state {
            let sequences = case.packing.as_ref().map_or(batch, Packing::len);
            inputs.insert("initial_state".into(), random.normal(&[sequences, nheads, headdim, d_state]));
        }
        inputs
    }

    fn role(name: &str) -> Role {
        match name {
            "x" | "dt" | "b" | "c" | "z" => Role::Activation,
            "initial_state" => Role::State,
            _ => Role::Parameter,
        }
    }

    fn time_axis(_: &Case, name: &str) -> Option<usize> {
        matches!(name, "x" | "dt" | "b" | "c" | "z" | "y").then_some(1)
    }

    fn run(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        let output = ssd_chunk_scan(&arguments(case, inputs))?;
        Ok([("y".into(), output.y), ("final_state".into(), output.final_state)].into())
    }

    fn slack(dtype: DType) -> f64 {
        let half = matches!(dtype, DType::F16 | DType::BF16);
        if half && target::is_cuda() { tolerance::TENSOR_CORES } else { 1.0 }
    }

    fn reference(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        let output = mamba_ops::ssd::reference::forward(&arguments(case, inputs))?;
        Ok([("y".into(), output.y), ("final_state".into(), output.final_state)].into())
    }

    fn golden(golden: &Golden) -> std::result::Result<(Case, GoldenTensors), String> {
        let ours = |name: &str| if name == "initial_states" { "initial_state" } else { name }.to_owned();
        let tensors = GoldenTensors::read(golden, ours);
        let (batch, seqlen, nheads, headdim) = tensors.inputs["x"].dims4().unwrap();
        let (_, _, ngroups, d_state) = tensors.inputs["b"].dims4().unwrap();
        let has = |name: &str| tensors.inputs.contains_key(name);
        let (low, high) = golden.option("dt_limit").unwrap().split_once(',').unwrap();
        let case = Case {
            batch,
            seqlen,
            nheads,
            headdim,
            ngroups,
            d_state,
            d: tensors.inputs.get("d").map(|d| d.rank()),
            z: has("z"),
            dt_bias: has("dt_bias"),
            dt_softplus: golden.flag("dt_softplus"),
            dt_limit: (low.parse().unwrap(), high.parse().unwrap()),
            chunk_size: golden.number("chunk_size").unwrap() as usize,
            state: has("initial_state"),
            packing: laws::packing(golden),
        };
        Ok((case, tensors))
    }
}

impl PackedOp for Ssd {
    fn packed(case: &Case, packing: Option<Packing>) -> Case {
        let (batch, seqlen) =
            packing.as_ref().map_or((case.batch, case.seqlen), |packing| (packing.batch(), packing.seqlen()));
        Case { batch, seqlen, packing, ..case.clone() }
    }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for seqlen in [0, 1, 2, 15, 16, 17, 40] {
        cases.push(Case::new([2, seqlen, 3, 5, 1, 7]));
    }
    for chunk_size in [1, 17, 23, 64, 1000] {
        cases.push(Case { chunk_size, ..Case::new([1, 70, 2, 3, 1, 4]) });
    }
    for (headdim, d_state) in [(1, 1), (1, 24), (16, 16), (20, 1), (33, 64), (64, 19), (100, 5)] {
        cases.push(Case::new([1, 20, 2, headdim, 1, d_state]));
    }
    for (nheads, ngroups) in [(6, 2), (6, 6), (10, 2), (13, 1)] {
        cases.push(Case::new([2, 20, nheads, 4, ngroups, 5]));
    }
    cases.push(Case::new([0, 7, 4, 4, 1, 4]));
    cases.push(Case { d: Some(2), ..Case::new([2, 20, 4, 5, 2, 3]) });
    cases.push(Case { dt_limit: (0.1, 0.6), ..Case::new([2, 20, 4, 5, 2, 3]) });
    cases.push(Case { dt_limit: (f64::NEG_INFINITY, 0.3), ..Case::bare([2, 20, 4, 5, 2, 3]) });
    cases.push(Case::bare([2, 40, 4, 5, 2, 3]));
    cases.push(Case { z: true, ..Case::bare([2, 40, 4, 5, 2, 3]) });
    cases.push(Case { state: true, ..Case::bare([2, 40, 4, 5, 2, 3]) });
    for packing in laws::packings() {
        cases.push(Ssd::packed(&Case::new([0, 0, 6, 5, 2, 3]), Some(packing)));
    }
    // The sizes that a GPU has kernels of its own for.
    let packing = Some(laws::packings()[7].clone());
    cases.push(Ssd::packed(&Case::new([0, 0, 2, 64, 1, 128]), packing.clone()));
    cases.push(Ssd::packed(&Case { state: true, ..Case::bare([0, 0, 2, 64, 1, 128]) }, packing));
    cases.push(Case { d: Some(1), state: true, ..Case::bare([1, 64, 2, 64, 1, 128]) });
    cases.push(Case::new([1, 70, 2, 64, 2, 128]));
    cases
}

#[test]
fn reference() {
    laws::reference::<Ssd>(&cases());
}

#[test]
fn packed() {
    laws::packed::<Ssd>(&Case::new([0, 0, 4, 5, 2, 3]));
    laws::packed::<Ssd>(&Case { chunk_size: 64, d: Some(2), ..Case::new([0, 0, 13, 3, 1, 17]) });
    laws::packed::<Ssd>(&Case { chunk_size: 33, dt_limit: (0.1, 0.6), ..Case::new([0, 0, 6, 17, 6, 4]) });
    laws::packed::<Ssd>(&Case::bare([0, 0, 4, 5, 2, 3]));
    laws::packed::<Ssd>(&Case::new([0, 0, 4, 32, 2, 64]));
}

#[test]
fn partial_gradients() {
    laws::partial_gradients::<Ssd>(&Case::new([2, 40, 4, 5, 2, 3]));
    laws::partial_gradients::<Ssd>(&Case { z: false, ..Case::new([2, 5, 2, 5, 1, 3]) });
}

#[test]
fn split() {
    laws::split::<Ssd>(&Case::new([2, 19, 4, 3, 2, 5]));
    laws::split::<Ssd>(&Case::bare([1, 35, 2, 3, 1, 4]));
}

#[test]
fn layout() {
    laws::layout::<Ssd>(&Case { d: Some(2), ..Case::new([2, 20, 4, 3, 2, 5]) });
    laws::layout::<Ssd>(&Ssd::packed(&Case::new([0, 0, 4, 3, 2, 5]), Some(laws::packings()[6].clone())));
}

#[test]
fn threads() {
    laws::threads::<Ssd>(&Case::new([2, 150, 20, 16, 2, 24]));
    let packed = Ssd::packed(&Case::new([0, 0, 20, 16, 2, 24]), Some(laws::packings()[5].clone()));
    laws::threads::<Ssd>(&packed);
}

#[test]
fn repeats() {
    let case = Case::new([2, 150, 20, 16, 2, 24]);
    laws::repeats::<Ssd>(&case);
    laws::repeats::<Ssd>(&Ssd::packed(&case, Some(laws::packings()[9].clone())));
}

#[test]
fn finite_differences() {
    laws::finite_differences::<Ssd>(&[
        Case::new([2, 5, 4, 3, 2, 3]),
        Case { d: Some(2), dt_limit: (0.1, 0.4), ..Case::new([2, 5, 4, 3, 1, 3]) },
        Case::bare([2, 5, 2, 3, 1, 3]),
        Ssd::packed(&Case::new([0, 0, 4, 3, 2, 3]), Some(laws::packings()[3].clone())),
    ]);
}

#[test]
fn golden() {
    assert_eq!(laws::golden::<Ssd>("ops/ssd", &[]), 36 + 17);
}

fn cast(inputs: &Tensors, dtype: DType) -> Tensors {
    inputs.iter().map(|(name, x)| (name.clone(), x.to_dtype(dtype).unwrap())).collect()
}

/// Decays from almost 1 to 0 and steps up to 1000 over 4097 tokens give what the `f64` recurrence gives.
#[test]
fn extreme_decays() {
    let (seqlen, nheads, headdim, d_state) = (4097, 12, 3, 4);
    let case = Case { chunk_size: 64, ..Case::bare([1, seqlen, nheads, headdim, 1, d_state]) };
    let mut random = Random::new(11);
    let mut inputs = Ssd::inputs(&case, &mut random);
    // 0, then from -1e-30 to -1e3.
    let a = (0..nheads).map(|i| if i == 0 { 0.0 } else { -(10f64.powf(-33.0 + 3.0 * i as f64 + 3.0)) });
    inputs.insert("a".into(), Tensor::from_iter(a, &Device::Cpu).unwrap());
    let dt: Vec<f64> = (0..seqlen * nheads)
        .map(|i| 10f64.powf(random.uniform(-6.0, 3.0)) * f64::from(u8::from(i % 7 != 0)))
        .collect();
    inputs.insert("dt".into(), Tensor::from_vec(dt, (1, seqlen, nheads), &Device::Cpu).unwrap());
    let single = cast(&inputs, DType::F32);
    let want = Ssd::reference(&case, &cast(&single, DType::F64)).unwrap();
    for isa in Target::available() {
        let got = isa.scope(|| Ssd::fused(&case, &single)).unwrap();
        for (name, want) in &want {
            let axis = if name == "y" { 2 } else { 1 };
            for head in 0..nheads {
                let (got, want) =
                    (got[name].narrow(axis, head, 1).unwrap(), want.narrow(axis, head, 1).unwrap());
                assert!(values(&got).iter().all(|v| v.is_finite()), "{} `{name}`", isa.name());
                let error = relative_rms(&got, &want);
                let allowed = tolerance::FORWARD;
                assert!(error <= allowed, "{} `{name}` of head {head} is off by {error:.1e}", isa.name());
            }
        }
    }
}

/// Gradients over many chunks, under strong, weak, no and negative decay.
#[test]
fn gradients_over_many_chunks() {
    let sizes = [1, 400, 6, 5, 2, 7];
    let mut random = Random::new(12);
    for (low, high) in [(-1e3, -1.0), (-0.1, -1e-4), (-1e-30, 0.0), (0.0, 0.02)] {
        let case = Case { chunk_size: 64, ..Case::new(sizes) };
        let mut inputs = Ssd::inputs(&case, &mut random);
        inputs.insert("a".into(), random.tensor(&[6], low, high));
        let single = cast(&inputs, DType::F32);
        let gradients = |inputs: &Tensors, run: fn(&Case, &Tensors) -> Result<Tensors>| -> Result<Tensors> {
            let vars: Vec<(&String, Var)> =
                inputs.iter().map(|(name, x)| Ok((name, Var::from_tensor(x)?))).collect::<Result<_>>()?;
            let tracked = vars.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
            let outputs = run(&case, &tracked)?;
            let loss = (outputs["y"].sqr()?.sum_all()? + outputs["final_state"].sqr()?.sum_all()?)?;
            let store = loss.backward()?;
            let gradient = |var: &Var| store.get(var.as_tensor()).map(Tensor::detach);
            Ok(vars.iter().filter_map(|(name, var)| Some(((*name).clone(), gradient(var)?))).collect())
        };
        let want = gradients(&cast(&single, DType::F64), Ssd::reference).unwrap();
        let got = gradients(&single, Ssd::fused).unwrap();
        assert_eq!(got.len(), want.len());
        for (name, want) in &want {
            let error = relative_rms(&got[name], want);
            assert!(error <= tolerance::BACKWARD, "a in [{low}, {high}): d`{name}` is off by {error:.1e}");
        }
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (x, dt, a, b) = (zeros(&[2, 5, 6, 3]), zeros(&[2, 5, 6]), zeros(&[6]), zeros(&[2, 5, 2, 4]));
    let good = SsdChunkScan::new(&x, &dt, &a, &b, &b);
    let fails = |args: SsdChunkScan, want: &str| {
        let message = ssd_chunk_scan(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    assert!(ssd_chunk_scan(&good).is_ok());
    let expected = "ssd_chunk_scan: `x` has shape [2, 5, 6], expected (batch, seqlen, nheads, headdim)";
    fails(SsdChunkScan { x: &dt, ..good }, expected);
    fails(
        SsdChunkScan { dt: &x, ..good },
        "`dt` has shape [2, 5, 6, 3], expected (batch 2, seqlen 5, nheads 6)",
    );
    fails(SsdChunkScan { a: &zeros(&[6, 4]), ..good }, "`a` has shape [6, 4], expected (nheads 6)");
    let groups = zeros(&[2, 5, 4, 4]);
    fails(
        SsdChunkScan { b: &groups, c: &groups, ..good },
        "`b` has 4 groups, expected a divisor of nheads 6",
    );
    fails(SsdChunkScan { c: &groups, ..good }, "expected (batch 2, seqlen 5, ngroups 2, d_state 4)");
    fails(SsdChunkScan { d: Some(&zeros(&[3])), ..good }, "`d` has shape [3], expected (nheads 6)");
    fails(SsdChunkScan { d: Some(&dt), ..good }, "expected (nheads 6, headdim 3)");
    fails(SsdChunkScan { z: Some(&dt), ..good }, "`z` has shape [2, 5, 6]");
    fails(
        SsdChunkScan { dt_bias: Some(&zeros(&[5])), ..good },
        "`dt_bias` has shape [5], expected (nheads 6)",
    );
    let state = zeros(&[2, 6, 4, 3]);
    let expected =
        "`initial_state` has shape [2, 6, 4, 3], expected (batch 2, nheads 6, headdim 3, d_state 4)";
    fails(SsdChunkScan { initial_state: Some(&state), ..good }, expected);
    fails(SsdChunkScan { chunk_size: 0, ..good }, "`chunk_size` is 0");
    fails(SsdChunkScan { dt_limit: (0.5, 0.1), ..good }, "`dt_limit` is (0.5, 0.1)");
    fails(SsdChunkScan { dt_limit: (f64::NAN, 0.1), ..good }, "`dt_limit`");
    let half = b.to_dtype(DType::BF16).unwrap();
    fails(SsdChunkScan { b: &half, ..good }, "`b` has dtype bf16, expected f32 as `x`");
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
    gradients_over_many_chunks,
);
