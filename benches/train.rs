//! What a training step takes on the CPU, and what the fused scan is worth in one: `cargo bench -p mamba-benches --bench train`.
//!
//! `train`: models of 2.1 million parameters, a batch of random tokens, everything in f32: loss, gradients, clipping to a norm of 1,
//! AdamW, as [`Trainer::step`] does them. With `--save FOLDER` the models go there, and `benches/peers/transformers_train.py FOLDER`
//! trains the same models on the same tokens under the same names; `benches/peers/join.py` joins the two. `loss` is that of the
//! first step: it says whether both compute the same.
//!
//! `scan`: forward and backward of the selective scan over one sequence of some length, beside the same recurrence as plain tensor
//! operations, one token after another, which is its reference.
//!
//! `ms` is the median of the wall clock (one run of a plain scan over more than 1000 tokens); `busy_ms` processor time over threads, what a step would take with nobody else on the machine
//! and all threads at work.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use clap::Parser;
use mamba_model::Model;
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_ops::{SelectiveScan, SelectiveScanOutput, SequenceLayout, selective_scan};
use mamba_train::data::Batch;
use mamba_train::{TrainOptions, TrainableModel, Trainer};
use serde_json::{Value, json};

/// Measures training on the CPU.
#[derive(Debug, Parser)]
struct Args {
    /// Only cases whose name contains one of these, as in `mamba2-2m train B4 L256` or `scan L512`.
    #[arg(long, value_delimiter = ',')]
    case: Vec<String>,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Runs that are measured, after one that is not.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Write the models here, in the layout of transformers.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Where to write the rows as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Processor time of all threads so far.
fn processor_time() -> Option<f64> {
    let threads = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let line = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        line.split(' ').next()?.parse::<f64>().ok()
    });
    Some(1e-9 * nanoseconds.sum::<f64>())
}

/// What one run took, in milliseconds: the wall clock, and processor time over threads.
fn clock<T>(f: impl FnOnce() -> Result<T>) -> Result<(T, [Option<f64>; 2])> {
    let (start, before) = (Instant::now(), processor_time());
    let value = f()?;
    let ms = 1e3 * start.elapsed().as_secs_f64();
    let used = processor_time().zip(before).map(|(after, before)| after - before);
    Ok((value, [Some(ms), used.map(|used| 1e3 * used / rayon::current_num_threads() as f64)]))
}

/// The medians of several runs after one that is not measured.
fn time(runs: usize, mut f: impl FnMut() -> Result<()>) -> Result<[Option<f64>; 2]> {
    f()?;
    let times: Vec<_> = (0..runs.max(1)).map(|_| Ok(clock(&mut f)?.1)).collect::<Result<_>>()?;
    let median = |which: usize| {
        let mut all: Vec<f64> = times.iter().filter_map(|times| times[which]).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    };
    Ok([median(0), median(1)])
}

/// A step of a whole model.
fn step(args: &Args, name: &str, config: &ModelConfig) -> Result<Value> {
    let start = Model::random(config, 1, &Device::Cpu)?;
    if let Some(folder) = &args.save {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        start.save_pretrained(&folder, DType::F32)?;
    }
    // As in the peer's script.
    let draw = |i: usize| (i as u32).wrapping_mul(2_654_435_761) >> 23;
    let row = |row: usize| (0..=args.tokens).map(|i| draw(row * (args.tokens + 1) + i)).collect();
    let batch = Batch::padded(&(0..args.batch).map(row).collect::<Vec<_>>(), &Device::Cpu)?;
    let mut trainer = Trainer::new(TrainableModel::new(&start, DType::F32)?, TrainOptions::default())?;
    let mut first = None;
    let [ms, busy_ms] = time(args.steps, || {
        let report = trainer.step(std::slice::from_ref(&batch))?;
        first.get_or_insert(report.loss);
        Ok(())
    })?;
    let tokens_per_s = ms.map(|ms| 1e3 * batch.count as f64 / ms);
    Ok(json!({ "ms": ms, "busy_ms": busy_ms, "tokens_per_s": tokens_per_s, "loss": first }))
}

/// Inputs of a scan in the shape of one layer of the smaller models: 64 channels, 16 states.
fn inputs(seqlen: usize) -> Result<Vec<Var>> {
    let (dim, states) = (64, 16);
    let normal = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
    let tensors = [
        normal(&[1, seqlen, dim])?,
        (normal(&[1, seqlen, dim])? - 3.0)?,
        normal(&[dim, states])?.exp()?.neg()?,
        normal(&[1, seqlen, states])?,
        normal(&[1, seqlen, states])?,
    ];
    Ok(tensors.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?)
}

/// The gradients of the sum of what a scan gives.
fn gradients(
    x: &[Var],
    scan: fn(&SelectiveScan) -> candle_core::Result<SelectiveScanOutput>,
) -> Result<Vec<Tensor>> {
    let args = SelectiveScan::new(&x[0], &x[1], &x[2], &x[3], &x[4]);
    let output = scan(&SelectiveScan { delta_softplus: true, layout: SequenceLayout::ChannelsLast, ..args })?;
    let grads = output.y.sum_all()?.backward()?;
    x.iter().map(|x| grads.get(x).cloned().context("no gradient")).collect()
}

/// Forward and backward of the scan, fused and one token after another.
fn scan(args: &Args, seqlen: usize) -> Result<Value> {
    let x = inputs(seqlen)?;
    let plain = mamba_ops::selective_scan::reference::forward;
    let (want, mut sequential) = clock(|| gradients(&x, plain))?;
    for (got, want) in gradients(&x, selective_scan)?.iter().zip(want) {
        let norm = |x: &Tensor| Ok::<_, candle_core::Error>(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt());
        let error = norm(&(got - &want)?)? / norm(&want)?;
        ensure!(error < 2e-5, "the fused scan over {seqlen} tokens is wrong by {error:.1e}");
    }
    let [ms, busy_ms] = time(args.steps.max(10), || gradients(&x, selective_scan).map(|_| ()))?;
    // One run of a long one says enough.
    if seqlen < 1000 {
        sequential = time(args.steps, || gradients(&x, plain).map(|_| ()))?;
    }
    let [sequential_ms, sequential_busy_ms] = sequential;
    Ok(json!({
        "ms": ms, "busy_ms": busy_ms, "sequential_ms": sequential_ms, "sequential_busy_ms": sequential_busy_ms,
    }))
}

fn run(args: &Args) -> Result<()> {
    let mixers = [
        ("mamba-2m", MixerSpec::Mamba1(Mamba1Config::new(192))),
        (
            "mamba2-2m",
            MixerSpec::Mamba2(Mamba2Config {
                d_state: 64,
                headdim: 32,
                chunk_size: 64,
                ..Mamba2Config::new(192)
            }),
        ),
    ];
    let wanted = |case: &str| args.case.is_empty() || args.case.iter().any(|part| case.contains(part));
    let mut rows: Vec<Value> = vec![];
    let mut keep = |case: String, mut row: Value| {
        println!("{case}: {row}");
        row["case"] = json!(case);
        rows.push(row);
    };
    for (name, mixer) in mixers {
        let case = format!("{name} train B{} L{}", args.batch, args.tokens);
        if wanted(&case) {
            let config = ModelConfig::uniform(512, 192, 8, mixer);
            keep(case, step(args, name, &config)?);
        }
    }
    for seqlen in [128, 512, 2048, 8192] {
        let case = format!("scan L{seqlen}");
        if wanted(&case) {
            keep(case, scan(args, seqlen)?);
        }
    }
    if let Some(path) = &args.json {
        let threads = rayon::current_num_threads();
        let all = json!({ "threads": threads, "isa": mamba_ops::simd::Isa::best().name(), "rows": rows });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    // Candle's backward recurses over the tokens of the plain scan.
    let worker = std::thread::Builder::new().stack_size(8 << 30).spawn(move || run(&args))?;
    worker.join().unwrap_or_else(|_| anyhow::bail!("the benchmark panicked"))
}
