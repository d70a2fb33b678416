//! Single tokens through the decoder, on the CPU and on a GPU, against whole forward passes in CPU memory.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use mamba_model::config::{
    AttentionConfig, BranchSpec, DtBcNorm, GatedNorm, LayerSpec, Mamba1Config, Mamba2Config, MixerSpec,
    MlpActivation, MlpConfig, MlpLayout, ModelConfig, Rope,
};
use mamba_model::{Batch, InferenceCache, Model};
use mamba_ops::NormKind;
use mamba_ops::decoder::{MAX_BATCH, MAX_BATCH_F32};
use mamba_ops::simd::Isa;

use crate::parity::tiny_checkpoints;
use crate::support::golden::path;
use crate::support::random::Random;
use crate::support::tolerance::relative_rms;

const VOCAB: usize = 60;

/// What blocks of Mamba know, by name.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let mamba1 = |mixer: Mamba1Config| ModelConfig::uniform(VOCAB, 48, 3, MixerSpec::Mamba1(mixer));
    let mamba2 = |mixer: Mamba2Config| ModelConfig::uniform(VOCAB, 48, 3, MixerSpec::Mamba2(mixer));
    let (one, two) = (
        Mamba1Config::new(48),
        Mamba2Config { d_state: 32, headdim: 8, chunk_size: 16, ..Mamba2Config::new(48) },
    );
    let norm = |weights: bool| Some(DtBcNorm { eps: 1e-6, weights });
    let gated = |before_gate: bool| Some(GatedNorm { eps: 1e-5, before_gate });
    let layer_norm = ModelConfig { norm: NormKind::Layer, ..mamba1(one.clone()) };
    vec![
        ("mamba1", mamba1(one.clone())),
        ("layer norm, stream not in f32", ModelConfig { residual_in_f32: false, ..layer_norm }),
        ("norms without weights", mamba1(Mamba1Config { dt_bc_norm: norm(false), ..one.clone() })),
        ("norms with weights", mamba1(Mamba1Config { dt_bc_norm: norm(true), d_state: 24, ..one.clone() })),
        ("biases, narrow filter", mamba1(Mamba1Config { proj_bias: true, d_conv: 2, ..one.clone() })),
        ("no bias, large rank", mamba1(Mamba1Config { conv_bias: false, dt_rank: 176, d_conv: 3, ..one })),
        ("mamba2", mamba2(two.clone())),
        ("groups", mamba2(Mamba2Config { ngroups: 3, norm: gated(true), d_state: 160, ..two.clone() })),
        ("groups, norm of the gated", mamba2(Mamba2Config { ngroups: 2, headdim: 24, ..two.clone() })),
        ("no norm", mamba2(Mamba2Config { norm: None, d_has_headdim: true, ..two.clone() })),
        (
            "biases, bounds",
            mamba2(Mamba2Config { in_bias: true, out_bias: true, dt_limit: (0.01, 0.05), d_conv: 3, ..two }),
        ),
    ]
}

/// Attention and MLPs beside what families have of them.
fn attentions() -> Vec<(&'static str, ModelConfig)> {
    let mamba = Mamba2Config { d_state: 32, headdim: 8, chunk_size: 16, ..Mamba2Config::new(48) };
    let of = |attention: AttentionConfig, mlp: MlpConfig| {
        let first =
            vec![(0.7, MixerSpec::Mamba2(mamba.clone())), (1.3, MixerSpec::Attention(attention.clone()))];
        let branch = |mixers| BranchSpec { mixers };
        let second = branch(vec![(0.5, MixerSpec::Mlp(mlp))]);
        let side = LayerSpec { shared: None, branches: vec![branch(first), second] };
        ModelConfig::of_layers(VOCAB, 48, [side, LayerSpec::new([MixerSpec::Attention(attention)])])
    };
    let mlp = MlpConfig::new(72);
    let wide = AttentionConfig { qkv_bias: true, ..AttentionConfig::new(2, 2, 160) };
    let rope = |dim, interleaved| Some(Rope { interleaved, ..Rope::new(dim, 100.0) });
    vec![
        ("window", of(AttentionConfig { window: Some(7), ..AttentionConfig::new(6, 3, 16) }, mlp.clone())),
        (
            "wide heads, scaled keys, up before gate",
            of(
                AttentionConfig { key_scale: 0.3, input_scale: 1.7, rope: rope(64, false), ..wide },
                MlpConfig { layout: MlpLayout::UpGate, activation: MlpActivation::Gelu, ..mlp.clone() },
            ),
        ),
        (
            "many queries a key, norms, an MLP without a gate",
            of(
                AttentionConfig {
                    qk_norm_eps: Some(1e-6),
                    rope: rope(8, true),
                    ..AttentionConfig::new(12, 1, 32)
                },
                MlpConfig {
                    layout: MlpLayout::Plain,
                    activation: MlpActivation::GeluTanh,
                    bias: true,
                    ..mlp
                },
            ),
        ),
    ]
}

/// The checkpoints that are read operation by operation: experts, Mamba-1 with heads, a bypass beside Mamba-2, learned first states.
const BY_OPERATIONS: [&str; 7] = [
    "granitemoehybrid",
    "jamba",
    "nemotron_h_latent_moe",
    "nemotron_h_moe",
    "ss_mamba2_init_states",
    "ss_mamba2_partial_ssm",
    "zamba",
];

/// How many others there are.
const DECODED: usize = 34;

/// Every family that there is a checkpoint of, in larger sizes, of which the kernels read 16 bytes at once.
fn families() -> Vec<(String, ModelConfig)> {
    let attention = |c: &mut AttentionConfig| {
        c.headdim *= 4;
        if let Some(rope) = &mut c.rope {
            rope.dim *= 4;
        }
    };
    let mlp = |c: &mut MlpConfig| c.d_hidden = (2 * c.d_hidden).next_multiple_of(8);
    let larger = |mut config: ModelConfig| {
        config.d_model = 48;
        for block in &mut config.shared_blocks {
            attention(&mut block.attention);
            mlp(&mut block.mlp);
            let ranks = [&mut block.attention_adapter_rank, &mut block.mlp_adapter_rank];
            ranks.into_iter().flatten().for_each(|rank| *rank = 8);
        }
        let branches = config.layers.iter_mut().flat_map(|layer| &mut layer.branches);
        for (_, mixer) in branches.flat_map(|branch| &mut branch.mixers) {
            match mixer {
                MixerSpec::Mamba1(c) => (c.d_inner, c.d_state) = (96, 8),
                MixerSpec::Mamba2(c) => (c.d_inner, c.d_ssm, c.d_state) = (4 * c.d_inner, 4 * c.d_ssm, 8),
                MixerSpec::Attention(c) => attention(c),
                MixerSpec::Mlp(c) => mlp(c),
                _ => {}
            }
        }
        config
    };
    let config =
        |name: &String| ModelConfig::from_file(path("models").join(name).join("config.json")).unwrap();
    tiny_checkpoints().into_iter().map(|name| (name.clone(), larger(config(&name)))).collect()
}

/// A model whose norms and biases are not what they begin with.
fn random(config: &ModelConfig, seed: u64) -> Result<HashMap<String, Tensor>> {
    let mut random = Random::new(seed);
    let model = Model::random(config, seed, &Device::Cpu).unwrap();
    let noisy = |(name, x): &(String, Tensor)| {
        let noise = (random.normal(x.dims()).to_dtype(DType::F32)?
            * if name.ends_with("A_log") { 0.0 } else { 0.1 })?;
        Ok((name.clone(), (x + noise)?))
    };
    model.parameters().iter().map(noisy).collect()
}

/// A batch that is read in turns: a prompt, steps, a fork, a second prompt, steps.
struct Reader<'a> {
    model: &'a Model,
    ids: Tensor,
    cache: InferenceCache,
    logits: Vec<Tensor>,
}

impl Reader<'_> {
    fn read(&mut self, len: usize) -> Result<()> {
        let piece = self.ids.narrow(1, self.cache.position(), len)?;
        let logits = self.model.forward(&piece, Some(&mut self.cache)).unwrap();
        self.logits.push(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?);
        Ok(())
    }

    fn step(&mut self, steps: usize, plain: bool) -> Result<()> {
        for _ in 0..steps {
            let id = self.ids.narrow(1, self.cache.position(), 1)?;
            let logits = match plain {
                true => self.model.prefill(&id, &mut self.cache).unwrap(),
                false => self.model.step(&id.squeeze(1)?, &mut self.cache).unwrap(),
            };
            self.logits.push(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.unsqueeze(1)?);
        }
        Ok(())
    }
}

/// Whether single tokens went through a decoder and, on a GPU, have become a graph.
fn is_decoded(cache: &InferenceCache, device: &Device) -> bool {
    let expected = if device.is_cpu() { "Decoder(Cpu(" } else { "captured: true" };
    format!("{cache:?}").contains(expected)
}

/// Whether they should, where there is a decoder.
fn decodes(device: &Device) -> bool {
    device.is_cpu() || std::env::var("MAMBA_CUDA_GRAPHS").map_or(true, |value| value != "0")
}

/// All logits of `ids`, with the decoder, if there is one, or without.
fn read(model: &Model, ids: &Tensor, plain: bool, has_decoder: bool) -> Result<Tensor> {
    let batch = ids.dim(0)?;
    let ids = ids.to_device(model.device())?;
    let mut reader = Reader { model, ids, cache: model.new_cache(batch).unwrap(), logits: vec![] };
    reader.read(5)?;
    reader.step(4, plain)?;
    let on_gpu = model.device().is_cuda();
    let most = if on_gpu && model.dtype() == DType::F32 { MAX_BATCH_F32 } else { MAX_BATCH };
    let expected = !plain && has_decoder && batch <= most && decodes(model.device());
    assert_eq!(is_decoded(&reader.cache, model.device()), expected, "a decoder");
    // A fork goes its own way without touching this one.
    let mut fork = reader.cache.fork().unwrap();
    let other = reader.ids.narrow(1, 0, 1)?.squeeze(1)?;
    for _ in 0..3 {
        model.step(&other, &mut fork).unwrap();
    }
    reader.step(2, plain)?;
    reader.read(3)?;
    // What was saved goes on as what was not.
    let bytes = reader.cache.to_bytes().unwrap();
    reader.cache = InferenceCache::from_bytes(&bytes, model.config(), model.device()).unwrap();
    reader.step(4, plain)?;
    Tensor::cat(&reader.logits, 1)
}

mod cpu {
    use candle_core::Device;

    #[test]
    fn equals_whole_passes() {
        assert!(super::equals_whole_passes(&Device::Cpu).unwrap() > 0);
    }

    #[test]
    fn families() {
        assert!(super::every_family(&Device::Cpu).unwrap() > 0);
    }

    #[test]
    fn grows() {
        assert!(super::grows(&Device::Cpu).unwrap() > 0);
    }

    #[test]
    fn rows_of_unequal_lengths() {
        assert!(super::rows_of_unequal_lengths(&Device::Cpu).unwrap() > 0);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use crate::support::target::with_gpu;

    #[test]
    fn equals_whole_passes() {
        with_gpu(super::equals_whole_passes);
    }

    #[test]
    fn families() {
        with_gpu(super::every_family);
    }

    #[test]
    fn grows() {
        with_gpu(super::grows);
    }

    #[test]
    fn rows_of_unequal_lengths() {
        with_gpu(super::rows_of_unequal_lengths);
    }

    #[test]
    fn unknown_ids() {
        with_gpu(super::unknown_ids);
    }
}

/// Weights as a dtype keeps them, in f32; those of recurrences are never rounded.
fn rounded(weights: &HashMap<String, Tensor>, dtype: DType) -> Result<HashMap<String, Tensor>> {
    let rounded = weights.iter().map(|(name, x)| {
        let kept = ["A_log", ".D", "dt_bias", "init_states"].iter().any(|end| name.ends_with(end));
        Ok((name.clone(), if kept { x.clone() } else { x.to_dtype(dtype)?.to_dtype(DType::F32)? }))
    });
    rounded.collect()
}

fn model(config: &ModelConfig, weights: &HashMap<String, Tensor>, dtype: DType, device: &Device) -> Model {
    Model::new(config, VarBuilder::from_tensors(weights.clone(), dtype, device)).unwrap()
}

/// f32 as the CPU; f16 and bf16 at least as close to it as the operations, which round more often.
fn check(
    name: &str,
    config: &ModelConfig,
    seed: u64,
    cases: &[(DType, usize)],
    has_decoder: bool,
    device: &Device,
) -> Result<()> {
    let weights = random(config, seed)?;
    for &(dtype, batch) in cases {
        let rounded = rounded(&weights, dtype)?;
        let (exact, on_gpu) =
            (model(config, &rounded, DType::F32, &Device::Cpu), model(config, &rounded, dtype, device));
        let ids = Random::new(7).ids(batch * 18, config.vocab_size as u32);
        let ids = Tensor::from_vec(ids, (batch, 18), &Device::Cpu)?;
        let want = exact.forward(&ids, None).unwrap();
        let error = relative_rms(&read(&on_gpu, &ids, false, has_decoder)?, &want);
        let bound = match dtype {
            DType::F32 => 1e-5,
            _ => relative_rms(&read(&on_gpu, &ids, true, has_decoder)?, &want),
        };
        println!("{name}, {}, batch {batch}: off by {error:.1e}, bound {bound:.1e}", dtype.as_str());
        assert!(error <= bound, "{name}, {}, batch {batch}: off by {error:.1e}", dtype.as_str());
    }
    Ok(())
}

fn equals_whole_passes(device: &Device) -> Result<usize> {
    let cases = [
        (DType::F32, 1),
        (DType::F32, 3),
        (DType::F16, 1),
        (DType::F16, 8),
        (DType::BF16, 2),
        (DType::BF16, 4),
        (DType::F16, MAX_BATCH),
        (DType::BF16, 13),
        (DType::BF16, 33),
        (DType::F32, MAX_BATCH_F32 + 1),
        (DType::F16, MAX_BATCH + 1),
    ];
    let configs = configs().into_iter().chain(attentions()).collect::<Vec<_>>();
    for (i, (name, config)) in configs.iter().enumerate() {
        check(name, config, i as u64, &cases, true, device)?;
    }
    assert_eq!(configs.len(), 14);
    Ok(configs.len() * cases.len())
}

/// Also those that have no decoder give what a whole pass gives.
fn every_family(device: &Device) -> Result<usize> {
    let cases = [
        (DType::F32, 1),
        (DType::F32, 3),
        (DType::F16, 1),
        (DType::BF16, 2),
        (DType::F16, 5),
        (DType::BF16, 13),
        (DType::F16, 33),
    ];
    let families = families();
    let (mut decoded, mut by_operations) = (0, 0);
    for (i, (name, config)) in families.iter().enumerate() {
        let has_decoder = !BY_OPERATIONS.contains(&name.as_str());
        let cases = if has_decoder { &cases[..] } else { &cases[..1] };
        check(name, config, i as u64, cases, has_decoder, device)?;
        if has_decoder { decoded += 1 } else { by_operations += 1 }
    }
    assert_eq!((decoded, by_operations), (DECODED, BY_OPERATIONS.len()));
    Ok(cases.len() * decoded + by_operations)
}

/// Over the ends of blocks of keys and values, and over the room that a graph was made for; with a window, blocks are given up.
fn grows(device: &Device) -> Result<usize> {
    let cases = [(None, 250, 12), (None, 4090, 12), (Some(100), 500, 280), (Some(300), 780, 30)];
    for (window, prompt, steps) in cases {
        let rope = Some(Rope::new(16, 1e4));
        let attention = AttentionConfig { window, rope, ..AttentionConfig::new(4, 2, 16) };
        let config = ModelConfig::uniform(VOCAB, 48, 2, MixerSpec::Attention(attention));
        let weights = random(&config, 3)?;
        let (exact, on_gpu) = (
            model(&config, &weights, DType::F32, &Device::Cpu),
            model(&config, &weights, DType::F32, device),
        );
        let len = prompt + steps;
        let ids = Tensor::from_vec(Random::new(5).ids(2 * len, VOCAB as u32), (2, len), &Device::Cpu)?;
        let want = exact.forward(&ids, None).unwrap().narrow(1, prompt, steps)?;
        let ids = ids.to_device(device)?;
        let cache = on_gpu.new_cache(2).unwrap();
        let mut reader = Reader { model: &on_gpu, ids, cache, logits: vec![] };
        reader.read(prompt)?;
        reader.logits.clear();
        reader.step(steps, false)?;
        assert_eq!(is_decoded(&reader.cache, device), decodes(device));
        let error = relative_rms(&Tensor::cat(&reader.logits, 1)?, &want);
        println!("window {window:?}, {prompt} tokens and {steps} steps: off by {error:.1e}");
        assert!(error <= 1e-5, "window {window:?}, {prompt} tokens and {steps} steps: off by {error:.1e}");
    }
    Ok(cases.len())
}

/// Rows that have read different numbers of tokens, and forks of them that both go on, each as if it were alone.
fn rows_of_unequal_lengths(device: &Device) -> Result<usize> {
    let configs: Vec<_> = attentions().into_iter().chain(configs()).collect();
    for (name, config) in &configs {
        let weights = random(config, 11)?;
        let (exact, on_gpu) =
            (model(config, &weights, DType::F32, &Device::Cpu), model(config, &weights, DType::F32, device));
        let (lengths, width, steps) = ([9, 2, 5], 9, 5);
        let rows: Vec<Vec<u32>> =
            (0..3).map(|row| Random::new(row).ids(lengths[row as usize] + steps, VOCAB as u32)).collect();
        let padded: Vec<u32> = rows
            .iter()
            .zip(lengths)
            .flat_map(|(row, len)| std::iter::repeat_n(0, width - len).chain(row[..len].iter().copied()))
            .collect();
        let prompt = Tensor::from_vec(padded, (3, width), device)?;
        let mut cache = on_gpu.new_cache(3).unwrap();
        on_gpu.prefill(Batch::left_padded(&prompt, &lengths).unwrap(), &mut cache).unwrap();
        let mut forks = vec![];
        for step in 0..steps {
            let ids: Vec<u32> = rows.iter().zip(lengths).map(|(row, len)| row[len + step]).collect();
            let ids = Tensor::new(ids, device)?;
            if step == 3 {
                forks.push(cache.fork().unwrap());
            }
            for cache in std::iter::once(&mut cache).chain(&mut forks) {
                let logits = on_gpu.step(&ids, cache).unwrap().to_device(&Device::Cpu)?;
                for (i, (row, len)) in rows.iter().zip(lengths).enumerate() {
                    let alone = Tensor::new(&row[..=len + step], &Device::Cpu)?.unsqueeze(0)?;
                    let want = exact.forward(&alone, None).unwrap().narrow(1, len + step, 1)?.squeeze(1)?;
                    let error = relative_rms(&logits.narrow(0, i, 1)?, &want);
                    assert!(error <= 2e-5, "{name}, row {i}, step {step}: off by {error:.1e}");
                }
            }
        }
        assert!(!forks.is_empty());
    }
    Ok(configs.len())
}

/// An id past the vocabulary gives no answer that looks like one, and spoils its own row alone.
#[cfg(feature = "cuda")]
fn unknown_ids(device: &Device) -> Result<usize> {
    let configs: Vec<_> = configs().into_iter().chain(attentions()).collect();
    for (_, config) in &configs {
        let model = Model::random(config, 0, device).unwrap();
        let (mut one, mut other) = (model.new_cache(2).unwrap(), model.new_cache(2).unwrap());
        let unknown = Tensor::new(&[3u32, VOCAB as u32 + 8], device)?;
        let known = Tensor::new(&[3u32, 4], device)?;
        let got = model.step(&unknown, &mut one).unwrap().to_vec2::<f32>()?;
        let want = model.step(&known, &mut other).unwrap().to_vec2::<f32>()?;
        assert_eq!(got[0], want[0]);
        assert!(got[1].iter().all(|x| x.is_nan()));
    }
    Ok(configs.len())
}

/// The logits of three steps of all rows of a batch, in rounds of as many rows.
fn steps(model: &Model, ids: &[Vec<u32>], at_once: usize) -> Vec<Vec<f32>> {
    let mut out = vec![];
    for rows in ids.chunks(at_once) {
        let mut cache = model.new_cache(rows.len()).unwrap();
        let mut logits = vec![vec![]; rows.len()];
        for i in 0..3 {
            let ids: Vec<u32> = rows.iter().map(|row| row[i]).collect();
            let ids = Tensor::new(ids, &Device::Cpu).unwrap();
            let y = model.step(&ids, &mut cache).unwrap().to_dtype(DType::F32).unwrap();
            for (all, y) in logits.iter_mut().zip(y.to_vec2::<f32>().unwrap()) {
                all.extend(y);
            }
        }
        out.extend(logits);
    }
    out
}

/// A row gives the same bits alone as among others, on any number of threads; instruction sets differ by rounding alone.
#[test]
fn rows_and_threads_on_the_cpu() {
    let configs: Vec<_> = configs().into_iter().chain(attentions()).collect();
    for (i, (name, config)) in configs.iter().enumerate() {
        let weights = random(config, i as u64).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let model = model(config, &weights, dtype, &Device::Cpu);
            let ids: Vec<Vec<u32>> = (0..19).map(|row| Random::new(row).ids(3, VOCAB as u32)).collect();
            let want = steps(&model, &ids, 19);
            let same = |got: Vec<Vec<f32>>, what: &str| {
                assert_eq!(got, want, "{name}, {}, {what}", dtype.as_str());
            };
            same(steps(&model, &ids, 1), "alone");
            same(steps(&model, &ids, 4), "in fours");
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                same(pool.install(|| steps(&model, &ids, 19)), "on other threads");
            }
            for isa in Isa::available() {
                let flat = |rows: Vec<Vec<f32>>| {
                    let len = rows.len() * rows[0].len();
                    Tensor::from_vec(rows.concat(), len, &Device::Cpu).unwrap()
                };
                let error = relative_rms(&flat(isa.scope(|| steps(&model, &ids, 19))), &flat(want.clone()));
                let bound = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
                assert!(error <= bound, "{name}, {}, {}: off by {error:.1e}", dtype.as_str(), isa.name());
            }
        }
    }
    assert_eq!(configs.len(), 14);
}

/// An id past the vocabulary is an error on the CPU, and changes nothing.
#[test]
fn unknown_ids_on_the_cpu() {
    let (_, config) = configs().remove(0);
    let model = Model::random(&config, 0, &Device::Cpu).unwrap();
    let (mut one, mut other) = (model.new_cache(2).unwrap(), model.new_cache(2).unwrap());
    let known = Tensor::new(&[3u32, 4], &Device::Cpu).unwrap();
    let unknown = Tensor::new(&[3u32, VOCAB as u32 + 8], &Device::Cpu).unwrap();
    model.step(&known, &mut one).unwrap();
    model.step(&known, &mut other).unwrap();
    let error = model.step(&unknown, &mut one).unwrap_err().to_string();
    assert!(error.contains("token id 68"), "{error}");
    let [got, want] = [&mut one, &mut other].map(|cache| model.step(&known, cache).unwrap());
    assert_eq!(got.to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap());
}
