//! Forecasts a time series with a Mamba model that reads numbers in the place of tokens: `cargo run --release --example forecast`.
//!
//! At every hour the model says what it expects of each of the next 24, as a change from the last value. What it forecasts for a part
//! of the series that it has not seen stands beside three simple rules: as now, as a day before, as a week before.

#[path = "cli/mod.rs"]
mod cli;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use clap::Parser;
use mamba_model::Model;
use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};
use mamba_train::data::Permutation;
use mamba_train::record::{Curve, loss_curve};
use mamba_train::{AdamW, AdamWOptions, Gradients, Parameters, Schedule};
use serde_json::json;

/// Trains a forecaster, or with --predict uses one that was trained, and writes what it forecasts as an SVG.
#[derive(Debug, Parser)]
struct Args {
    /// A text file with a number a line, hours one after another; made by rule and chance if not given.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Where the trained forecaster goes, and comes from.
    #[arg(long, default_value = "forecaster")]
    out: PathBuf,
    /// Forecast what follows the series, without training.
    #[arg(long)]
    predict: bool,
    /// Optimizer steps.
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Of the series that is made, of initial values, and of the order of what is learnt.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Hours that are read and forecast.
const WINDOW: usize = 240;
const HORIZON: usize = 24;
const DAY: usize = 24;
const WEEK: usize = 7 * DAY;
const BATCH: usize = 16;

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let series = match &args.data {
        Some(path) => read(path)?,
        None => made(365 * DAY, args.seed),
    };
    let least = if args.predict { WINDOW } else { 10 * (WINDOW + HORIZON) };
    ensure!(series.len() >= least, "the series has {} numbers, expected {least} at least", series.len());
    if args.predict {
        let forecaster = Forecaster::load(&args.out)?;
        let next = forecaster.forecast(&[&series[series.len() - WINDOW..]])?.remove(0);
        next.iter().for_each(|value| println!("{value:.3}"));
        return Ok(());
    }
    let (seen, held_out) = series.split_at(series.len() * 4 / 5);
    let forecaster = train(seen, &args)?;

    // A forecast at the end of each day that was kept apart, of it and of the rules.
    let ends: Vec<usize> = (WINDOW..=held_out.len() - HORIZON).step_by(DAY).collect();
    let windows: Vec<&[f32]> = ends.iter().map(|end| &held_out[end - WINDOW..*end]).collect();
    let forecasts = forecaster.forecast(&windows)?;
    let error = |guess: &dyn Fn(usize, usize) -> f32| {
        let of = |(i, end): (usize, &usize)| {
            (0..HORIZON).map(|h| (guess(i, h) - held_out[end + h]).abs()).sum::<f32>()
        };
        ends.iter().enumerate().map(of).sum::<f32>() / (ends.len() * HORIZON) as f32
    };
    let before = |hours: usize| error(&|i, h| held_out[ends[i] - hours + h]);
    println!("mean absolute error of {} forecasts of {HORIZON} hours each:", ends.len());
    let last = error(&|i, _| held_out[ends[i] - 1]);
    for (name, error) in [("now", last), ("a day before", before(DAY)), ("a week before", before(WEEK))] {
        println!("  as {name}: {error:.3}");
    }
    println!("  forecaster: {:.3}", error(&|i, h| forecasts[i][h]));

    // What was saved forecasts the same.
    let again = Forecaster::load(&args.out)?.forecast(&windows)?;
    ensure!(again == forecasts, "the saved forecaster gives other numbers");
    let (end, forecast) = (ends[ends.len() - 1], &forecasts[forecasts.len() - 1]);
    let points = |from: usize, values: &[f32]| {
        values.iter().enumerate().map(|(i, value)| ((from + i) as f64, f64::from(*value))).collect()
    };
    let curves = [
        Curve { name: "what was", points: points(0, &held_out[end - 3 * DAY..end + HORIZON]) },
        Curve { name: "forecast", points: points(3 * DAY, forecast) },
    ];
    let picture = args.out.join("forecast.svg");
    std::fs::write(&picture, loss_curve("three days, and a forecast of the next", &curves))?;
    println!("the forecaster is in {}, its last forecast in {}", args.out.display(), picture.display());
    Ok(())
}

/// From windows of hours to those that follow.
struct Forecaster {
    input: Linear,
    encoder: Model,
    output: Linear,
    /// Mean and deviation of what it learnt from.
    scale: (f64, f64),
}

impl Forecaster {
    fn new(weights: VarBuilder, scale: (f64, f64)) -> Result<Self> {
        let config = config();
        Ok(Self {
            input: linear(1, config.d_model, weights.pp("input"))?,
            encoder: Model::new(&config, weights.pp("encoder"))?,
            output: linear(config.d_model, HORIZON, weights.pp("output"))?,
            scale,
        })
    }

    fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("forecaster.json");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let scale = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let path = folder.join("forecaster.safetensors");
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
            .with_context(|| path.display().to_string())?;
        Self::new(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), scale)
    }

    /// `(batch, hours)`, scaled, to the hours that follow each, `(batch, hours, HORIZON)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.unsqueeze(2)?;
        let hidden = self.encoder.hidden_states(&self.input.forward(&x)?, None)?;
        Ok(self.output.forward(&hidden)?.broadcast_add(&x)?)
    }

    /// What follows each window.
    fn forecast(&self, windows: &[&[f32]]) -> Result<Vec<Vec<f32>>> {
        let (mean, deviation) = self.scale;
        let x = Tensor::new(windows.concat(), &Device::Cpu)?.reshape((windows.len(), ()))?;
        let last = x.dim(D::Minus1)? - 1;
        let next = self.forward(&((x - mean)? / deviation)?)?.narrow(1, last, 1)?.squeeze(1)?;
        Ok(((next * deviation)? + mean)?.to_vec2()?)
    }
}

/// Two layers of Mamba-2. It reads numbers, so its table of tokens has a single row, which is not used.
fn config() -> ModelConfig {
    let mixer = Mamba2Config { d_state: 32, headdim: 16, chunk_size: 64, ..Mamba2Config::new(32) };
    ModelConfig::uniform(1, 32, 2, MixerSpec::Mamba2(mixer))
}

/// Learns from all windows of a series, in an order by chance, and saves what it learnt.
fn train(series: &[f32], args: &Args) -> Result<Forecaster> {
    let count = series.len() as f64;
    let mean = series.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let variance = series.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
    let scale = (mean, variance.sqrt());
    let scaled: Vec<f32> = series.iter().map(|x| ((f64::from(*x) - mean) / scale.1) as f32).collect();

    // The encoder begins as published, the output at 0: as the last value.
    let vars = VarMap::new();
    let mut chance = Chance(args.seed);
    let width = config().d_model;
    let mut values: Vec<(String, Tensor)> = vec![];
    for (name, value) in Model::random(&config(), args.seed, &Device::Cpu)?.parameters() {
        values.push((format!("encoder.{name}"), value.clone()));
    }
    let input: Vec<f32> = (0..2 * width).map(|_| chance.normal()).collect();
    values.push(("input.weight".into(), Tensor::new(&input[..width], &Device::Cpu)?.unsqueeze(1)?));
    values.push(("input.bias".into(), Tensor::new(&input[width..], &Device::Cpu)?));
    values.push(("output.weight".into(), Tensor::zeros((HORIZON, width), DType::F32, &Device::Cpu)?));
    values.push(("output.bias".into(), Tensor::zeros(HORIZON, DType::F32, &Device::Cpu)?));
    for (name, value) in values {
        vars.data().lock().expect("nobody else").insert(name, Var::from_tensor(&value)?);
    }
    let forecaster = Forecaster::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), scale)?;

    let parameters = Parameters::from_varmap(&vars)?;
    let mut optimizer = AdamW::new(&parameters, AdamWOptions::default())?;
    let schedule = Schedule { lr: 5e-3, warmup: 20, steps: args.steps, min_lr: 5e-5, ..Schedule::default() };
    let windows = (series.len() - WINDOW - HORIZON + 1) as u64;
    for step in 0..args.steps {
        let (mut inputs, mut targets) = (Vec::<f32>::new(), Vec::<f32>::new());
        for row in 0..BATCH {
            let drawn = (step * BATCH + row) as u64;
            let order = Permutation::new(windows, args.seed + drawn / windows);
            let start = order.at(drawn % windows) as usize;
            inputs.extend(&scaled[start..start + WINDOW]);
            (start + 1..=start + WINDOW).for_each(|next| targets.extend(&scaled[next..next + HORIZON]));
        }
        let inputs = Tensor::from_vec(inputs, (BATCH, WINDOW), &Device::Cpu)?;
        let targets = Tensor::from_vec(targets, (BATCH, WINDOW, HORIZON), &Device::Cpu)?;
        let loss = (forecaster.forward(&inputs)? - targets)?.abs()?.mean_all()?;
        let mut gradients = Gradients::of(&loss, &parameters)?;
        gradients.clip(1.0)?;
        optimizer.step(&gradients, schedule.at(step))?;
        if (step + 1) % 50 == 0 {
            println!("step {} error {:.3}", step + 1, scale.1 * f64::from(loss.to_scalar::<f32>()?));
        }
    }
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    vars.save(args.out.join("forecaster.safetensors"))?;
    std::fs::write(args.out.join("forecaster.json"), json!(scale).to_string())?;
    Ok(forecaster)
}

/// Hours of something that people use: more by day, less on weekends, more in some weeks than in others, and never quite so.
fn made(hours: usize, seed: u64) -> Vec<f32> {
    let mut chance = Chance(seed ^ 0x5eed);
    let (mut level, mut swing) = (0.0, 0.0);
    let wave = |t: usize, period: usize| (std::f32::consts::TAU * (t % period) as f32 / period as f32).sin();
    let hour = |t: usize| {
        level = 0.97 * level + 0.4 * chance.normal(); // weather
        swing = 0.995 * swing + 0.02 * chance.normal();
        let day = (1.0 + swing) * (3.0 * wave(t, DAY) + 1.2 * wave(2 * t + 5, DAY));
        let weekend = if t % WEEK >= 5 * DAY { 0.4 } else { 1.0 };
        20.0 + level + weekend * (4.0 + day) + 0.2 * chance.normal()
    };
    (0..hours).map(hour).collect()
}

fn read(path: &Path) -> Result<Vec<f32>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let number = |(i, line): (usize, &str)| {
        let number = line.trim().parse::<f32>().ok().filter(|number| number.is_finite());
        number.with_context(|| format!("{}: line {} is no number: {line}", path.display(), i + 1))
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(number).collect()
}

/// SplitMix64: the same numbers everywhere.
struct Chance(u64);

impl Chance {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Nearly normal: twelve uniform numbers, without their mean.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}
