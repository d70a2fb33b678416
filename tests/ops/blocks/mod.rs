//! Cases of the fused blocks: `mamba2_split_conv1d_scan` and `mamba1_inner` against the ops one after another.

mod mamba1;
mod mamba2;

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::{GatedRmsNorm, Mamba2SplitConv1dScan, Packing, mamba2_split_conv1d_scan};

pub use self::mamba1::Mamba1;
use self::mamba1::mamba1_cases;
pub use self::mamba2::Mamba2;
use self::mamba2::mamba2_cases;
use crate::laws::{self, GoldenTensors, Op, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target;
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

/// A block, and what its laws need of it.
pub trait Block: std::fmt::Debug + Clone + Sync {
    /// The name of the main input.
    const MAIN: &'static str;
    fn random(&self, random: &mut Random) -> Tensors;
    fn run(&self, inputs: &Tensors) -> Result<Tensors>;
    fn unfused(&self, inputs: &Tensors) -> Result<Tensors>;
    fn step(&self, inputs: &Tensors, token: &Tensor, conv: &Tensor, ssm: &Tensor) -> Result<Tensor>;
    /// The same, where `backward()` computes nothing again.
    fn keeping(&self) -> Self;
    fn with_seqlen(&self, seqlen: usize) -> Self;
    fn with_packing(&self, packing: Option<Packing>) -> Self;
    /// The case of a golden file, with its tensors by our names.
    fn golden(golden: &Golden) -> (Self, GoldenTensors);
}

/// The laws with the block itself as the reference of finite differences, else with the ops one after another.
pub struct Subject<B, const ITSELF: bool>(std::marker::PhantomData<B>);

impl<B: Block, const ITSELF: bool> Op for Subject<B, ITSELF> {
    type Case = B;
    const ROUNDED_ONCE: &[DType] = &[DType::F32];

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

/// How far a block may be off the ops one after another: they round the same in the same places. On a GPU products are added
/// up in other orders, which now and then gives the next number of 16 bits.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => F64_TOLERANCE,
        DType::BF16 if target::is_cuda() => 2f64.powi(-7),
        DType::F16 if target::is_cuda() => 2f64.powi(-10),
        _ => F32_TOLERANCE,
    }
}

/// Outputs, states and gradients are those of the ops one after another, in every dtype.
fn equals_unfused<B: Block>(cases: &[B]) {
    let kept = cases.iter().map(Block::keeping);
    for (seed, case) in cases.iter().cloned().chain(kept).enumerate() {
        let exact = case.random(&mut Random::new(seed as u64));
        let fused = |x: &Tensors| Subject::<B, false>::fused(&case, x);
        let unfused =
            |x: &Tensors| target::back(case.unfused(&target::place(&format!("{case:?} unfused"), x)?)?);
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let inputs = cast(&exact, dtype);
            let untracked = fused(&inputs).unwrap();
            assert!(untracked.values().all(|y| !y.track_op()), "{case:?}: a graph without need");
            let cotangents = laws::cotangents(&untracked, &mut Random::new(77)).unwrap();
            let got = laws::differentiate(&fused, &inputs, &cotangents).unwrap();
            let want = laws::differentiate(&unfused, &inputs, &cotangents).unwrap();
            for (what, got, want) in
                [("untracked ", &untracked, &want.0), ("", &got.0, &want.0), ("d", &got.1, &want.1)]
            {
                assert_eq!(got.len(), want.len());
                for (name, want) in want {
                    let got = &got[name];
                    assert_eq!(got.dtype(), want.dtype(), "{case:?}: {what}{name}");
                    let (error, allowed) = (relative_rms(got, want), tolerance(dtype));
                    assert!(error <= allowed, "{case:?} {dtype:?}: {what}`{name}` is off by {error:.1e}");
                }
            }
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
                let inputs = target::place(&format!("{case:?}"), &cast(&exact, dtype)).unwrap();
                let whole = target::back(case.run(&inputs).unwrap()).unwrap();
                let mut first = inputs.clone();
                first.insert(B::MAIN.into(), inputs[B::MAIN].narrow(1, 0, prefill).unwrap());
                let first = case.with_seqlen(prefill).run(&first).unwrap();
                let (conv, ssm) = (&first["final_conv_state"], &first["final_ssm_state"]);
                let mut ys: Vec<Tensor> = (prefill > 0).then(|| first["y"].clone()).into_iter().collect();
                for t in prefill..prefill + STEPS {
                    let token = inputs[B::MAIN].narrow(1, t, 1).unwrap();
                    ys.push(case.step(&inputs, &token, conv, ssm).unwrap());
                }
                let got = outputs(Tensor::cat(&ys, 1).unwrap(), conv.clone(), ssm.clone());
                let got = target::back(got).unwrap();
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
    let case = Mamba2 { in_proj: true, out_proj: true, ..Mamba2::new([2, 20, 4, 3, 2, 5]) };
    laws::partial_gradients::<Subject<Mamba2, false>>(&case.keeping());
    let case = Mamba1 { in_proj: true, out_proj: true, ..Mamba1::new([2, 20, 6, 4, 2]) };
    laws::partial_gradients::<Subject<Mamba1, false>>(&case.keeping());
}

#[test]
fn split() {
    laws::split::<Subject<Mamba2, false>>(&Mamba2::new([2, 9, 4, 3, 2, 5]));
    laws::split::<Subject<Mamba1, false>>(&Mamba1 { states: false, ..Mamba1::new([2, 9, 6, 4, 2]) });
}

#[test]
fn layout() {
    laws::layout::<Subject<Mamba2, false>>(&Mamba2::new([2, 20, 4, 3, 2, 5]));
    laws::layout::<Subject<Mamba1, false>>(&Mamba1::new([2, 20, 6, 4, 2]));
}

#[test]
fn repeats() {
    let packing = Some(laws::packings()[9].clone());
    laws::repeats::<Subject<Mamba2, false>>(&Mamba2::new([2, 100, 8, 16, 2, 16]));
    laws::repeats::<Subject<Mamba2, false>>(
        &Mamba2::new([0, 0, 2, 64, 1, 128]).with_packing(packing.clone()),
    );
    laws::repeats::<Subject<Mamba1, false>>(&Mamba1::new([2, 100, 64, 8, 4]));
    laws::repeats::<Subject<Mamba1, false>>(&Mamba1::new([0, 0, 64, 16, 4]).with_packing(packing).keeping());
}

#[test]
fn threads() {
    laws::threads::<Subject<Mamba2, false>>(&Mamba2::new([2, 100, 8, 16, 2, 16]));
    laws::threads::<Subject<Mamba1, false>>(&Mamba1::new([2, 100, 64, 8, 4]));
}

#[test]
fn finite_differences() {
    let packing = Some(laws::packings()[3].clone());
    laws::finite_differences::<Subject<Mamba2, true>>(&[
        Mamba2::new([2, 5, 4, 3, 2, 3]),
        Mamba2 { in_proj: true, out_proj: true, ..Mamba2::new([1, 5, 2, 3, 1, 3]) }.keeping(),
        Mamba2::new([0, 0, 2, 3, 1, 3]).with_packing(packing.clone()),
        Mamba2 { out_proj: true, norm: None, ..Mamba2::new([1, 5, 2, 3, 1, 3]) },
        Mamba2 { norm: Some((Some(3), true)), d_has_headdim: true, ..Mamba2::new([1, 5, 2, 3, 1, 3]) },
    ]);
    laws::finite_differences::<Subject<Mamba1, true>>(&[
        Mamba1::new([2, 5, 4, 3, 2]),
        Mamba1 { in_proj: true, out_proj: true, ..Mamba1::new([1, 5, 4, 3, 2]) }.keeping(),
        Mamba1::new([0, 0, 4, 3, 2]).with_packing(packing),
    ]);
}

/// Outputs, and gradients through all of them.
fn of_everything<B: Block>(case: &B, inputs: &Tensors) -> (Tensors, Tensors) {
    let outputs = case.run(inputs).unwrap();
    let cotangents = laws::cotangents(&outputs, &mut Random::new(2)).unwrap();
    laws::differentiate(&|x| case.run(x), inputs, &cotangents).unwrap()
}

/// Empty batches and sequences pass through, states too, and their gradients are there.
#[test]
fn empty() {
    for (batch, seqlen) in [(0, 5), (2, 0)] {
        let case = Mamba2 { out_proj: true, ..Mamba2::new([batch, seqlen, 4, 3, 2, 5]) };
        let inputs = cast(&case.random(&mut Random::new(1)), DType::F32);
        let (got, gradients) = of_everything(&case, &inputs);
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
        let (got, gradients) = of_everything(&case, &inputs);
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

crate::on_cuda!(
    golden,
    layout,
    mamba1_equals_unfused,
    mamba1_prefill_and_decode,
    mamba2_equals_unfused,
    mamba2_prefill_and_decode,
    packed,
    partial_gradients,
    repeats,
    split,
);
