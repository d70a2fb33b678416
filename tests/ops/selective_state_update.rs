//! Cases of `selective_state_update`: no gradients, and the state changes in place, so the laws are written here.

use candle_core::{DType, Device, Tensor, Var};
use mamba_ops::{
    SelectiveScan, SelectiveStateUpdate, SequenceLayout, SsdChunkScan, StateIndices, selective_scan,
    selective_state_update, ssd_chunk_scan,
};

use crate::laws::Tensors;
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, max_error, of_rounding, relative_rms, values};

/// How `dt`, `a`, `d` and `dt_bias` are given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    Channels,
    Heads,
    /// One value a head.
    Tied,
}

use Form::{Channels, Heads, Tied};

#[derive(Debug, Clone)]
pub struct Case {
    pub form: Form,
    pub batch: usize,
    /// Several at once, on an axis of their own.
    pub tokens: Option<usize>,
    pub nheads: usize,
    pub headdim: usize,
    /// None: `b` and `c` without the axis.
    pub ngroups: Option<usize>,
    pub d_state: usize,
    pub options: bool,
    pub dt_limit: (f64, f64),
}

pub const FREE: (f64, f64) = (f64::NEG_INFINITY, f64::INFINITY);

impl Case {
    pub fn new(form: Form, [batch, nheads, headdim, d_state]: [usize; 4], ngroups: Option<usize>) -> Self {
        Self { form, batch, tokens: None, nheads, headdim, ngroups, d_state, options: true, dt_limit: FREE }
    }

    pub fn inputs(&self, random: &mut Random) -> Tensors {
        let Self { form, batch, tokens, nheads, headdim, ngroups, d_state, options, .. } = *self;
        let channels = if form == Channels { vec![nheads] } else { vec![nheads, headdim] };
        let heads = if form == Tied { vec![nheads] } else { channels.clone() };
        let with = |first: &[usize], middle: &[usize], last: Option<usize>| -> Vec<usize> {
            [first, middle].concat().into_iter().chain(last).collect()
        };
        let rows: Vec<usize> = [batch].into_iter().chain(tokens).collect();
        let x = with(&rows, &channels, None);
        let group = with(&rows, &ngroups.map_or(vec![], |g| vec![g]), Some(d_state));
        let a = with(&[], &heads, if form == Tied { None } else { Some(d_state) });
        let mut inputs = Tensors::new();
        let mut insert = |name: &str, x| inputs.insert(name.to_owned(), x);
        insert("state", random.normal(&with(&[batch], &channels, Some(d_state))));
        insert("x", random.normal(&x));
        insert("dt", random.tensor(&with(&rows, &heads, None), -3.0, 1.0));
        insert("a", random.tensor(&a, -4.0, -0.1));
        insert("b", random.normal(&group));
        insert("c", random.normal(&group));
        if options {
            insert("d", random.normal(&heads));
            insert("z", random.normal(&x));
            insert("dt_bias", random.tensor(&heads, 0.0, 0.3));
        }
        inputs
    }
}

pub fn arguments<'a>(inputs: &'a Tensors, softplus: bool, dt_limit: (f64, f64)) -> SelectiveStateUpdate<'a> {
    let get = |name: &str| &inputs[name];
    SelectiveStateUpdate {
        d: inputs.get("d"),
        z: inputs.get("z"),
        dt_bias: inputs.get("dt_bias"),
        dt_softplus: softplus,
        dt_limit,
        ..SelectiveStateUpdate::new(get("state"), get("x"), get("dt"), get("a"), get("b"), get("c"))
    }
}

pub fn cast(inputs: &Tensors, activations: DType, others: DType) -> Tensors {
    let dtype = |name: &str| match name {
        "x" | "dt" | "b" | "c" | "z" => activations,
        _ => others,
    };
    inputs.iter().map(|(name, x)| (name.clone(), x.to_dtype(dtype(name)).unwrap())).collect()
}

/// `y` and the new state, computed on the device under test; the tensors of `inputs` stay as they are.
pub fn update(inputs: &Tensors, softplus: bool, dt_limit: (f64, f64)) -> (Tensor, Tensor) {
    update_at(inputs, softplus, dt_limit, None)
}

/// The same, of the states that the indices name.
fn update_at(
    inputs: &Tensors,
    softplus: bool,
    dt_limit: (f64, f64),
    state_indices: Option<&StateIndices>,
) -> (Tensor, Tensor) {
    let shapes: Vec<&[usize]> = inputs.values().map(Tensor::dims).collect();
    let mut inputs = target::place(&format!("{shapes:?} {softplus} {dt_limit:?}"), inputs).unwrap();
    let state = inputs["state"].contiguous().unwrap().copy().unwrap();
    inputs.insert("state".into(), state.clone());
    let args = SelectiveStateUpdate { state_indices, ..arguments(&inputs, softplus, dt_limit) };
    let y = selective_state_update(&args).unwrap();
    let mut outputs = target::back([("y".into(), y), ("state".into(), state)].into()).unwrap();
    (outputs.remove("y").unwrap(), outputs.remove("state").unwrap())
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for d_state in [0, 1, 3, 7, 8, 15, 16, 24, 31, 33, 64, 100, 128, 256] {
        cases.push(Case::new(Channels, [2, 5, 1, d_state], None));
        cases.push(Case::new(Heads, [2, 3, 5, d_state], Some(1)));
        cases.push(Case::new(Tied, [2, 3, 5, d_state], Some(3)));
    }
    for form in [Channels, Heads, Tied] {
        let headdim = if form == Channels { 1 } else { 7 };
        cases.push(Case::new(form, [3, 6, headdim, 5], Some(2)));
        cases.push(Case::new(form, [0, 6, headdim, 5], None));
        cases.push(Case::new(form, [2, 700 / headdim, headdim, 16], Some(4)));
        cases.push(Case { options: false, ..Case::new(form, [2, 4, headdim, 16], None) });
        cases.push(Case { dt_limit: (0.2, 0.7), ..Case::new(form, [2, 4, headdim, 16], None) });
        for tokens in [0, 1, 5] {
            let tokens = Some(tokens);
            cases.push(Case { tokens, ..Case::new(form, [3, 4, headdim, 5], Some(2)) });
            cases.push(Case {
                tokens,
                options: false,
                ..Case::new(form, [2, 300 / headdim, headdim, 40], None)
            });
        }
    }
    cases.push(Case::new(Tied, [1, 5, 130, 70], Some(1)));
    cases
}

/// The fused path agrees with the reference in `f64`, for every dtype and instruction set.
#[test]
fn reference() {
    for (seed, case) in cases().iter().enumerate() {
        let inputs = case.inputs(&mut Random::new(seed as u64));
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let rounded = cast(&inputs, dtype, DType::F32);
            let exact = cast(&rounded, DType::F64, DType::F64);
            let want = update(&exact, true, case.dt_limit);
            for isa in Target::available() {
                let (y, state) = isa.scope(|| update(&rounded, true, case.dt_limit));
                assert_eq!((y.dtype(), state.dtype()), (dtype, DType::F32));
                let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
                let (error, bound) =
                    (relative_rms(&y, &want.0), of_rounding(&want.0, dtype, tolerance::FORWARD));
                assert!(error <= bound, "{context}: `y` is off by {error:.1e}");
                let error = relative_rms(&state, &want.1);
                assert!(error <= tolerance::FORWARD, "{context}: `state` is off by {error:.1e}");
            }
        }
    }
}

/// One value a head gives what the same value for each channel gives.
#[test]
fn tied_heads_equal_repeated_values() {
    let case = Case::new(Tied, [2, 6, 9, 20], Some(2));
    let inputs = case.inputs(&mut Random::new(1));
    let mut repeated = inputs.clone();
    let expand = |x: &Tensor, shape: &[usize]| {
        let ones = vec![1; shape.len() - x.rank()];
        let dims: Vec<usize> = x.dims().iter().copied().chain(ones).collect();
        x.reshape(dims).unwrap().broadcast_as(shape).unwrap().contiguous().unwrap()
    };
    for (name, shape) in
        [("dt", vec![2, 6, 9]), ("a", vec![6, 9, 20]), ("d", vec![6, 9]), ("dt_bias", vec![6, 9])]
    {
        repeated.insert(name.into(), expand(&inputs[name], &shape));
        // Each of them alone, too.
        let mut mixed = inputs.clone();
        mixed.insert(name.into(), repeated[name].clone());
        let (want, got) = (update(&inputs, true, FREE), update(&mixed, true, FREE));
        assert!(relative_rms(&got.0, &want.0) <= 1e-14, "{name}");
        assert!(relative_rms(&got.1, &want.1) <= 1e-14, "{name}");
        let single = cast(&mixed, DType::F32, DType::F32);
        let got = update(&single, true, FREE);
        assert!(relative_rms(&got.0, &want.0) <= tolerance::FORWARD, "{name}");
        assert!(relative_rms(&got.1, &want.1) <= tolerance::FORWARD, "{name}");
    }
}

/// The tokens of one batch element, all others left out; of what has no batch, all.
fn element(inputs: &Tensors, i: usize) -> Tensors {
    let of = |(name, x): (&String, &Tensor)| match name.as_str() {
        "a" | "d" | "dt_bias" => (name.clone(), x.clone()),
        _ => (name.clone(), x.narrow(0, i, 1).unwrap()),
    };
    inputs.iter().map(of).collect()
}

/// Several tokens at once give the bits that they give one by one.
#[test]
fn several_tokens_equal_steps() {
    const TOKENS: usize = 6;
    for form in [Channels, Heads, Tied] {
        let headdim = if form == Channels { 1 } else { 7 };
        let case = Case { tokens: Some(TOKENS), ..Case::new(form, [3, 98 / headdim, headdim, 19], Some(2)) };
        let inputs = case.inputs(&mut Random::new(7));
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let inputs = cast(&inputs, dtype, if dtype == DType::F64 { dtype } else { DType::F32 });
            for isa in Target::available() {
                isa.scope(|| {
                    let (y, state) = update(&inputs, true, (0.1, 0.9));
                    let (mut step, mut ys) = (inputs.clone(), vec![]);
                    for t in 0..TOKENS {
                        for name in ["x", "dt", "b", "c", "z"] {
                            step.insert(name.into(), inputs[name].get_on_dim(1, t).unwrap());
                        }
                        let (y, state) = update(&step, true, (0.1, 0.9));
                        ys.push(y);
                        step.insert("state".into(), state);
                    }
                    assert_eq!(relative_rms(&y, &Tensor::stack(&ys, 1).unwrap()), 0.0, "{case:?}");
                    assert_eq!(relative_rms(&state, &step["state"]), 0.0, "{case:?}");
                });
            }
        }
    }
}

/// Rows move on the states that their indices name and no others, as each does alone; rows of padding, whatever is in
/// them, move none and give 0.
#[test]
fn pool_of_states() {
    const POOL: usize = 6;
    let rows = [4, -1, 0, 5, -7];
    let indices = StateIndices::new(&rows).unwrap();
    for form in [Channels, Heads, Tied] {
        for tokens in [None, Some(3)] {
            let headdim = if form == Channels { 1 } else { 7 };
            let shape = [rows.len(), 308 / headdim, headdim, 19];
            let case = Case { tokens, ..Case::new(form, shape, Some(2)) };
            let mut random = Random::new(8);
            let exact = case.inputs(&mut random);
            let pool = Case { batch: POOL, ..case.clone() }.inputs(&mut random).remove("state").unwrap();
            for dtype in [DType::F32, DType::BF16, DType::F64] {
                let state_dtype = if dtype == DType::F64 { dtype } else { DType::F32 };
                let before = pool.to_dtype(state_dtype).unwrap();
                let mut inputs = cast(&exact, dtype, state_dtype);
                for isa in Target::available() {
                    let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
                    // What padding holds must not matter.
                    let x = &inputs["x"];
                    let nan = (x.narrow(0, 0, 1).unwrap() * f64::NAN).unwrap();
                    let x: Vec<Tensor> = (0..rows.len())
                        .map(|i| if rows[i] < 0 { nan.clone() } else { x.narrow(0, i, 1).unwrap() })
                        .collect();
                    inputs.insert("x".into(), Tensor::cat(&x, 0).unwrap());
                    inputs.insert("state".into(), before.clone());
                    let (y, pool) = isa.scope(|| update_at(&inputs, true, FREE, Some(&indices)));
                    let mut want = before.copy().unwrap();
                    for (i, index) in rows.into_iter().enumerate() {
                        let y = y.narrow(0, i, 1).unwrap();
                        let Ok(index) = usize::try_from(index) else {
                            assert!(values(&y).iter().all(|v| *v == 0.0), "{context}: padding gives {y}");
                            continue;
                        };
                        let mut alone = element(&inputs, i);
                        alone.insert("state".into(), before.narrow(0, index, 1).unwrap());
                        let (y_alone, state) = isa.scope(|| update(&alone, true, FREE));
                        assert_eq!(relative_rms(&y, &y_alone), 0.0, "{context}: row {i}");
                        let parts = [
                            want.narrow(0, 0, index).unwrap(),
                            state,
                            want.narrow(0, index + 1, POOL - index - 1).unwrap(),
                        ];
                        let parts: Vec<&Tensor> = parts.iter().filter(|x| x.elem_count() > 0).collect();
                        want = Tensor::cat(&parts, 0).unwrap();
                    }
                    assert_eq!(relative_rms(&pool, &want), 0.0, "{context}");
                }
            }
        }
    }
}

/// Strided inputs give the bits that contiguous ones give, and any number of threads does.
#[test]
fn layout_and_threads() {
    for form in [Channels, Heads, Tied] {
        let headdim = if form == Channels { 1 } else { 40 };
        let case = Case::new(form, [3, 1200 / headdim, headdim, 33], Some(2));
        let inputs = cast(&case.inputs(&mut Random::new(2)), DType::F32, DType::F32);
        let want = update(&inputs, true, FREE);
        let strided: Tensors = inputs
            .iter()
            .map(|(name, x)| {
                let last = x.rank() - 1;
                let view = Tensor::cat(&[x, x], last).unwrap().narrow(last, x.dims()[last], x.dims()[last]);
                (name.clone(), view.unwrap())
            })
            .collect();
        let got = update(&strided, true, FREE);
        assert_eq!((relative_rms(&got.0, &want.0), relative_rms(&got.1, &want.1)), (0.0, 0.0));
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let got = pool.install(|| update(&inputs, true, FREE));
            assert_eq!((relative_rms(&got.0, &want.0), relative_rms(&got.1, &want.1)), (0.0, 0.0));
        }
    }
}

/// A view of part of a larger buffer is changed in place, and nothing around it.
#[test]
fn state_within_a_buffer() {
    let inputs = Case::new(Tied, [2, 3, 4, 5], None).inputs(&mut Random::new(3));
    for dtype in [DType::F32, DType::F64] {
        let mut inputs = cast(&inputs, dtype, dtype);
        let (_, want) = update(&inputs, true, FREE);
        let ones = want.ones_like().unwrap();
        let buffer = Tensor::cat(&[&ones, &inputs["state"], &ones], 0).unwrap();
        inputs.insert("state".into(), buffer.narrow(0, 2, 2).unwrap());
        selective_state_update(&arguments(&inputs, true, FREE)).unwrap();
        let after = buffer.narrow(0, 2, 2).unwrap();
        assert_eq!(relative_rms(&after, &want), 0.0);
        for start in [0, 4] {
            assert_eq!(relative_rms(&buffer.narrow(0, start, 2).unwrap(), &ones), 0.0);
        }
    }
}

#[test]
fn golden() {
    let mut applied = 0;
    for golden in Golden::folder("ops/selective_state_update") {
        applied += 1;
        let inputs: Tensors = golden.with_prefix("in.").into_iter().collect();
        let indices =
            golden.tensors.get("indices").map(|indices| StateIndices::from_tensor(indices).unwrap());
        let softplus = golden.flag("dt_softplus");
        // In 16 bits ours may be off by as much as upstream's once more.
        let mut dtypes =
            vec![(DType::F64, DType::F64, tolerance::GOLDEN_F64, 1.0), (DType::F32, DType::F32, 1e-5, 1.0)];
        dtypes.extend(golden.half().map(|dtype| (dtype, DType::F32, 1e-5, 1.0 + tolerance::HALF_FACTOR)));
        for (dtype, others, allowed, factor) in dtypes {
            let mut variants = vec![cast(&inputs, dtype, others)];
            if golden.flag("tied") {
                let mut tied = variants[0].clone();
                for name in ["dt", "a", "d", "dt_bias"] {
                    let Some(x) = tied.get(name) else { continue };
                    let axis = if name == "dt" { 2 } else { 1 };
                    let x = x.narrow(axis, 0, 1).unwrap().squeeze(axis).unwrap();
                    let x = if name == "a" { x.narrow(1, 0, 1).unwrap().squeeze(1).unwrap() } else { x };
                    tied.insert(name.into(), x);
                }
                variants.push(tied);
            }
            for inputs in variants {
                let (y, state) = update_at(&inputs, softplus, FREE, indices.as_ref());
                for (name, got) in [("y", y), ("state", state)] {
                    let error = max_error(&got, &golden.tensors[&format!("out.{name}")]);
                    let (file, own) = (&golden.name, golden.tolerance("tolerance", name));
                    let allowed = allowed + factor * own;
                    assert!(error <= allowed, "{file} {dtype:?}: `{name}` is off by {error:.1e}");
                }
            }
        }
    }
    assert_eq!(applied, 19 + 11);
}

/// `l` updates equal `selective_scan` over `l` tokens.
#[test]
fn updates_equal_selective_scan() {
    let (batch, dim, seqlen, d_state, groups) = (2, 6, 9, 5, 3);
    let mut random = Random::new(4);
    let mut draw = |shape: &[usize]| random.normal(shape).to_dtype(DType::F32).unwrap();
    let (u, z, b, c) = (
        draw(&[batch, seqlen, dim]),
        draw(&[batch, seqlen, dim]),
        draw(&[batch, seqlen, groups, d_state]),
        draw(&[batch, seqlen, groups, d_state]),
    );
    let (delta, d, bias) = (draw(&[batch, seqlen, dim]), draw(&[dim]), draw(&[dim]));
    let a = draw(&[dim, d_state]).exp().unwrap().neg().unwrap();
    let state = draw(&[batch, dim, d_state]);
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let activations = [&u, &delta, &z, &b, &c].map(|x| x.to_dtype(dtype).unwrap());
        let [u, delta, z, b, c] = &activations;
        let state_dtype = if dtype == DType::F64 { dtype } else { DType::F32 };
        let state = state.to_dtype(state_dtype).unwrap().copy().unwrap();
        let want = selective_scan(&SelectiveScan {
            d: Some(&d),
            z: Some(z),
            delta_bias: Some(&bias),
            delta_softplus: true,
            initial_state: Some(&state.copy().unwrap()),
            layout: SequenceLayout::ChannelsLast,
            ..SelectiveScan::new(u, delta, &a, b, c)
        })
        .unwrap();
        let step = |t: usize| {
            let [x, dt, z, b, c] = [u, delta, z, b, c].map(|x| x.get_on_dim(1, t).unwrap());
            selective_state_update(&SelectiveStateUpdate {
                d: Some(&d),
                z: Some(&z),
                dt_bias: Some(&bias),
                dt_softplus: true,
                ..SelectiveStateUpdate::new(&state, &x, &dt, &a, &b, &c)
            })
        };
        let ys: Vec<Tensor> = (0..seqlen).map(|t| step(t).unwrap()).collect();
        let y = Tensor::stack(&ys, 1).unwrap();
        assert!(relative_rms(&y, &want.y) <= of_rounding(&want.y, dtype, tolerance::FORWARD));
        assert!(relative_rms(&state, &want.final_state) <= tolerance::FORWARD);
    }
}

/// `l` updates equal `ssd_chunk_scan` over `l` tokens.
#[test]
fn updates_equal_ssd_chunk_scan() {
    let (batch, nheads, headdim, seqlen, d_state, groups) = (2, 6, 5, 20, 7, 3);
    let mut random = Random::new(5);
    let mut draw = |shape: &[usize]| random.normal(shape).to_dtype(DType::F32).unwrap();
    let (x, z, dt, b, c) = (
        draw(&[batch, seqlen, nheads, headdim]),
        draw(&[batch, seqlen, nheads, headdim]),
        draw(&[batch, seqlen, nheads]),
        draw(&[batch, seqlen, groups, d_state]),
        draw(&[batch, seqlen, groups, d_state]),
    );
    let (d, bias) = (draw(&[nheads]), draw(&[nheads]));
    let a = draw(&[nheads]).exp().unwrap().neg().unwrap();
    let state = draw(&[batch, nheads, headdim, d_state]);
    let dt_limit = (0.3, 1.5);
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let activations = [&x, &dt, &z, &b, &c].map(|x| x.to_dtype(dtype).unwrap());
        let [x, dt, z, b, c] = &activations;
        let state_dtype = if dtype == DType::F64 { dtype } else { DType::F32 };
        let state = state.to_dtype(state_dtype).unwrap().copy().unwrap();
        let want = ssd_chunk_scan(&SsdChunkScan {
            d: Some(&d),
            z: Some(z),
            dt_bias: Some(&bias),
            dt_softplus: true,
            dt_limit,
            chunk_size: 16,
            initial_state: Some(&state.copy().unwrap()),
            ..SsdChunkScan::new(x, dt, &a, b, c)
        })
        .unwrap();
        let step = |t: usize| {
            let [x, dt, z, b, c] = [x, dt, z, b, c].map(|x| x.get_on_dim(1, t).unwrap());
            selective_state_update(&SelectiveStateUpdate {
                d: Some(&d),
                z: Some(&z),
                dt_bias: Some(&bias),
                dt_softplus: true,
                dt_limit,
                ..SelectiveStateUpdate::new(&state, &x, &dt, &a, &b, &c)
            })
        };
        let ys: Vec<Tensor> = (0..seqlen).map(|t| step(t).unwrap()).collect();
        let y = Tensor::stack(&ys, 1).unwrap();
        assert!(relative_rms(&y, &want.y) <= of_rounding(&want.y, dtype, tolerance::FORWARD));
        assert!(relative_rms(&state, &want.final_state) <= tolerance::FORWARD);
    }
}

/// Decays from almost 1 to 0 and steps up to 1000 stay finite and exact.
#[test]
fn extreme_decays() {
    let (dim, d_state) = (40, 34);
    let mut inputs = Case::new(Channels, [1, dim, 1, d_state], None).inputs(&mut Random::new(6));
    let count = dim * d_state;
    let a: Vec<f64> =
        (0..count).map(|i| -(10f64.powf(-30.0 + 33.0 * i as f64 / (count - 1) as f64))).collect();
    inputs.insert("a".into(), Tensor::from_vec(a, (dim, d_state), &Device::Cpu).unwrap());
    let dt: Vec<f64> =
        (0..dim).map(|i| if i == 0 { 0.0 } else { 10f64.powf(-6.0 + 9.0 * i as f64 / 39.0) }).collect();
    inputs.insert("dt".into(), Tensor::from_vec(dt, (1, dim), &Device::Cpu).unwrap());
    let single = cast(&inputs, DType::F32, DType::F32);
    let want = update(&cast(&single, DType::F64, DType::F64), false, FREE);
    for isa in Target::available() {
        let got = isa.scope(|| update(&single, false, FREE));
        for (got, want) in [(&got.0, &want.0), (&got.1, &want.1)] {
            assert!(values(got).iter().all(|v| v.is_finite()));
            assert!(relative_rms(got, want) <= tolerance::FORWARD, "{}", isa.name());
        }
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (state, x, dt) = (zeros(&[2, 6, 3, 4]), zeros(&[2, 6, 3]), zeros(&[2, 6]));
    let (a, b) = (zeros(&[6]), zeros(&[2, 2, 4]));
    let good = SelectiveStateUpdate::new(&state, &x, &dt, &a, &b, &b);
    let fails = |args: SelectiveStateUpdate, want: &str| {
        let message = selective_state_update(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    assert!(selective_state_update(&good).is_ok());
    let expected = "selective_state_update: `state` has shape [2, 6, 5, 4], expected (batch 2, nheads 6, headdim 3, d_state 4)";
    fails(SelectiveStateUpdate { state: &zeros(&[2, 6, 5, 4]), ..good }, expected);
    let several = zeros(&[2, 9, 6, 3]);
    fails(
        SelectiveStateUpdate { x: &several, ..good },
        "`dt` has shape [2, 6], expected (batch 2, tokens 9, nheads 6",
    );
    let indices = StateIndices::new(&[0, 2]).unwrap();
    let pooled = SelectiveStateUpdate { state_indices: Some(&indices), ..good };
    fails(pooled, "`state_indices` is 2 somewhere, expected less than states 2");
    let indices = StateIndices::new(&[0, 1, -1]).unwrap();
    fails(
        SelectiveStateUpdate { state_indices: Some(&indices), ..good },
        "`state_indices` is of 3 rows, expected batch 2",
    );
    fails(
        SelectiveStateUpdate { dt: &zeros(&[2, 5]), ..good },
        "`dt` has shape [2, 5], expected (batch 2, nheads 6)",
    );
    fails(SelectiveStateUpdate { a: &zeros(&[6, 4]), ..good }, "expected (nheads 6, headdim 3, d_state 4)");
    fails(SelectiveStateUpdate { b: &zeros(&[2, 4, 4]), c: &zeros(&[2, 4, 4]), ..good }, "`b` has 4 groups");
    fails(SelectiveStateUpdate { c: &zeros(&[2, 4]), ..good }, "expected ngroups 2 as `b`");
    fails(SelectiveStateUpdate { d: Some(&zeros(&[3])), ..good }, "`d` has shape [3], expected (nheads 6)");
    fails(SelectiveStateUpdate { dt_limit: (1.0, 0.0), ..good }, "`dt_limit` is (1, 0)");
    let half = state.to_dtype(DType::BF16).unwrap();
    fails(SelectiveStateUpdate { state: &half, ..good }, "`state` has dtype bf16, expected f32");
    let tracked = Var::from_tensor(&x).unwrap();
    fails(SelectiveStateUpdate { x: &tracked, ..good }, "`x` tracks gradients");
    let shared = zeros(&[4, 6, 3, 4]);
    let (inside, state) = (shared.narrow(0, 0, 2).unwrap(), shared.narrow(0, 2, 2).unwrap());
    let inside = inside.narrow(3, 0, 1).unwrap().squeeze(3).unwrap();
    fails(SelectiveStateUpdate { x: &inside, state: &state, ..good }, "`x` shares storage with the state");
    let strided = zeros(&[2, 3, 6, 4]).transpose(1, 2).unwrap();
    fails(SelectiveStateUpdate { state: &strided, ..good }, "the state must be contiguous f32");
}

crate::on_cuda!(
    reference,
    tied_heads_equal_repeated_values,
    several_tokens_equal_steps,
    pool_of_states,
    golden,
    extreme_decays,
);
