//! The laws, written once and fed with ops: reference, split, layout, threads, finite differences, golden.
//!
//! Poison, the sixth, is in all of them: in debug builds, and on a GPU by `MAMBA_POISON=1`, the buffers of kernels start as NaN.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, Var};
use mamba_ops::Packing;

use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, error_by_largest, max_error, of_rounding, relative_rms, values};

/// Tensors by argument name.
pub type Tensors = BTreeMap<String, Tensor>;

/// How an input is cast when the op runs in some dtype.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Role {
    /// To that dtype.
    Activation,
    /// Stays `f32`.
    Parameter,
    /// Stays `f32`.
    State,
}

impl Role {
    pub fn dtype(self, dtype: DType) -> DType {
        if self == Self::Activation || dtype == DType::F64 { dtype } else { DType::F32 }
    }
}

/// The dtypes that kernels have.
pub const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Each of them on each target of the test that runs.
pub fn everywhere() -> impl Iterator<Item = (DType, Target)> {
    DTYPES.into_iter().flat_map(|dtype| Target::available().into_iter().map(move |target| (dtype, target)))
}

/// An op under test. Inputs and outputs go by the names of its argument and output structs.
pub trait Op {
    type Case: Debug + Clone + Sync;
    /// The dtypes in which the fused path computes in `f32` and rounds once, so that it can be compared with the reference in
    /// `f64`; in others it rounds in between.
    const ROUNDED_ONCE: &[DType] = &DTYPES;

    /// Random inputs, `f64`.
    fn inputs(case: &Self::Case, random: &mut Random) -> Tensors;
    fn role(name: &str) -> Role;
    /// The axis of time of an input or output, if it has one; `initial_state` and `final_state` have none.
    fn time_axis(case: &Self::Case, name: &str) -> Option<usize>;
    /// The op itself, on the device of its inputs.
    fn run(case: &Self::Case, inputs: &Tensors) -> Result<Tensors>;
    /// The op on the device under test, from and to CPU memory.
    fn fused(case: &Self::Case, inputs: &Tensors) -> Result<Tensors> {
        target::back(Self::run(case, &target::place(&format!("{case:?}"), inputs)?)?)
    }
    fn reference(case: &Self::Case, inputs: &Tensors) -> Result<Tensors>;
    /// How many times the tolerances of `f32` hold for what is computed in some dtype.
    fn slack(_dtype: DType) -> f64 {
        1.0
    }
    /// The case of a golden file, with its tensors by our names; an error says why it does not apply.
    fn golden(golden: &Golden) -> std::result::Result<(Self::Case, GoldenTensors), String>;
}

/// An op that takes packed sequences: whatever is no parameter has an axis of time, or is a state of each sequence.
/// (Halves are left to the law of reference: gradients of parts, each rounded, do not add up to that of the whole.)
pub trait PackedOp: Op {
    /// The case with the sizes of a packing.
    fn packed(case: &Self::Case, packing: Option<Packing>) -> Self::Case;
}

/// The packing that a golden file was made with.
pub fn packing(golden: &Golden) -> Option<Packing> {
    golden.tensors.get("seq_idx").map(|ids| Packing::from_seq_idx(ids).unwrap())
}

/// The tensors of a golden file under our names.
#[derive(Default)]
pub struct GoldenTensors {
    pub inputs: Tensors,
    pub outputs: Tensors,
    pub cotangents: Tensors,
    pub gradients: Tensors,
    /// How far the outputs in the file are from `f64`.
    pub tolerances: BTreeMap<String, f64>,
    /// The same of the gradients.
    pub gradient_tolerances: BTreeMap<String, f64>,
}

impl GoldenTensors {
    /// Reads them, renaming by `ours`.
    pub fn read(golden: &Golden, ours: impl Fn(&str) -> String) -> Self {
        let read =
            |prefix| golden.with_prefix(prefix).into_iter().map(|(name, x)| (ours(&name), x)).collect();
        let tolerances = |what, prefix| {
            let names = golden.with_prefix(prefix).into_keys();
            names.map(|name| (ours(&name), golden.tolerance(what, &name))).collect()
        };
        Self {
            inputs: read("in."),
            outputs: read("out."),
            cotangents: read("cot."),
            gradients: read("grad."),
            tolerances: tolerances("tolerance", "out."),
            gradient_tolerances: tolerances("tolerance_grad", "grad."),
        }
    }
}

pub type Run<'a> = &'a dyn Fn(&Tensors) -> Result<Tensors>;

/// Outputs, and the gradients of `Σ cotangent · output` by every input. A fused path gives every gradient; in a
/// reference over an empty sequence, say, nothing may lead to an input, whose gradient is then 0.
pub fn differentiate(run: Run, inputs: &Tensors, cotangents: &Tensors) -> Result<(Tensors, Tensors)> {
    let vars: BTreeMap<&String, Var> =
        inputs.iter().map(|(name, x)| Ok((name, Var::from_tensor(x)?))).collect::<Result<_>>()?;
    let tracked = vars.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
    let outputs = run(&tracked)?;
    let mut loss: Option<Tensor> = None;
    for (name, cotangent) in cotangents {
        let y = outputs[name].to_dtype(DType::F64)?;
        let term = (y * cotangent.to_dtype(DType::F64)?)?.sum_all()?;
        loss = Some(match loss {
            Some(loss) => (loss + term)?,
            None => term,
        });
    }
    let mut gradients = Tensors::new();
    if let Some(loss) = loss {
        let store = loss.backward()?;
        for (name, var) in &vars {
            let gradient = match store.get(var.as_tensor()) {
                Some(gradient) => gradient.detach(),
                None if var.dtype() == DType::F64 => var.zeros_like()?,
                // Nothing empty is moved, see `target`: neither this input, nor, where there is no other, what came out.
                None if target::is_cuda() && (var.elem_count() == 0 || empty(&outputs)) => {
                    var.zeros_like()?
                }
                None => panic!("no gradient reached `{name}`"),
            };
            gradients.insert((*name).clone(), gradient);
        }
    }
    Ok((outputs.into_iter().map(|(name, y)| (name, y.detach())).collect(), gradients))
}

fn empty(tensors: &Tensors) -> bool {
    tensors.values().all(|x| x.elem_count() == 0)
}

pub fn cast<O: Op>(inputs: &Tensors, dtype: DType) -> Result<Tensors> {
    inputs.iter().map(|(name, x)| Ok((name.clone(), x.to_dtype(O::role(name).dtype(dtype))?))).collect()
}

pub fn to_f64(inputs: &Tensors) -> Result<Tensors> {
    inputs.iter().map(|(name, x)| Ok((name.clone(), x.to_dtype(DType::F64)?))).collect()
}

/// What is exact in both dtypes of 16 bits, or in a wider one.
pub fn exact_in(dtype: DType, x: &Tensor) -> Result<Tensor> {
    match dtype {
        DType::BF16 | DType::F16 => x.to_dtype(DType::F16)?.to_dtype(DType::BF16)?.to_dtype(dtype),
        wide => x.to_dtype(wide),
    }
}

/// Random cotangents for outputs, exact in each output's dtype.
pub fn cotangents(outputs: &Tensors, random: &mut Random) -> Result<Tensors> {
    let cotangent = |(name, y): (&String, &Tensor)| {
        Ok((name.clone(), exact_in(y.dtype(), &random.normal(y.dims()))?.to_dtype(DType::F64)?))
    };
    outputs.iter().map(cotangent).collect()
}

pub fn is_empty(outputs: &Tensors) -> bool {
    outputs.values().all(|y| y.elem_count() == 0)
}

#[track_caller]
pub fn agree(got: &Tensors, want: &Tensors, f32_tolerance: f64, context: &str) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{context}");
    for (name, want) in want {
        let got = &got[name];
        let error = relative_rms(got, want);
        let bound = of_rounding(want, got.dtype(), f32_tolerance);
        assert!(error <= bound, "{context}: `{name}` is off by {error:.1e}, allowed {bound:.1e}");
    }
}

/// Law 1: the fused path agrees with the reference in `f64` on the same rounded inputs, outputs and gradients, for
/// every dtype and instruction set.
pub fn reference<O: Op>(cases: &[O::Case]) {
    for (seed, case) in cases.iter().enumerate() {
        let inputs = O::inputs(case, &mut Random::new(seed as u64));
        for &dtype in O::ROUNDED_ONCE {
            let rounded = cast::<O>(&inputs, dtype).unwrap();
            let outputs = O::fused(case, &rounded).unwrap();
            let cotangents = cotangents(&outputs, &mut Random::new(seed as u64 + 1000)).unwrap();
            let exact = to_f64(&rounded).unwrap();
            let want = if is_empty(&outputs) {
                (O::reference(case, &exact).unwrap(), Tensors::new())
            } else {
                differentiate(&|x| O::reference(case, x), &exact, &cotangents).unwrap()
            };
            for isa in Target::available() {
                let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
                isa.scope(|| {
                    // Inference takes another path than training: no graph, nothing kept.
                    let untracked = O::fused(case, &rounded).unwrap();
                    assert!(untracked.values().all(|y| !y.track_op()), "{context}: a graph without need");
                    let forward = tolerance::FORWARD * O::slack(dtype);
                    let backward = tolerance::BACKWARD * O::slack(dtype);
                    agree(&untracked, &want.0, forward, &context);
                    if is_empty(&outputs) {
                        return;
                    }
                    let got = differentiate(&|x| O::fused(case, x), &rounded, &cotangents).unwrap();
                    agree(&got.0, &want.0, forward, &context);
                    agree(&got.1, &want.1, backward, &format!("{context} gradient"));
                    if dtype == DType::F32 && target::is_cuda() {
                        let on_cpu = differentiate(&|x| O::run(case, x), &rounded, &cotangents).unwrap();
                        let all =
                            |(outputs, gradients): (Tensors, Tensors)| outputs.into_iter().chain(gradients);
                        for ((name, gpu), (_, cpu)) in all(got).zip(all(on_cpu)) {
                            let error = error_by_largest(&gpu, &cpu);
                            let allowed = tolerance::CPU_AND_GPU;
                            assert!(error <= allowed, "{context}: `{name}` is off the CPU's by {error:.1e}");
                        }
                    }
                });
            }
        }
    }
}

/// Gradients arrive when only one output is used, and when only one input tracks.
pub fn partial_gradients<O: Op>(case: &O::Case) {
    let inputs = O::inputs(case, &mut Random::new(1));
    for &dtype in O::ROUNDED_ONCE {
        partial_gradients_in::<O>(case, &cast::<O>(&inputs, dtype).unwrap(), O::slack(dtype));
    }
}

fn partial_gradients_in<O: Op>(case: &O::Case, inputs: &Tensors, slack: f64) {
    let exact = to_f64(inputs).unwrap();
    let outputs = O::fused(case, inputs).unwrap();
    let all = cotangents(&outputs, &mut Random::new(2)).unwrap();
    for name in outputs.keys() {
        let one: Tensors = [(name.clone(), all[name].clone())].into();
        let vars: Vec<(&String, Var)> =
            inputs.iter().map(|(name, x)| (name, Var::from_tensor(x).unwrap())).collect();
        let tracked = vars.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
        let got = O::fused(case, &tracked).unwrap();
        let loss = (got[name].to_dtype(DType::F64).unwrap() * &one[name]).unwrap().sum_all().unwrap();
        let store = loss.backward().unwrap();
        let reference: Vec<(&String, Var)> =
            exact.iter().map(|(name, x)| (name, Var::from_tensor(x).unwrap())).collect();
        let tracked =
            reference.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
        let want = O::reference(case, &tracked).unwrap();
        let want = (want[name].clone() * &one[name]).unwrap().sum_all().unwrap().backward().unwrap();
        for ((input, var), (_, exact)) in vars.iter().zip(&reference) {
            let got = store.get(var.as_tensor()).unwrap_or_else(|| panic!("no gradient for `{input}`"));
            let zero = exact.zeros_like().unwrap();
            let want = want.get(exact.as_tensor()).unwrap_or(&zero);
            let error = relative_rms(got, want);
            let bound = of_rounding(want, got.dtype(), tolerance::BACKWARD * slack);
            assert!(error <= bound, "{case:?}: `{input}` through `{name}` is off by {error:.1e}");
        }
    }
    let (_, whole) = differentiate(&|x| O::fused(case, x), inputs, &all).unwrap();
    for name in inputs.keys() {
        let var = Var::from_tensor(&inputs[name]).unwrap();
        let mut mixed = inputs.clone();
        mixed.insert(name.clone(), var.as_tensor().clone());
        let outputs = O::fused(case, &mixed).unwrap();
        let terms = outputs
            .iter()
            .map(|(name, y)| (y.to_dtype(DType::F64).unwrap() * &all[name]).unwrap().sum_all().unwrap());
        let loss = terms.reduce(|a, b| (a + b).unwrap()).unwrap();
        let store = loss.backward().unwrap();
        let got = store.get(var.as_tensor()).unwrap_or_else(|| panic!("`{name}` alone gets no gradient"));
        assert_eq!(relative_rms(got, &whole[name]), 0.0, "{case:?}: `{name}` alone");
    }
}

/// Law 2: a sequence cut anywhere, with the states carried, is the whole of the reference.
pub fn split<O: Op>(case: &O::Case) {
    let inputs = O::inputs(case, &mut Random::new(3));
    for &dtype in O::ROUNDED_ONCE {
        let inputs = cast::<O>(&inputs, dtype).unwrap();
        let whole = O::reference(case, &to_f64(&inputs).unwrap()).unwrap();
        let (main, axis) = inputs
            .keys()
            .find_map(|name| Some((name, O::time_axis(case, name)?)))
            .expect("an input has a time axis");
        let seqlen = inputs[main].dim(axis).unwrap();
        let pieces = (0..=seqlen).map(|t| vec![t, seqlen - t]).chain([vec![1; seqlen]]);
        for (lengths, target) in
            pieces.flat_map(|p| Target::available().into_iter().map(move |t| (p.clone(), t)))
        {
            let context = format!("{case:?} {} {} cut into {lengths:?}", dtype.as_str(), target.name());
            let got = target.scope(|| in_pieces::<O>(case, &inputs, &lengths)).unwrap();
            agree(&got, &whole, tolerance::FORWARD * O::slack(dtype), &context);
        }
    }
}

/// The outputs of a sequence that is cut; each piece begins with the states that the one before it left.
fn in_pieces<O: Op>(case: &O::Case, inputs: &Tensors, lengths: &[usize]) -> Result<Tensors> {
    let (mut start, mut states, mut ys) = (0, Tensors::new(), vec![]);
    for &len in lengths {
        let mut piece = Tensors::new();
        for (name, x) in inputs {
            let cut = O::time_axis(case, name).map(|axis| x.narrow(axis, start, len));
            piece.insert(name.clone(), cut.unwrap_or_else(|| Ok(x.clone()))?);
        }
        piece.extend(states.iter().map(|(name, x)| (name.replacen("final", "initial", 1), x.clone())));
        states = O::fused(case, &piece)?;
        ys.extend(states.remove("y"));
        start += len;
    }
    let y = O::time_axis(case, "y").expect("`y` has a time axis");
    states.insert("y".into(), Tensor::cat(&ys, y)?);
    Ok(states)
}

/// Sequences of all kinds: none at all, empty ones, shorter than a window, at the borders of tiles and chunks, far longer than
/// others; rows with padding, and rows of nothing else.
pub fn packings() -> Vec<Packing> {
    let ids = |rows: &[&[(i64, usize)]]| {
        let row =
            |row: &&[(i64, usize)]| -> Vec<i64> { row.iter().flat_map(|&(id, len)| vec![id; len]).collect() };
        let rows: Vec<Vec<i64>> = rows.iter().map(row).collect();
        Packing::from_seq_idx(&Tensor::new(rows, &Device::Cpu).unwrap()).unwrap()
    };
    vec![
        Packing::from_lengths(&[]),
        Packing::from_lengths(&[0, 0]),
        Packing::from_lengths(&[9]),
        Packing::from_lengths(&[3, 0, 1, 2, 9, 0, 1]),
        Packing::from_lengths(&[16, 15, 17, 1, 32]),
        Packing::from_lengths(&[65, 64, 1, 63]),
        ids(&[
            &[(-1, 2), (5, 3), (-1, 1), (5, 7), (0, 4)],
            &[(0, 17)],
            &[(1, 1), (0, 15), (-7, 1)],
            &[(-1, 17)],
        ]),
        // For a GPU: several tiles beside almost none, many sequences, and one that more than one block goes through.
        Packing::from_lengths(&[1, 37, 0, 300, 5]),
        Packing::from_lengths(&(0..200).map(|i| i % 9 + 1).collect::<Vec<_>>()),
        Packing::from_lengths(&[3, 900, 0, 130]),
        ids(&[&[(-1, 5)], &[(-1, 5)]]),
    ]
}

/// Packed sequences are what each of them is alone, in values, states and every gradient; padding has neither.
pub fn packed<O: PackedOp>(case: &O::Case) {
    for (seed, packing) in packings().into_iter().enumerate() {
        let case = O::packed(case, Some(packing.clone()));
        let inputs = O::inputs(&case, &mut Random::new(seed as u64));
        for (dtype, forward, backward) in
            [(DType::F64, 1e-12, 1e-11), (DType::F32, tolerance::FORWARD, tolerance::BACKWARD)]
        {
            if dtype == DType::F64 && packing.seqlen() > 500 {
                continue; // token by token, as the short ones: the reference
            }
            let inputs = cast::<O>(&inputs, dtype).unwrap();
            let outputs = O::fused(&case, &inputs).unwrap();
            let cotangents = cotangents(&outputs, &mut Random::new(seed as u64 + 1)).unwrap();
            let (want, want_gradients) = one_by_one::<O>(&case, &packing, &inputs, &cotangents);
            let targets = Target::available();
            for isa in if dtype == DType::F64 { &targets[..1] } else { &targets } {
                let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
                let (got, gradients) = isa
                    .scope(|| differentiate(&|x| O::fused(&case, x), &inputs, &cotangents))
                    .unwrap_or_else(|e| panic!("{context}: {e}"));
                agree(&got, &want, forward, &context);
                agree(&gradients, &want_gradients, backward, &format!("{context} gradient"));
            }
        }
    }
}

/// Each sequence of a packing by itself: outputs, and the gradients added up.
fn one_by_one<O: PackedOp>(
    case: &O::Case,
    packing: &Packing,
    inputs: &Tensors,
    cotangents: &Tensors,
) -> (Tensors, Tensors) {
    /// A tensor by its shape and its elements.
    type Flat = BTreeMap<String, (Vec<usize>, Vec<f64>)>;
    let flat = |all: &Tensors| -> Flat {
        all.iter().map(|(name, x)| (name.clone(), (x.dims().to_vec(), values(x)))).collect()
    };
    let zeros = |all: &Tensors| -> Flat {
        all.iter().map(|(n, x)| (n.clone(), (x.dims().to_vec(), vec![0.0; x.elem_count()]))).collect()
    };
    let (mut outputs, mut gradients) = (zeros(&O::fused(case, inputs).unwrap()), zeros(inputs));
    let is_state = |name: &str| name.starts_with("initial_") || name.starts_with("final_");
    // The shape of a sequence's part of a tensor, and where it lies among the elements of the whole.
    let part = |name: &str, dims: &[usize], i: usize| -> (Vec<usize>, Vec<Range<usize>>) {
        let (mut part, sequence) = (dims.to_vec(), packing.sequences()[i]);
        let (axis, row, start, len) = match (O::time_axis(case, name), is_state(name)) {
            (Some(axis), _) => (axis, sequence.row, sequence.start, sequence.len),
            (None, true) => (0, 0, i, 1),
            (None, false) => return (part, std::iter::once(0..dims.iter().product()).collect()),
        };
        (part[0], part[axis]) = (1, len);
        let lines: usize = dims[..axis].iter().skip(1).product();
        let inner: usize = dims[axis + 1..].iter().product();
        let first = |line: usize| ((row * lines + line) * dims[axis] + start) * inner;
        (part, (0..lines).map(|line| first(line)..first(line) + len * inner).collect())
    };
    let dtypes: BTreeMap<&String, DType> = inputs.iter().map(|(name, x)| (name, x.dtype())).collect();
    let (inputs, cotangents) = (flat(inputs), flat(cotangents));
    let alone = O::packed(case, None);
    for i in 0..packing.len() {
        let cut = |(name, (dims, whole)): (&String, &(Vec<usize>, Vec<f64>))| {
            let (dims, places) = part(name, dims, i);
            let values: Vec<f64> = places.into_iter().flat_map(|place| whole[place].to_vec()).collect();
            let dtype = dtypes.get(name).copied().unwrap_or(DType::F64);
            (name.clone(), Tensor::from_vec(values, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
        };
        let (inputs, cotangents): (Tensors, Tensors) =
            (inputs.iter().map(cut).collect(), cotangents.iter().map(cut).collect());
        let (ys, grads) = differentiate(&|x| O::fused(&alone, x), &inputs, &cotangents).unwrap();
        for (wholes, parts) in [(&mut outputs, ys), (&mut gradients, grads)] {
            for (name, x) in parts {
                let (dims, whole) = wholes.get_mut(&name).unwrap();
                let places = part(&name, dims, i).1.into_iter().flatten();
                places.zip(values(&x)).for_each(|(at, value)| whole[at] += value);
            }
        }
    }
    let tensors = |all: Flat| {
        all.into_iter().map(|(n, (dims, v))| (n, Tensor::from_vec(v, dims, &Device::Cpu).unwrap())).collect()
    };
    (tensors(outputs), tensors(gradients))
}

/// Law 3: strided views give the bits that contiguous tensors give, outputs and gradients.
pub fn layout<O: Op>(case: &O::Case) {
    type View = fn(&Tensor) -> Result<Tensor>;
    let views: [(&str, View); 3] = [
        ("transposed", |x| match x.rank() {
            0 | 1 => Ok(x.clone()),
            rank => x.transpose(rank - 2, rank - 1)?.contiguous()?.transpose(rank - 2, rank - 1),
        }),
        ("narrowed", |x| {
            let last = x.rank() - 1;
            let len = x.dim(last)?;
            Tensor::cat(&[x, x, x], last)?.narrow(last, len, len)
        }),
        ("offset", |x| {
            let len = x.dim(0)?;
            Tensor::cat(&[x, x], 0)?.narrow(0, len, len)
        }),
    ];
    let inputs = O::inputs(case, &mut Random::new(4));
    for (dtype, target) in everywhere() {
        let inputs = cast::<O>(&inputs, dtype).unwrap();
        let cotangents = cotangents_of::<O>(case, &inputs);
        let run = |view: View| {
            let fused = |x: &Tensors| {
                let viewed = x.iter().map(|(name, x)| Ok((name.clone(), view(x)?))).collect::<Result<_>>()?;
                O::fused(case, &viewed)
            };
            target.scope(|| differentiate(&fused, &inputs, &cotangents)).unwrap()
        };
        let want = run(|x| Ok(x.clone()));
        for (kind, view) in views {
            let context = format!("{case:?} {} {} from {kind} inputs", dtype.as_str(), target.name());
            same_results(&run(view), &want, &context);
        }
    }
}

/// Cotangents for the outputs that some inputs have.
fn cotangents_of<O: Op>(case: &O::Case, inputs: &Tensors) -> Tensors {
    cotangents(&O::fused(case, inputs).unwrap(), &mut Random::new(6)).unwrap()
}

/// Outputs and gradients.
type Results = (Tensors, Tensors);

#[track_caller]
fn same_bits(what: &str, got: &Tensors, want: &Tensors, context: &str) {
    for (name, want) in want {
        let (got, want) = (values(&got[name]), values(want));
        // Or both no numbers; 0 and -0 are one.
        let same = |(got, want): (&f64, &f64)| got == want || (got.is_nan() && want.is_nan());
        assert!(
            got.len() == want.len() && got.iter().zip(&want).all(same),
            "{context}: {what}`{name}` differs"
        );
    }
}

#[track_caller]
fn same_results(got: &Results, want: &Results, context: &str) {
    same_bits("", &got.0, &want.0, context);
    same_bits("d", &got.1, &want.1, context);
}

/// Any number of threads gives the same bits, outputs and gradients: in `f32` on every instruction set, in each dtype on one.
pub fn threads<O: Op>(case: &O::Case) {
    let inputs = O::inputs(case, &mut Random::new(5));
    for (dtype, isa) in everywhere().filter(|(dtype, isa)| *dtype == DType::F32 || isa.is_current()) {
        let inputs = cast::<O>(&inputs, dtype).unwrap();
        let cotangents = cotangents_of::<O>(case, &inputs);
        let run = |threads: usize| {
            let pool =
                rayon::ThreadPoolBuilder::new().num_threads(threads).stack_size(64 << 20).build().unwrap();
            let once = || differentiate(&|x| O::fused(case, x), &inputs, &cotangents).unwrap();
            pool.install(|| isa.scope(once))
        };
        let one = run(1);
        let counts: &[usize] = if isa.is_current() { &[2, 3, 5] } else { &[3] };
        for count in counts {
            let context = format!("{case:?} {} {} with {count} threads", dtype.as_str(), isa.name());
            same_results(&run(*count), &one, &context);
        }
    }
}

/// The same inputs give the same bits again, outputs and gradients, in each dtype.
pub fn repeats<O: Op>(case: &O::Case) {
    let inputs = O::inputs(case, &mut Random::new(5));
    for dtype in DTYPES {
        let inputs = cast::<O>(&inputs, dtype).unwrap();
        let cotangents = cotangents_of::<O>(case, &inputs);
        let run = || differentiate(&|x| O::fused(case, x), &inputs, &cotangents).unwrap();
        let once = run();
        for _ in 0..if target::is_cuda() { 3 } else { 1 } {
            same_results(&run(), &once, &format!("{case:?} {} again", dtype.as_str()));
        }
    }
}

/// The reference's own gradients, in `f64`, agree with central differences along random directions.
pub fn finite_differences<O: Op>(cases: &[O::Case]) {
    for case in cases {
        let inputs = O::inputs(case, &mut Random::new(7));
        let run = |x: &Tensors| O::reference(case, x);
        let cotangents = cotangents(&run(&inputs).unwrap(), &mut Random::new(8)).unwrap();
        let (_, gradients) = differentiate(&run, &inputs, &cotangents).unwrap();
        let loss = |inputs: &Tensors| -> f64 {
            let outputs = run(inputs).unwrap();
            let terms = cotangents.iter().map(|(name, c)| {
                (&outputs[name] * c).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
            });
            terms.sum()
        };
        for (name, gradient) in &gradients {
            let direction = Random::new(9).normal(gradient.dims());
            let shifted = |by: f64| {
                let mut inputs = inputs.clone();
                let x = (&inputs[name] + (&direction * by).unwrap()).unwrap();
                inputs.insert(name.clone(), x);
                loss(&inputs)
            };
            let step = 1e-5;
            let got = (shifted(step) - shifted(-step)) / (2.0 * step);
            let terms = values(&(gradient * &direction).unwrap());
            let want: f64 = terms.iter().sum();
            let scale: f64 = terms.iter().map(|x| x.abs()).sum();
            assert!(scale > 0.0, "{case:?}: no element of `{name}` has a gradient, so nothing is compared");
            let error = (got - want).abs() / scale.max(1e-3);
            let allowed = tolerance::FINITE_DIFFERENCES;
            assert!(error <= allowed, "{case:?}: d`{name}` {want} but differences give {got}");
        }
    }
}

/// Law 5: the reference in `f64` and the fused path in `f32` hold what published implementations gave. What their kernels
/// gave in 16 bits, the fused path gives in 16 bits with at most 1.5 times the error, tensor by tensor. Returns the number of
/// files that applied; `skipped` are the names of those that do not.
pub fn golden<O: Op>(folder: &str, skipped: &[&str]) -> usize {
    let mut applied = 0;
    for golden in Golden::folder(folder) {
        let (case, tensors) = match O::golden(&golden) {
            Ok(case) => case,
            Err(why) => {
                assert!(skipped.contains(&golden.name.as_str()), "{} does not apply: {why}", golden.name);
                println!("{folder}/{}: not applicable, {why}", golden.name);
                continue;
            }
        };
        assert!(!skipped.contains(&golden.name.as_str()), "{} applies after all", golden.name);
        applied += 1;
        let inputs = to_f64(&tensors.inputs).unwrap();
        // Some references cannot differentiate: no gradients in the file, then none are compared.
        let cotangents = if tensors.gradients.is_empty() { &Tensors::new() } else { &tensors.cotangents };
        let fused = |dtype, target: Target| {
            let inputs = cast::<O>(&inputs, dtype).unwrap();
            let results =
                target.scope(|| differentiate(&|x| O::fused(&case, x), &inputs, cotangents)).unwrap();
            (target.name(), results)
        };
        let exact = differentiate(&|x| O::reference(&case, x), &inputs, cotangents).unwrap();
        let in_f64 = ("reference", exact.clone(), tolerance::GOLDEN_F64, tolerance::GOLDEN_F64);
        let in_f32 = Target::available().into_iter().map(|target| {
            let (name, results) = fused(DType::F32, target);
            (name, results, 1e-5, 1e-4)
        });
        for (path, (outputs, gradients), forward, backward) in [in_f64].into_iter().chain(in_f32) {
            for (name, want) in &tensors.outputs {
                let error = max_error(&outputs[name], want);
                let allowed = forward + tensors.tolerances[name];
                assert!(error <= allowed, "{} {path}: `{name}` is off by {error:.1e}", golden.name);
            }
            for (name, want) in &tensors.gradients {
                let error = max_error(&gradients[name], want);
                let allowed = backward + tensors.gradient_tolerances[name];
                assert!(error <= allowed, "{} {path}: d`{name}` is off by {error:.1e}", golden.name);
            }
        }
        let Some(dtype) = golden.half() else { continue };
        for target in Target::available() {
            let (path, (outputs, gradients)) = fused(dtype, target);
            for (what, ours, theirs, exact, slack) in [
                ("", outputs, &tensors.outputs, &exact.0, tolerance::FORWARD),
                ("d", gradients, &tensors.gradients, &exact.1, tolerance::BACKWARD),
            ] {
                // Upstream keeps some in `f32` that ours round: once, then.
                let upstream = |name: &String| {
                    let rounded = exact[name].to_dtype(ours[name].dtype()).unwrap();
                    relative_rms(&theirs[name], &exact[name]).max(relative_rms(&rounded, &exact[name]))
                };
                // Where both round in between, tensors of a few numbers have more luck or less: there all together are judged.
                let groups: Vec<Vec<&String>> = match O::ROUNDED_ONCE.contains(&dtype) {
                    true => theirs.keys().map(|name| vec![name]).collect(),
                    false => vec![theirs.keys().collect()],
                };
                for names in groups.iter().filter(|names| !names.is_empty()) {
                    let size = |name: &String| exact[name].elem_count() as f64;
                    let (error, theirs) = (
                        pooled(names, size, |name| relative_rms(&ours[name], &exact[name])),
                        pooled(names, size, upstream),
                    );
                    let context = format!("{}/{} {path}: {what}{names:?}", folder, golden.name);
                    println!("{context}: {error:.1e}, upstream {theirs:.1e}");
                    let bound = tolerance::HALF_FACTOR * theirs + slack;
                    assert!(error <= bound, "{context} is off by {error:.1e}, upstream's by {theirs:.1e}");
                }
            }
        }
    }
    applied
}

/// The root mean square of errors, each as often as its tensor has elements.
fn pooled(names: &[&String], size: impl Fn(&String) -> f64, error: impl Fn(&String) -> f64) -> f64 {
    let squares: f64 = names.iter().map(|name| size(name) * error(name).powi(2)).sum();
    (squares / names.iter().map(|name| size(name)).sum::<f64>()).sqrt()
}
