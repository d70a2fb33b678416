//! What reading single tokens takes.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor};
use candle_nn::VarBuilder;
use mamba_generate::CausalLm;
use mamba_model::Model;
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_ops::NormKind;
use mamba_ops::decoder::{Conv, Decoder, Mamba1, Mixer, Norm, Product, Stack, State};

use crate::support::alloc::{asked, live, peak, reset_peak};

const TOKENS: usize = 100;

/// Does nothing: what candle itself asks for when a tensor is changed in place.
struct Visit;

impl InplaceOp1 for Visit {
    fn name(&self) -> &'static str {
        "visit"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        Ok(())
    }
}

/// A decoder asks for the memory of its logits, and for nothing else but what candle asks for where it visits a state.
pub fn a_token_of_a_decoder() {
    let (d_model, d_inner, d_state, rank, vocabulary, batch) = (64, 128, 16, 4, 500, 3);
    let draw = |shape: &[usize]| Tensor::randn(0f32, 0.1, shape, &Device::Cpu).unwrap();
    let norm = || Norm { kind: NormKind::Rms, weight: draw(&[d_model]), bias: None, eps: 1e-5 };
    let mamba = || Mamba1 {
        in_proj: Product::new(draw(&[2 * d_inner, d_model])),
        conv: Conv { weight: draw(&[d_inner, 4]), bias: Some(draw(&[d_inner])), silu: true },
        x_proj: Product::new(draw(&[rank + 2 * d_state, d_inner])),
        dt_bc_norms: None,
        dt_proj: draw(&[d_inner, rank]),
        dt_bias: draw(&[d_inner]),
        a: draw(&[d_inner, d_state]).abs().unwrap().neg().unwrap(),
        d: draw(&[d_inner]),
        out_proj: Product::new(draw(&[d_model, d_inner])),
    };
    let layer = || mamba_ops::decoder::Layer {
        shared: None,
        norm: norm(),
        mixers: vec![(1.0, Mixer::Mamba1(mamba()))],
    };
    let embedding = draw(&[vocabulary, d_model]);
    let stack = Stack {
        head: Product::new(embedding.clone()),
        embedding,
        embedding_scale: 1.0,
        layers: (0..4).map(|_| layer()).collect(),
        norm_f: norm(),
    };
    let mut decoder = Decoder::new(stack, batch).unwrap().unwrap();
    let zeros = |shape: [usize; 3]| Tensor::zeros(&shape, DType::F32, &Device::Cpu).unwrap();
    let tensors: Vec<_> =
        (0..4).map(|_| (zeros([batch, d_inner, 3]), zeros([batch, d_inner, d_state]))).collect();
    let states: Vec<State> =
        tensors.iter().map(|(conv, ssm)| State { conv: Some(conv), ssm: Some(ssm), kv: vec![] }).collect();
    let ids = Tensor::new(&[3u32, 1, 4], &Device::Cpu).unwrap();
    let mut token = || decoder.step(&ids, &[0; 3], &states).unwrap();
    drop(token());
    let logits = vec![0f32; batch * vocabulary];
    let (calls, bytes) = asked(|| {
        drop(Tensor::from_slice(&logits, (batch, vocabulary), &Device::Cpu));
        tensors
            .iter()
            .for_each(|(conv, ssm)| [conv, ssm].iter().for_each(|x| x.inplace_op1(&Visit).unwrap()));
    });
    let (all_calls, all_bytes) = asked(|| (0..TOKENS).for_each(|_| drop(token())));
    println!(
        "{TOKENS} tokens: asked {all_calls} times for {all_bytes} bytes; one should {calls} times, {bytes}"
    );
    assert!(calls > 0 && bytes >= logits.len() * 4, "the measure is wrong");
    // Queues of the threads come in pieces, one for many tokens.
    assert!(all_calls <= TOKENS * calls + TOKENS / 10, "asked {all_calls} times, expected {calls} a token");
    assert!(all_bytes <= TOKENS * bytes + (1 << 14), "asked for {all_bytes} bytes, expected {bytes} a token");
}

/// Through a model: little besides, and the memory in use is the same after 32 and 2048 tokens.
pub fn tokens_of_models() {
    let mixers = [
        ("mamba1", MixerSpec::Mamba1(Mamba1Config::new(256))),
        ("mamba2", MixerSpec::Mamba2(Mamba2Config { headdim: 32, ..Mamba2Config::new(256) })),
    ];
    for (name, mixer) in mixers {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let config = ModelConfig::uniform(1000, 256, 3, mixer.clone());
            let start = Model::random(&config, 0, &Device::Cpu).unwrap();
            let weights = start.parameters().iter().cloned().collect();
            let model = Model::new(&config, VarBuilder::from_tensors(weights, dtype, &Device::Cpu)).unwrap();
            let (mut cache, mut logits) = (CausalLm::new_cache(&model).unwrap(), vec![]);
            let mut read = |tokens: usize| {
                for id in 0..tokens as u32 {
                    CausalLm::step(&model, id % 1000, &mut cache, &mut logits).unwrap();
                }
            };
            read(3);
            let (calls, bytes) = asked(|| read(TOKENS));
            let (calls, bytes) = (calls / TOKENS, bytes / TOKENS);
            println!("{name}, {}: a token asks {calls} times for {bytes} bytes", dtype.as_str());
            assert!(bytes <= 1000 * dtype.size_in_bytes() + 4096, "a token asks for {bytes} bytes");
            let mut after = |tokens: usize| {
                let before = live();
                reset_peak();
                read(tokens);
                (peak() - before, live().abs_diff(before))
            };
            let (few, many) = (after(32), after(2048));
            println!("  peak and rest of 32 tokens {few:?}, of 2048 {many:?}");
            assert!(many.0 <= few.0 + 4096 && many.1 <= 4096, "memory grows with the tokens");
        }
    }
}
