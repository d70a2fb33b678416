//! What a training step takes on a GPU: `cargo bench --features cuda --bench cuda_train`.
//!
//! Random weights of the published shapes, random tokens, a batch of 8 x 2048, compute in bf16, master weights, moments and
//! gradients' sums in f32, clipping to a norm of 1, AdamW. `step`: the wall clock of [`Trainer::step`], which reads the loss, median
//! over steps, in milliseconds; `forward`, `backward` and `update` are its parts, between synchronisations. `peak_gib` is the most
//! memory that tensors held at once, parameters and moments among them. With `--documents N` as many tokens are cut into N documents
//! of uneven lengths and packed into one row.
//! `benches/peers/upstream_train.py` times upstream under the same names and `benches/peers/join.py` joins the two.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_model::{Model, Recompute};
use mamba_train::data::Batch;
use mamba_train::{
    AdamW, AdamWOptions, Gradients, TrainOptions, TrainableModel, Trainer, language_model_loss,
};
use serde_json::{Value, json};

/// Measures training steps on a GPU.
#[derive(Debug, Parser)]
struct Args {
    /// Only cases whose name ends with one of these, as in `L2048` or `recompute`.
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Documents that the tokens are cut into, packed into one row.
    #[arg(long)]
    documents: Option<usize>,
    /// Layers of the models.
    #[arg(long, default_value_t = 24)]
    layers: usize,
    /// Steps that are measured.
    #[arg(long, default_value_t = 7)]
    steps: usize,
    /// Where to write the rows as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Milliseconds of `f`, with everything that it enqueued.
fn clock<T>(device: &Device, f: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    device.synchronize()?;
    let start = Instant::now();
    let value = f()?;
    device.synchronize()?;
    Ok((value, start.elapsed().as_secs_f64() * 1e3))
}

/// The most bytes that were in use at once since the last call.
fn peak() -> Result<u64> {
    use sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    let (mut device, mut pool, mut most) = (0, std::ptr::null_mut(), 0u64);
    // SAFETY: a device is in use; the attribute is a u64, which is reset by writing 0.
    unsafe {
        sys::cuDeviceGet(&mut device, 0).result()?;
        sys::cuDeviceGetDefaultMemPool(&mut pool, device).result()?;
        let value = (&raw mut most).cast();
        sys::cuMemPoolGetAttribute(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, value).result()?;
        let mut zero = 0u64;
        sys::cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut zero).cast()).result()?;
    }
    Ok(most)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Uneven lengths of so many documents of at least two tokens, whose targets are `tokens` in all.
fn lengths(documents: usize, tokens: usize) -> Vec<usize> {
    // Fixed weights between 1 and 16, most of them small.
    let weight = |i: usize| f64::from(2u32.pow((i as u32).wrapping_mul(2_654_435_761) >> 30)).powf(4.0 / 3.0);
    let all: f64 = (0..documents).map(weight).sum();
    let spare = tokens.saturating_sub(documents) as f64;
    let (mut end, mut sum) = (0, 0.0);
    let mut length = |i: usize| {
        sum += weight(i);
        let start = std::mem::replace(&mut end, (spare * sum / all).round() as usize);
        end - start + 2 // one target at least, and the first token, which is none
    };
    (0..documents).map(&mut length).collect()
}

fn measure(args: &Args, config: &ModelConfig, recompute: Recompute, device: &Device) -> Result<Value> {
    let model = || -> Result<TrainableModel> {
        let start = Model::random(config, 1, device)?;
        Ok(TrainableModel::new(&start, DType::BF16)?.with_recompute(recompute))
    };
    let draw = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % config.vocab_size as u32;
    let lengths = match args.documents {
        Some(documents) => lengths(documents, args.batch * args.tokens),
        None => vec![args.tokens + 1; args.batch],
    };
    let row = |(i, len): (usize, &usize)| (0..*len).map(|t| draw(i * (args.tokens + 1) + t)).collect();
    let rows: Vec<Vec<u32>> = lengths.iter().enumerate().map(row).collect();
    let batch = match args.documents {
        Some(_) => Batch::packed(&rows, device)?,
        None => Batch::padded(&rows, device)?,
    };

    let mut trainer = Trainer::new(model()?, TrainOptions::default())?;
    for _ in 0..3 {
        trainer.step(std::slice::from_ref(&batch))?;
    }
    peak()?;
    let mut times = vec![];
    for _ in 0..args.steps {
        times.push(clock(device, || Ok(trainer.step(std::slice::from_ref(&batch))?))?.1);
    }
    let (step, peak) = (median(times), peak()? as f64 / (1u64 << 30) as f64);
    drop(trainer);

    let model = model()?;
    let mut optimizer = AdamW::new(model.parameters(), AdamWOptions::default())?;
    let (mut forward, mut backward, mut update) = (vec![], vec![], vec![]);
    for _ in 0..args.steps {
        let (loss, ms) = clock(device, || Ok(language_model_loss(model.model(), &batch)?))?;
        forward.push(ms);
        let loss: Tensor = (loss / batch.count as f64)?;
        let (mut gradients, ms) = clock(device, || Ok(Gradients::of(&loss, model.parameters())?))?;
        backward.push(ms);
        let apply = || {
            gradients.clip(1.0)?;
            Ok(optimizer.step(&gradients, 1e-4)?)
        };
        update.push(clock(device, apply)?.1);
    }
    let tokens = (args.batch * args.tokens) as f64;
    Ok(json!({
        "ms": step, "peak_gib": peak, "tokens_per_s": tokens / step * 1e3,
        "forward_ms": median(forward), "backward_ms": median(backward), "update_ms": median(update),
    }))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::new_cuda(0).context("this benchmark needs a GPU")?;
    let shapes = [
        ("mamba-130m", 50280, MixerSpec::Mamba1(Mamba1Config::new(768))),
        ("mamba2-130m", 50288, MixerSpec::Mamba2(Mamba2Config::new(768))),
    ];
    let mut rows: Vec<Value> = vec![];
    println!(
        "| case | ms | peak GiB | tokens/s | forward | backward | update |\n|---|---|---|---|---|---|---|"
    );
    for (name, vocab, mixer) in shapes {
        for (label, recompute) in [("", Recompute::Nothing), (" recompute", Recompute::Layers)] {
            let sequences = match args.documents {
                Some(documents) => format!("D{documents} T{}", args.batch * args.tokens),
                None => format!("B{} L{}", args.batch, args.tokens),
            };
            let case = format!("{name} bf16 train {sequences}{label}");
            if !(args.case.is_empty() || args.case.iter().any(|part| case.ends_with(part))) {
                continue;
            }
            let config = ModelConfig::uniform(vocab, 768, args.layers, mixer.clone());
            let mut row = measure(&args, &config, recompute, &device)?;
            let figure = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            let [ms, gib, tokens, forward, backward, update] =
                ["ms", "peak_gib", "tokens_per_s", "forward_ms", "backward_ms", "update_ms"].map(figure);
            println!(
                "| {case} | {ms:.1} | {gib:.1} | {tokens:.0} | {forward:.1} | {backward:.1} | {update:.1} |"
            );
            row["case"] = json!(case);
            rows.push(row);
        }
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&json!({ "rows": rows }))?)?;
    }
    Ok(())
}
