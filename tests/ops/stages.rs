//! What upstream's kernels for the stages of the duality gave, and its gate: each stage is a scan with some of its inputs left
//! out, so that our one op answers for all of them.

use candle_core::{DType, Device, Result, Tensor};
use mamba_ops::Packing;

use crate::laws::{self, GoldenTensors, Op, Tensors};
use crate::ssd::{Case, Ssd};
use crate::support::golden::Golden;
use crate::support::tolerance::max_error;

/// A stage by our op, from the inputs of a file to outputs of the same names.
type Stage = fn(&Golden, &Tensors) -> Result<Tensors>;

fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// The scan of some inputs by name, with steps as they are.
fn scan(case: Case, inputs: &[(&str, &Tensor)]) -> Result<Tensors> {
    let inputs = inputs.iter().map(|(name, x)| ((*name).to_owned(), (*x).clone())).collect();
    Ssd::fused(&case, &inputs)
}

fn free() -> Case {
    Case { dt_limit: (f64::NEG_INFINITY, f64::INFINITY), ..Case::bare([0; 6]) }
}

fn chunk_size(golden: &Golden) -> usize {
    golden.number("chunk_size").unwrap() as usize
}

/// `(batch, seqlen, ..)` as `(batch · chunks, tokens, ..)`.
fn in_chunks(x: &Tensor, tokens: usize) -> Result<Tensor> {
    let dims = [&[x.dim(0)? * x.dim(1)? / tokens, tokens], &x.dims()[2..]].concat();
    x.reshape(dims)
}

/// Steps after bias, softplus and bounds, and sums of their exponents. Without decay, ones add up steps; a state of ones, to which
/// nothing is added, decays by the exponents.
fn chunk_cumsum(golden: &Golden, inputs: &Tensors) -> Result<Tensors> {
    let tokens = chunk_size(golden);
    let (batch, seqlen, nheads) = inputs["dt"].dims3()?;
    let (rows, chunks) = (batch * seqlen / tokens, seqlen / tokens);
    let dt = in_chunks(&inputs["dt"], tokens)?;
    let (x, one, state) =
        (ones(&[rows, tokens, nheads, 1]), ones(&[rows, tokens, 1, 1]), ones(&[rows, nheads, 1, 1]));
    let (low, high) = golden.option("dt_limit").unwrap().split_once(',').unwrap();
    let case = Case {
        dt_softplus: golden.flag("dt_softplus"),
        dt_limit: (low.parse().unwrap(), high.parse().unwrap()),
        ..free()
    };
    let run = |x: &Tensor, a: &Tensor, state: &Tensor| -> Result<Tensor> {
        let mut inputs_of_scan =
            vec![("x", x), ("dt", &dt), ("a", a), ("b", &one), ("c", &one), ("initial_state", state)];
        inputs_of_scan.extend(inputs.get("dt_bias").map(|bias| ("dt_bias", bias)));
        scan(case.clone(), &inputs_of_scan)?["y"].squeeze(3)
    };
    let sums = run(&x, &zeros(&[nheads]), &state.zeros_like()?)?;
    let before = Tensor::cat(&[&zeros(&[rows, 1, nheads]), &sums.narrow(1, 0, tokens - 1)?], 1)?;
    let decays = run(&x.zeros_like()?, &inputs["a"], &state)?;
    let place = |y: Tensor| y.reshape((batch, chunks, tokens, nheads))?.permute((0, 3, 1, 2))?.contiguous();
    Ok([("dt".into(), place((sums - before)?)?), ("da_cumsum".into(), place(decays.log()?)?)].into())
}

/// `(batch, nheads, chunks, tokens)` as `(batch · chunks, tokens, nheads)`.
fn tokens_first(x: &Tensor) -> Result<Tensor> {
    let (batch, nheads, chunks, tokens) = x.dims4()?;
    x.permute((0, 2, 3, 1))?.reshape((batch * chunks, tokens, nheads))
}

/// The state that each chunk leaves. Decays are given by themselves: as steps, for which what goes in makes up.
fn chunk_state(_: &Golden, inputs: &Tensors) -> Result<Tensors> {
    let (batch, nheads, chunks, tokens) = inputs["dt"].dims4()?;
    let (dt, sums) = (tokens_first(&inputs["dt"])?, tokens_first(&inputs["da_cumsum"])?);
    let decay = (sums.narrow(1, 0, tokens - 1)? - sums.narrow(1, 1, tokens - 1)?)?;
    let steps = Tensor::cat(&[&ones(&[batch * chunks, 1, nheads]), &decay], 1)?; // the first finds no state
    let [x, b] = ["x", "b"].map(|name| in_chunks(&inputs[name], tokens).unwrap());
    let x = x.broadcast_mul(&(dt / &steps)?.unsqueeze(3)?)?;
    let outputs =
        scan(free(), &[("x", &x), ("dt", &steps), ("a", &ones(&[nheads]).neg()?), ("b", &b), ("c", &b)])?;
    let state = &outputs["final_state"];
    let dims = [&[batch, chunks], &state.dims()[1..]].concat();
    Ok([("states".into(), state.reshape(dims)?)].into())
}

/// States handed from chunk to chunk: a scan over chunks, whose channels are all that a state has.
fn state_passing(_: &Golden, inputs: &Tensors) -> Result<Tensors> {
    let (batch, chunks, nheads, headdim, d_state) = inputs["states"].dims5()?;
    let steps = inputs["da_chunk_last"].transpose(1, 2)?.contiguous()?.neg()?;
    let states = inputs["states"].reshape((batch, chunks, nheads, headdim * d_state))?;
    let x = states.broadcast_div(&steps.unsqueeze(3)?)?;
    let (one, a) = (ones(&[batch, chunks, 1, 1]), ones(&[nheads]).neg()?);
    let outputs = scan(free(), &[("x", &x), ("dt", &steps), ("a", &a), ("b", &one), ("c", &one)])?;
    let first = zeros(&[batch, 1, nheads, headdim * d_state]);
    let passed = Tensor::cat(&[&first, &outputs["y"].narrow(1, 0, chunks - 1)?], 1)?;
    let last = outputs["final_state"].reshape((batch, nheads, headdim, d_state))?;
    Ok([("states".into(), passed.reshape(inputs["states"].shape())?), ("final_states".into(), last)].into())
}

/// Products of all tokens of a chunk: without decay, from one unit vector a token; once from each side of the diagonal.
fn bmm(golden: &Golden, inputs: &Tensors) -> Result<Tensors> {
    let tokens = chunk_size(golden);
    let groups = inputs["a"].dims().get(3).map_or(1, |_| inputs["a"].dims()[2]);
    let (batch, seqlen, d_state) =
        (inputs["a"].dim(0)?, inputs["a"].dim(1)?, inputs["a"].dims()[inputs["a"].rank() - 1]);
    let rows = batch * seqlen / tokens;
    let [a, b] = ["a", "b"].map(|name| inputs[name].reshape((rows, tokens, groups, d_state)).unwrap());
    let unit = Tensor::eye(tokens, DType::F32, &Device::Cpu)?.reshape((1, tokens, 1, tokens))?;
    let x = unit.broadcast_as((rows, tokens, groups, tokens))?.contiguous()?;
    let packing = golden.tensors.get("in.seq_idx").map(|ids| {
        Packing::from_seq_idx(&ids.to_dtype(DType::I64).unwrap().reshape((rows, tokens)).unwrap()).unwrap()
    });
    let (dt, none) = (ones(&[rows, tokens, groups]), zeros(&[groups]));
    let products = |b: &Tensor, c: &Tensor| -> Result<Tensor> {
        let case = Case { packing: packing.clone(), ..free() };
        let outputs = scan(case, &[("x", &x), ("dt", &dt), ("a", &none), ("b", b), ("c", c)])?;
        outputs["y"].transpose(1, 2) // (rows, groups, tokens, tokens)
    };
    let below = Tensor::tril2(tokens, DType::F32, &Device::Cpu)?;
    let above = (1.0 - &below)?;
    let all = (products(&b, &a)?.broadcast_mul(&below)?
        + products(&a, &b)?.transpose(2, 3)?.broadcast_mul(&above)?)?;
    let out = match inputs["a"].rank() {
        3 => all.reshape((batch, seqlen / tokens, tokens, tokens))?,
        _ => all.reshape((batch, seqlen / tokens, groups, tokens, tokens))?,
    };
    Ok([("out".into(), out)].into())
}

/// A product with `silu` of the other half: the gate of a scan of which the skip connection alone is left.
fn swiglu(_: &Golden, inputs: &Tensors) -> Result<Tensors> {
    let (rows, width) = inputs["xy"].dims2()?;
    let half = |i: usize| inputs["xy"].narrow(1, i * width / 2, width / 2)?.reshape((1, rows, 1, width / 2));
    let (z, x, none) = (half(0)?, half(1)?, zeros(&[1, rows, 1, 1]));
    let case = Case { d: Some(1), z: true, ..free() };
    let (dt, one) = (ones(&[1, rows, 1]), ones(&[1]));
    let inputs = [("x", &x), ("z", &z), ("dt", &dt), ("a", &one), ("b", &none), ("c", &none), ("d", &one)];
    Ok([("y".into(), scan(case, &inputs)?["y"].reshape((rows, width / 2))?)].into())
}

#[test]
fn golden() {
    let stages: [(&str, Stage, usize); 5] = [
        ("ops/ssd_chunk_cumsum", chunk_cumsum, 2),
        ("ops/ssd_chunk_state", chunk_state, 1),
        ("ops/ssd_state_passing", state_passing, 1),
        ("ops/ssd_bmm", bmm, 3),
        ("ops/swiglu", swiglu, 1),
    ];
    for (folder, stage, count) in stages {
        let files = Golden::folder(folder);
        assert_eq!(files.len(), count, "{folder}");
        for file in files {
            let tensors = GoldenTensors::read(&file, str::to_owned);
            let floats = |(name, x): (&String, &Tensor)| {
                x.dtype().is_float().then(|| (name.clone(), x.to_dtype(DType::F32).unwrap()))
            };
            let inputs: Tensors = tensors.inputs.iter().filter_map(floats).collect();
            let cotangents = if tensors.gradients.is_empty() { &Tensors::new() } else { &tensors.cotangents };
            let (outputs, gradients) =
                laws::differentiate(&|x| stage(&file, x), &inputs, cotangents).unwrap();
            for (what, got, want, tolerances, ours) in [
                ("", &outputs, &tensors.outputs, &tensors.tolerances, 1e-5),
                ("d", &gradients, &tensors.gradients, &tensors.gradient_tolerances, 1e-4),
            ] {
                for (name, want) in want {
                    let (error, allowed) = (max_error(&got[name], want), ours + tolerances[name]);
                    assert!(error <= allowed, "{folder}/{}: {what}`{name}` is off by {error:.1e}", file.name);
                }
            }
        }
    }
}

crate::on_cuda!(golden);
