//! From a file of 500 MB to a model that is ready to run, beside reading the same bytes once:
//! `cargo bench -p mamba-benches --bench loading`.
//!
//! The file has the shapes of the published mamba2-130m in f32; the same model follows as GGUF, plain and quantized. All
//! files are in the cache of the operating system. `peers/loading_transformers.py` loads the same folder with transformers.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use mamba_model::Model;
use mamba_model::checkpoint::LocalDir;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata};
use mamba_model::config::{Mamba2Config, MixerSpec, ModelConfig};

/// Measures how long loading takes.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds; the best counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Layers of the model; 24 make 516 MB.
    #[arg(long, default_value_t = 24)]
    layers: usize,
    /// The folder for the files, which stay there; one of the system's that is removed if not given.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let temporary = std::env::temp_dir().join(format!("mamba-loading-{}", std::process::id()));
    let folder = args.folder.clone().unwrap_or_else(|| temporary.clone());
    std::fs::create_dir_all(&folder)?;
    let measured = measure(&args, &folder);
    if args.folder.is_none() {
        std::fs::remove_dir_all(&temporary)?;
    }
    measured
}

fn measure(args: &Args, folder: &Path) -> Result<()> {
    let (device, safetensors) = (Device::Cpu, folder.join("model.safetensors"));
    let kinds = [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_K];
    let gguf = |kind: GgmlType| folder.join(format!("{kind}.gguf"));
    if !safetensors.exists() {
        let mut config =
            ModelConfig::uniform(50280, 768, args.layers, MixerSpec::Mamba2(Mamba2Config::new(768)));
        config.padded_vocab_size = 50288;
        // Random: pages of zeros may be stored and read in other ways.
        let model = Model::random(&config, 0, &device)?;
        model.save_pretrained(folder, DType::F32)?;
        for kind in kinds {
            model.save_gguf(gguf(kind), kind, Metadata::default(), |_| {})?;
        }
    }
    println!("| file | MB | as | read once, ms | loaded, ms | ratio | first logits, ms |");
    println!("|---|---|---|---|---|---|---|");
    for path in [safetensors].into_iter().chain(kinds.map(gguf)) {
        for dtype in [DType::F32, DType::BF16] {
            let (mut read, mut load, mut logits) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
            let mut bytes = 0;
            for _ in 0..args.rounds {
                let start = Instant::now();
                bytes = std::hint::black_box(std::fs::read(&path)?).len();
                read = read.min(start.elapsed().as_secs_f64());
                let start = Instant::now();
                let model = Model::from_pretrained(&LocalDir::new(&path)?, dtype, &device)?;
                load = load.min(start.elapsed().as_secs_f64());
                let ids = Tensor::new(&[[1u32]], &device)?;
                let found = model.forward(&ids, None)?.to_dtype(DType::F32)?;
                logits = logits.min(start.elapsed().as_secs_f64());
                ensure!(found.sum_all()?.to_scalar::<f32>()?.is_finite(), "the logits are no numbers");
            }
            println!(
                "| {} | {:.0} | {} | {:.0} | {:.0} | {:.2} | {:.0} |",
                path.file_name().unwrap_or_default().display(),
                bytes as f64 * 1e-6,
                dtype.as_str(),
                read * 1e3,
                load * 1e3,
                load / read,
                logits * 1e3
            );
        }
    }
    Ok(())
}
