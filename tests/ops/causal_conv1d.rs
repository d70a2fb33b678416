//! Cases of `causal_conv1d` and its update.

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::{
    Activation, CausalConv1d, CausalConv1dUpdate, Packing, SequenceLayout, StateIndices, causal_conv1d,
    causal_conv1d_update,
};

use crate::laws::{self, GoldenTensors, Op, PackedOp, Role, Tensors};
use crate::support::golden::Golden;
use crate::support::random::Random;
use crate::support::target::{self, Target};
use crate::support::tolerance::{self, max_error, relative_rms, values};

#[derive(Debug, Clone)]
pub struct Case {
    pub batch: usize,
    pub dim: usize,
    pub seqlen: usize,
    pub width: usize,
    pub bias: bool,
    pub state: bool,
    pub activation: Activation,
    pub layout: SequenceLayout,
    pub packing: Option<Packing>,
}

use Activation::{Identity, Silu};
use SequenceLayout::{ChannelsFirst, ChannelsLast};

pub struct Conv;

fn arguments<'a>(case: &'a Case, inputs: &'a Tensors) -> CausalConv1d<'a> {
    CausalConv1d {
        bias: inputs.get("bias"),
        initial_state: inputs.get("initial_state"),
        activation: case.activation,
        layout: case.layout,
        packing: case.packing.as_ref(),
        ..CausalConv1d::new(&inputs["x"], &inputs["weight"])
    }
}

impl Op for Conv {
    type Case = Case;

    fn inputs(case: &Case, random: &mut Random) -> Tensors {
        let Case { batch, dim, seqlen, width, .. } = *case;
        let shape = match case.layout {
            ChannelsFirst => [batch, dim, seqlen],
            ChannelsLast => [batch, seqlen, dim],
        };
        let mut inputs = Tensors::new();
        inputs.insert("x".into(), random.normal(&shape));
        inputs.insert("weight".into(), random.normal(&[dim, width]));
        if case.bias {
            inputs.insert("bias".into(), random.normal(&[dim]));
        }
        if case.state {
            let sequences = case.packing.as_ref().map_or(batch, Packing::len);
            inputs.insert("initial_state".into(), random.normal(&[sequences, dim, width - 1]));
        }
        inputs
    }

    fn role(name: &str) -> Role {
        match name {
            "x" => Role::Activation,
            "initial_state" => Role::State,
            _ => Role::Parameter,
        }
    }

    fn time_axis(case: &Case, name: &str) -> Option<usize> {
        matches!(name, "x" | "y").then_some(if case.layout == ChannelsFirst { 2 } else { 1 })
    }

    fn run(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        let output = causal_conv1d(&arguments(case, inputs))?;
        Ok([("y".into(), output.y), ("final_state".into(), output.final_state)].into())
    }

    fn reference(case: &Case, inputs: &Tensors) -> Result<Tensors> {
        let output = mamba_ops::causal_conv1d::reference::forward(&arguments(case, inputs))?;
        Ok([("y".into(), output.y), ("final_state".into(), output.final_state)].into())
    }

    fn golden(golden: &Golden) -> std::result::Result<(Case, GoldenTensors), String> {
        let tensors = GoldenTensors::read(golden, |name| match name {
            "initial_states" => "initial_state".into(),
            "final_states" => "final_state".into(),
            other => other.into(),
        });
        let (batch, dim, seqlen) = tensors.inputs["x"].dims3().unwrap();
        let case = Case {
            batch,
            dim,
            seqlen,
            width: tensors.inputs["weight"].dim(1).unwrap(),
            bias: tensors.inputs.contains_key("bias"),
            state: tensors.inputs.contains_key("initial_state"),
            activation: activation(golden),
            layout: ChannelsFirst,
            packing: laws::packing(golden),
        };
        Ok((case, tensors))
    }
}

impl PackedOp for Conv {
    fn packed(case: &Case, packing: Option<Packing>) -> Case {
        let (batch, seqlen) =
            packing.as_ref().map_or((case.batch, case.seqlen), |packing| (packing.batch(), packing.seqlen()));
        Case { batch, seqlen, packing, ..case.clone() }
    }
}

fn activation(golden: &Golden) -> Activation {
    match golden.option("activation") {
        Some("silu") => Silu,
        Some("none" | "identity") => Identity,
        other => panic!("{}: activation {other:?}", golden.name),
    }
}

fn case(sizes: [usize; 4], bias: bool, state: bool, activation: Activation, layout: SequenceLayout) -> Case {
    let [batch, dim, seqlen, width] = sizes;
    Case { batch, dim, seqlen, width, bias, state, activation, layout, packing: None }
}

fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for layout in [ChannelsFirst, ChannelsLast] {
        for width in 1..=8 {
            let (bias, state) = (width % 2 == 0, width % 3 != 0);
            let activation = if width % 4 < 2 { Silu } else { Identity };
            cases.push(case([2, 5, 11, width], bias, state, activation, layout));
        }
        for seqlen in [0, 1, 2, 3, 63, 64, 65, 129, 300] {
            cases.push(case([2, 19, seqlen, 4], true, true, Silu, layout));
        }
        cases.push(case([0, 4, 7, 4], true, true, Silu, layout));
        cases.push(case([3, 1, 40, 4], true, false, Silu, layout));
        cases.push(case([1, 70, 500, 4], true, true, Silu, layout));
        for packing in laws::packings() {
            cases.push(Conv::packed(&case([0, 5, 0, 4], true, true, Silu, layout), Some(packing)));
        }
        for (i, width) in [(6, 3), (7, 4), (9, 8)] {
            let packing = laws::packings()[i].clone();
            cases.push(Conv::packed(&case([0, 72, 0, width], true, true, Silu, layout), Some(packing)));
        }
    }
    cases
}

#[test]
fn reference() {
    laws::reference::<Conv>(&cases());
}

#[test]
fn packed() {
    for layout in [ChannelsFirst, ChannelsLast] {
        for (width, bias, state, activation) in
            [(4, true, true, Silu), (2, false, true, Identity), (8, true, false, Silu), (1, true, true, Silu)]
        {
            laws::packed::<Conv>(&case([0, 5, 0, width], bias, state, activation, layout));
        }
        laws::packed::<Conv>(&case([0, 530, 0, 4], true, true, Silu, layout));
        laws::packed::<Conv>(&case([0, 136, 0, 3], true, true, Silu, layout));
    }
}

#[test]
fn partial_gradients() {
    for layout in [ChannelsFirst, ChannelsLast] {
        laws::partial_gradients::<Conv>(&case([2, 5, 9, 4], true, true, Silu, layout));
        laws::partial_gradients::<Conv>(&case([2, 5, 2, 4], true, true, Identity, layout));
    }
}

#[test]
fn split() {
    for layout in [ChannelsFirst, ChannelsLast] {
        laws::split::<Conv>(&case([2, 6, 9, 4], true, true, Silu, layout));
        laws::split::<Conv>(&case([1, 3, 7, 8], true, false, Silu, layout));
        laws::split::<Conv>(&case([1, 3, 5, 1], false, false, Identity, layout));
    }
}

#[test]
fn layout() {
    for layout in [ChannelsFirst, ChannelsLast] {
        let case = case([2, 6, 9, 4], true, true, Silu, layout);
        laws::layout::<Conv>(&case);
        laws::layout::<Conv>(&Conv::packed(&case, Some(laws::packings()[6].clone())));
    }
}

#[test]
fn threads() {
    for layout in [ChannelsFirst, ChannelsLast] {
        let case = case([2, 70, 400, 4], true, true, Silu, layout);
        laws::threads::<Conv>(&case);
        laws::threads::<Conv>(&Conv::packed(&case, Some(Packing::from_lengths(&[130, 1, 0, 200, 64, 3]))));
    }
}

#[test]
fn repeats() {
    for layout in [ChannelsFirst, ChannelsLast] {
        let case = case([2, 70, 400, 4], true, true, Silu, layout);
        laws::repeats::<Conv>(&case);
        laws::repeats::<Conv>(&Conv::packed(&case, Some(laws::packings()[8].clone())));
    }
}

#[test]
fn finite_differences() {
    let all = [ChannelsFirst, ChannelsLast]
        .map(|layout| [Silu, Identity].map(|act| case([2, 3, 6, 4], true, true, act, layout)));
    let packing = Some(laws::packings()[3].clone());
    let packed = Conv::packed(&case([0, 3, 0, 4], true, true, Silu, ChannelsLast), packing);
    laws::finite_differences::<Conv>(&[all.concat(), vec![packed]].concat());
}

#[test]
fn golden() {
    assert_eq!(laws::golden::<Conv>("ops/causal_conv1d", &[]), 25 + 20);
}

/// `y` and the window after it, computed on the device under test; the tensors of `inputs` stay as they are.
fn update(inputs: &Tensors, activation: Activation, layout: SequenceLayout) -> (Tensor, Tensor) {
    update_at(inputs, activation, layout, None)
}

/// The same, of the windows that the indices name.
fn update_at(
    inputs: &Tensors,
    activation: Activation,
    layout: SequenceLayout,
    state_indices: Option<&StateIndices>,
) -> (Tensor, Tensor) {
    let shapes: Vec<&[usize]> = inputs.values().map(Tensor::dims).collect();
    let inputs = target::place(&format!("{shapes:?} {activation:?} {layout:?}"), inputs).unwrap();
    let state = inputs["state"].copy().unwrap();
    let y = causal_conv1d_update(&CausalConv1dUpdate {
        bias: inputs.get("bias"),
        activation,
        layout,
        state_indices,
        ..CausalConv1dUpdate::new(&inputs["x"], &state, &inputs["weight"])
    })
    .unwrap();
    let mut outputs = target::back([("y".into(), y), ("state".into(), state)].into()).unwrap();
    (outputs.remove("y").unwrap(), outputs.remove("state").unwrap())
}

/// The update moves the window and gives what the golden has, for one and several tokens.
#[test]
fn update_golden() {
    let (mut applied, skipped) = (0, ["state_of_full_width"]);
    for golden in Golden::folder("ops/causal_conv1d_update") {
        if skipped.contains(&golden.name.as_str()) {
            println!(
                "{}: not applicable, a window of width inputs holds one that is never read",
                golden.name
            );
            continue;
        }
        applied += 1;
        let mut inputs = Tensors::new();
        for name in ["x", "conv_state", "weight", "bias"] {
            if let Some(x) = golden.tensors.get(&format!("in.{name}")) {
                let ours = if name == "conv_state" { "state" } else { name };
                inputs.insert(ours.into(), x.to_dtype(DType::F32).unwrap());
            }
        }
        let one = inputs["x"].rank() == 2;
        if one {
            inputs.insert("x".into(), inputs["x"].unsqueeze(2).unwrap());
        }
        let indices =
            golden.tensors.get("indices").map(|indices| StateIndices::from_tensor(indices).unwrap());
        // In 16 bits ours may be off by as much as upstream's once more.
        let mut dtypes = vec![(DType::F32, 1.0)];
        dtypes.extend(golden.half().map(|dtype| (dtype, 1.0 + tolerance::HALF_FACTOR)));
        for (dtype, factor) in dtypes {
            inputs.insert("x".into(), inputs["x"].to_dtype(dtype).unwrap());
            let (y, state) = update_at(&inputs, activation(&golden), ChannelsFirst, indices.as_ref());
            let y = if one { y.squeeze(2).unwrap() } else { y };
            let error = max_error(&y, &golden.tensors["out.y"]);
            let allowed = 1e-5 + factor * golden.tolerance("tolerance", "y");
            assert!(error <= allowed, "{} {dtype:?}: off by {error:.1e}", golden.name);
            assert_eq!(max_error(&state, &golden.tensors["out.conv_state"]), 0.0, "{}", golden.name);
        }
    }
    assert_eq!(applied, 9 + 11);
}

/// `l` updates of one token, or a few of several, equal one forward over `l`, in every dtype, layout and width.
#[test]
fn updates_equal_forward() {
    for (layout, tokens, width) in
        [ChannelsFirst, ChannelsLast].into_iter().flat_map(|l| [(l, 1, 4), (l, 3, 4), (l, 1, 7), (l, 3, 2)])
    {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let case = case([2, 5, 9, width], true, true, Silu, layout);
            let mut inputs = Conv::inputs(&case, &mut Random::new(1));
            for (name, x) in &mut inputs {
                let half = Conv::role(name) == Role::Activation;
                let as_dtype = if half || dtype == DType::F64 { dtype } else { DType::F32 };
                *x = x.to_dtype(as_dtype).unwrap();
            }
            let want = Conv::fused(&case, &inputs).unwrap();
            let mut state = inputs.remove("initial_state").unwrap();
            let (x, axis) = (inputs.remove("x").unwrap(), Conv::time_axis(&case, "x").unwrap());
            let mut steps = vec![];
            for t in (0..9).step_by(tokens) {
                inputs.insert("x".into(), x.narrow(axis, t, tokens).unwrap());
                inputs.insert("state".into(), state);
                let (y, next) = update(&inputs, Silu, layout);
                steps.push(y);
                state = next;
            }
            let y = Tensor::cat(&steps, axis).unwrap();
            let bound = tolerance::of_rounding(&want["y"], dtype, tolerance::FORWARD);
            assert!(relative_rms(&y, &want["y"]) <= bound);
            assert_eq!(relative_rms(&state, &want["final_state"]), 0.0);
        }
    }
}

/// Rows move on the windows that their indices name and no others, as each does alone; padding moves none and gives 0.
#[test]
fn pool_of_windows() {
    const POOL: usize = 6;
    let rows = [4, -1, 0, 5, -7];
    let indices = StateIndices::new(&rows).unwrap();
    for (layout, tokens, width) in [
        (ChannelsFirst, 1, 4),
        (ChannelsLast, 1, 3),
        (ChannelsFirst, 5, 4),
        (ChannelsLast, 5, 4),
        (ChannelsLast, 2, 8),
        (ChannelsLast, 2, 1),
        (ChannelsFirst, 0, 4),
    ] {
        let case = case([rows.len(), 600, tokens, width], true, false, Silu, layout);
        let mut random = Random::new(2);
        let exact = Conv::inputs(&case, &mut random);
        let pool = random.normal(&[POOL, 600, width - 1]);
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let mut inputs =
                if dtype == DType::F64 { exact.clone() } else { laws::cast::<Conv>(&exact, dtype).unwrap() };
            let x = inputs["x"].clone();
            let before = pool.to_dtype(if dtype == DType::F64 { dtype } else { DType::F32 }).unwrap();
            for isa in Target::available() {
                let context = format!("{case:?} {} {}", dtype.as_str(), isa.name());
                let mut step = |x: &Tensor, state: &Tensor, state_indices: Option<&StateIndices>| {
                    inputs.insert("x".into(), x.clone());
                    inputs.insert("state".into(), state.clone());
                    isa.scope(|| update_at(&inputs, Silu, layout, state_indices))
                };
                let (y, after) = step(&x, &before, Some(&indices));
                let mut want: Vec<Tensor> = (0..POOL).map(|i| before.narrow(0, i, 1).unwrap()).collect();
                for (i, index) in rows.into_iter().enumerate() {
                    let got = values(&y.narrow(0, i, 1).unwrap());
                    let Ok(index) = usize::try_from(index) else {
                        assert!(got.iter().all(|v| *v == 0.0), "{context}: padding");
                        continue;
                    };
                    let (alone, state) = step(&x.narrow(0, i, 1).unwrap(), &want[index], None);
                    want[index] = state;
                    assert_eq!(got, values(&alone), "{context}: row {i}");
                }
                assert_eq!(values(&after), values(&Tensor::cat(&want, 0).unwrap()), "{context}");
            }
        }
    }
}

#[test]
fn misuse() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let (x, weight) = (zeros(&[2, 3, 5]), zeros(&[3, 4]));
    let fails = |args: CausalConv1d, want: &str| {
        let message = causal_conv1d(&args).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    };
    let good = CausalConv1d::new(&x, &weight);
    let (flat, narrow, integers) = (zeros(&[6, 5]), zeros(&[2, 4]), x.to_dtype(DType::U32).unwrap());
    fails(
        CausalConv1d { x: &flat, ..good },
        "causal_conv1d: `x` has shape [6, 5], expected (batch, dim, seqlen)",
    );
    fails(CausalConv1d { x: &integers, ..good }, "`x` has dtype u32, expected f32, f16, bf16 or f64");
    fails(CausalConv1d { weight: &narrow, ..good }, "`weight` has shape [2, 4], expected (dim 3, width 4)");
    fails(CausalConv1d { weight: &zeros(&[3, 0]), ..good }, "`weight` has width 0");
    fails(CausalConv1d { bias: Some(&zeros(&[4])), ..good }, "`bias` has shape [4], expected (dim 3)");
    let state = zeros(&[2, 3, 4]);
    let expected = "`initial_state` has shape [2, 3, 4], expected (batch 2, dim 3, width - 1 3)";
    fails(CausalConv1d { initial_state: Some(&state), ..good }, expected);
    let half = zeros(&[2, 3, 3]).to_dtype(DType::F16).unwrap();
    fails(CausalConv1d { initial_state: Some(&half), ..good }, "`initial_state` has dtype f16, expected f32");

    let state = zeros(&[2, 3, 3]);
    let update = CausalConv1dUpdate::new(&x, &state, &weight);
    let indices = StateIndices::new(&[-1, 2]).unwrap();
    let message = causal_conv1d_update(&CausalConv1dUpdate { state_indices: Some(&indices), ..update })
        .unwrap_err()
        .to_string();
    let expected = "causal_conv1d_update: `state_indices` is 2 somewhere, expected less than states 2";
    assert!(message.contains(expected), "{message}");
    let tracked = candle_core::Var::from_tensor(&weight).unwrap();
    let message =
        causal_conv1d_update(&CausalConv1dUpdate { weight: &tracked, ..update }).unwrap_err().to_string();
    assert!(message.contains("causal_conv1d_update: `weight` tracks gradients"), "{message}");
    let shared = zeros(&[4, 3, 3]);
    let (x, state) = (shared.narrow(0, 0, 2).unwrap(), shared.narrow(0, 2, 2).unwrap());
    let message =
        causal_conv1d_update(&CausalConv1dUpdate { x: &x, state: &state, ..update }).unwrap_err().to_string();
    assert!(message.contains("`x` shares storage with the state"), "{message}");
}

crate::on_cuda!(
    reference,
    packed,
    partial_gradients,
    split,
    layout,
    repeats,
    golden,
    update_golden,
    updates_equal_forward,
    pool_of_windows,
);
