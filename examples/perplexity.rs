//! Scores a text: `cargo run --release --example perplexity -- --file F.txt`.

#[path = "cli/mod.rs"]
mod cli;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use mamba_model::{InferenceCache, Model};
use tokenizers::Tokenizer;

/// Measures how well a model predicts a text, and prints one JSON object: `tokens` that were predicted, `nll`, the
/// mean of their negative log-likelihoods in nats, and `ppl`, its exponential.
///
/// A text of any length runs in the same memory: the state is carried from window to window.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// The text to score.
    #[arg(long, required_unless_present = "ids", conflicts_with = "ids")]
    file: Option<PathBuf>,
    /// A safetensors file with token ids to score: a vector, or a matrix whose rows are scored one by one.
    #[arg(long, requires = "key")]
    ids: Option<PathBuf>,
    /// The name of the tensor in the file of ids.
    #[arg(long)]
    key: Option<String>,
    /// Tokens that are computed at once.
    #[arg(long, default_value_t = 512)]
    window: usize,
}

/// Bytes of a text that are read and encoded at once.
const PIECE: usize = 1 << 20;

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    ensure!(args.window > 0, "--window is 0, expected at least 1");
    let (model, source) = cli::load(&args.model)?;
    let mut score = Score::default();
    match (&args.file, &args.ids, &args.key) {
        (Some(file), ..) => {
            let tokenizer = cli::tokenizer(&args.model, &model, source.as_ref())?;
            score_text(&model, &tokenizer, file, args.window, &mut score)?;
        }
        (None, Some(ids), Some(key)) => {
            for row in read_ids(ids, key)? {
                let mut reader = Reader::new(&model, args.window)?;
                reader.read(&row, &mut score)?;
                reader.finish(&mut score)?;
            }
        }
        _ => bail!("give --file, or --ids with --key"),
    }
    ensure!(score.tokens > 0, "nothing to predict: a sequence needs at least two tokens");
    let nll = score.sum / score.tokens as f64;
    println!("{}", serde_json::json!({ "tokens": score.tokens, "nll": nll, "ppl": nll.exp() }));
    Ok(())
}

#[derive(Default)]
struct Score {
    tokens: usize,
    sum: f64,
}

/// Reads one sequence, window by window.
struct Reader<'a> {
    model: &'a Model,
    cache: InferenceCache,
    window: usize,
    /// Tokens that were not read yet.
    waiting: Vec<u32>,
}

impl<'a> Reader<'a> {
    fn new(model: &'a Model, window: usize) -> Result<Self> {
        Ok(Self { model, cache: model.new_cache(1)?, window, waiting: vec![] })
    }

    /// Takes tokens, and scores all windows that are full: a window predicts one token past itself.
    fn read(&mut self, ids: &[u32], score: &mut Score) -> Result<()> {
        self.waiting.extend(ids);
        let mut start = 0;
        while self.waiting.len() - start > self.window {
            let window = self.waiting[start..=start + self.window].to_vec();
            self.score(&window, score)?;
            start += self.window;
        }
        self.waiting.drain(..start);
        Ok(())
    }

    /// Scores what is left.
    fn finish(mut self, score: &mut Score) -> Result<()> {
        let rest = std::mem::take(&mut self.waiting);
        if rest.len() > 1 { self.score(&rest, score) } else { Ok(()) }
    }

    /// Reads all tokens but the last, and scores all but the first.
    fn score(&mut self, ids: &[u32], score: &mut Score) -> Result<()> {
        let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
        let inputs = Tensor::from_slice(inputs, (1, inputs.len()), self.model.device())?;
        let logits = self.model.forward(&inputs, Some(&mut self.cache))?.squeeze(0)?;
        let logits = logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        for (row, &target) in logits.iter().zip(targets) {
            let Some(&wanted) = row.get(target as usize) else {
                bail!("token id {target}, expected 0 to {}", row.len() - 1)
            };
            let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
            let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
            let nll = sum.ln() + f64::from(max) - f64::from(wanted);
            ensure!(nll.is_finite(), "the model gave logits that are not numbers at token {}", score.tokens);
            score.sum += nll;
            score.tokens += 1;
        }
        Ok(())
    }
}

/// Encodes and scores a file piece by piece.
fn score_text(
    model: &Model,
    tokenizer: &Tokenizer,
    file: &Path,
    window: usize,
    score: &mut Score,
) -> Result<()> {
    let context = || file.display().to_string();
    let size = std::fs::metadata(file).with_context(context)?.len();
    let bar = cli::spinner(String::new());
    let mut input = BufReader::new(File::open(file).with_context(context)?);
    let mut reader = Reader::new(model, window)?;
    let (mut bytes, mut done) = (vec![], 0);
    loop {
        let read =
            input.by_ref().take((PIECE - bytes.len().min(PIECE)) as u64 + 1).read_to_end(&mut bytes)?;
        let piece = if read == 0 { bytes.len() } else { cut(&bytes) };
        let text = std::str::from_utf8(&bytes[..piece])
            .with_context(|| format!("{}: not UTF-8 near byte {done}", file.display()))?;
        // No special tokens: a text is scored as it stands, however it is cut.
        let encoding =
            tokenizer.encode(text, false).map_err(|e| anyhow::anyhow!("{}: {e}", file.display()))?;
        reader.read(encoding.get_ids(), score)?;
        bytes.drain(..piece);
        done += piece as u64;
        bar.set_message(format!("{done} of {size} bytes, nll {:.4}", score.sum / score.tokens.max(1) as f64));
        if read == 0 {
            break;
        }
    }
    bar.finish_and_clear();
    reader.finish(score)
}

/// Where to cut a piece of a text so that both parts are encoded as the whole is: before the last whitespace that
/// follows something else, which no token of the published tokenizers spans.
fn cut(bytes: &[u8]) -> usize {
    if bytes.len() <= PIECE {
        return 0; // read on
    }
    let ends = |i: &usize| bytes[*i].is_ascii_whitespace() && !bytes[*i - 1].is_ascii_whitespace();
    (1..bytes.len()).rev().find(ends).unwrap_or(0)
}

/// The rows of a tensor of ids.
fn read_ids(file: &Path, key: &str) -> Result<Vec<Vec<u32>>> {
    let mut tensors =
        candle_core::safetensors::load(file, &Device::Cpu).with_context(|| file.display().to_string())?;
    let Some(ids) = tensors.remove(key) else {
        let mut names: Vec<String> = tensors.into_keys().collect();
        names.sort();
        bail!("{}: no tensor `{key}`; it has {}", file.display(), names.join(", "))
    };
    let rows = match ids.rank() {
        1 => ids.unsqueeze(0)?,
        2 => ids,
        _ => bail!("{}: `{key}` has shape {:?}, expected a vector or a matrix", file.display(), ids.dims()),
    };
    let checked = rows.to_dtype(DType::I64)?.to_vec2::<i64>()?.into_iter().map(|row| {
        let id = |id| u32::try_from(id).with_context(|| format!("{}: token id {id}", file.display()));
        row.into_iter().map(id).collect()
    });
    checked.collect()
}
