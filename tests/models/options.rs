//! Options that no checkpoint of a published implementation has, against what they mean.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use mamba_model::Model;
use mamba_model::config::{
    AttentionConfig, LayerSpec, Mamba2Config, MixerSpec, MlpConfig, ModelConfig, Rope, RopeScaling,
};

use crate::in_pieces;
use crate::support::random::Random;
use crate::support::tolerance::max_error;

/// Two layers of a mixer and an MLP.
fn model(mixer: MixerSpec) -> Model {
    let layer = LayerSpec::new([mixer, MixerSpec::Mlp(MlpConfig::new(12))]);
    Model::random(&ModelConfig::of_layers(31, 16, vec![layer; 2]), 3, &Device::Cpu).unwrap()
}

fn ids(seqlen: usize) -> Tensor {
    Tensor::from_vec(Random::new(2).ids(2 * seqlen, 31), (2, seqlen), &Device::Cpu).unwrap()
}

fn rebuilt(model: &Model, change: impl Fn(&str, &Tensor) -> Tensor) -> Model {
    let tensors = model.parameters().iter().map(|(name, x)| (name.clone(), change(name, x))).collect();
    Model::new(model.config(), VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap()
}

/// A window of more than the text changes nothing; a shorter one does, in every split alike, and bounds the cache.
#[test]
fn sliding_window() {
    let with = |window| {
        let attention =
            AttentionConfig { window, rope: Some(Rope::new(8, 1e4)), ..AttentionConfig::new(4, 2, 8) };
        model(MixerSpec::Attention(attention))
    };
    let (all, wide, narrow) = (with(None), with(Some(600)), with(Some(20)));
    let input = ids(600);
    let want = all.forward(&input, None).unwrap();
    assert!(max_error(&wide.forward(&input, None).unwrap(), &want) < 1e-6);
    let got = narrow.forward(&input, None).unwrap();
    assert!(max_error(&got, &want) > 1e-3);
    assert!(max_error(&got.narrow(1, 0, 20).unwrap(), &want.narrow(1, 0, 20).unwrap()) < 1e-6);
    for lengths in [vec![300, 1, 299], vec![1; 600], vec![599, 1]] {
        assert!(max_error(&in_pieces(&narrow, &input, &lengths), &got) < 1e-5);
    }
    let mut cache = narrow.new_cache(1).unwrap();
    let token = Tensor::new(&[[1u32]], &Device::Cpu).unwrap();
    for _ in 0..1500 {
        narrow.prefill(&token, &mut cache).unwrap();
    }
    // Two layers, at most two blocks of 256 tokens of 2 heads of 8 channels, keys and values.
    assert!(cache.bytes() <= 2 * 2 * 256 * 2 * 8 * 2 * 4, "{}", cache.bytes());
}

/// Pairs of neighbours turn as pairs of halves do when channels stand in another order.
#[test]
fn interleaved_rope() {
    let with = |interleaved| {
        let rope = Rope { interleaved, ..Rope::new(6, 100.0) };
        model(MixerSpec::Attention(AttentionConfig { rope: Some(rope), ..AttentionConfig::new(2, 1, 8) }))
    };
    let (halves, neighbours) = (with(false), with(true));
    // Channel 2 i of a head comes from channel i, channel 2 i + 1 from i + 3; the last two do not turn.
    let order = [0u32, 3, 1, 4, 2, 5, 6, 7];
    let permuted = rebuilt(&neighbours, |name, x| {
        if !(name.contains("q_proj") || name.contains("k_proj")) {
            return x.clone();
        }
        let heads = x.dim(0).unwrap() as u32 / 8;
        let rows: Vec<u32> = (0..heads).flat_map(|h| order.map(|c| h * 8 + c)).collect();
        let count = rows.len();
        x.index_select(&Tensor::from_vec(rows, count, &Device::Cpu).unwrap(), 0).unwrap()
    });
    let input = ids(15);
    let want = halves.forward(&input, None).unwrap();
    assert!(max_error(&permuted.forward(&input, None).unwrap(), &want) < 1e-6);
    assert!(max_error(&neighbours.forward(&input, None).unwrap(), &want) > 1e-4);
}

/// A factor of 1 stretches nothing.
#[test]
fn rope_scaling_of_one() {
    let with = |scaling| {
        let rope = Rope { scaling, ..Rope::new(8, 100.0) };
        model(MixerSpec::Attention(AttentionConfig { rope: Some(rope), ..AttentionConfig::new(2, 2, 8) }))
    };
    let input = ids(30);
    let want = with(RopeScaling::None).forward(&input, None).unwrap();
    let original_context = 16.0;
    let llama = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context,
    };
    let yarn = |factor| RopeScaling::Yarn {
        factor,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context,
        attention_factor: 1.0,
        truncate: true,
    };
    for (one, four) in [
        (RopeScaling::Linear { factor: 1.0 }, RopeScaling::Linear { factor: 4.0 }),
        (llama(1.0), llama(4.0)),
        (yarn(1.0), yarn(4.0)),
    ] {
        assert!(max_error(&with(one).forward(&input, None).unwrap(), &want) < 1e-6, "{one:?}");
        assert!(max_error(&with(four).forward(&input, None).unwrap(), &want) > 1e-5, "{four:?}");
    }
}

/// A learned state before the first token: zeros are nothing, others are what every sequence begins with, however it is read. The
/// numbers of mamba_ssm are in `ss_mamba2_init_states`.
#[test]
fn learnable_init_states() {
    let with = |learnable_init_states| {
        let mamba = Mamba2Config { d_state: 4, headdim: 8, learnable_init_states, ..Mamba2Config::new(16) };
        model(MixerSpec::Mamba2(mamba))
    };
    let (without, zeros) = (with(false), with(true));
    let input = ids(14);
    let want = without.forward(&input, None).unwrap();
    assert_eq!(max_error(&zeros.forward(&input, None).unwrap(), &want), 0.0);
    let learned = rebuilt(&zeros, |name, x| match name.ends_with("init_states") {
        true => Random::new(4).normal(x.dims()).to_dtype(DType::F32).unwrap(),
        false => x.clone(),
    });
    let got = learned.forward(&input, None).unwrap();
    assert!(max_error(&got, &want) > 1e-3);
    for lengths in [vec![14], vec![1; 14], vec![0, 3, 11]] {
        assert!(max_error(&in_pieces(&learned, &input, &lengths), &got) < 1e-5, "{lengths:?}");
    }
    let mut cache = learned.new_cache(2).unwrap();
    learned.forward(&input, Some(&mut cache)).unwrap();
    cache.reset().unwrap();
    assert!(max_error(&learned.forward(&input, Some(&mut cache)).unwrap(), &got) < 1e-6);
}

/// A builder that has whatever it is asked for makes a model too, without adapters.
#[test]
fn a_builder_of_zeros() {
    for name in ["mamba_tied", "ss_mamba2_attention", "jamba", "zamba2"] {
        let config = crate::open(name, DType::F32).config().clone();
        let model = Model::new(&config, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
        assert!(!model.has_adapters(), "{name}");
        let logits = model.forward(&ids(5), None).unwrap();
        assert_eq!(max_error(&logits, &logits.zeros_like().unwrap()), 0.0, "{name}");
    }
}
