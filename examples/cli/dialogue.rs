//! How turns of a conversation are written for a model: by its chat template, or as a play.

use anyhow::Result;
use clap::Args;
use mamba_generate::{ChatTemplate, Message};
use mamba_model::checkpoint::ModelSource;
use tokenizers::Tokenizer;

use crate::cli;

/// Who talks.
#[derive(Debug, Args)]
pub struct DialogueArgs {
    /// What the model is told first.
    #[arg(long)]
    pub system: Option<String>,
    /// Without a chat template: who you are; User if not given, JULIET for the default model.
    #[arg(long)]
    pub you: Option<String>,
    /// Without a chat template: who the model is; Assistant if not given, ROMEO for the default model.
    #[arg(long)]
    pub name: Option<String>,
}

/// The manner in which turns are written.
pub enum Dialogue {
    /// As the model learned it.
    Template {
        template: Box<ChatTemplate>,
        /// The token that ends a turn, if the tokenizer says so.
        end: Option<u32>,
        messages: Vec<Message>,
    },
    /// A name, what is said, an empty line.
    Play { beginning: String, you: String, name: String },
}

impl Dialogue {
    /// By the template that comes with the model; a play if there is none.
    pub fn new(
        args: &DialogueArgs,
        shakespeare: bool,
        source: &dyn ModelSource,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        if let Some((template, end)) = template_of(source, tokenizer)? {
            let (template, messages) = (Box::new(template), args.system.iter());
            let messages = messages.map(|text| Message::new("system", text)).collect();
            return Ok(Self::Template { template, end, messages });
        }
        let (you, name) = if shakespeare { ("JULIET", "ROMEO") } else { ("User", "Assistant") };
        Ok(Self::Play {
            beginning: args.system.as_ref().map(|text| format!("{text}\n\n")).unwrap_or_default(),
            you: args.you.clone().unwrap_or(you.into()),
            name: args.name.clone().unwrap_or(name.into()),
        })
    }

    /// A line for the user.
    pub fn describe(&self) -> String {
        match self {
            Self::Template { .. } => "Turns are written by the chat template of the model.".into(),
            Self::Play { you, name, .. } => format!(
                "The model has no chat template, so it never learned to answer: it continues a play in which you are {you} \
                 and it is {name} (--you, --name)."
            ),
        }
    }

    /// The whole text up to where the model is to speak, after what was written before.
    pub fn prompt(&self, past: &str, said: &str) -> Result<String> {
        match self {
            Self::Template { template, messages, .. } => {
                let mut messages = messages.clone();
                messages.push(Message::new("user", said));
                Ok(template.render(&messages, true)?)
            }
            Self::Play { beginning, you, name } => {
                let past = if past.is_empty() { beginning } else { past };
                Ok(format!("{past}{you}:\n{said}\n\n{name}:\n"))
            }
        }
    }

    /// Whether the text of the first prompt is to get what the tokenizer puts before a text; templates write it themselves.
    pub fn wants_special_tokens(&self) -> bool {
        matches!(self, Self::Play { .. })
    }

    /// The text at which a reply ends, and which follows it in any case.
    pub fn separator(&self) -> Option<&'static str> {
        match self {
            Self::Template { .. } => None,
            Self::Play { .. } => Some("\n\n"),
        }
    }

    /// The token that ends a turn, beside those that end a text.
    pub fn end(&self) -> Option<u32> {
        match self {
            Self::Template { end, .. } => *end,
            Self::Play { .. } => None,
        }
    }

    /// Notes a turn that was completed.
    pub fn add(&mut self, said: &str, reply: String) {
        if let Self::Template { messages, .. } = self {
            messages.extend([Message::new("user", said), Message::new("assistant", reply)]);
        }
    }

    /// Forgets all turns.
    pub fn reset(&mut self) {
        if let Self::Template { messages, .. } = self {
            messages.retain(|message| message.role == "system");
        }
    }

    /// What there is to keep.
    pub fn messages(&self) -> &[Message] {
        match self {
            Self::Template { messages, .. } => messages,
            Self::Play { .. } => &[],
        }
    }

    /// Goes on from what was kept.
    pub fn set_messages(&mut self, kept: Vec<Message>) {
        if let Self::Template { messages, .. } = self {
            *messages = kept;
        }
    }
}

/// The chat template of a model and the token that ends a turn.
fn template_of(
    source: &dyn ModelSource,
    tokenizer: &Tokenizer,
) -> Result<Option<(ChatTemplate, Option<u32>)>> {
    let config = cli::tokenizer_config(source, tokenizer)?;
    let Some(config) = config.filter(|config| !config["chat_template"].is_null()) else { return Ok(None) };
    let end = &config["eos_token"];
    let end = end.as_str().or(end["content"].as_str()).and_then(|token| tokenizer.token_to_id(token));
    Ok(Some((ChatTemplate::from_tokenizer_config(&config.to_string())?, end)))
}
