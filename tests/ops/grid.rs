//! Each op over the grid of its sizes and options, forward and backward, on every instruction set, against loops in `f64`.
//!
//! The grids are covered by pairs (`pairwise.rs`): any two levels of any two factors meet in a case.

use candle_core::{DType, Device, Tensor};
use mamba_ops::{Activation, NormKind, PackedSequence, Packing, SequenceLayout};

use crate::laws::{self, Op, Tensors};
use crate::oracle::{self, Coefficient, Ssm};
use crate::pairwise::{Factor, cover};
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, relative_rms, values};
use crate::{causal_conv1d, norm, selective_scan, selective_state_update, ssd};

use SequenceLayout::{ChannelsFirst, ChannelsLast};

/// The values of tensors by name.
pub type Values = std::collections::BTreeMap<String, Vec<f64>>;

pub fn all_values(tensors: &Tensors) -> Values {
    tensors.iter().map(|(name, x)| (name.clone(), values(x))).collect()
}

/// Of each name in `like`, the values as a tensor of that shape; a missing one is a test that is wrong.
pub fn shaped(like: &Tensors, mut values: Values) -> Tensors {
    let tensor = |(name, x): (&String, &Tensor)| {
        let values = values.remove(name).unwrap_or_else(|| panic!("the oracle has no `{name}`"));
        (name.clone(), Tensor::from_vec(values, x.dims(), &Device::Cpu).unwrap())
    };
    like.iter().map(tensor).collect()
}

/// Outputs and gradients by name from inputs and cotangents, all `f64`.
pub type Oracle<C> = fn(&C, &Tensors, &Tensors) -> (Values, Values);

/// The fused path gives what the oracle gives, in every dtype, on every instruction set; on the CPU, where 16 bits are converted
/// to `f32` at the border and the law of reference has seen that, small cases alone are in 16 bits, and large gradients not on
/// the scalar instruction set, which takes ten times as long as the others.
pub fn check<O: Op>(case: &O::Case, inputs: &Tensors, oracle: Oracle<O::Case>) {
    check_in::<O>(case, inputs, &[DType::F32], oracle);
    let size: usize = inputs.values().map(Tensor::elem_count).sum();
    if target::is_cuda() || size < 1 << 12 {
        check_in::<O>(case, inputs, &[DType::BF16, DType::F16], oracle);
    }
}

/// In dtypes that share their inputs, and so what the oracle gives.
pub fn check_in<O: Op>(case: &O::Case, inputs: &Tensors, dtypes: &[DType], oracle: Oracle<O::Case>) {
    let exact_in = |(name, x): (&String, &Tensor)| {
        let rounded = laws::exact_in(O::role(name).dtype(dtypes[0]), x).unwrap();
        (name.clone(), rounded.to_dtype(DType::F64).unwrap())
    };
    let exact: Tensors = inputs.iter().map(exact_in).collect();
    let outputs = O::fused(case, &laws::cast::<O>(&exact, dtypes[0]).unwrap()).unwrap();
    let cotangents = laws::cotangents(&outputs, &mut Random::new(2000)).unwrap();
    let (want, gradients) = oracle(case, &exact, &cotangents);
    let (want, gradients) = (shaped(&outputs, want), shaped(&exact, gradients));
    let large = exact.values().map(Tensor::elem_count).sum::<usize>() > 1 << 18;
    for (&dtype, isa) in
        dtypes.iter().flat_map(|dtype| Target::available().into_iter().map(move |isa| (dtype, isa)))
    {
        let inputs = laws::cast::<O>(&exact, dtype).unwrap();
        let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
        let (forward, backward) =
            (tolerance::FORWARD * O::slack(dtype), tolerance::BACKWARD * O::slack(dtype));
        isa.scope(|| {
            if laws::is_empty(&outputs) || (large && isa.name() == "scalar") {
                return laws::agree(&O::fused(case, &inputs).unwrap(), &want, forward, &context);
            }
            let got = laws::differentiate(&|x| O::fused(case, x), &inputs, &cotangents).unwrap();
            laws::agree(&got.0, &want, forward, &context);
            laws::agree(&got.1, &gradients, backward, &format!("{context} gradient"));
        });
    }
}

/// Weights of levels that are sizes.
fn sizes(levels: &[usize]) -> Factor {
    levels.iter().map(|n| *n as f64).collect()
}

/// Weights of options.
fn options(count: usize) -> Factor {
    vec![1.0; count]
}

/// The packing of a case: each row one sequence, or cut at random, with some padding.
pub fn cut([batch, seqlen]: [usize; 2], random: &mut Random) -> Packing {
    let mut ids = vec![];
    for _ in 0..batch {
        let mut row: Vec<i64> = vec![];
        while row.len() < seqlen {
            let len = random.uniform(1.0, 2.0 + seqlen as f64 / 2.0) as usize;
            // A run of padding now and then.
            let id = if random.uniform(0.0, 1.0) < 0.2 { -1 } else { ids.len() as i64 + row.len() as i64 };
            row.extend(std::iter::repeat_n(id, len.min(seqlen - row.len())));
        }
        ids.extend(row);
    }
    Packing::from_seq_idx(&Tensor::from_vec(ids, (batch, seqlen), &Device::Cpu).unwrap()).unwrap()
}

/// Where the sequences of a case lie.
fn sequences(packing: Option<&Packing>, [batch, seqlen]: [usize; 2]) -> Vec<PackedSequence> {
    match packing {
        Some(packing) => packing.sequences().to_vec(),
        None => (0..batch).map(|row| PackedSequence { row, start: 0, len: seqlen }).collect(),
    }
}

fn outputs(y: Vec<f64>, state: Vec<f64>) -> Values {
    [("y".into(), y), ("final_state".into(), state)].into()
}

/// `(batch, a, b, ..)` as `(batch, b, a, ..)`, flat.
fn swapped(x: &Tensor) -> Tensor {
    x.transpose(1, 2).unwrap().contiguous().unwrap()
}

pub fn ssd_oracle(case: &ssd::Case, inputs: &Tensors, cotangents: &Tensors) -> (Values, Values) {
    let (v, ct) = (all_values(inputs), all_values(cotangents));
    let get = |name: &str| v.get(name).map(Vec::as_slice);
    let ssm = Ssm {
        batch: case.batch,
        sequences: &sequences(case.packing.as_ref(), [case.batch, case.seqlen]),
        seqlen: case.seqlen,
        dim: case.nheads * case.headdim,
        d_state: case.d_state,
        x: &v["x"],
        dt: &v["dt"],
        dt_share: case.headdim,
        a: &v["a"],
        a_share: Some(case.headdim),
        b: Coefficient::Varying(&v["b"], case.ngroups),
        c: Coefficient::Varying(&v["c"], case.ngroups),
        d: get("d").map(|d| (d, if case.d == Some(1) { case.headdim } else { 1 })),
        z: get("z"),
        dt_bias: get("dt_bias").map(|bias| (bias, case.headdim)),
        dt_softplus: case.dt_softplus,
        dt_limit: case.dt_limit,
        initial_state: get("initial_state"),
    };
    let (y, state, g) = ssm.backward(&ct["y"], &ct["final_state"]);
    let gradients = [
        ("x", g.x),
        ("dt", g.dt),
        ("a", g.a),
        ("b", g.b),
        ("c", g.c),
        ("d", g.d),
        ("z", g.z),
        ("dt_bias", g.dt_bias),
        ("initial_state", g.initial_state),
    ];
    (outputs(y, state), gradients.map(|(name, g)| (name.to_owned(), g)).into())
}

#[test]
fn ssd_chunk_scan() {
    const CHUNK: usize = 32;
    let (states, headdims) = ([1, 8, 16, 24, 64, 96, 128, 256], [1, 8, 64, 80, 128]);
    let lengths = [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 129, 4097];
    let groups = [(1, 2), (2, 4), (8, 8), (3, 3)]; // groups and heads; the last: as many groups as heads
    let factors = [
        sizes(&states),
        sizes(&groups.map(|(_, heads)| heads)),
        sizes(&headdims),
        sizes(&lengths),
        sizes(&[0, 1, 3]),
        options(3), // d: none, one a head, one a channel
        options(2), // z
        options(2), // bias and softplus
        options(2), // initial state
        options(2), // dt_limit
        options(2), // packed
    ];
    let cases = cover(&factors, 1.5e6);
    println!("{} cases", cases.len());
    for (seed, level) in cases.iter().enumerate() {
        let (ngroups, nheads) = groups[level[1]];
        let case = ssd::Case {
            d: [None, Some(1), Some(2)][level[5]],
            z: level[6] == 1,
            dt_bias: level[7] == 1,
            dt_softplus: level[7] == 1,
            state: level[8] == 1,
            dt_limit: [(0.0, f64::INFINITY), (0.02, 0.4)][level[9]],
            chunk_size: CHUNK,
            packing: (level[10] == 1)
                .then(|| cut([[0, 1, 3][level[4]], lengths[level[3]]], &mut Random::new(seed as u64))),
            ..ssd::Case::new([
                [0, 1, 3][level[4]],
                lengths[level[3]],
                nheads,
                headdims[level[2]],
                ngroups,
                states[level[0]],
            ])
        };
        check::<ssd::Ssd>(&case, &ssd::Ssd::inputs(&case, &mut Random::new(seed as u64)), ssd_oracle);
    }
}

pub fn scan_oracle(case: &selective_scan::Case, inputs: &Tensors, cotangents: &Tensors) -> (Values, Values) {
    // Everything with the channels last.
    let first = case.layout == ChannelsFirst;
    let last = |name: &str, x: &Tensor| match (name, x.rank()) {
        ("u" | "delta" | "z" | "y", 3) if first => swapped(x),
        ("b" | "c", 4) if first => x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap(),
        _ => x.clone(),
    };
    let tensors =
        |all: &Tensors| -> Tensors { all.iter().map(|(name, x)| (name.clone(), last(name, x))).collect() };
    let (v, ct) = (all_values(&tensors(inputs)), all_values(&tensors(cotangents)));
    let get = |name: &str| v.get(name).map(Vec::as_slice);
    let coefficient = |name: &str, groups: Option<usize>| match groups {
        None => Coefficient::Constant(&v[name]),
        Some(groups) => Coefficient::Varying(&v[name], groups),
    };
    let ssm = Ssm {
        batch: case.batch,
        sequences: &sequences(case.packing.as_ref(), [case.batch, case.seqlen]),
        seqlen: case.seqlen,
        dim: case.dim,
        d_state: case.d_state,
        x: &v["u"],
        dt: &v["delta"],
        dt_share: 1,
        a: &v["a"],
        a_share: None,
        b: coefficient("b", case.b),
        c: coefficient("c", case.c),
        d: get("d").map(|d| (d, 1)),
        z: get("z"),
        dt_bias: get("delta_bias").map(|bias| (bias, 1)),
        dt_softplus: case.delta_softplus,
        dt_limit: (f64::NEG_INFINITY, f64::INFINITY),
        initial_state: get("initial_state"),
    };
    let (y, state, g) = ssm.backward(&ct["y"], &ct["final_state"]);
    let gradients: [(&str, Vec<f64>); 9] = [
        ("u", g.x),
        ("delta", g.dt),
        ("a", g.a),
        ("b", g.b),
        ("c", g.c),
        ("d", g.d),
        ("z", g.z),
        ("delta_bias", g.dt_bias),
        ("initial_state", g.initial_state),
    ];
    // Back to the layout of the case.
    let (batch, seqlen, dim, n) = (case.batch, case.seqlen, case.dim, case.d_state);
    let back = |name: &str, x: Vec<f64>| -> Vec<f64> {
        let groups = match name {
            "b" => case.b,
            "c" => case.c,
            _ => None,
        };
        let tensor = |x: Vec<f64>, shape: &[usize]| Tensor::from_vec(x, shape, &Device::Cpu).unwrap();
        match (name, groups) {
            ("u" | "delta" | "z" | "y", _) if first && !x.is_empty() => {
                values(&swapped(&tensor(x, &[batch, seqlen, dim])))
            }
            (_, Some(g)) if first && !x.is_empty() => {
                values(&tensor(x, &[batch, seqlen, g, n]).permute((0, 2, 3, 1)).unwrap())
            }
            _ => x,
        }
    };
    let gradients = gradients.map(|(name, g)| (name.to_owned(), back(name, g)));
    (outputs(back("y", y), state), gradients.into())
}

#[test]
fn selective_scan() {
    let states = [1, 8, 16, 24, 64, 96, 128, 256];
    let lengths = [0, 1, 2, 63, 64, 65, 129, 4097]; // states are kept every 64 tokens
    // Channels and groups of B and C: one, two, eight, as many as channels, constant.
    let shapes = [
        (6, Some(1), Some(1)),
        (4, Some(2), Some(2)),
        (16, Some(8), Some(2)),
        (17, Some(17), Some(1)),
        (3, None, Some(3)),
        (18, Some(1), None),
        (2, None, None),
    ];
    let factors = [
        sizes(&states),
        sizes(&shapes.map(|(dim, ..)| dim)),
        sizes(&lengths),
        sizes(&[0, 1, 3]),
        options(2), // layout
        options(2), // d
        options(2), // z
        options(2), // bias
        options(2), // softplus
        options(2), // initial state
        options(2), // packed
    ];
    let cases = cover(&factors, 1.5e6);
    println!("{} cases", cases.len());
    for (seed, level) in cases.iter().enumerate() {
        let (dim, b, c) = shapes[level[1]];
        let case = selective_scan::Case {
            b,
            c,
            d: level[5] == 1,
            z: level[6] == 1,
            delta_bias: level[7] == 1,
            delta_softplus: level[8] == 1,
            state: level[9] == 1,
            packing: (level[10] == 1)
                .then(|| cut([[0, 1, 3][level[3]], lengths[level[2]]], &mut Random::new(seed as u64))),
            ..selective_scan::Case::new(
                [[0, 1, 3][level[3]], dim, lengths[level[2]], states[level[0]]],
                [ChannelsFirst, ChannelsLast][level[4]],
            )
        };
        let inputs = selective_scan::Scan::inputs(&case, &mut Random::new(seed as u64));
        check::<selective_scan::Scan>(&case, &inputs, scan_oracle);
    }
}

fn conv_oracle(case: &causal_conv1d::Case, inputs: &Tensors, cotangents: &Tensors) -> (Values, Values) {
    let first = case.layout == ChannelsFirst;
    let last = |x: &Tensor| values(&if first { swapped(x) } else { x.clone() });
    let v = all_values(inputs);
    let x = last(&inputs["x"]);
    let conv = oracle::Conv {
        sequences: &sequences(case.packing.as_ref(), [case.batch, case.seqlen]),
        seqlen: case.seqlen,
        dim: case.dim,
        width: case.width,
        x: &x,
        weight: &v["weight"],
        bias: v.get("bias").map(Vec::as_slice),
        initial_state: v.get("initial_state").map(Vec::as_slice),
        silu: case.activation == Activation::Silu,
    };
    let (y, state, g) = conv.backward(&last(&cotangents["y"]), &values(&cotangents["final_state"]));
    let back = |x: Vec<f64>| match first && !x.is_empty() {
        true => {
            let shape = (case.batch, case.seqlen, case.dim);
            values(&swapped(&Tensor::from_vec(x, shape, &Device::Cpu).unwrap()))
        }
        false => x,
    };
    let gradients =
        [("x", back(g.x)), ("weight", g.weight), ("bias", g.bias), ("initial_state", g.initial_state)];
    (outputs(back(y), state), gradients.map(|(name, g)| (name.to_owned(), g)).into())
}

#[test]
fn causal_conv1d() {
    let (lengths, dims) = ([0, 1, 2, 63, 64, 65, 129, 4097], [1, 3, 8, 17, 64, 80]);
    let factors = [
        sizes(&[2, 3, 4, 5, 6, 7, 8]),
        sizes(&lengths),
        sizes(&dims),
        sizes(&[0, 1, 3]),
        options(2), // layout
        options(2), // activation
        options(2), // bias
        options(2), // initial state
        options(2), // packed
    ];
    let cases = cover(&factors, 1.5e6);
    println!("{} cases", cases.len());
    for (seed, level) in cases.iter().enumerate() {
        let case = causal_conv1d::Case {
            batch: [0, 1, 3][level[3]],
            dim: dims[level[2]],
            seqlen: lengths[level[1]],
            width: level[0] + 2,
            bias: level[6] == 1,
            state: level[7] == 1,
            activation: [Activation::Identity, Activation::Silu][level[5]],
            layout: [ChannelsFirst, ChannelsLast][level[4]],
            packing: (level[8] == 1)
                .then(|| cut([[0, 1, 3][level[3]], lengths[level[1]]], &mut Random::new(seed as u64))),
        };
        let inputs = causal_conv1d::Conv::inputs(&case, &mut Random::new(seed as u64));
        check::<causal_conv1d::Conv>(&case, &inputs, conv_oracle);
    }
}

fn norm_oracle(case: &norm::Case, inputs: &Tensors, cotangents: &Tensors) -> (Values, Values) {
    let (v, ct) = (all_values(inputs), all_values(cotangents));
    let get = |name: &str| v.get(name).map(Vec::as_slice);
    let dim = case.shape[case.shape.len() - 1];
    let norm = oracle::Norm {
        dim,
        group_size: case.group_size.unwrap_or(dim),
        layer: case.kind == NormKind::Layer,
        eps: case.eps,
        norm_before_gate: case.gate == norm::Gate::AfterNorm,
        x: &v["x"],
        weight: get("weight"),
        bias: get("bias"),
        residual: get("residual"),
        z: get("z"),
    };
    let (y, sum, g) = norm.backward(&ct["y"], ct.get("residual").map(Vec::as_slice));
    let gradients =
        [("x", g.sum.clone()), ("residual", g.sum), ("weight", g.weight), ("bias", g.bias), ("z", g.z)];
    let outputs = [("y".to_owned(), y), ("residual".to_owned(), sum)];
    (outputs.into(), gradients.map(|(name, g)| (name.to_owned(), g)).into())
}

#[test]
fn norms() {
    use norm::Gate::{AfterNorm, BeforeNorm, Without};
    let dims = [8, 24, 64, 80, 128, 1536];
    let rows: [&[usize]; 6] = [&[0], &[1], &[3], &[2, 0], &[3, 129], &[4097]];
    let factors = [
        sizes(&dims),
        sizes(&rows.map(|rows| rows.iter().product())),
        options(2), // kind
        options(4), // groups
        options(3), // gate
        options(2), // weight
        options(2), // bias
        options(2), // residual
    ];
    let cases = cover(&factors, 1.5e6);
    println!("{} cases", cases.len());
    for (seed, level) in cases.iter().enumerate() {
        let dim = dims[level[0]];
        let shape: Vec<usize> = rows[level[1]].iter().copied().chain([dim]).collect();
        let case = norm::Case {
            group_size: [None, Some(dim / 2), Some(dim / 8 * 2), Some(8)][level[3]]
                .filter(|size| dim.is_multiple_of(*size)),
            gate: [Without, BeforeNorm, AfterNorm][level[4]],
            weight: level[5] == 1,
            bias: level[6] == 1,
            residual: level[7] == 1,
            ..norm::Case::new([NormKind::Rms, NormKind::Layer][level[2]], &shape)
        };
        let inputs = norm::InDtypeOfX::inputs(&case, &mut Random::new(seed as u64));
        check::<norm::InDtypeOfX>(&case, &inputs, norm_oracle);
    }
}

#[test]
fn selective_state_update() {
    use selective_state_update::Form::{Channels, Heads, Tied};
    let (states, headdims) = ([1, 8, 16, 24, 64, 96, 128, 256], [1, 8, 64, 80, 128]);
    let groups = [(Some(1), 2), (Some(2), 4), (Some(8), 8), (Some(3), 3), (None, 5)];
    let factors = [
        sizes(&states),
        sizes(&groups.map(|(_, heads)| heads)),
        sizes(&headdims),
        sizes(&[0, 1, 3]),
        options(3),        // form
        options(2),        // d, z, bias
        options(2),        // softplus
        options(2),        // dt_limit
        sizes(&[1, 1, 4]), // tokens: one, one on an axis of its own, several
    ];
    let cases = cover(&factors, 1.5e6);
    println!("{} cases", cases.len());
    for (seed, level) in cases.iter().enumerate() {
        let (ngroups, nheads) = groups[level[1]];
        let form = [Channels, Heads, Tied][level[4]];
        // Without heads, the channels of each would-be head are channels like the others.
        let (nheads, headdim) = match form {
            Channels => (nheads * headdims[level[2]], 1),
            _ => (nheads, headdims[level[2]]),
        };
        let tokens = [None, Some(1), Some(4)][level[8]];
        let case = selective_state_update::Case {
            tokens,
            options: level[5] == 1,
            dt_limit: [selective_state_update::FREE, (0.1, 0.9)][level[7]],
            ..selective_state_update::Case::new(
                form,
                [[0, 1, 3][level[3]], nheads, headdim, states[level[0]]],
                ngroups,
            )
        };
        let softplus = level[6] == 1;
        let mut inputs = case.inputs(&mut Random::new(seed as u64));
        if !softplus {
            let dt = inputs["dt"].exp().unwrap();
            inputs.insert("dt".into(), dt);
        }
        let inputs = selective_state_update::cast(&inputs, DType::F32, DType::F32);
        let v = all_values(&inputs);
        let get = |name: &str| v.get(name).map(Vec::as_slice);
        let share = if form == Tied { headdim } else { 1 };
        let ngroups = ngroups.unwrap_or(1);
        let ssm = Ssm {
            batch: case.batch,
            sequences: &sequences(None, [case.batch, tokens.unwrap_or(1)]),
            seqlen: tokens.unwrap_or(1),
            dim: nheads * headdim,
            d_state: case.d_state,
            x: &v["x"],
            dt: &v["dt"],
            dt_share: share,
            a: &v["a"],
            a_share: (form == Tied).then_some(headdim),
            b: Coefficient::Varying(&v["b"], ngroups),
            c: Coefficient::Varying(&v["c"], ngroups),
            d: get("d").map(|d| (d, share)),
            z: get("z"),
            dt_bias: get("dt_bias").map(|bias| (bias, share)),
            dt_softplus: softplus,
            dt_limit: case.dt_limit,
            initial_state: get("state"),
        };
        let (y, state) = ssm.forward();
        for isa in Target::available() {
            let got = isa.scope(|| selective_state_update::update(&inputs, softplus, case.dt_limit));
            for (name, got, want) in [("y", got.0, &y), ("state", got.1, &state)] {
                let want = Tensor::from_vec(want.clone(), got.dims(), &Device::Cpu).unwrap();
                let error = relative_rms(&got, &want);
                assert!(
                    error <= tolerance::FORWARD,
                    "{case:?} {}: `{name}` is off by {error:.1e}",
                    isa.name()
                );
            }
        }
    }
}

crate::on_cuda!(causal_conv1d, norms, selective_scan, selective_state_update, ssd_chunk_scan);
