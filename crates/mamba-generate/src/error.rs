//! What can go wrong between logits and text.

/// Any error of a model or a tokenizer, as they come in many types.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// What this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between logits and text.
///
/// Messages say who complains, about which argument, what it got and what it expected. The errors of the model and of
/// the tokenizer are kept whole as [`source`](std::error::Error::source).
///
/// # Example
/// ```
/// let error = mamba_generate::TopP::new(1.5).unwrap_err();
/// assert_eq!(error.to_string(), "top_p: `p` is 1.5, expected a number above 0 and at most 1");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter is outside its domain.
    #[error("{op}: `{argument}` is {got}, expected {expected}")]
    InvalidArgument {
        /// Who complains.
        op: &'static str,
        /// The name of the parameter.
        argument: &'static str,
        /// Its value, as text.
        got: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A prompt without tokens: there is nothing whose logits could be sampled.
    #[error("generator: `prompt` is empty, expected at least one token id")]
    EmptyPrompt,
    /// A token of the prompt that the model does not know.
    #[error("generator: `prompt` holds token {id} at position {position}, expected ids below {vocab_size}")]
    TokenOutOfRange {
        /// The token id.
        id: u32,
        /// Where it stands in the prompt, from 0.
        position: usize,
        /// How many tokens the model knows.
        vocab_size: usize,
    },
    /// The model returned a number of logits that is not its own vocabulary's size.
    #[error("generator: the model returned {got} logits for position {position}, expected {expected}")]
    LogitsLength {
        /// How many came.
        got: usize,
        /// The model's `vocab_size`.
        expected: usize,
        /// The position of the token to choose: how many tokens precede it.
        position: usize,
    },
    /// A logit that is NaN or plus infinity, which no distribution can be made of.
    #[error("sampling: the logit of token {id} at position {position} is {value}, expected a number")]
    InvalidLogit {
        /// The token whose logit it is.
        id: u32,
        /// The position of the token to choose: how many tokens precede it.
        position: usize,
        /// The logit.
        value: f32,
    },
    /// No token is left to choose: every logit is minus infinity, or a filter removed every token.
    #[error("sampling: no token at position {position} has a logit above minus infinity")]
    NoCandidates {
        /// The position of the token to choose: how many tokens precede it.
        position: usize,
    },
    /// The model failed; its own error is the source.
    #[error("the model failed in `{during}` at position {position}")]
    Model {
        /// The method of [`CausalLm`](crate::CausalLm) that failed.
        during: &'static str,
        /// How many tokens precede the one that was to be chosen.
        position: usize,
        /// The model's error.
        source: BoxError,
    },
    /// A drafter that does not know the tokens of the model it is to help.
    #[error("speculative: the draft has a vocabulary of {draft} tokens, expected that of the model, {model}")]
    DraftVocabulary {
        /// How many tokens the drafter knows.
        draft: usize,
        /// How many the model knows.
        model: usize,
    },
    /// The tokenizer of a GGUF file cannot be used.
    #[error("gguf: `{key}` {message}")]
    Gguf {
        /// The key of the file.
        key: String,
        /// What is wrong with its value, to be read behind the key.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the operating system said: a part of the message, so no [`source`](std::error::Error::source), which those
        /// who print a chain of errors would print again.
        cause: std::io::Error,
    },
    /// A saved generation cannot be used.
    #[error("saved generation: {0}")]
    State(String),
    /// A chat template cannot be read, or refuses a conversation; its own words are the source.
    #[error("the chat template failed")]
    ChatTemplate(#[source] BoxError),
    /// A grammar cannot be used, or no text can be generated that keeps to it.
    #[error("grammar: {0}")]
    Grammar(String),
    /// The tokenizer could not decode; its own error is the source.
    #[error("the tokenizer failed to decode")]
    Tokenizer(#[source] BoxError),
}

impl Error {
    pub(crate) fn invalid(
        op: &'static str,
        argument: &'static str,
        got: impl ToString,
        expected: &'static str,
    ) -> Self {
        Self::InvalidArgument { op, argument, got: got.to_string(), expected }
    }

    /// Says what a model was asked for when it failed, and after how many tokens.
    pub(crate) fn model(during: &'static str, position: usize) -> impl FnOnce(BoxError) -> Self {
        move |source| Self::Model { during, position, source }
    }
}
