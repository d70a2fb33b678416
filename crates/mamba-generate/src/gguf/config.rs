//! Chat templates and the names of special tokens, which Hugging Face keeps in `tokenizer_config.json`.

use mamba_model::checkpoint::gguf::{Array, Metadata, Value};
use serde_json::{Map, Value as Json, json};
use tokenizers::Tokenizer;

use super::{BOS, EOS, bad};
use crate::Result;

const TEMPLATE: &str = "tokenizer.chat_template";
const TEMPLATES: &str = "tokenizer.chat_templates";
/// The name of the template that is used where none is asked for.
const DEFAULT: &str = "default";

/// Special tokens by their names there and here.
const SPECIAL: [(&str, &str); 4] = [
    ("bos_token", BOS),
    ("eos_token", EOS),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
];

/// The keys of a GGUF file for what a `tokenizer_config.json` says: the chat templates, and which token begins a text, ends
/// one, stands for the unknown and pads.
///
/// What [`tokenizer_to_gguf`](super::tokenizer_to_gguf) says of the same keys is what is put around texts, and goes first:
/// extend these keys with those. A template in a file of its own, `chat_template.jinja`, is to be put into the JSON before.
///
/// # Errors
/// If `config` is no JSON.
///
/// # Example
/// ```
/// use mamba_generate::{ChatTemplate, tokenizer_config_from_gguf, tokenizer_config_to_gguf};
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/mamba2-shakespeare/tokenizer.json");
/// let tokenizer = tokenizers::Tokenizer::from_file(path)?;
/// let config = r#"{"eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"}"#;
/// let metadata = tokenizer_config_to_gguf(config, &tokenizer)?;
/// assert_eq!(metadata.str("tokenizer.chat_template"), Some("{{ messages[0].content }}{{ eos_token }}"));
/// assert_eq!(metadata.u64("tokenizer.ggml.eos_token_id"), Some(0));
///
/// let again: serde_json::Value = serde_json::from_str(&tokenizer_config_from_gguf(&metadata, &tokenizer))?;
/// assert_eq!(again["eos_token"], "<|endoftext|>");
/// # Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
/// ```
pub fn tokenizer_config_to_gguf(config: &str, tokenizer: &Tokenizer) -> Result<Metadata> {
    let config: Json = serde_json::from_str(config)
        .map_err(|e| bad(TEMPLATE, format!("cannot be made: the configuration is no JSON: {e}")))?;
    let mut metadata = Metadata::default();
    for (name, key) in SPECIAL {
        // Either the text, or the token as an object.
        let token = config[name].as_str().or(config[name]["content"].as_str());
        if let Some(id) = token.and_then(|token| tokenizer.token_to_id(token)) {
            metadata.set(key, Value::U32(id));
        }
    }
    let mut names = vec![];
    for (name, template) in templates(&config["chat_template"]) {
        let key = if name == DEFAULT { TEMPLATE.to_owned() } else { format!("{TEMPLATE}.{name}") };
        metadata.set(key, Value::String(template.to_owned()));
        names.extend((name != DEFAULT).then(|| name.to_owned()));
    }
    if !names.is_empty() {
        metadata.set(TEMPLATES, Array::String(names));
    }
    Ok(metadata)
}

/// Templates by name, of one or of a list.
fn templates(json: &Json) -> Vec<(&str, &str)> {
    match json {
        Json::String(only) => vec![(DEFAULT, only)],
        Json::Array(several) => {
            several.iter().filter_map(|t| Some((t["name"].as_str()?, t["template"].as_str()?))).collect()
        }
        _ => vec![],
    }
}

/// The text of a `tokenizer_config.json` that says what a GGUF file says of chat templates and special tokens.
///
/// `tokenizer` is that of the file, which has the tokens themselves. This is what
/// [`ChatTemplate::from_tokenizer_config`](crate::ChatTemplate::from_tokenizer_config) and transformers read, beside the
/// `tokenizer.json`. What the file says nothing of is left out.
///
/// # Example
/// See [`tokenizer_config_to_gguf`].
pub fn tokenizer_config_from_gguf(metadata: &Metadata, tokenizer: &Tokenizer) -> String {
    let mut config = Map::new();
    for (name, key) in SPECIAL {
        let id = metadata.u64(key).and_then(|id| u32::try_from(id).ok());
        if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
            config.insert(name.into(), token.into());
        }
    }
    let named = metadata.strings(TEMPLATES).unwrap_or_default().iter().filter_map(|name| {
        let template = metadata.str(&format!("{TEMPLATE}.{name}"))?;
        Some(json!({ "name": name, "template": template }))
    });
    let mut named: Vec<Json> = named.collect();
    match (metadata.str(TEMPLATE), named.is_empty()) {
        (Some(only), true) => config.insert("chat_template".into(), only.into()),
        (None, true) => None,
        (default, false) => {
            let default = default.map(|template| json!({ "name": DEFAULT, "template": template }));
            named.splice(0..0, default);
            config.insert("chat_template".into(), named.into())
        }
    };
    // The class that takes everything else from tokenizer.json.
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    format!("{:#}\n", Json::Object(config))
}
