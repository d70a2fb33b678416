//! Streams text from a model: `cargo run --release --example generate`.

#[path = "cli/mod.rs"]
mod cli;

use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use mamba_generate::{
    FinishReason, Generator, Grammar, GrammarCompiler, TextGenerator, TextOptions, Timings,
};
use mamba_model::Model;
use tokenizers::Tokenizer;

/// What the default model is asked if nothing is.
const DEFAULT_PROMPT: &str = "ROMEO:\nWhat light through yonder window breaks?\n\n";

/// Streams text from a Mamba model.
///
/// Without arguments, text in Shakespeare's manner from a model that is part of this repository.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// The text to continue; standard input if neither this nor --prompt-ids is given.
    #[arg(long, conflicts_with = "prompt_ids")]
    prompt: Option<String>,
    /// The token ids to continue, such as 5,17,3; needs no tokenizer.
    #[arg(long)]
    prompt_ids: Option<String>,
    /// The most tokens to generate.
    #[arg(long, default_value_t = 200)]
    max_new_tokens: usize,
    /// Go on after the token that ends a text.
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    sampling: cli::SamplingArgs,
    #[command(flatten)]
    constraint: Constraint,
    /// Stop before this text; may be given more than once.
    #[arg(long)]
    stop: Vec<String>,
    /// Print one JSON object instead of the text.
    #[arg(long)]
    json: bool,
}

/// What the text must be.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Constraint {
    /// The text is JSON of the schema in this file.
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// A regular expression matches the whole text.
    #[arg(long, value_name = "PATTERN")]
    regex: Option<String>,
    /// The text is of the grammar in this file, in the syntax of Lark.
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl Constraint {
    fn compile(&self, compiler: impl FnOnce() -> Result<GrammarCompiler>) -> Result<Option<Grammar>> {
        let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| path.display().to_string());
        Ok(match self {
            Self { json_schema: Some(path), .. } => Some(compiler()?.json_schema(&read(path)?)?),
            Self { regex: Some(pattern), .. } => Some(compiler()?.regex(pattern)?),
            Self { grammar: Some(path), .. } => Some(compiler()?.lark(&read(path)?)?),
            _ => None,
        })
    }
}

/// What is printed in the end.
struct Summary {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: Option<String>,
    finish_reason: Option<FinishReason>,
    timings: Timings,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let sampling = args.sampling.config()?;
    let (model, source) = cli::load(&args.model)?;
    let ids = args.prompt_ids.as_deref().map(cli::parse_ids).transpose()?;
    let tokenizer = match ids {
        Some(_) if args.model.tokenizer.is_none() && !cli::has_tokenizer(source.as_ref())? => None,
        _ => Some(cli::tokenizer(&args.model, &model, source.as_ref())?),
    };
    let prompt_ids = match (ids, &tokenizer) {
        (Some(ids), _) => ids,
        (None, Some(tokenizer)) => cli::encode(tokenizer, &prompt(&args)?, true)?,
        (None, None) => bail!("a text needs a tokenizer"),
    };
    ensure!(
        !prompt_ids.is_empty(),
        "the prompt is empty: give one with --prompt, --prompt-ids or standard input"
    );

    let eos_tokens = cli::eos_tokens(&model, tokenizer.as_ref());
    let grammar = args.constraint.compile(|| {
        let tokenizer =
            tokenizer.as_ref().context("a constraint needs a tokenizer: name one with --tokenizer")?;
        Ok(GrammarCompiler::new(tokenizer, model.config().vocab_size, &eos_tokens)?)
    })?;
    let seed = sampling.seed;
    let mut sampling = sampling.build()?;
    if let Some(grammar) = grammar {
        sampling.push_front(grammar);
    }
    let generator = Generator::builder(&model)
        .prompt(&prompt_ids)
        .sampling(sampling)
        .max_new_tokens(args.max_new_tokens)
        .eos_tokens(&eos_tokens)
        .ignore_eos(args.ignore_eos)
        .build()?;
    let summary = match &tokenizer {
        Some(tokenizer) => stream_text(generator, tokenizer, &args)?,
        None => stream_ids(generator, &args)?,
    };
    if args.json { print_json(&summary) } else { print_line(&summary, seed) }
}

/// The prompt from the command line or standard input; the default model has one of its own.
fn prompt(args: &Args) -> Result<String> {
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    }
    let default = cli::is_default(&args.model);
    if std::io::stdin().is_terminal() {
        ensure!(default, "no prompt: give one with --prompt, --prompt-ids or standard input");
        return Ok(DEFAULT_PROMPT.into());
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = sender.send(std::io::stdin().read_to_string(&mut text).map(|_| text));
    });
    // A pipe that nobody writes to must not keep the default model from speaking.
    let patience = if default { Duration::from_secs(2) } else { Duration::MAX };
    match receiver.recv_timeout(patience) {
        Ok(text) => {
            let text = text.context("standard input cannot be read")?;
            Ok(if text.is_empty() && default { DEFAULT_PROMPT.into() } else { text })
        }
        Err(_) => Ok(DEFAULT_PROMPT.into()),
    }
}

fn stream_text(generator: Generator<Model>, tokenizer: &Tokenizer, args: &Args) -> Result<Summary> {
    let prompt_ids = generator.prompt().to_vec();
    if !args.json {
        cli::show(&cli::decode(tokenizer, &prompt_ids, true)?)?;
    }
    let options = TextOptions { stop_strings: args.stop.clone(), ..Default::default() };
    let mut pieces = TextGenerator::new(generator, tokenizer, options)?;
    let mut text = String::new();
    for piece in &mut pieces {
        let piece = piece?;
        if !args.json {
            cli::show(&piece)?;
        }
        text += &piece;
    }
    Ok(Summary {
        prompt_ids,
        ids: pieces.ids().to_vec(),
        text: Some(text),
        finish_reason: pieces.finish_reason(),
        timings: pieces.generator().timings(),
    })
}

fn stream_ids(mut generator: Generator<Model>, args: &Args) -> Result<Summary> {
    ensure!(args.stop.is_empty(), "--stop needs a tokenizer: name one with --tokenizer");
    let mut ids = vec![];
    for token in &mut generator {
        let token = token?;
        if !args.json {
            cli::show(&format!("{}{}", if ids.is_empty() { "" } else { "," }, token.id))?;
        }
        ids.push(token.id);
    }
    Ok(Summary {
        prompt_ids: generator.prompt().to_vec(),
        ids,
        text: None,
        finish_reason: generator.finish_reason(),
        timings: generator.timings(),
    })
}

fn print_json(summary: &Summary) -> Result<()> {
    let object = serde_json::json!({
        "prompt_ids": summary.prompt_ids,
        "ids": summary.ids,
        "text": summary.text,
        "finish_reason": summary.finish_reason.map(FinishReason::as_str),
        "prompt_tokens_per_s": summary.timings.prompt_tokens_per_s(),
        "tokens_per_s": summary.timings.tokens_per_s(),
    });
    cli::show(&format!("{object}\n"))
}

/// On standard error, so that a redirected text stays a text.
fn print_line(summary: &Summary, seed: u64) -> Result<()> {
    cli::show("\n")?;
    let speed = |per_s: Option<f64>| per_s.map_or("-".into(), |n| format!("{n:.0}"));
    eprintln!(
        "\n[{} prompt tokens at {} tokens/s, {} generated at {} tokens/s, ended by {}, seed {seed}]",
        summary.prompt_ids.len(),
        speed(summary.timings.prompt_tokens_per_s()),
        summary.ids.len(),
        speed(summary.timings.tokens_per_s()),
        summary.finish_reason.map_or("nothing", FinishReason::as_str).replace('_', " "),
    );
    Ok(())
}
