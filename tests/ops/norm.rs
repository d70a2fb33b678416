//! Cases of `norm`.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::{Norm, NormKind, NormOutput, norm};

use crate::laws::{self, GoldenTensors, Op, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, relative_rms, values};

use NormKind::{Layer, Rms};

/// The gate, if any.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gate {
    Without,
    BeforeNorm,
    AfterNorm,
}

use Gate::{AfterNorm, BeforeNorm, Without};

#[derive(Debug, Clone)]
pub struct Case {
    pub kind: NormKind,
    pub shape: Vec<usize>,
    pub group_size: Option<usize>,
    pub weight: bool,
    pub bias: bool,
    pub residual: bool,
    pub gate: Gate,
    pub eps: f64,
    pub residual_in_f32: bool,
    /// Whether the stream that comes out is looked at where it is `x` itself: its gradient then joins that of `x` in
    /// the dtype of `x`, rounded by candle.
    pub prenorm: bool,
}

impl Case {
    pub fn new(kind: NormKind, shape: &[usize]) -> Self {
        Self {
            kind,
            shape: shape.to_vec(),
            group_size: None,
            weight: true,
            bias: false,
            residual: false,
            gate: Without,
            eps: 1e-5,
            residual_in_f32: false,
            prenorm: false,
        }
    }

    fn tensors(&self, output: NormOutput) -> Tensors {
        let mut tensors: Tensors = [("y".into(), output.y)].into();
        if self.residual || self.residual_in_f32 || self.prenorm {
            tensors.insert("residual".into(), output.residual);
        }
        tensors
    }
}

/// The op with a residual stream in the dtype of `x`, or in `f32`.
pub struct Subject<const F32_STREAM: bool>;
pub type InDtypeOfX = Subject<false>;
pub type InF32 = Subject<true>;

fn arguments<'a>(case: &Case, inputs: &'a Tensors) -> Norm<'a> {
    Norm {
        weight: inputs.get("weight"),
        bias: inputs.get("bias"),
        residual: inputs.get("residual"),
        z: inputs.get("z"),
        group_size: case.group_size,
        norm_before_gate: case.gate == AfterNorm,
        residual_in_f32: case.residual_in_f32,
        ..Norm::new(&inputs["x"], case.kind, case.eps)
    }
}

impl<const F32_STREAM: bool> Op for Subject<F32_STREAM> {
    type Case = Case;

    fn inputs(case: &Case, random: &mut Random) -> Tensors {
        let dim = case.shape[case.shape.len() - 1];
        let mut inputs: Tensors = [("x".into(), random.normal(&case.shape))].into();
        for (name, given, shape) in [
            ("weight", case.weight, &[dim][..]),
            ("bias", case.bias, &[dim]),
            ("residual", case.residual, &case.shape),
            ("z", case.gate != Without, &case.shape),
        ] {
            if given {
                inputs.insert(name.into(), random.normal(shape));
            }
        }
        inputs
    }

    fn role(name: &str) -> Role {
        match name {
            "x" | "z" => Role::Activation,
            "residual" if F32_STREAM => Role::State,
            "residual" => Role::Activation,
            _ => Role::Parameter,
        }
    }

    fn time_axis(_: &Case, _: &str) -> Option<usize> {
        None
    }

    fn run(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        Ok(case.tensors(norm(&arguments(case, inputs))?))
    }

    fn reference(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        Ok(case.tensors(mamba_ops::norm::reference::forward(&arguments(case, inputs))?))
    }

    fn golden(golden: &Golden) -> std::result::Result<(Case, GoldenTensors), String> {
        let tensors = GoldenTensors::read(golden, str::to_owned);
        let has = |name: &str| tensors.inputs.contains_key(name);
        for (name, option) in
            [("x1", "parallel branches"), ("rowscale", "scaled rows"), ("dropout_mask", "dropout")]
        {
            if has(name) {
                return Err(format!("{option} (`{name}`) are no option of ours"));
            }
        }
        let case = Case {
            kind: match golden.option("kind") {
                Some("rms_norm" | "rms_norm_gated") => Rms,
                Some("layer_norm" | "layer_norm_gated") => Layer,
                other => panic!("{}: kind {other:?}", golden.name),
            },
            shape: tensors.inputs["x"].dims().to_vec(),
            group_size: match golden.option("group_size") {
                Some("none") => None,
                _ => golden.number("group_size").map(|n| n as usize),
            },
            weight: has("weight"),
            bias: has("bias"),
            residual: has("residual"),
            gate: match (has("z"), golden.flag("norm_before_gate")) {
                (false, _) => Without,
                (true, false) => BeforeNorm,
                (true, true) => AfterNorm,
            },
            eps: golden.number("eps").unwrap_or_else(|| panic!("{}: no eps", golden.name)),
            residual_in_f32: golden.flag("residual_in_fp32"),
            prenorm: golden.flag("prenorm"),
        };
        Ok((case, tensors))
    }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for kind in [Rms, Layer] {
        for dim in [1, 3, 4, 8, 15, 16, 17, 31, 63, 64, 65, 129, 500, 2560] {
            // Of one channel RMSNorm leaves little but the sign: gradients are what eps leaves of a difference.
            let eps = if dim == 1 { 1.0 } else { 1e-5 };
            let gate = [Without, BeforeNorm, AfterNorm][dim % 3];
            let new = Case::new(kind, &[3, dim]);
            cases.push(Case { bias: dim % 2 == 0, residual: dim % 4 < 2, gate, eps, ..new });
        }
        for gate in [Without, BeforeNorm, AfterNorm] {
            for (weight, bias, residual) in
                [(false, false, false), (false, true, true), (true, false, true), (true, true, true)]
            {
                cases.push(Case { weight, bias, residual, gate, ..Case::new(kind, &[2, 5, 24]) });
            }
            for group_size in [2, 8, 17, 34, 136] {
                let case = Case::new(kind, &[2, 3, 136]);
                cases.push(Case { group_size: Some(group_size), bias: true, gate, ..case });
            }
        }
        for shape in [&[7][..], &[1, 1, 1, 9], &[2, 2, 2, 2, 5], &[1030, 6], &[257, 24]] {
            cases.push(Case { bias: true, residual: true, ..Case::new(kind, shape) });
        }
        for shape in [&[0][..], &[0, 4], &[2, 0, 4], &[3, 0]] {
            cases.push(Case { bias: true, residual: true, gate: BeforeNorm, ..Case::new(kind, shape) });
        }
        for eps in [0.0, 1e-2] {
            cases.push(Case { eps, residual: true, ..Case::new(kind, &[4, 20]) });
        }
    }
    cases
}

/// Everything at once.
fn full(kind: NormKind, shape: &[usize], gate: Gate) -> Case {
    Case { bias: true, residual: true, gate, ..Case::new(kind, shape) }
}

fn kinds_and_gates() -> impl Iterator<Item = (NormKind, Gate)> {
    [Rms, Layer].into_iter().flat_map(|kind| [Without, BeforeNorm, AfterNorm].map(|gate| (kind, gate)))
}

#[test]
fn reference() {
    laws::reference::<InDtypeOfX>(&cases());
}

#[test]
fn reference_with_an_f32_stream() {
    let mut cases = vec![];
    for (kind, gate) in kinds_and_gates() {
        cases.push(full(kind, &[2, 5, 24], gate));
        cases.push(Case { residual_in_f32: true, ..full(kind, &[2, 5, 24], gate) });
        cases.push(Case { residual: false, residual_in_f32: true, ..full(kind, &[9, 33], gate) });
    }
    laws::reference::<InF32>(&cases);
    for case in &mut cases {
        case.residual_in_f32 = true; // from a residual in the dtype of x
    }
    laws::reference::<InDtypeOfX>(&cases);
}

#[test]
fn partial_gradients() {
    for (kind, gate) in kinds_and_gates() {
        laws::partial_gradients::<InDtypeOfX>(&full(kind, &[3, 5, 12], gate));
        laws::partial_gradients::<InDtypeOfX>(&Case { group_size: Some(6), ..full(kind, &[3, 5, 12], gate) });
    }
}

#[test]
fn layout() {
    for (kind, gate) in kinds_and_gates() {
        laws::layout::<InDtypeOfX>(&full(kind, &[2, 6, 9], gate));
        laws::layout::<InDtypeOfX>(&full(kind, &[9], gate));
    }
}

#[test]
fn threads() {
    for (kind, gate) in kinds_and_gates() {
        laws::threads::<InDtypeOfX>(&full(kind, &[3, 401, 70], gate));
    }
}

#[test]
fn repeats() {
    for (kind, gate) in kinds_and_gates() {
        laws::repeats::<InDtypeOfX>(&full(kind, &[3, 401, 70], gate));
        if target::is_cuda() {
            laws::repeats::<InDtypeOfX>(&full(kind, &[2000, 264], gate)); // rows of many blocks
        }
    }
}

#[test]
fn finite_differences() {
    let cases: Vec<Case> = kinds_and_gates()
        .flat_map(|(kind, gate)| {
            let case = full(kind, &[2, 3, 8], gate);
            [Case { group_size: Some(4), ..case.clone() }, Case { residual: false, ..case.clone() }, case]
        })
        .collect();
    laws::finite_differences::<InDtypeOfX>(&cases);
}

#[test]
fn golden() {
    let not_ours = [
        "layer_norm_parallel",
        "layer_norm_rowscale",
        "rms_norm_parallel",
        "upstream_cuda_layer_norm_dropout_rowscale",
        "upstream_cuda_layer_norm_parallel",
    ];
    assert_eq!(laws::golden::<InF32>("ops/norm", &not_ours), 38 + 28 - not_ours.len());
}

/// A row gives the same bits alone as among others, and whatever the rank.
#[test]
fn rows_do_not_see_each_other() {
    for (kind, gate) in kinds_and_gates() {
        let (rows, dim) = (20, 37);
        let case = full(kind, &[rows, dim], gate);
        let inputs: Tensors = InF32::inputs(&case, &mut Random::new(1))
            .into_iter()
            .map(|(name, x)| (name, x.to_dtype(DType::F32).unwrap()))
            .collect();
        let whole = InF32::fused(&case, &inputs).unwrap();
        for row in 0..rows {
            let one = |x: &Tensor| if x.rank() == 2 { x.get(row).unwrap() } else { x.clone() };
            let alone = inputs.iter().map(|(name, x)| (name.clone(), one(x))).collect();
            let got = InF32::fused(&case, &alone).unwrap();
            for (name, whole) in &whole {
                assert_eq!(relative_rms(&got[name], &one(whole)), 0.0, "{case:?}: `{name}` of row {row}");
            }
        }
    }
}

/// A mean 100,000 times the spread costs layer norm no accuracy, forward and backward.
#[test]
fn large_mean() {
    let case = Case { bias: true, ..Case::new(Layer, &[5, 1000]) };
    let mut inputs = InF32::inputs(&case, &mut Random::new(2));
    inputs.insert("x".into(), (&inputs["x"] + 1e5).unwrap());
    let single: Tensors = inputs.iter().map(|(n, x)| (n.clone(), x.to_dtype(DType::F32).unwrap())).collect();
    let exact: Tensors = single.iter().map(|(n, x)| (n.clone(), x.to_dtype(DType::F64).unwrap())).collect();
    let cotangent = Random::new(3).normal(&case.shape);
    let run = |inputs: &Tensors, f: &dyn Fn(&Tensors) -> Result<Tensors>| {
        let x = Var::from_tensor(&inputs["x"]).unwrap();
        let mut inputs = inputs.clone();
        inputs.insert("x".into(), x.as_tensor().clone());
        let y = f(&inputs).unwrap()["y"].to_dtype(DType::F64).unwrap();
        let loss = (&y * &cotangent).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().get(x.as_tensor()).unwrap().clone();
        (y.detach(), gradient)
    };
    let want = run(&exact, &|x| InF32::reference(&case, x));
    for isa in Target::available() {
        let got = isa.scope(|| run(&single, &|x| InF32::fused(&case, x)));
        let (forward, backward) = (relative_rms(&got.0, &want.0), relative_rms(&got.1, &want.1));
        assert!(forward <= tolerance::FORWARD, "{} is off by {forward:.1e}", isa.name());
        assert!(backward <= tolerance::BACKWARD, "{} gradient is off by {backward:.1e}", isa.name());
    }
}

/// Rows of one value everywhere, 0 too, have no spread: outputs and gradients stay finite.
#[test]
fn rows_without_spread() {
    for (kind, gate) in kinds_and_gates() {
        for value in [0.0, 3.0, -1e8] {
            let case = Case { residual: false, ..full(kind, &[2, 19], gate) };
            let mut inputs: Tensors = InF32::inputs(&case, &mut Random::new(4))
                .into_iter()
                .map(|(name, x)| (name, x.to_dtype(DType::F32).unwrap()))
                .collect();
            let x = Var::from_tensor(&Tensor::full(value as f32, (2, 19), &Device::Cpu).unwrap()).unwrap();
            inputs.insert("x".into(), x.as_tensor().clone());
            for isa in Target::available() {
                let y = isa.scope(|| InF32::fused(&case, &inputs)).unwrap()["y"].clone();
                let gradient = y.sum_all().unwrap().backward().unwrap().get(x.as_tensor()).unwrap().clone();
                for (what, x) in [("y", &y), ("gradient", &gradient)] {
                    let finite = values(x).iter().all(|v| v.is_finite());
                    assert!(finite, "{case:?} of {value}: {what} on {}", isa.name());
                }
            }
        }
    }
}

/// The dtype of the stream that comes out, and that it is `x` itself where nothing is added.
#[test]
fn residual_stream() {
    use DType::{BF16, F16, F32, F64};
    let weight = Tensor::ones(4, F32, &Device::Cpu).unwrap();
    for (x, residual, in_f32, want) in [
        (BF16, None, false, BF16),
        (BF16, None, true, F32),
        (BF16, Some(BF16), false, BF16),
        (BF16, Some(BF16), true, F32),
        (F16, Some(F32), false, F32),
        (F32, Some(F32), false, F32),
        (F64, Some(F64), true, F64),
    ] {
        let zeros = |dtype| Tensor::zeros((2, 4), dtype, &Device::Cpu).unwrap();
        let (x, stream) = (zeros(x), residual.map(zeros));
        let args =
            Norm { residual: stream.as_ref(), residual_in_f32: in_f32, ..Norm::rms(&x, &weight, 1e-5) };
        let output = norm(&args).unwrap();
        assert_eq!((output.y.dtype(), output.residual.dtype()), (x.dtype(), want), "{residual:?} {in_f32}");
        assert_eq!(output.residual.id() == x.id(), residual.is_none() && want == x.dtype());
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (x, weight) = (zeros(&[2, 3, 6]), zeros(&[6]));
    let fails = |args: Norm, want: &str| {
        let message = norm(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    let good = Norm::layer(&x, &weight, 1e-5);
    assert!(norm(&good).is_ok());
    let (scalar, integers) = (zeros(&[]), x.to_dtype(DType::U32).unwrap());
    fails(Norm { x: &scalar, ..good }, "norm: `x` is a scalar, expected (.., dim)");
    fails(Norm { x: &integers, ..good }, "norm: `x` has dtype u32, expected f32, f16, bf16 or f64");
    fails(Norm { weight: Some(&zeros(&[5])), ..good }, "`weight` has shape [5], expected (dim 6)");
    fails(Norm { bias: Some(&zeros(&[1, 6])), ..good }, "`bias` has shape [1, 6], expected (dim 6)");
    let flat = zeros(&[6, 6]);
    let expected = "has shape [6, 6], expected (batch 2, batch 3, dim 6)";
    fails(Norm { residual: Some(&flat), ..good }, &format!("`residual` {expected}"));
    fails(Norm { z: Some(&flat), ..good }, &format!("`z` {expected}"));
    let half = x.to_dtype(DType::F16).unwrap();
    fails(Norm { z: Some(&half), ..good }, "`z` has dtype f16, expected f32 as `x`");
    fails(Norm { residual: Some(&half), ..good }, "`residual` has dtype f16, expected f32 as `x`, or f32");
    for group_size in [0, 4, 12] {
        let args = Norm { group_size: Some(group_size), ..good };
        fails(args, &format!("`group_size` is {group_size}, expected a divisor of dim 6"));
    }
    for eps in [-1e-5, f64::NAN, f64::INFINITY] {
        fails(Norm { eps, ..good }, &format!("`eps` is {eps}, expected a finite number of at least 0"));
    }
}

crate::on_cuda!(
    reference,
    reference_with_an_f32_stream,
    partial_gradients,
    layout,
    repeats,
    golden,
    rows_do_not_see_each_other,
    large_mean,
    rows_without_spread,
);
