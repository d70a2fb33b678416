//! What the graph of a fused block keeps alive while training, and what loading a model and reading a prompt take, in bytes, counted
//! by the allocator of this program.
#![allow(clippy::unwrap_used)] // a test fails by panicking

#[path = "../support/mod.rs"]
mod support;

mod decoding;
mod loading;

use candle_core::{Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use mamba_generate::{Generator, PROMPT_PIECE};
use mamba_model::config::{LayerSpec, Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_model::{Model, Recompute};
use mamba_ops::{
    Attention, CausalConv1d, GatedRmsNorm, LinearCrossEntropy, Mamba1Inner, Mamba2SplitConv1dScan, Norm,
    SelectiveScan, SequenceLayout, SsdChunkScan, attention, causal_conv1d, checkpoint, linear_cross_entropy,
    mamba1_inner, mamba2_split_conv1d_scan, norm, selective_scan, ssd_chunk_scan,
};

use crate::support::alloc::{Counting, live, peak, reset_peak};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that are alive after `forward` beyond what was before, without the outputs' own; and the most that were alive
/// at once during backward beyond what was before forward.
fn graph(forward: impl Fn() -> Result<Vec<Tensor>>) -> (usize, usize) {
    let measure = || {
        let before = live();
        let outputs = forward().unwrap();
        let own: usize = outputs.iter().map(|y| y.elem_count() * y.dtype().size_in_bytes()).sum();
        let kept = live() - before - own;
        let loss = outputs[0].sum_all().unwrap();
        reset_peak();
        drop(loss.backward().unwrap());
        (kept, peak() - before)
    };
    // Tables, threads and the buffers of each are made once, the last when a thread first has work, which on a busy machine may be
    // late: the smallest of several measures is without them.
    let least = |a: (usize, usize), b: (usize, usize)| (a.0.min(b.0), a.1.min(b.1));
    (0..5).map(|_| measure()).reduce(least).unwrap()
}

fn var(shape: &[usize]) -> Var {
    Var::from_tensor(&Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap()).unwrap()
}

fn report(name: &str, activation: usize, fused: (usize, usize), unfused: (usize, usize)) {
    println!("{name}: the main input has {activation} bytes");
    println!("  fused:   graph keeps {}, peak of backward {}", fused.0, fused.1);
    println!("  unfused: graph keeps {}, peak of backward {}", unfused.0, unfused.1);
}

fn mamba2() {
    let (batch, seqlen, nheads, headdim, d_state, width) = (2, 512, 8, 16, 32, 4);
    let (d_ssm, conv_dim) = (nheads * headdim, nheads * headdim + 2 * d_state);
    let zxbcdt = var(&[batch, seqlen, d_ssm + conv_dim + nheads]);
    let (conv_weight, weight, d) = (var(&[conv_dim, width]), var(&[d_ssm]), var(&[nheads]));
    let a = var(&[nheads]).exp().unwrap().neg().unwrap();
    let fused = graph(|| {
        let norm = GatedRmsNorm { weight: &weight, eps: 1e-5, group_size: None, norm_before_gate: false };
        let output = mamba2_split_conv1d_scan(&Mamba2SplitConv1dScan {
            norm: Some(norm),
            d: Some(&d),
            ..Mamba2SplitConv1dScan::new(&zxbcdt, &conv_weight, &a, headdim)
        })?;
        Ok(vec![output.y, output.final_conv_state, output.final_ssm_state])
    });
    let unfused = graph(|| {
        let z = zxbcdt.narrow(2, 0, d_ssm)?;
        let conv = causal_conv1d(&CausalConv1d {
            layout: SequenceLayout::ChannelsLast,
            ..CausalConv1d::new(&zxbcdt.narrow(2, d_ssm, conv_dim)?, &conv_weight)
        })?;
        let group = |start: usize| conv.y.narrow(2, start, d_state)?.reshape((batch, seqlen, 1, d_state));
        let scan = ssd_chunk_scan(&SsdChunkScan {
            d: Some(&d),
            dt_softplus: true,
            ..SsdChunkScan::new(
                &conv.y.narrow(2, 0, d_ssm)?.reshape((batch, seqlen, nheads, headdim))?,
                &zxbcdt.narrow(2, d_ssm + conv_dim, nheads)?,
                &a,
                &group(d_ssm)?,
                &group(d_ssm + d_state)?,
            )
        })?;
        let y = scan.y.reshape((batch, seqlen, d_ssm))?;
        let y = norm(&Norm { z: Some(&z), ..Norm::rms(&y, &weight, 1e-5) })?.y;
        Ok(vec![y, conv.final_state, scan.final_state])
    });
    let activation = zxbcdt.elem_count() * 4;
    report("Mamba-2", activation, fused, unfused);
    // Nothing that grows with the sequence: tokens, the table of inputs, and `a` as it was before.
    assert!(fused.0 < 20_000, "the fused block keeps {} bytes", fused.0);
    assert!(unfused.0 > activation, "the measure is wrong: unfused keeps {} bytes", unfused.0);
    assert!(fused.1 < 12 * activation, "backward of the fused block takes {} bytes", fused.1);
}

fn mamba1() {
    let (batch, seqlen, dim, d_state, dt_rank, width) = (2, 512, 128, 16, 8, 4);
    let xz = var(&[batch, seqlen, 2 * dim]);
    let (conv_weight, d) = (var(&[dim, width]), var(&[dim]));
    let (x_proj, dt_proj) = (var(&[dt_rank + 2 * d_state, dim]), var(&[dim, dt_rank]));
    let a = var(&[dim, d_state]).exp().unwrap().neg().unwrap();
    let fused = graph(|| {
        let output = mamba1_inner(&Mamba1Inner {
            d: Some(&d),
            ..Mamba1Inner::new(&xz, &conv_weight, &x_proj, &dt_proj, &a)
        })?;
        Ok(vec![output.y, output.final_conv_state, output.final_ssm_state])
    });
    let unfused = graph(|| {
        let layout = SequenceLayout::ChannelsLast;
        let conv = causal_conv1d(&CausalConv1d {
            layout,
            ..CausalConv1d::new(&xz.narrow(2, 0, dim)?, &conv_weight)
        })?;
        let project = |x: &Tensor, weight: &Tensor| {
            let last = x.dim(2)?;
            x.reshape((batch * seqlen, last))?.matmul(&weight.t()?)?.reshape((batch, seqlen, ()))
        };
        let projected = project(&conv.y, &x_proj)?;
        let delta = project(&projected.narrow(2, 0, dt_rank)?, &dt_proj)?;
        let scan = selective_scan(&SelectiveScan {
            d: Some(&d),
            z: Some(&xz.narrow(2, dim, dim)?),
            delta_softplus: true,
            layout,
            ..SelectiveScan::new(
                &conv.y,
                &delta,
                &a,
                &projected.narrow(2, dt_rank, d_state)?,
                &projected.narrow(2, dt_rank + d_state, d_state)?,
            )
        })?;
        Ok(vec![scan.y, conv.final_state, scan.final_state])
    });
    let activation = xz.elem_count() * 4;
    report("Mamba", activation, fused, unfused);
    assert!(fused.0 < 20_000, "the fused block keeps {} bytes", fused.0);
    assert!(unfused.0 > activation, "the measure is wrong: unfused keeps {} bytes", unfused.0);
    assert!(fused.1 < 12 * activation, "backward of the fused block takes {} bytes", fused.1);
}

/// A checkpoint keeps its inputs and outputs; a variable among the inputs is not copied in backward.
fn generic_checkpoint() {
    let (x, weight) = (var(&[64, 1000]), var(&[1000, 1000]));
    let layer = |x: &[Tensor]| {
        let mut hidden = x[0].clone();
        for _ in 0..4 {
            hidden = hidden.matmul(&x[1])?.tanh()?;
        }
        Ok(vec![hidden.sum(1)?])
    };
    let fused = graph(|| checkpoint("layer", &[&x, &weight], layer));
    let unfused = graph(|| layer(&[x.as_tensor().clone(), weight.as_tensor().clone()]));
    report("4 layers", x.elem_count() * 4, fused, unfused);
    assert!(fused.0 < 20_000, "the checkpoint keeps {} bytes", fused.0);
    // The gradients of the weight, as they are formed and summed, are the same for both.
    assert!(fused.1 < unfused.1 + weight.elem_count() * 4 / 2, "backward takes {} bytes", fused.1);
}

/// The loss of a head: what its graph keeps are gradients of the factors, and the logits of all rows never exist at once.
fn head() {
    let (rows, dim, classes) = (2048, 32, 1000);
    let (x, weight) = (var(&[rows, dim]), var(&[classes, dim]));
    let targets = Tensor::zeros(rows, candle_core::DType::I64, &Device::Cpu).unwrap();
    let args =
        |chunk_rows| LinearCrossEntropy { chunk_rows, ..LinearCrossEntropy::new(&x, &weight, &targets) };
    let logits = rows * classes * 4;
    let fused = graph(|| Ok(vec![linear_cross_entropy(&args(Some(64)))?]));
    let unfused = graph(|| Ok(vec![linear_cross_entropy::reference::forward(&args(None))?]));
    report("head", rows * dim * 4, fused, unfused);
    println!("  logits of all rows: {logits}");
    let factors = (rows * dim + classes * dim) * 4;
    assert!(fused.0 < factors + 20_000, "the graph keeps {} bytes", fused.0);
    assert!(unfused.0 > 3 * logits, "the measure is wrong: unfused keeps {} bytes", unfused.0);
    assert!(fused.1 < 5 * factors, "backward takes {} bytes", fused.1);
    let before = live();
    reset_peak();
    drop(linear_cross_entropy(&args(Some(64))).unwrap());
    let peak = peak() - before;
    assert!(peak < logits / 4, "forward takes {peak} bytes, logits {logits}");
}

/// A model that recomputes its layers keeps a layer's input each, and gives the same loss.
fn layers() {
    let config = ModelConfig::uniform(50, 64, 8, MixerSpec::Mamba1(Mamba1Config::new(64)));
    let start = Model::random(&config, 1, &Device::Cpu).unwrap();
    let vars: std::collections::HashMap<String, Tensor> = start
        .parameters()
        .iter()
        .map(|(name, x)| (name.clone(), Var::from_tensor(x).unwrap().into_inner()))
        .collect();
    let ids = Tensor::zeros((2, 256), candle_core::DType::U32, &Device::Cpu).unwrap();
    let model = |recompute| {
        let weights = VarBuilder::from_tensors(vars.clone(), candle_core::DType::F32, &Device::Cpu);
        Model::new(&config, weights).unwrap().with_recompute(recompute)
    };
    let measure = |recompute| {
        let model = model(recompute);
        graph(|| Ok(vec![model.hidden_states(&ids, None)?]))
    };
    let (fused, unfused) = (measure(Recompute::Layers), measure(Recompute::Nothing));
    let stream = 2 * 256 * 64 * 4;
    report("8 layers", stream, fused, unfused);
    // Update and stream of each layer; a layer has some twenty such tensors inside.
    assert!(fused.0 < 8 * 3 * stream, "the model keeps {} bytes", fused.0);
    assert!(unfused.0 > 3 * fused.0 && unfused.1 > 2 * fused.1, "nothing was saved");
}

/// One test alone, so that nothing else allocates meanwhile.
/// Attention holds no matrix of scores, nor any part of it that grows with the length of both queries and keys.
fn attention_over_many_tokens() {
    let (seqlen, nheads, headdim) = (4500, 2, 8);
    let draw = || Tensor::randn(0f32, 1.0, (1, seqlen, nheads, headdim), &Device::Cpu).unwrap();
    let (q, keys, values) = (draw(), [draw()], [draw()]);
    let args = Attention::new(&q, &keys, &values);
    let peaks = (0..3).map(|_| {
        let before = live();
        reset_peak();
        drop(attention(&args).unwrap());
        peak() - before
    });
    let (peak, input) = (peaks.min().unwrap(), q.elem_count() * 4);
    println!("attention over {seqlen} tokens: peak {peak}, an input has {input} bytes");
    assert!(peak >= input, "the measure is wrong: the output alone has {input} bytes, the peak is {peak}");
    assert!(peak < 4 * input, "attention takes {peak} bytes, an input has {input}");
}

/// Reading a prompt takes the memory of a piece of it, however long it is.
fn long_prompts() {
    let mamba2 = Mamba2Config { d_state: 8, headdim: 8, ..Mamba2Config::new(16) };
    let mixers = [MixerSpec::Mamba1(Mamba1Config::new(16)), MixerSpec::Mamba2(mamba2)];
    let config = ModelConfig::of_layers(50, 16, mixers.map(|mixer| LayerSpec::new([mixer])));
    let model = Model::random(&config, 0, &Device::Cpu).unwrap();
    let peak_of = |seqlen: usize, piece: usize| {
        let ids: Vec<u32> = (0..seqlen as u32).map(|i| i * 7 % 50).collect();
        let peaks = (0..3).map(|_| {
            let mut generator = Generator::builder(&model).prompt(&ids).prompt_piece(piece).build().unwrap();
            let before = live();
            reset_peak();
            generator.prefill().unwrap();
            assert_eq!(generator.cache().position(), seqlen);
            peak() - before
        });
        peaks.min().unwrap()
    };
    let (short, long) = (peak_of(4 << 10, PROMPT_PIECE), peak_of(16 << 10, PROMPT_PIECE));
    let at_once = peak_of(16 << 10, 16 << 10);
    println!("a prompt of 4096 tokens: peak {short}, of 16384: {long}, read at once: {at_once}");
    assert!(long < short + short / 10, "16384 tokens take {long} bytes, 4096 take {short}");
    assert!(at_once > 4 * long, "the measure is wrong: at once they take {at_once} bytes");
}

#[test]
fn memory() {
    decoding::a_token_of_a_decoder();
    decoding::tokens_of_models();
    attention_over_many_tokens();
    long_prompts();
    mamba2();
    mamba1();
    generic_checkpoint();
    head();
    layers();
    loading::writing();
    loading::one_tensor_at_a_time();
}
