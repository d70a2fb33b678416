//! Writes a checkpoint in another format: `cargo run --release --example convert -- --model M --to FOLDER`.

#[path = "cli/mod.rs"]
mod cli;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use clap::Parser;

/// Reads a checkpoint of any format and writes it as safetensors, in the layout of Hugging Face if that has words for
/// it, else in that of state-spaces. The tokenizer is copied.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// The folder to write, which must not hold a model yet.
    #[arg(long)]
    to: PathBuf,
    /// The dtype to write.
    #[arg(long, value_enum, default_value_t = cli::Precision::F16)]
    save_as: cli::Precision,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    ensure!(!args.to.join("config.json").exists(), "{} holds a model already", args.to.display());
    let (model, source) = cli::load(&args.model)?;
    let dtype = DType::from(args.save_as);
    let spinner = cli::spinner(format!("writing {}", args.to.display()));
    model.save_pretrained(&args.to, dtype)?;
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        if let Some(path) = source.file(name)? {
            std::fs::copy(&path, args.to.join(name)).with_context(|| path.display().to_string())?;
        }
    }
    spinner.finish_and_clear();
    let elements: usize = model.parameters().iter().map(|(_, x)| x.elem_count()).sum();
    println!("{}: {} tensors, {elements} parameters", args.to.display(), model.parameters().len());
    Ok(())
}
