//! Trains a published model further, all of it or adapters: `cargo run --release --example finetune -- --data text.txt`.

#[path = "cli/mod.rs"]
mod cli;
#[path = "cli/training.rs"]
mod training;

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use clap::Parser;
use mamba_model::Model;
use mamba_train::{LoraConfig, Schedule, TrainOptions, TrainableModel, load_adapter, save_adapter};

/// Trains any model that `generate` loads further on text files: low-rank adapters (LoRA), or with --full everything.
///
/// Adapters are saved in PEFT's format, and merged into the model beside them. Everything else is as in the example `train`, but the
/// defaults: 200 steps after 20 of warm-up, at 1e-3 without decay for adapters, at 1e-4 with a decay of 0.1 for --full.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    run: training::RunArgs,
    /// A folder or a repository on the Hub; a small model of Shakespeare's manner if not given.
    #[arg(long)]
    model: Option<String>,
    /// Branch, tag or commit on the Hub.
    #[arg(long, default_value = "main")]
    revision: String,
    /// A tokenizer.json, or a repository that has one; that of the model if not given.
    #[arg(long)]
    tokenizer: Option<String>,
    /// Train all parameters, no adapters.
    #[arg(long)]
    full: bool,
    /// Modules that get adapters.
    #[arg(long, value_delimiter = ',', default_value = "in_proj,out_proj")]
    targets: Vec<String>,
    /// Parameters to train as they are, such as A_log,D,dt_bias.
    #[arg(long, value_delimiter = ',')]
    train: Vec<String>,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Their scale times the rank.
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// Scale by the root of the rank.
    #[arg(long)]
    rslora: bool,
    /// Train the length of each row too.
    #[arg(long)]
    dora: bool,
    /// Adapters to merge into the model first, in PEFT's format.
    #[arg(long)]
    adapter: Option<PathBuf>,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let processes = args.run.processes()?;
    let model_args = cli::ModelArgs {
        model: args.model.clone(),
        revision: args.revision.clone(),
        tokenizer: args.tokenizer.clone(),
        dtype: args.run.dtype,
        device: processes.device.clone(),
    };
    let (mut base, source) = cli::load(&model_args)?;
    let tokenizer = cli::tokenizer(&model_args, &base, source.as_ref())?;
    if let Some(folder) = &args.adapter {
        base = load_adapter(&base, folder).with_context(|| folder.display().to_string())?.merged()?;
    }
    let lora = LoraConfig {
        rank: args.rank,
        alpha: args.alpha,
        rank_stabilized: args.rslora,
        dora: args.dora,
        targets: args.targets.clone(),
        train: args.train.clone(),
    };
    let dtype = args.run.model_dtype();
    let model = match args.full {
        true => TrainableModel::new(&base, dtype)?,
        false => TrainableModel::lora(&base, &lora, dtype, args.run.seed)?,
    };
    let name = source.describe();
    // Adapters bear a higher learning rate, and no decay.
    let (lr, weight_decay) = if args.full { (1e-4, 0.1) } else { (1e-3, 0.0) };
    let mut defaults = TrainOptions {
        schedule: Schedule { lr, min_lr: lr / 100.0, steps: 200, warmup: 20, ..Schedule::default() },
        ..TrainOptions::default()
    };
    defaults.optimizer.weight_decay = weight_decay;
    training::run(training::Task {
        args: &args.run,
        processes: &processes,
        tokenizer: &tokenizer,
        model,
        options: args.run.train_options(defaults)?,
        export: &|model, folder| {
            let whole: Model = model.snapshot(DType::F32)?;
            if args.full {
                return Ok(whole.save_pretrained(folder, DType::F32)?);
            }
            save_adapter(model, &lora, &name, &folder.join("adapter"))?;
            Ok(whole.merged()?.save_pretrained(folder, DType::F32)?)
        },
    })
}
