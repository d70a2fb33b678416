//! Talks with a model: `cargo run --release --example chat`.
//!
//! The state of the model is kept between turns, so a turn costs only its own tokens.

#[path = "cli/mod.rs"]
mod cli;
#[path = "cli/dialogue.rs"]
mod dialogue;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use dialogue::Dialogue;
use mamba_generate::{
    CancelToken, FinishReason, GenerationState, Generator, SamplingConfig, TextGenerator, TextOptions,
    TextStream,
};
use mamba_model::{AtomicFile, InferenceCache, Model};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokenizers::Tokenizer;

const HELP: &str = "\
/save FILE   keep the conversation
/load FILE   go on with one that was kept
/reset       forget the conversation
/help        show this
/quit        end; Ctrl-D too
Ctrl-C stops a reply; what was said of it stays.";

/// Talks with a Mamba model.
///
/// By the chat template of the model if it has one; else as in a play. Lines may also come from a pipe: replies go to standard
/// output, all else to standard error.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    dialogue: dialogue::DialogueArgs,
    /// The most tokens of a reply.
    #[arg(long, default_value_t = 200)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: cli::SamplingArgs,
}

fn main() -> Result<()> {
    cli::start();
    let args = Args::parse();
    let sampling = args.sampling.config()?;
    let (model, source) = cli::load(&args.model)?;
    let tokenizer = cli::tokenizer(&args.model, &model, source.as_ref())?;
    let default = cli::is_default(&args.model);
    let dialogue = Dialogue::new(&args.dialogue, default, source.as_ref(), &tokenizer)?;
    eprintln!("{}\n{HELP}\n", dialogue.describe());
    let mut eos_tokens = cli::eos_tokens(&model, Some(&tokenizer));
    eos_tokens.extend(dialogue.end());
    let mut chat = Chat {
        model: &model,
        tokenizer: &tokenizer,
        dialogue,
        sampling,
        eos_tokens,
        max_new_tokens: args.max_new_tokens,
        interrupt: Interrupt::new()?,
        past: None,
    };
    let mut editor = DefaultEditor::new()?;
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
            Err(ReadlineError::Interrupted) => eprintln!("/quit or Ctrl-D ends"),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ctrl-C: during a reply it stops the reply, else the program.
struct Interrupt {
    cancel: CancelToken,
    replying: Arc<AtomicBool>,
}

impl Interrupt {
    fn new() -> Result<Self> {
        let (cancel, replying) = (CancelToken::new(), Arc::new(AtomicBool::new(false)));
        let (handler, busy) = (cancel.clone(), replying.clone());
        ctrlc::set_handler(move || match busy.load(Relaxed) {
            true => handler.cancel(),
            false => std::process::exit(130),
        })
        .context("Ctrl-C cannot be caught")?;
        Ok(Self { cancel, replying })
    }

    fn during<T>(&self, reply: impl FnOnce() -> T) -> T {
        self.cancel.reset();
        self.replying.store(true, Relaxed);
        let outcome = reply();
        self.replying.store(false, Relaxed);
        outcome
    }
}

/// What was said: for the model, and as text with all special tokens.
struct Past {
    state: GenerationState<InferenceCache>,
    text: String,
}

struct Chat<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    dialogue: Dialogue,
    sampling: SamplingConfig,
    eos_tokens: Vec<u32>,
    max_new_tokens: usize,
    interrupt: Interrupt,
    past: Option<Past>,
}

impl Chat<'_> {
    fn obey(&mut self, line: &str) -> Result<ControlFlow<()>> {
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match command {
            "/save" => self.save(file(rest)?)?,
            "/load" => self.load(file(rest)?)?,
            "/reset" => {
                self.past = None;
                self.dialogue.reset();
                eprintln!("[the conversation is forgotten]");
            }
            "/help" => eprintln!("{HELP}"),
            "/quit" => return Ok(ControlFlow::Break(())),
            _ if command.starts_with('/') => bail!("there is no {command}; /help shows what there is"),
            _ => {
                let reply = self.interrupt.during(|| self.reply(line));
                let (past, reply) = reply?;
                self.past = Some(past);
                self.dialogue.add(line, reply);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Reads what is new, and shows the reply as it comes.
    fn reply(&self, said: &str) -> Result<(Past, String)> {
        let past = self.past.as_ref();
        let prompt = self.dialogue.prompt(past.map_or("", |past| &past.text), said)?;
        // A template may write the past anew: then all of it is read again.
        let known = past.filter(|past| prompt.starts_with(&past.text));
        let new = &prompt[known.map_or(0, |past| past.text.len())..];
        let start = known.is_none() && self.dialogue.wants_special_tokens();
        let mut builder = Generator::builder(self.model)
            .prompt(&cli::encode(self.tokenizer, new, start)?)
            .sampling(self.sampling.build()?)
            .max_new_tokens(self.max_new_tokens)
            .eos_tokens(&self.eos_tokens)
            .cancel_token(&self.interrupt.cancel);
        if let Some(past) = known {
            builder = builder.resume(past.state.fork(self.model)?);
        }
        let stop_strings = self.dialogue.separator().map(String::from).into_iter().collect();
        let options = TextOptions { stop_strings, ..Default::default() };
        let mut text = TextGenerator::new(builder.build()?, self.tokenizer, options)?;
        let mut reply = String::new();
        for piece in &mut text {
            let piece = piece?;
            cli::show(&piece)?;
            reply += &piece;
        }
        cli::show("\n")?;
        let (reason, generator) = (text.finish_reason(), text.into_generator());
        let timings = generator.timings();
        eprintln!(
            "[{} tokens read, {} generated at {:.0} tokens/s, ended by {}]\n",
            timings.prompt_tokens,
            timings.generated_tokens,
            timings.tokens_per_s().unwrap_or_default(),
            match reason {
                Some(FinishReason::Cancelled) => "Ctrl-C".into(),
                reason => reason.map_or("nothing", FinishReason::as_str).replace('_', " "),
            },
        );
        let mut stream =
            TextStream::new(self.tokenizer).skip_special_tokens(false).after(generator.prompt())?;
        let mut text = prompt;
        for &id in generator.generated() {
            text += &stream.push(id)?.unwrap_or_default();
        }
        text += &stream.flush()?.unwrap_or_default();
        Ok((self.separate(Past { state: generator.state()?, text })?, reply))
    }

    /// Ends the paragraph if a reply was cut short.
    fn separate(&self, past: Past) -> Result<Past> {
        let Some(separator) = self.dialogue.separator().filter(|end| !past.text.ends_with(end)) else {
            return Ok(past);
        };
        // The next turn reads it, so that Ctrl-C is heeded.
        let generator = Generator::builder(self.model)
            .resume(past.state)
            .prompt(&cli::encode(self.tokenizer, separator, false)?)
            .sampling(self.sampling.build()?)
            .build()?;
        Ok(Past { state: generator.state()?, text: past.text + separator })
    }

    /// Two files: the state, and beside it what was said. Neither takes its place before the disk has both.
    fn save(&self, path: &Path) -> Result<()> {
        let past = self.past.as_ref().context("there is no conversation yet")?;
        let tokens = past.state.tokens().len();
        let notes = serde_json::json!({
            "tokens": tokens,
            "text": past.text,
            "messages": self.dialogue.messages(),
        });
        let written = |path: &Path, bytes: &[u8]| -> Result<AtomicFile> {
            let fail = || path.display().to_string();
            let mut file = AtomicFile::create(path).with_context(fail)?;
            file.write_all(bytes).and_then(|()| file.sync()).with_context(fail)?;
            Ok(file)
        };
        let beside = notes_of(path);
        ensure!(!beside.is_dir(), "{} is a folder", beside.display());
        let state = written(path, &past.state.to_bytes(self.model)?)?;
        let notes = written(&beside, notes.to_string().as_bytes())?;
        state.commit().with_context(|| path.display().to_string())?;
        notes.commit().with_context(|| beside.display().to_string())?;
        eprintln!("[saved after {tokens} tokens]");
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let mut state = GenerationState::load(self.model, path)?;
        let kept = Generator::builder(self.model).sampling(self.sampling.build()?);
        if kept.resume(state.fork(self.model)?).build().is_err() {
            state = state.without_sampling();
            eprintln!("[saved with other options of sampling: goes on with those of now]");
        }
        let tokens = state.tokens().len();
        let beside = notes_of(path);
        let read = || -> Result<_> {
            let mut notes: serde_json::Value = serde_json::from_slice(&std::fs::read(&beside)?)?;
            ensure!(notes["tokens"] == tokens, "belongs to another state than {}", path.display());
            let text = notes["text"].as_str().context("has no `text`")?.to_owned();
            Ok((text, serde_json::from_value(notes["messages"].take())?))
        };
        let (text, messages) = read().with_context(|| beside.display().to_string())?;
        self.past = Some(Past { state, text });
        self.dialogue.set_messages(messages);
        eprintln!("[goes on after {tokens} tokens]");
        Ok(())
    }
}

fn file(name: &str) -> Result<&Path> {
    let name = name.trim();
    ensure!(!name.is_empty(), "expected the name of a file behind the command");
    Ok(Path::new(name))
}

/// The file beside a state that holds what was said.
fn notes_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}
