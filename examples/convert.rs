//! Writes a checkpoint in another format: `cargo run --release --example convert -- --model M --to FOLDER`.

#[path = "cli/mod.rs"]
mod cli;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use clap::Parser;
use indicatif::ProgressBar;
use mamba_generate::{tokenizer_config_to_gguf, tokenizer_to_gguf};
use mamba_model::Model;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata, TensorSpec, Value};
use mamba_model::checkpoint::{Checkpoint, LocalDir, ModelSource};
use mamba_model::families::{self, FAMILIES, Family};
use tokenizers::Tokenizer;

/// What belongs to a model beside its weights.
const BESIDE: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Reads a checkpoint of any format and writes it in another one, with its tokenizer and chat template, and reports every tensor.
///
/// A name that ends in .gguf is written as one GGUF file, in the layout of llama.cpp, plain or quantized. Any other name is
/// a folder with safetensors, in the layout of Hugging Face if that has words for the model, else in that of state-spaces, a torch file, or as
/// `--layout` says.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// The folder or the file *.gguf to write, which must not be there yet.
    #[arg(long)]
    to: PathBuf,
    /// The type to write: f32, f16 or bf16, and in GGUF also q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, q3_k, q2_k.
    #[arg(long, default_value = "f16")]
    save_as: GgmlType,
    /// The layout of a folder: state-spaces, or a model_type of transformers, such as mamba2.
    #[arg(long)]
    layout: Option<String>,
    /// Say nothing about single tensors.
    #[arg(long, short)]
    quiet: bool,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let to_gguf = args.to.extension().is_some_and(|extension| extension == "gguf");
    let exists = if to_gguf { args.to.exists() } else { args.to.join("config.json").exists() };
    ensure!(!exists, "{} holds a model already", args.to.display());
    let kinds: Vec<_> = GgmlType::of_weights().filter(|kind| to_gguf || is_plain(*kind)).collect();
    ensure!(
        kinds.contains(&args.save_as),
        "--save-as {}: expected one of {} for {}",
        args.save_as,
        kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", "),
        if to_gguf { "GGUF" } else { "safetensors" }
    );
    let layout = args.layout.as_deref().map(|name| {
        ensure!(!to_gguf, "--layout {name}: a GGUF file has a layout of its own");
        let known = || FAMILIES.map(Family::name).join(", ");
        Family::named(name).with_context(|| format!("--layout {name}: expected one of {}", known()))
    });
    let layout = layout.transpose()?;
    let (model, source) = cli::load(&args.model)?;
    let written = if to_gguf {
        gguf(&args, &model, source.as_ref())?
    } else {
        folder(&args, &model, layout, source.as_ref())?
    };
    let (mut elements, mut bytes) = (0, 0);
    for tensor in &written {
        let size = tensor.bytes().unwrap_or(0);
        if !args.quiet {
            println!("{:44} {:>6} {:?}, {size} bytes", tensor.name, tensor.kind, tensor.shape);
        }
        elements += tensor.shape.iter().product::<usize>();
        bytes += size;
    }
    let per_element = 8.0 * bytes as f64 / elements as f64;
    println!(
        "{}: {} tensors, {elements} parameters, {bytes} bytes, {per_element:.2} bits each",
        args.to.display(),
        written.len()
    );
    Ok(())
}

/// Whether safetensors are written in a type.
fn is_plain(kind: GgmlType) -> bool {
    matches!(kind, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
}

/// The keys of a tokenizer and of what belongs to it.
fn tokenizer_keys(tokenizer: &Tokenizer, source: &dyn ModelSource) -> Result<Metadata> {
    let mut keys = match cli::tokenizer_config(source, tokenizer)? {
        Some(config) => tokenizer_config_to_gguf(&config.to_string(), tokenizer)?,
        None => Metadata::default(),
    };
    // What is put around texts is what begins and ends them.
    let own = tokenizer_to_gguf(tokenizer)?;
    keys.extend(own.iter().map(|(key, value)| (key.to_owned(), value.clone())));
    Ok(keys)
}

/// Fills as numbers are written: files hold other tensors than models, of as many numbers.
fn bar(args: &Args, model: &Model) -> ProgressBar {
    let numbers = model.parameters().iter().map(|(_, x)| x.elem_count() as u64).sum();
    cli::bar(numbers, format!("writing {}", args.to.display()))
}

/// Writes one GGUF file with the model's tokenizer in it.
fn gguf(args: &Args, model: &Model, source: &dyn ModelSource) -> Result<Vec<TensorSpec>> {
    let mut extra = match cli::tokenizer(&args.model, model, source) {
        Ok(tokenizer) => tokenizer_keys(&tokenizer, source)?,
        Err(error) => {
            eprintln!("no tokenizer is written: {error:#}");
            Metadata::default()
        }
    };
    let name = args.to.file_stem().and_then(|stem| stem.to_str()).unwrap_or("model");
    extra.set("general.name", Value::String(name.into()));
    let bar = bar(args, model);
    let mut written = vec![];
    model.save_gguf(&args.to, args.save_as, extra, |tensor| {
        bar.inc(tensor.shape.iter().product::<usize>() as u64);
        written.push(tensor.clone());
    })?;
    bar.finish_and_clear();
    Ok(written)
}

/// Writes a folder with safetensors; files of the tokenizer are copied, or made from a GGUF file.
fn folder(
    args: &Args,
    model: &Model,
    layout: Option<&Family>,
    source: &dyn ModelSource,
) -> Result<Vec<TensorSpec>> {
    let dtype = args.save_as.dtype().unwrap_or(DType::F32); // `main` lets no other pass
    let family =
        layout.or_else(|| families::of(model.config())).context("no layout has words for the model")?;
    let bar = bar(args, model);
    model.save_pretrained_with(family, &args.to, dtype, |_, tensor| {
        bar.inc(tensor.shape.iter().product::<usize>() as u64);
    })?;
    bar.finish_and_clear();
    // Files that stand beside a GGUF file may belong to another model.
    if !cli::has_gguf_tokenizer(source) {
        for name in BESIDE {
            if let Some(path) = source.file(name)? {
                std::fs::copy(&path, args.to.join(name)).with_context(|| path.display().to_string())?;
            }
        }
    }
    let (tokenizer, config) = (args.to.join("tokenizer.json"), args.to.join("tokenizer_config.json"));
    if !tokenizer.exists()
        && let Ok(found) = cli::tokenizer(&args.model, model, source)
    {
        found.save(&tokenizer, false).map_err(|e| anyhow::anyhow!("{}: {e}", tokenizer.display()))?;
        if !config.exists()
            && let Some(said) = cli::tokenizer_config(source, &found)?
        {
            std::fs::write(&config, format!("{said:#}\n")).with_context(|| config.display().to_string())?;
        }
    }
    report(&args.to)
}

/// What stands in the folder that was written.
fn report(folder: &Path) -> Result<Vec<TensorSpec>> {
    let checkpoint = Checkpoint::open(&LocalDir::new(folder)?)?;
    let spec = |name: &str| {
        let info = checkpoint.info(name).with_context(|| format!("{name} has a type that is not known"))?;
        let kind = GgmlType::all().find(|kind| kind.dtype() == Some(info.dtype));
        let kind = kind.with_context(|| format!("{name} is {:?}, which has no name here", info.dtype))?;
        Ok(TensorSpec { name: name.to_string(), shape: info.shape.to_vec(), kind })
    };
    checkpoint.names().map(spec).collect()
}
