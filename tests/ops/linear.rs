//! Cases of `linear`.

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::simd::Isa;
use mamba_ops::{Linear, linear};

use crate::laws::{self, GoldenTensors, Op, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::tolerance::{self, of_rounding, relative_rms, values};

use DType::{BF16, F16, F32, F64};

#[derive(Debug, Clone)]
struct Case {
    x: Vec<usize>,
    d_out: usize,
    bias: bool,
}

impl Case {
    fn new(x: &[usize], d_out: usize, bias: bool) -> Self {
        Self { x: x.to_vec(), d_out, bias }
    }
}

/// The op with parameters in the dtype of `x`, or in `f32`.
struct Subject<const F32_PARAMETERS: bool>;
type InDtypeOfX = Subject<false>;
type InF32 = Subject<true>;

fn arguments(inputs: &Tensors) -> Linear<'_> {
    Linear { bias: inputs.get("bias"), ..Linear::new(&inputs["x"], &inputs["weight"]) }
}

impl<const F32_PARAMETERS: bool> Op for Subject<F32_PARAMETERS> {
    type Case = Case;

    fn inputs(case: &Case, random: &mut Random) -> Tensors {
        let d_in = case.x[case.x.len() - 1];
        let mut inputs: Tensors =
            [("x".into(), random.normal(&case.x)), ("weight".into(), random.normal(&[case.d_out, d_in]))]
                .into();
        if case.bias {
            inputs.insert("bias".into(), random.normal(&[case.d_out]));
        }
        inputs
    }

    fn role(name: &str) -> Role {
        if F32_PARAMETERS && name != "x" { Role::Parameter } else { Role::Activation }
    }

    fn time_axis(_: &Case, _: &str) -> Option<usize> {
        None
    }

    fn run(_: &Case, inputs: &Tensors) -> Result<Tensors> {
        Ok([("y".into(), linear(&arguments(inputs))?)].into())
    }

    fn reference(_: &Case, inputs: &Tensors) -> Result<Tensors> {
        Ok([("y".into(), mamba_ops::linear::reference::forward(&arguments(inputs))?)].into())
    }

    fn golden(_: &Golden) -> std::result::Result<(Case, GoldenTensors), String> {
        Err("there are none".into())
    }
}

fn cast(inputs: &Tensors, x: DType, parameters: DType) -> Tensors {
    let dtype = |name: &str| if name == "x" { x } else { parameters };
    inputs.iter().map(|(name, t)| (name.clone(), t.to_dtype(dtype(name)).unwrap())).collect()
}

fn exact(inputs: &Tensors) -> Tensor {
    InF32::reference(&Case::new(&[], 0, false), &cast(inputs, F64, F64)).unwrap()["y"].clone()
}

/// What is computed without a graph, for every dtype of `x` and of the weight, on every instruction set.
fn check(case: &Case, seed: u64) {
    let inputs = InF32::inputs(case, &mut Random::new(seed));
    for x in [F32, BF16, F16] {
        for parameters in [F32, BF16, F16] {
            let rounded = cast(&inputs, x, parameters);
            let want = exact(&rounded);
            for isa in Isa::available() {
                let got = isa.scope(|| linear(&arguments(&rounded))).unwrap();
                assert_eq!(got.dtype(), x);
                let (error, bound) = (relative_rms(&got, &want), of_rounding(&want, x, tolerance::FORWARD));
                let (x, w) = (x.as_str(), parameters.as_str());
                assert!(
                    error <= bound,
                    "{case:?} x {x} weight {w} {}: off by {error:.1e}, allowed {bound:.1e}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn every_number_of_rows() {
    for rows in 1..=17 {
        check(&Case::new(&[rows, 70], 13, rows % 2 == 0), rows as u64);
    }
    for rows in [31, 32, 33, 64, 65, 100, 300] {
        check(&Case::new(&[rows, 40], 37, true), rows as u64);
    }
}

#[test]
fn every_size() {
    for d_in in [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 129, 500, 2047] {
        for d_out in [1, 2, 3, 4, 5, 7, 8, 33] {
            check(&Case::new(&[1 + (d_in + d_out) % 5, d_in], d_out, d_out % 2 == 0), d_in as u64);
        }
    }
    // Several tasks.
    check(&Case::new(&[3, 96], 2001, true), 1);
    check(&Case::new(&[1, 4100], 50, false), 2);
}

#[test]
fn every_rank_and_nothing() {
    for shape in [&[9][..], &[1, 9], &[2, 3, 9], &[2, 1, 2, 9]] {
        check(&Case::new(shape, 6, true), 1);
    }
    for (shape, d_out) in [(&[0, 4][..], 3), (&[2, 0, 4], 3), (&[2, 4], 0), (&[0, 4], 0), (&[20, 4], 0)] {
        check(&Case::new(shape, d_out, true), 1);
    }
    for rows in [0, 2, 20] {
        for bias in [false, true] {
            check(&Case::new(&[rows, 0], 3, bias), 1);
            check(&Case::new(&[rows, 0], 0, bias), 1);
        }
    }
}

#[test]
fn reference() {
    // In f16 and bf16 with a weight that has it too, training rounds as candle does, more than once.
    let mut cases = vec![Case::new(&[9], 5, true), Case::new(&[2, 3, 20], 7, true)];
    cases.extend([1, 4, 17, 70].map(|rows| Case::new(&[rows, 35], 11, rows % 2 == 0)));
    cases.extend([Case::new(&[0, 4], 3, true), Case::new(&[2, 0], 3, true), Case::new(&[2, 4], 0, true)]);
    laws::reference::<InF32>(&cases);
}

#[test]
fn partial_gradients() {
    for rows in [2, 40] {
        laws::partial_gradients::<InDtypeOfX>(&Case::new(&[rows, 10], 7, true));
    }
}

/// A strided `x` gives the bits of a contiguous one; a weight that lies otherwise is multiplied in another way.
#[test]
fn layout() {
    for rows in [1, 3, 70] {
        let inputs = InF32::inputs(&Case::new(&[rows, 8], 6, true), &mut Random::new(4));
        for dtype in [F32, BF16, F16] {
            let inputs = cast(&inputs, dtype, dtype);
            let (args, exact) = (arguments(&inputs), exact(&inputs));
            let want = values(&linear(&args).unwrap());
            let bound = of_rounding(&exact, dtype, tolerance::FORWARD);
            let transposed = |x: &Tensor| x.t().unwrap().contiguous().unwrap().t().unwrap();
            let narrowed = |x: &Tensor| Tensor::cat(&[x, x, x], 1).unwrap().narrow(1, 8, 8).unwrap();
            for view in [&transposed as &dyn Fn(&Tensor) -> Tensor, &narrowed] {
                let (x, weight) = (view(args.x), view(args.weight));
                assert_eq!(values(&linear(&Linear { x: &x, ..args }).unwrap()), want);
                let other = linear(&Linear { weight: &weight, ..args }).unwrap();
                assert!(relative_rms(&other, &exact) <= bound, "{rows} rows of {dtype:?}");
            }
        }
    }
}

/// A view of some rows of the weight, as of an embedding that is the head too, is read where it lies.
#[test]
fn rows_of_a_larger_weight() {
    let inputs = InF32::inputs(&Case::new(&[2, 33], 40, false), &mut Random::new(1));
    for dtype in [F32, BF16, F16] {
        let inputs = cast(&inputs, dtype, dtype);
        let whole = linear(&arguments(&inputs)).unwrap();
        for (start, len) in [(0, 37), (3, 8), (39, 1), (40, 0)] {
            let weight = inputs["weight"].narrow(0, start, len).unwrap();
            let got = linear(&Linear::new(&inputs["x"], &weight)).unwrap();
            assert_eq!(values(&got), values(&whole.narrow(1, start, len).unwrap()));
        }
    }
}

#[test]
fn finite_differences() {
    let cases = [Case::new(&[2, 3, 8], 5, true), Case::new(&[9], 4, false)];
    laws::finite_differences::<InDtypeOfX>(&cases);
}

#[test]
fn threads() {
    laws::threads::<InDtypeOfX>(&Case::new(&[5, 300], 401, true));
    for rows in [1, 7, 16, 40] {
        let inputs = InF32::inputs(&Case::new(&[rows, 300], 1003, true), &mut Random::new(5));
        for dtype in [F32, BF16, F16] {
            let inputs = cast(&inputs, dtype, dtype);
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                values(&pool.install(|| linear(&arguments(&inputs)).unwrap()))
            };
            let one = run(1);
            assert!([2, 3, 5].into_iter().all(|count| run(count) == one), "{rows} rows of {dtype:?}");
        }
    }
}

/// A row gives the same bits alone as among a few others.
#[test]
fn rows_do_not_see_each_other() {
    for rows in [2, 5, 16] {
        let inputs = InF32::inputs(&Case::new(&[rows, 77], 30, true), &mut Random::new(1));
        for dtype in [F32, BF16, F16] {
            let inputs = cast(&inputs, dtype, dtype);
            let whole = linear(&arguments(&inputs)).unwrap();
            for row in 0..rows {
                let x = inputs["x"].narrow(0, row, 1).unwrap();
                let alone = linear(&Linear { x: &x, ..arguments(&inputs) }).unwrap();
                assert_eq!(values(&alone), values(&whole.narrow(0, row, 1).unwrap()));
            }
        }
    }
}

/// Whichever argument tracks, and only then, the result does; and what it is does not depend on that.
#[test]
fn a_graph_where_one_is_needed() {
    for rows in [3, 40] {
        let inputs = InF32::inputs(&Case::new(&[rows, 10], 7, true), &mut Random::new(1));
        let inputs = cast(&inputs, F32, F32);
        let want = linear(&arguments(&inputs)).unwrap();
        assert!(!want.track_op());
        for name in inputs.keys() {
            let var = Var::from_tensor(&inputs[name]).unwrap();
            let mut tracked = inputs.clone();
            tracked.insert(name.clone(), var.as_tensor().clone());
            let y = linear(&arguments(&tracked)).unwrap();
            assert!(y.track_op() && relative_rms(&y, &want) <= tolerance::FORWARD);
            let gradient = y.sum_all().unwrap().backward().unwrap();
            assert!(gradient.get(var.as_tensor()).is_some(), "`{name}` gets no gradient");
        }
    }
}

/// Infinities and NaN stay what they are, and stay where they are; numbers too small to be normal count.
#[test]
fn special_values() {
    for dtype in [F32, BF16, F16] {
        for isa in Isa::available() {
            let mut weight = vec![0f32; 6 * 37];
            (weight[36], weight[37], weight[2 * 37], weight[3 * 37 + 1]) =
                (f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 6e-8);
            let weight = Tensor::from_vec(weight, (6, 37), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let x = Tensor::ones((1, 37), F32, &Device::Cpu).unwrap();
            let y = values(&isa.scope(|| linear(&Linear::new(&x, &weight))).unwrap());
            assert_eq!((y[0], y[1], y[4], y[5]), (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0.0));
            assert!(y[2].is_nan() && (y[3] - 6e-8).abs() < 1e-9, "{dtype:?} {}: {y:?}", isa.name());
        }
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, F32, &Device::Cpu).unwrap();
    let (x, weight) = (zeros(&[2, 6]), zeros(&[3, 6]));
    let fails = |args: Linear, want: &str| {
        let message = linear(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    let good = Linear::new(&x, &weight);
    assert!(linear(&good).is_ok());
    fails(Linear { x: &zeros(&[]), ..good }, "linear: `x` is a scalar, expected (.., in)");
    fails(Linear { x: &zeros(&[2, 5]), ..good }, "`weight` has shape [3, 6], expected (out 3, in 5)");
    for shape in [&[][..], &[6], &[1, 3, 6]] {
        let expected = format!("`weight` has shape {shape:?}, expected (out, in 6)");
        fails(Linear { weight: &zeros(shape), ..good }, &expected);
    }
    for shape in [&[][..], &[6], &[1, 3]] {
        let expected = format!("`bias` has shape {shape:?}, expected (out 3)");
        fails(Linear { bias: Some(&zeros(shape)), ..good }, &expected);
    }
    let integers = |x: &Tensor| x.to_dtype(DType::U32).unwrap();
    let floating = "has dtype u32, expected f32, f16, bf16 or f64";
    fails(Linear { x: &integers(&x), ..good }, &format!("`x` {floating}"));
    fails(Linear { weight: &integers(&weight), ..good }, &format!("`weight` {floating}"));
    fails(Linear { bias: Some(&integers(&zeros(&[3]))), ..good }, &format!("`bias` {floating}"));
}
