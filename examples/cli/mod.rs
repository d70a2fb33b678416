//! What the examples share: finding a model, its tokenizer and a device, with progress on long work.
#![allow(dead_code)]

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use mamba_generate::{SamplingConfig, tokenizer_config_from_gguf, tokenizer_from_gguf};
use mamba_model::Model;
use mamba_model::checkpoint::gguf::Metadata;
use mamba_model::checkpoint::{Checkpoint, HubBuilder, LocalDir, ModelSource, Progress};
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// The model that is part of the repository.
pub const DEFAULT_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/mamba-tinyshakespeare");

/// The tokenizer of the models that state-spaces published, which come without one.
const STATE_SPACES_TOKENIZER: &str = "EleutherAI/gpt-neox-20b";

/// Which model, and how to run it.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A folder, a file of weights, a repository on the Hugging Face Hub such as state-spaces/mamba2-130m, or a file in
    /// one, owner/name/file.gguf; a small model of Shakespeare's manner if not given.
    #[arg(long)]
    pub model: Option<String>,
    /// Branch, tag or commit on the Hub.
    #[arg(long, default_value = "main")]
    pub revision: String,
    /// A tokenizer.json, a GGUF file, or a repository that has one; that of the model if not given.
    #[arg(long)]
    pub tokenizer: Option<String>,
    /// What weights and activations are computed in; states are always f32.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub dtype: Precision,
    /// auto, cpu, cuda or cuda:N; auto takes a GPU if the program was built for one and there is one.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

/// The dtypes a model may run in.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Precision {
    F32,
    F16,
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// How far from the likeliest tokens to stray; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Keep the k likeliest tokens.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Keep the likeliest tokens that together reach this probability.
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Keep tokens at least this likely in proportion to the likeliest.
    #[arg(long)]
    pub min_p: Option<f64>,
    /// Divide the logits of tokens that have occurred by this.
    #[arg(long)]
    pub repetition_penalty: Option<f64>,
    /// The same seed gives the same text; from the clock if not given.
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// Checked, so that bad options are told before a model is loaded.
    pub fn config(&self) -> Result<SamplingConfig> {
        let config = SamplingConfig {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed.unwrap_or_else(|| {
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.subsec_nanos().into())
            }),
            ..Default::default()
        };
        config.build()?;
        Ok(config)
    }
}

/// Prepares the process: the first thing that `main` does.
pub fn start() {
    // SAFETY: no other thread runs yet. Without this, idle threads of candle spin and starve the busy ones.
    unsafe { std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0") };
}

/// Whether the model that is part of the repository is meant.
pub fn is_default(args: &ModelArgs) -> bool {
    args.model.is_none()
}

/// Finds the model and loads it.
pub fn load(args: &ModelArgs) -> Result<(Model, Box<dyn ModelSource>)> {
    let device = device(&args.device)?;
    let dtype = DType::from(args.dtype);
    let source = source(args.model.as_deref().unwrap_or(DEFAULT_MODEL), &args.revision)?;
    let spinner = spinner(format!("loading {}", source.describe()));
    let model = Model::from_pretrained(source.as_ref(), dtype, &device);
    spinner.finish_and_clear();
    Ok((model?, source))
}

/// A folder or file if there is one of that name, else a repository on the Hub or a file in one.
pub fn source(name: &str, revision: &str) -> Result<Box<dyn ModelSource>> {
    let path = Path::new(name);
    let parts: Vec<&str> = name.splitn(3, '/').collect();
    let weights = parts.get(2).filter(|file| file.ends_with(".gguf") || file.ends_with(".safetensors"));
    let repository = (parts.len() == 2 || weights.is_some()) && !name.starts_with(['.', '/', '~']);
    if path.exists() || !repository {
        return Ok(Box::new(LocalDir::new(path).with_context(|| {
            format!(
                "{name} is neither a folder or file here nor a repository such as state-spaces/mamba2-130m"
            )
        })?));
    }
    let mut hub = HubBuilder::from_env(parts[..2].join("/")).revision(revision).on_progress(show_download());
    if let Some(weights) = weights {
        hub = hub.weights(*weights);
    }
    Ok(Box::new(hub.build()?))
}

/// The keys of a GGUF file, if the source is one and they describe a tokenizer.
fn gguf_keys(source: &dyn ModelSource) -> Option<Metadata> {
    // Where another format was found the model itself has reported what is amiss.
    let checkpoint = Checkpoint::open(source).ok()?;
    checkpoint.metadata().filter(|keys| keys.get("tokenizer.ggml.model").is_some()).cloned()
}

/// Whether the tokenizer of a model is within its GGUF file.
pub fn has_gguf_tokenizer(source: &dyn ModelSource) -> bool {
    gguf_keys(source).is_some()
}

/// What a `tokenizer_config.json` says, its chat template above all: of a GGUF file with a tokenizer and a template, else that
/// beside the weights, with `chat_template.jinja` where the template has a file of its own.
pub fn tokenizer_config(source: &dyn ModelSource, tokenizer: &Tokenizer) -> Result<Option<Value>> {
    let keys = gguf_keys(source).map(|keys| tokenizer_config_from_gguf(&keys, tokenizer));
    let within: Option<Value> = keys.map(|text| serde_json::from_str(&text)).transpose()?;
    if within.as_ref().is_some_and(|config| !config["chat_template"].is_null()) {
        return Ok(within);
    }
    let read = |name: &str| -> Result<Option<String>> {
        let Some(path) = source.file(name)? else { return Ok(None) };
        Ok(Some(std::fs::read_to_string(&path).with_context(|| path.display().to_string())?))
    };
    let beside = read("tokenizer_config.json")?;
    let beside =
        beside.map(|text| serde_json::from_str(&text)).transpose().context("tokenizer_config.json")?;
    match read("chat_template.jinja")? {
        Some(template) => {
            let mut config = beside.or(within).unwrap_or_else(|| json!({}));
            config["chat_template"] = template.into();
            Ok(Some(config))
        }
        None => Ok(beside.or(within)),
    }
}

/// Whether a model comes with a tokenizer.
pub fn has_tokenizer(source: &dyn ModelSource) -> Result<bool> {
    Ok(tokenizer_of(source)?.is_some())
}

/// The tokenizer to use with a model; checked to know no id that the model does not.
pub fn tokenizer(args: &ModelArgs, model: &Model, source: &dyn ModelSource) -> Result<Tokenizer> {
    let tokenizer = match &args.tokenizer {
        Some(name) if name.ends_with(".json") && Path::new(name).is_file() => {
            read_tokenizer(Path::new(name))?
        }
        Some(name) => tokenizer_of(self::source(name, "main")?.as_ref())?
            .with_context(|| format!("{name} has no tokenizer"))?,
        None => match tokenizer_of(source)? {
            Some(tokenizer) => tokenizer,
            // The published vocabulary, whatever it was padded to.
            None if (50277..=50288).contains(&model.config().vocab_size) => {
                tokenizer_of(self::source(STATE_SPACES_TOKENIZER, "main")?.as_ref())?
                    .with_context(|| format!("{STATE_SPACES_TOKENIZER} has no tokenizer"))?
            }
            None => {
                bail!("{} has no tokenizer: name one with --tokenizer, or pass ids", source.describe())
            }
        },
    };
    let ids = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
    let known = model.config().vocab_size;
    ensure!(ids <= known, "the tokenizer has ids up to {}, the model knows {known}", ids - 1);
    Ok(tokenizer)
}

/// The tokenizer that comes with a model: that of a GGUF file, or a file beside the weights.
fn tokenizer_of(source: &dyn ModelSource) -> Result<Option<Tokenizer>> {
    match gguf_keys(source) {
        Some(keys) => Ok(Some(tokenizer_from_gguf(&keys)?)),
        None => source.file("tokenizer.json")?.map(|path| read_tokenizer(&path)).transpose(),
    }
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

/// The tokens of a text, for the start of one with what the tokenizer puts before it.
pub fn encode(tokenizer: &Tokenizer, text: &str, start: bool) -> Result<Vec<u32>> {
    let encoding =
        tokenizer.encode(text, start).map_err(|e| anyhow::anyhow!("the text cannot be encoded: {e}"))?;
    Ok(encoding.get_ids().to_vec())
}

/// The text of tokens.
pub fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
    tokenizer
        .decode(ids, skip_special_tokens)
        .map_err(|e| anyhow::anyhow!("the tokens cannot be decoded: {e}"))
}

/// The tokens that end a text: those of the configuration, else the one that the tokenizers of these models have.
pub fn eos_tokens(model: &Model, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    match &model.config().eos_token_ids[..] {
        [] => tokenizer.and_then(|tokenizer| tokenizer.token_to_id("<|endoftext|>")).into_iter().collect(),
        ids => ids.to_vec(),
    }
}

/// Prints text at once, also a part of a line.
pub fn show(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Turns `auto`, `cpu`, `cuda` or `cuda:N` into a device.
pub fn device(name: &str) -> Result<Device> {
    let cuda = |index: usize| {
        ensure!(
            candle_core::utils::cuda_is_available(),
            "this program was built without CUDA: add --features cuda to the cargo command"
        );
        Device::new_cuda(index).with_context(|| {
            format!(
                "no CUDA device {index} can be used: see that nvidia-smi lists it, else install or update NVIDIA's driver \
                 (https://www.nvidia.com/drivers), or take --device cpu"
            )
        })
    };
    match name {
        "auto" => Ok(cuda(0).unwrap_or(Device::Cpu)),
        "cpu" => Ok(Device::Cpu),
        "cuda" => cuda(0),
        other => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => cuda(index),
            None => bail!("--device {other}: expected auto, cpu, cuda or cuda:N"),
        },
    }
}

/// Something that turns while work is under way, if a person is watching.
pub fn spinner(message: String) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Something that fills while so many steps are done, if a person is watching.
pub fn bar(steps: u64, message: String) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps).with_style(style).with_message(message)
}

/// Draws a bar for each file that comes from the Hub.
fn show_download() -> impl Fn(Progress<'_>) + Send + Sync {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = Mutex::new(ProgressBar::hidden());
    move |progress| {
        let Ok(mut bar) = bar.lock() else { return };
        match progress {
            Progress::Started { file, total, resumed } => {
                *bar = ProgressBar::new(total.unwrap_or(0))
                    .with_style(style.clone())
                    .with_message(file.to_owned());
                bar.set_position(resumed);
                if !std::io::stderr().is_terminal() {
                    eprintln!("downloading {file} ({} bytes)", total.unwrap_or(0));
                }
            }
            Progress::Advanced { bytes, .. } => bar.set_position(bytes),
            Progress::Retrying { file, reason, wait } => {
                bar.suspend(|| eprintln!("{file}: {reason}; trying again in {:.0} s", wait.as_secs_f64()))
            }
            Progress::Finished { .. } => bar.finish_and_clear(),
            _ => {}
        }
    }
}

/// Token ids as in `5,17,3`.
pub fn parse_ids(text: &str) -> Result<Vec<u32>> {
    text.split(',').map(|id| id.trim().parse().with_context(|| format!("`{id}` is not a token id"))).collect()
}
