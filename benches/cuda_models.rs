//! What whole models do on a GPU: `cargo bench --features cuda --bench cuda_models`.
//!
//! Weights are random and made on the GPU. `decode`: a step after a prompt of 100 tokens, over 100 steps, each of which reads the
//! argmax of the logits before it; `plain` is the same through the operations that prompts go through. `text`: a step of
//! `mamba_generate::Batch`, whose rows sample with temperature and top-p, where every token comes to the host; `text read` has an
//! option that needs the logits there. `prefill`: one call that keeps the states and gives the last logits. Times are of the wall clock between synchronisations, in milliseconds; `weights_ms`
//! is what reading the weights once takes at 3.0 TB/s. `benches/peers/upstream_models.py` times upstream under the same names and
//! `benches/peers/join.py` joins the two.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use clap::Parser;
use mamba_generate::{Batch, Generator, SamplingConfig};
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_model::{InferenceCache, Model};
use mamba_ops::argmax;
use serde_json::{Value, json};

/// Hybrids in the sizes that were published: attention beside Mamba-2 in each layer, and in some layers in its place.
const FALCON_H1: &str = r#"{"model_type": "falcon_h1", "hidden_size": 1024, "num_hidden_layers": 36, "vocab_size": 32784,
    "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mamba_d_ssm": 1536,
    "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "rope_theta": 1e11,
    "ssm_multipliers": [0.5, 0.5, 0.5, 0.5, 0.5], "mlp_multipliers": [0.9, 0.3], "key_multiplier": 0.4}"#;
const BAMBA: &str = r#"{"model_type": "bamba", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "attn_layer_indices": [9, 18, 27],
    "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}"#;

const PROMPT: usize = 100;
const NEW: usize = 100;

/// Measures prompts and generation on a GPU.
#[derive(Debug, Parser)]
struct Args {
    /// Only cases whose name contains one of these, as in `mamba2-130m f16 decode B1`.
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Dtypes of the weights.
    #[arg(long, value_delimiter = ',', default_values_t = ["f16".to_owned(), "bf16".into()])]
    dtypes: Vec<String>,
    /// Where to write the rows as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Random weights of about the published sizes, made where they are used.
struct RandomWeights;

impl SimpleBackend for RandomWeights {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        let x = match name {
            _ if name.ends_with("A_log") => Tensor::rand(0f32, 2.77, s, dev)?,
            _ if name.ends_with("dt_bias") || name.ends_with("dt_proj.bias") => {
                Tensor::rand(-6.9f32, -2.3, s, dev)?
            }
            _ if name.ends_with(".D") || name.contains("norm") => Tensor::ones(s, DType::F32, dev)?,
            _ => Tensor::randn(0f32, 0.02, s, dev)?,
        };
        x.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name} has no known shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !name.contains("lora")
    }
}

/// Milliseconds of `f`, with everything that it enqueued.
fn clock(device: &Device, f: impl FnOnce() -> Result<()>) -> Result<f64> {
    device.synchronize()?;
    let start = Instant::now();
    f()?;
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn ids(batch: usize, len: usize, model: &Model) -> Result<Tensor> {
    let id = |i: u32| i.wrapping_mul(2_654_435_761) % model.config().vocab_size as u32;
    let ids: Vec<u32> = (0..(batch * len) as u32).map(id).collect();
    Ok(Tensor::from_vec(ids, (batch, len), model.device())?)
}

/// The next token of each sequence.
type Step = fn(&Model, &Tensor, &mut InferenceCache) -> mamba_model::Result<Tensor>;

fn plain(model: &Model, ids: &Tensor, cache: &mut InferenceCache) -> mamba_model::Result<Tensor> {
    model.prefill(&ids.unsqueeze(1)?, cache)
}

/// The best milliseconds a step of several runs.
fn decode(model: &Model, batch: usize, step: Step) -> Result<f64> {
    let device = model.device();
    let prompt = ids(batch, PROMPT, model)?;
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let mut cache = model.new_cache(batch)?;
        let mut next = argmax(&model.prefill(&prompt, &mut cache)?)?;
        let mut run = |n: usize| -> Result<()> {
            for _ in 0..n {
                next = argmax(&step(model, &next, &mut cache)?)?;
            }
            Ok(())
        };
        run(3)?; // the first ones capture
        best = best.min(clock(device, || run(NEW))? / NEW as f64);
    }
    Ok(best)
}

/// The best milliseconds that a batch of texts takes for a token each.
fn text(model: &Model, batch: usize, read: bool) -> Result<f64> {
    let prompt = ids(batch, PROMPT, model)?.to_vec2::<u32>()?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let mut rows = Batch::new(model);
        for (seed, prompt) in prompt.iter().enumerate() {
            let logit_bias = if read { vec![(0, 0.0)] } else { vec![] };
            let (temperature, top_p, seed) = (0.8, Some(0.95), seed as u64);
            let sampling = SamplingConfig { temperature, top_p, seed, logit_bias, ..Default::default() };
            let row = Generator::builder(model).prompt(prompt).sampling(sampling.build()?);
            rows.add(row.max_new_tokens(NEW + 20).build()?)?;
        }
        for _ in 0..5 {
            rows.step()?; // the first ones capture
        }
        let start = Instant::now();
        for _ in 0..NEW {
            rows.step()?;
        }
        best = best.min(start.elapsed().as_secs_f64() * 1e3 / NEW as f64);
    }
    Ok(best)
}

fn prefill(model: &Model, batch: usize, len: usize) -> Result<f64> {
    let device = model.device();
    let prompt = ids(batch, len, model)?;
    let mut cache = model.new_cache(batch)?;
    let mut times = vec![];
    for _ in 0..7 {
        cache.reset()?;
        let read = || {
            model.prefill(&prompt, &mut cache)?;
            Ok(())
        };
        times.push(clock(device, read)?);
    }
    times.drain(..2);
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// How far the decoder's logits are from those of the operations, by the largest.
fn difference(model: &Model) -> Result<f64> {
    let prompt = ids(1, PROMPT, model)?;
    let (mut one, mut other) = (model.new_cache(1)?, model.new_cache(1)?);
    let mut next = model.prefill(&prompt, &mut one)?.argmax(1)?;
    model.prefill(&prompt, &mut other)?;
    let mut gap = 0.0f32;
    for _ in 0..4 {
        let got = model.step(&next, &mut one)?.to_dtype(DType::F32)?;
        let want = plain(model, &next, &mut other)?.to_dtype(DType::F32)?;
        let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
        gap = gap.max((got - &want)?.abs()?.max_all()?.to_scalar::<f32>()? / scale);
        next = want.argmax(1)?;
    }
    Ok(f64::from(gap))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::new_cuda(0).context("this benchmark needs a GPU")?;
    let uniform = ModelConfig::uniform;
    let (one, two) =
        (|d| MixerSpec::Mamba1(Mamba1Config::new(d)), |d| MixerSpec::Mamba2(Mamba2Config::new(d)));
    let shapes = [
        ("mamba-130m", uniform(50280, 768, 24, one(768))),
        ("mamba2-130m", uniform(50288, 768, 24, two(768))),
        ("mamba-2.8b", uniform(50280, 2560, 64, one(2560))),
        ("mamba2-2.7b", uniform(50288, 2560, 64, two(2560))),
        ("falcon-h1-0.5b", ModelConfig::from_json(FALCON_H1)?),
        ("bamba-9b", ModelConfig::from_json(BAMBA)?),
    ];
    let mut rows: Vec<Value> = vec![];
    println!("| case | ms | tokens/s | weights_ms |\n|---|---|---|---|");
    for (name, config) in shapes {
        for dtype in &args.dtypes {
            let wanted = |label: &str| {
                let name = format!("{name} {dtype} {label}");
                (args.case.is_empty() || args.case.iter().any(|part| name.contains(part))).then_some(name)
            };
            let labels = [
                "decode B1",
                "decode B8",
                "decode B16",
                "decode B64",
                "text B1",
                "text B64",
                "text read B1",
                "text read B64",
                "prefill B1 L2048",
                "prefill B8 L2048",
                "plain B1",
            ];
            let labels: Vec<_> = labels.iter().filter_map(|label| Some((*label, wanted(label)?))).collect();
            if labels.is_empty() {
                continue;
            }
            let weights = VarBuilder::from_backend(Box::new(RandomWeights), dtype.parse()?, device.clone());
            let model = Model::new(&config, weights)?;
            let bytes: usize =
                model.parameters().iter().map(|(_, x)| x.elem_count() * x.dtype().size_in_bytes()).sum();
            let weights_ms = bytes as f64 / 3.0e9;
            println!(
                "| {name} {dtype}: the decoder differs from the operations by {:.1e} | | | |",
                difference(&model)?
            );
            for (label, case) in labels {
                let (ms, tokens) = match label {
                    "decode B1" => (decode(&model, 1, Model::step), 1),
                    "decode B8" => (decode(&model, 8, Model::step), 8),
                    "decode B16" => (decode(&model, 16, Model::step), 16),
                    "decode B64" => (decode(&model, 64, Model::step), 64),
                    "text B1" => (text(&model, 1, false), 1),
                    "text B64" => (text(&model, 64, false), 64),
                    "text read B1" => (text(&model, 1, true), 1),
                    "text read B64" => (text(&model, 64, true), 64),
                    "plain B1" => (decode(&model, 1, plain), 1),
                    "prefill B1 L2048" => (prefill(&model, 1, 2048), 2048),
                    _ => (prefill(&model, 8, 2048), 8 * 2048),
                };
                let ms = match ms {
                    Ok(ms) => ms,
                    Err(e) => {
                        println!("| {case} | {e:#} | | |");
                        rows.push(json!({ "case": case, "error": format!("{e:#}") }));
                        continue;
                    }
                };
                let per_s = tokens as f64 / ms * 1e3;
                println!("| {case} | {ms:.3} | {per_s:.0} | {weights_ms:.3} |");
                rows.push(json!({ "case": case, "ms": ms, "tokens_per_s": per_s, "weights_ms": weights_ms }));
            }
        }
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&json!({ "rows": rows }))?)?;
    }
    Ok(())
}
