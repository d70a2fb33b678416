//! Prompts of chat models: the templates that come with tokenizers.

mod python;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::error::{BoxError, Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: usually `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// Makes a turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A chat template: how a conversation is written as one text for a model to continue.
///
/// Templates are Jinja, as in the `chat_template` of `tokenizer_config.json`, and see what transformers gives them: `messages`,
/// `add_generation_prompt`, the special tokens such as `bos_token`, the functions `raise_exception` and `strftime_now` (in UTC),
/// Python's methods of strings, lists and dictionaries, and `tojson` with Python's spacing and keys in the order given.
///
/// # Example
/// ```
/// use mamba_generate::{ChatTemplate, Message};
///
/// let config = r#"{
///     "eos_token": "<|end|>",
///     "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
/// }"#;
/// let template = ChatTemplate::from_tokenizer_config(config)?;
/// let prompt = template.render(&[Message::new("user", "Hello! ")], true)?;
/// assert_eq!(prompt, "user: Hello!<|end|>\nassistant:");
/// # Ok::<(), mamba_generate::Error>(())
/// ```
///
/// # Source
/// `apply_chat_template` of transformers.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the others, by name.
    tokens: Vec<(String, String)>,
}

const NAME: &str = "chat_template";

fn fail(message: impl Into<BoxError>) -> Error {
    Error::ChatTemplate(message.into())
}

impl ChatTemplate {
    /// Makes one from the text of a template, without special tokens.
    ///
    /// # Errors
    /// If the template is no Jinja.
    pub fn new(template: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(fail)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", python::strftime_now);
        environment.add_filter("tojson", python::tojson);
        environment.add_template_owned(NAME, without_generation_tags(template)).map_err(fail)?;
        Ok(Self { environment, tokens: Vec::new() })
    }

    /// Makes one from the text of a `tokenizer_config.json`: its `chat_template`, the one named `default` if there are several,
    /// and its special tokens.
    ///
    /// # Errors
    /// If the text is no JSON, has no template, or the template is no Jinja.
    pub fn from_tokenizer_config(json: &str) -> Result<Self> {
        let config: serde_json::Value = serde_json::from_str(json).map_err(fail)?;
        let several = |templates: &[serde_json::Value]| {
            let named = |template: &&serde_json::Value| template["name"] == "default";
            templates
                .iter()
                .find(named)
                .or(templates.first())
                .and_then(|t| t["template"].as_str().map(String::from))
        };
        let template = match &config["chat_template"] {
            serde_json::Value::String(template) => Some(template.clone()),
            serde_json::Value::Array(templates) => several(templates),
            _ => None,
        };
        let template = template.ok_or_else(|| fail("tokenizer_config.json has no `chat_template`"))?;
        let mut made = Self::new(&template)?;
        for (name, value) in
            config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"))
        {
            if let Some(token) = value.as_str().or(value["content"].as_str()) {
                made = made.with_token(name, token);
            }
        }
        Ok(made)
    }

    /// Tells the template a special token, such as `bos_token`.
    #[must_use]
    pub fn with_token(mut self, name: &str, token: &str) -> Self {
        self.tokens.retain(|(known, _)| known != name);
        self.tokens.push((name.into(), token.into()));
        self
    }

    /// The text of a conversation; with `add_generation_prompt`, up to where the model is to answer.
    ///
    /// # Errors
    /// If the template refuses the conversation or fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(&messages, add_generation_prompt, &())
    }

    /// As [`render`](Self::render), for messages with more than a role and a content, and with more variables for the
    /// template, such as `tools`.
    ///
    /// # Errors
    /// If the template refuses the conversation or fails.
    pub fn render_with(
        &self,
        messages: &impl Serialize,
        add_generation_prompt: bool,
        variables: &impl Serialize,
    ) -> Result<String> {
        let tokens: std::collections::BTreeMap<&str, &str> =
            self.tokens.iter().map(|(name, token)| (name.as_str(), token.as_str())).collect();
        let own = context! { messages => Value::from(Serde(messages)), add_generation_prompt };
        let variables = Value::from(Serde(variables));
        let variables = if variables.is_none() {
            context! {}
        } else {
            variables
        };
        let all = context! { ..own, ..variables, ..Value::from(Serde(tokens)) };
        self.environment.get_template(NAME).and_then(|template| template.render(all)).map_err(fail)
    }
}

/// `{% generation %}` marks what the assistant says, for training; to the text it means nothing.
fn without_generation_tags(template: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(template.len()), template);
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + length];
        out += &rest[..start];
        match tag.trim_start_matches("{%").trim_matches(['-', '+']).trim() {
            "generation" => out += &tag.replace("generation", "if true"),
            "endgeneration" => out += &tag.replace("endgeneration", "endif"),
            _ => out += tag,
        }
        rest = &rest[start + length..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String> {
        let messages = [Message::new("user", " Hi! "), Message::new("assistant", "Yes?")];
        ChatTemplate::new(template)?.render(&messages, true)
    }

    #[test]
    fn generation_tags_mean_nothing() {
        let template =
            "{% for m in messages %}{%- generation -%} {{ m.content }} {% endgeneration %}|{% endfor %}";
        assert_eq!(render(template).unwrap(), " Hi!  |Yes? |");
    }

    #[test]
    fn what_a_template_says_is_told() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(error.to_string(), "the chat template failed");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("roles must alternate"), "{source}");
        assert!(ChatTemplate::new("{% for %}").is_err());
        assert!(ChatTemplate::from_tokenizer_config("{").is_err());
        let error = ChatTemplate::from_tokenizer_config("{}").unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("has no `chat_template`"));
    }

    #[test]
    fn configurations_say_tokens_in_two_ways_and_may_have_several_templates() {
        let config = r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null, "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}]}"#;
        let template = ChatTemplate::from_tokenizer_config(config).unwrap();
        assert_eq!(template.render(&[Message::new("user", "a")], false).unwrap(), "<s>a</s>");
    }

    #[test]
    fn more_variables_and_other_messages() {
        let template = ChatTemplate::new("{{ tools | tojson }}{{ messages[0].tool_calls[0].name }}").unwrap();
        let messages = serde_json::json!([{"role": "assistant", "tool_calls": [{"name": "look"}]}]);
        let variables = serde_json::json!({"tools": [{"name": "look", "n": 1}]});
        let text = template.render_with(&messages, false, &variables).unwrap();
        assert_eq!(text, r#"[{"name": "look", "n": 1}]look"#); // in the order given, as in Python
    }
}
