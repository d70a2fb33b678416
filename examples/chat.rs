//! Talks with a model: `cargo run --release --example chat`.
//!
//! The state of the model is kept between turns, so a turn costs only its own tokens.

#[path = "cli/mod.rs"]
mod cli;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use mamba_generate::{
    CancelToken, ChatTemplate, FinishReason, GenerationState, Generator, Message, SamplingConfig,
    TextGenerator, TextOptions,
};
use mamba_model::{InferenceCache, Model};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokenizers::Tokenizer;

const HELP: &str = "\
/save FILE   keep the conversation
/load FILE   go on with a conversation that was kept
/reset       forget the conversation
/quit        end; Ctrl-D too
Ctrl-C stops a reply";

/// Talks with a Mamba model.
///
/// The chat template of the model is used if it has one; else turns are those of a play.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// What the model is told first, if it has a chat template.
    #[arg(long)]
    system: Option<String>,
    /// Without a chat template: who you are.
    #[arg(long, default_value = "FIRST CITIZEN")]
    you: String,
    /// Without a chat template: who the model is.
    #[arg(long, default_value = "ROMEO")]
    name: String,
    /// The most tokens of a reply.
    #[arg(long, default_value_t = 300)]
    max_new_tokens: usize,
    /// How far from the likeliest tokens to stray; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Keep the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// The same seed gives the same replies.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let sampling = SamplingConfig {
        temperature: args.temperature,
        top_p: Some(args.top_p),
        seed: args.seed,
        ..Default::default()
    };
    sampling.build()?; // bad options are told before a model is loaded
    let (model, source) = cli::load(&args.model)?;
    let tokenizer = cli::tokenizer(&args.model, &model, source.as_ref())?;
    let style = match source.file("tokenizer_config.json")? {
        Some(path) => style(&args, &path)?,
        None => Style::play(&args),
    };
    let cancel = CancelToken::new();
    let handler = cancel.clone();
    ctrlc::set_handler(move || handler.cancel()).context("Ctrl-C cannot be caught")?;
    let mut chat =
        Chat { model: &model, tokenizer: &tokenizer, style, sampling, args: &args, cancel, past: None };
    let mut editor = DefaultEditor::new()?;
    eprintln!("{HELP}\n");
    loop {
        match editor.readline("> ") {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                let _ = editor.add_history_entry(line.as_str());
                match chat.obey(line.trim()) {
                    Ok(ControlFlow::Continue(())) => {}
                    Ok(ControlFlow::Break(())) => return Ok(()),
                    Err(error) => eprintln!("error: {error:#}"), // the conversation is as it was
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("(/quit or Ctrl-D ends)"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// How turns are written.
enum Style {
    Template { template: ChatTemplate, messages: Vec<Message> },
    Play { you: String, name: String },
}

impl Style {
    fn play(args: &Args) -> Self {
        Self::Play { you: args.you.clone(), name: args.name.clone() }
    }
}

fn style(args: &Args, tokenizer_config: &Path) -> Result<Style> {
    let json =
        std::fs::read_to_string(tokenizer_config).with_context(|| tokenizer_config.display().to_string())?;
    if !json.contains("\"chat_template\"") {
        return Ok(Style::play(args));
    }
    let template = ChatTemplate::from_tokenizer_config(&json)?;
    let messages = args.system.iter().map(|text| Message::new("system", text)).collect();
    Ok(Style::Template { template, messages })
}

/// What was said, for the model and as text.
struct Past {
    state: GenerationState<InferenceCache>,
    /// All of it, special tokens included.
    text: String,
}

struct Chat<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    style: Style,
    sampling: SamplingConfig,
    args: &'a Args,
    cancel: CancelToken,
    past: Option<Past>,
}

impl Chat<'_> {
    fn obey(&mut self, line: &str) -> Result<ControlFlow<()>> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "/save" => self.save(&file(rest)?)?,
            "/load" => self.load(&file(rest)?)?,
            "/reset" => self.reset(),
            "/quit" => return Ok(ControlFlow::Break(())),
            _ if command.starts_with('/') => eprintln!("{HELP}"),
            _ => self.turn(line)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Everything up to where the model is to answer.
    fn prompt(&mut self, said: &str) -> Result<String> {
        let past = self.past.as_ref().map_or("", |past| past.text.as_str());
        Ok(match &mut self.style {
            Style::Play { you, name } => format!("{past}{you}:\n{said}\n\n{name}:\n"),
            Style::Template { template, messages } => {
                let mut with = messages.clone();
                with.push(Message::new("user", said));
                let prompt = template.render(&with, true)?;
                *messages = with;
                prompt
            }
        })
    }

    fn turn(&mut self, said: &str) -> Result<()> {
        let before = match &self.style {
            Style::Template { messages, .. } => messages.len(),
            Style::Play { .. } => 0,
        };
        let outcome = self.reply(said);
        if let (Err(_), Style::Template { messages, .. }) = (&outcome, &mut self.style) {
            messages.truncate(before);
        }
        outcome
    }

    fn reply(&mut self, said: &str) -> Result<()> {
        let prompt = self.prompt(said)?;
        // A template may rewrite the past: then all of it is read again.
        let known = self.past.as_ref().filter(|past| prompt.starts_with(&past.text));
        let new = &prompt[known.map_or(0, |past| past.text.len())..];
        let encoding =
            self.tokenizer.encode(new, false).map_err(|e| anyhow!("the text cannot be encoded: {e}"))?;
        let mut builder = Generator::builder(self.model)
            .prompt(encoding.get_ids())
            .sampling(self.sampling.build()?)
            .max_new_tokens(self.args.max_new_tokens)
            .eos_tokens(&self.eos_tokens())
            .cancel_token(&self.cancel);
        if let Some(past) = known {
            builder = builder.resume(past.state.fork(self.model)?);
        }
        let stops = match &self.style {
            Style::Play { .. } => vec!["\n\n".to_owned()],
            Style::Template { .. } => vec![],
        };
        self.cancel.reset();
        let options = TextOptions { stop_strings: stops, ..Default::default() };
        let mut text = TextGenerator::new(builder.build()?, self.tokenizer, options)?;
        let mut reply = String::new();
        text.run(|piece| {
            reply += piece;
            let mut out = std::io::stdout().lock();
            match out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        println!();
        let (reason, generator) = (text.finish_reason(), text.into_generator());
        let timings = generator.timings();
        eprintln!(
            "[{} tokens read, {} generated, {:.0} a second, {}]\n",
            timings.prompt_tokens,
            timings.generated_tokens,
            timings.tokens_per_s().unwrap_or_default(),
            reason.map_or("nothing", FinishReason::as_str).replace('_', " "),
        );
        let generated = self.tokenizer.decode(generator.generated(), false);
        let text = prompt + &generated.map_err(|e| anyhow!("the reply cannot be decoded: {e}"))?;
        let state = generator.state()?;
        // The next turn begins a paragraph also if this one was stopped.
        self.past = Some(match matches!(self.style, Style::Play { .. }) && !text.ends_with("\n\n") {
            true => self.end_paragraph(text, state)?,
            false => Past { state, text },
        });
        if let Style::Template { messages, .. } = &mut self.style {
            messages.push(Message::new("assistant", reply));
        }
        Ok(())
    }

    /// The past, with an empty line read after it.
    fn end_paragraph(&self, text: String, state: GenerationState<InferenceCache>) -> Result<Past> {
        let end = self.tokenizer.encode("\n\n", false).map_err(|e| anyhow!("{e}"))?;
        let builder = Generator::builder(self.model).resume(state).prompt(end.get_ids());
        let mut generator = builder.sampling(self.sampling.build()?).build()?;
        generator.prefill()?;
        Ok(Past { state: generator.state()?, text: text + "\n\n" })
    }

    fn eos_tokens(&self) -> Vec<u32> {
        let configured = &self.model.config().eos_token_ids;
        match (configured.is_empty(), self.tokenizer.token_to_id("<|endoftext|>")) {
            (true, Some(id)) => vec![id],
            _ => configured.clone(),
        }
    }

    fn save(&self, path: &Path) -> Result<()> {
        let past = self.past.as_ref().context("there is no conversation yet")?;
        let messages = match &self.style {
            Style::Template { messages, .. } => messages.clone(),
            Style::Play { .. } => vec![],
        };
        past.state.save(self.model, path)?;
        let notes = serde_json::json!({ "text": past.text, "messages": messages });
        let beside = notes_of(path);
        mamba_model::write_atomically(&beside, notes.to_string().as_bytes())
            .with_context(|| beside.display().to_string())?;
        eprintln!("saved after {} tokens", past.state.tokens().len());
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let state = GenerationState::load(self.model, path)?;
        let beside = notes_of(path);
        let notes = std::fs::read_to_string(&beside).with_context(|| beside.display().to_string())?;
        let mut notes: serde_json::Value =
            serde_json::from_str(&notes).with_context(|| beside.display().to_string())?;
        let text = notes["text"].as_str().context("the notes of the conversation have no text")?.to_owned();
        if let Style::Template { messages, .. } = &mut self.style {
            *messages = serde_json::from_value(notes["messages"].take())?;
        }
        eprintln!("goes on after {} tokens", state.tokens().len());
        self.past = Some(Past { state, text });
        Ok(())
    }

    fn reset(&mut self) {
        self.past = None;
        if let Style::Template { messages, .. } = &mut self.style {
            messages.retain(|message| message.role == "system");
        }
    }
}

fn file(name: &str) -> Result<PathBuf> {
    let name = name.trim();
    anyhow::ensure!(!name.is_empty(), "name a file");
    Ok(name.into())
}

/// The file beside a state that holds what was said.
fn notes_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}
