//! Trains a language model from scratch: `cargo run --release --example train -- --data text.txt --steps 1000`.

#[path = "cli/mod.rs"]
mod cli;
#[path = "cli/training.rs"]
mod training;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use candle_core::DType;
use clap::{Parser, ValueEnum};
use mamba_model::Model;
use mamba_model::config::{Mamba1Config, Mamba2Config, MixerSpec, ModelConfig};
use mamba_train::{TrainOptions, TrainableModel};
use tokenizers::Tokenizer;

/// Trains a language model on text files, from random initial values.
///
/// Shows loss, speed and the time that is left, validates, generates a sample, and writes checkpoints, metrics.jsonl,
/// TensorBoard events and loss.svg. Ctrl-C saves; the same command goes on. The result loads as any published model.
///
/// Started several times, as torchrun, srun or Kubernetes do (RANK, WORLD_SIZE, MASTER_ADDR), it is one training on as many
/// GPUs, or CPUs, which share the work of each batch.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    run: training::RunArgs,
    /// A config.json that says what the model is made of, in the place of the flags below.
    #[arg(long)]
    model_config: Option<PathBuf>,
    /// The mixer of each layer.
    #[arg(long, value_enum, default_value_t = Mixer::Mamba2)]
    mixer: Mixer,
    /// Width of the model.
    #[arg(long, default_value_t = 192)]
    d_model: usize,
    /// Layers.
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// States a channel; 16 for mamba and 64 for mamba2 if not given.
    #[arg(long)]
    d_state: Option<usize>,
    /// Channels of a head of mamba2.
    #[arg(long, default_value_t = 32)]
    headdim: usize,
    /// A tokenizer.json; that of the model of this repository, for English, if not given.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mixer {
    Mamba,
    Mamba2,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let tokenizer =
        args.tokenizer.clone().unwrap_or_else(|| PathBuf::from(cli::DEFAULT_MODEL).join("tokenizer.json"));
    let tokenizer =
        Tokenizer::from_file(&tokenizer).map_err(|e| anyhow::anyhow!("{}: {e}", tokenizer.display()))?;
    let config = model_config(&args, &tokenizer)?;
    let processes = args.run.processes()?;
    let device = cli::device(&processes.device)?;
    let start = Model::random(&config, args.run.seed, &device)?;
    let model = TrainableModel::new(&start, args.run.model_dtype())?;
    training::run(training::Task {
        args: &args.run,
        processes: &processes,
        tokenizer: &tokenizer,
        model,
        options: args.run.train_options(TrainOptions::default())?,
        export: &|model, folder| Ok(model.snapshot(DType::F32)?.save_pretrained(folder, DType::F32)?),
    })
}

fn model_config(args: &Args, tokenizer: &Tokenizer) -> Result<ModelConfig> {
    let ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
    if let Some(path) = &args.model_config {
        let config = ModelConfig::from_file(path)?;
        ensure!(ids <= config.vocab_size, "the tokenizer has {ids} ids, the model {}", config.vocab_size);
        return Ok(config);
    }
    let width = args.d_model;
    let mixer = match args.mixer {
        Mixer::Mamba => {
            let default = Mamba1Config::new(width);
            MixerSpec::Mamba1(Mamba1Config { d_state: args.d_state.unwrap_or(default.d_state), ..default })
        }
        Mixer::Mamba2 => MixerSpec::Mamba2(Mamba2Config {
            d_state: args.d_state.unwrap_or(64),
            headdim: args.headdim,
            ..Mamba2Config::new(width)
        }),
    };
    Ok(ModelConfig::uniform(ids, width, args.layers, mixer))
}
