//! Single tokens on a GPU, through the decoder, against whole forward passes in CPU memory.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use mamba_model::config::{DtBcNorm, GatedNorm, Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_model::{InferenceCache, Model};
use mamba_ops::NormKind;
use mamba_ops::decoder::{MAX_BATCH, MAX_BATCH_F32};

use crate::support::random::Random;
use crate::support::target::with_gpu;
use crate::support::tolerance::relative_rms;

const VOCAB: usize = 60;

/// Everything that a decoder knows, by name.
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

/// All logits of `ids`; `plain` leaves the decoder out.
fn read(model: &Model, ids: &Tensor, plain: bool) -> Result<Tensor> {
    let batch = ids.dim(0)?;
    let ids = ids.to_device(model.device())?;
    let mut reader = Reader { model, ids, cache: model.new_cache(batch).unwrap(), logits: vec![] };
    reader.read(5)?;
    reader.step(4, plain)?;
    let most = if model.dtype() == DType::F32 { MAX_BATCH_F32 } else { MAX_BATCH };
    let decodes = !plain && batch <= most;
    assert_eq!(format!("{:?}", reader.cache).contains("captured: true"), decodes, "a graph of the layers");
    // A fork goes its own way without touching this one.
    let mut fork = reader.cache.fork().unwrap();
    let other = reader.ids.narrow(1, 0, 1)?.squeeze(1)?;
    for _ in 0..3 {
        model.step(&other, &mut fork).unwrap();
    }
    reader.step(2, plain)?;
    reader.read(3)?;
    reader.step(4, plain)?;
    Tensor::cat(&reader.logits, 1)
}

mod cuda {
    #[test]
    fn equals_whole_passes() {
        super::with_gpu(super::equals_whole_passes);
    }

    #[test]
    fn unknown_ids() {
        super::with_gpu(super::unknown_ids);
    }
}

/// f32 as the CPU; f16 and bf16 at least as close to it as the operations, which round more often.
fn equals_whole_passes(device: &Device) -> Result<usize> {
    let mut cases = 0;
    for (i, (name, config)) in configs().into_iter().enumerate() {
        let weights = random(&config, i as u64)?;
        for (dtype, batch) in [
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
        ] {
            let rounded = weights.iter().map(|(name, x)| {
                let kept = ["A_log", ".D", "dt_bias"].iter().any(|end| name.ends_with(end));
                Ok((name.clone(), if kept { x.clone() } else { x.to_dtype(dtype)?.to_dtype(DType::F32)? }))
            });
            let rounded: HashMap<_, _> = rounded.collect::<Result<_>>()?;
            let model = |dtype: DType, device: &Device| {
                Model::new(&config, VarBuilder::from_tensors(rounded.clone(), dtype, device)).unwrap()
            };
            let (exact, on_gpu) = (model(DType::F32, &Device::Cpu), model(dtype, device));
            let ids = Random::new(7).ids(batch * 18, VOCAB as u32);
            let ids = Tensor::from_vec(ids, (batch, 18), &Device::Cpu)?;
            let want = exact.forward(&ids, None).unwrap();
            let error = relative_rms(&read(&on_gpu, &ids, false)?, &want);
            let bound = match dtype {
                DType::F32 => 1e-5,
                _ => relative_rms(&read(&on_gpu, &ids, true)?, &want),
            };
            println!("{name}, {}, batch {batch}: off by {error:.1e}, bound {bound:.1e}", dtype.as_str());
            assert!(error <= bound, "{name}, {}, batch {batch}: off by {error:.1e}", dtype.as_str());
            cases += 1;
        }
    }
    assert_eq!(cases, 110);
    Ok(cases)
}

/// An id past the vocabulary gives no answer that looks like one, and spoils its own row alone.
fn unknown_ids(device: &Device) -> Result<usize> {
    for (_, config) in configs() {
        let model = Model::random(&config, 0, device).unwrap();
        let (mut one, mut other) = (model.new_cache(2).unwrap(), model.new_cache(2).unwrap());
        let unknown = Tensor::new(&[3u32, VOCAB as u32 + 8], device)?;
        let known = Tensor::new(&[3u32, 4], device)?;
        let got = model.step(&unknown, &mut one).unwrap().to_vec2::<f32>()?;
        let want = model.step(&known, &mut other).unwrap().to_vec2::<f32>()?;
        assert_eq!(got[0], want[0]);
        assert!(got[1].iter().all(|x| x.is_nan()));
    }
    Ok(configs().len())
}
