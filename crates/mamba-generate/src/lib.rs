//! From logits to text: samplers, stop rules, and streams of valid UTF-8.
//!
//! A model says how likely each next token is; this crate chooses one, feeds it back, and turns the tokens into text. It
//! asks of a model only what [`CausalLm`] says, which [`mamba_model::Model`] implements.
//!
//! ```text
//! prompt ids ─▶ CausalLm::prefill ─▶ logits ─▶ filters ─▶ sampler ─▶ token ─▶ TextStream ─▶ StopStrings ─▶ piece of text
//!                      CausalLm::step ◀────────────────────────────────┘
//! ```
//!
//! Each arrow is a part that serves alone as well:
//! - [`LogitsFilter`]s edit the [`Candidates`]: [`LogitBias`], [`BannedTokens`], [`ForcedTokens`], [`NoRepeatNgram`],
//!   [`MinNewTokens`]; [`RepetitionPenalty`], [`OccurrencePenalty`], [`Dry`]; [`Temperature`], [`TopNSigma`], [`TopK`], [`TopP`],
//!   [`MinP`], [`Typical`], [`Xtc`]; or a [`Chain`] of any, your own included. A [`Sampler`] chooses: [`ArgMax`], the seeded
//!   [`Multinomial`], or [`Mirostat`].
//! - [`SamplingConfig`] describes the usual combination, and [`Sampling`] is any combination ready to use.
//! - [`Generator`] is the iterator of tokens. It never computes a token that nobody asked for, and says what the model's
//!   cache has read when it ends, so that a conversation can go on.
//! - [`GenerationState`] is a generation as a value: copied, saved to a file, gone on with. [`score`] says how likely a model
//!   thinks a given text is.
//! - [`Batch`] generates many texts at once, whose rows come and go. [`PrefixCache`] keeps states of prompts for others that
//!   begin alike. [`Speculative`] generates the same text in fewer evaluations. [`beam_search`] looks for the likeliest
//!   text, and [`generate`](generate()) has the options of mamba_ssm.
//! - [`CancelToken`] stops a generation from another thread. With the feature `stream` there is an asynchronous stream of what
//!   a thread generates, with `chat` the chat templates of tokenizers, with `grammar` a filter that keeps the text to a JSON schema, a
//!   regular expression or a grammar.
//! - [`TextStream`] makes text of tokens, [`StopStrings`] ends it, and [`TextGenerator`] is all of it in one iterator.
//!
//! # Example
//! A model that says "hello" for ever, one letter at a time, and a text streamed from it.
//! ```
//! use mamba_generate::{BoxError, CausalLm, FinishReason, Generator, SamplingConfig, TextGenerator, TextOptions};
//! use tokenizers::Tokenizer;
//! use tokenizers::decoders::fuse::Fuse;
//! use tokenizers::models::bpe::BPE;
//!
//! /// Knows the letters of "helo ", and that l follows e, and so on. Its state is how many letters it has read.
//! struct Hello;
//!
//! const TEXT: &[u32] = &[0, 1, 2, 2, 3, 4]; // h e l l o and a space
//!
//! impl CausalLm for Hello {
//!     type Cache = usize;
//!
//!     fn vocab_size(&self) -> usize {
//!         5
//!     }
//!     fn new_cache(&self) -> Result<usize, BoxError> {
//!         Ok(0)
//!     }
//!     fn prefill(&self, ids: &[u32], read: &mut usize, logits: &mut Vec<f32>) -> Result<(), BoxError> {
//!         *read += ids.len();
//!         logits.clear();
//!         logits.resize(5, 0.0);
//!         logits[TEXT[*read % TEXT.len()] as usize] = 10.0;
//!         Ok(())
//!     }
//!     fn step(&self, id: u32, read: &mut usize, logits: &mut Vec<f32>) -> Result<(), BoxError> {
//!         self.prefill(&[id], read, logits)
//!     }
//! }
//!
//! let vocab = [("h", 0), ("e", 1), ("l", 2), ("o", 3), (" ", 4)].map(|(letter, id)| (letter.to_string(), id));
//! let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, vec![]).build()?);
//! tokenizer.with_decoder(Some(Fuse::new()));
//!
//! let sampling = SamplingConfig { temperature: 0.5, top_p: Some(0.9), seed: 1, ..Default::default() }.build()?;
//! let generator = Generator::builder(&Hello).prompt(&[0]).sampling(sampling).max_new_tokens(100).build()?;
//! let options = TextOptions { stop_strings: vec!["o h".into()], ..Default::default() };
//! let mut text = TextGenerator::new(generator, &tokenizer, options)?;
//!
//! let mut continuation = String::new();
//! for piece in &mut text {
//!     continuation += &piece?; // or print it, and flush
//! }
//! assert_eq!(continuation, "ell");
//! assert_eq!(text.finish_reason(), Some(FinishReason::StopString));
//! assert_eq!(text.ids(), [1, 2, 2, 3, 4, 0]);
//! # Ok::<(), BoxError>(())
//! ```
//!
//! # How fast
//! On a CPU, set `CANDLE_BARRIER_POOL_SPIN_LIMIT=0` in the environment, or first of all in `main`, before any other thread: candle keeps a
//! pool of threads beside rayon's whose idle ones spin, and starve those that work. A library cannot set it for you.
//!
//! # What holds
//! - The same seed, options and logits give the same tokens, in every version: see [`Multinomial`].
//! - Filters and samplers allocate nothing per token once their buffers have grown to the size of the vocabulary.
//! - The pieces of a text, joined, are what the tokenizer makes of all tokens at once; no piece holds half a character or
//!   any part of a stop string.
//! - Memory does not depend on the length of a prompt, but for what attention remembers: prompts are read in pieces of
//!   [`PROMPT_PIECE`] tokens, and who cancels waits for one of them at most, and loses nothing.
//! - Bad parameters are errors when they are set; NaN among the logits is an error that names the token, never a token.

mod batch;
mod beam;
mod cancel;
mod candidates;
#[cfg(feature = "chat")]
mod chat;
mod error;
#[cfg(test)]
mod fake;
mod filter;
mod generate;
mod generator;
mod gguf;
#[cfg(feature = "grammar")]
mod grammar;
mod lm;
mod logprobs;
mod mirostat;
mod model;
mod prefix_cache;
mod prompt;
mod rng;
mod sampler;
mod sampling;
mod saved;
mod score;
mod sequence;
mod speculative;
mod state;
mod stop;
#[cfg(feature = "stream")]
mod stream;
mod text;
mod text_generator;
mod timings;
mod token;

pub use batch::{Batch, BatchEvent, RowId};
pub use beam::{BeamOptions, EarlyStopping, Hypothesis, beam_search};
pub use cancel::CancelToken;
pub use candidates::{Candidate, Candidates};
#[cfg(feature = "chat")]
pub use chat::{ChatTemplate, Message};
pub use error::{BoxError, Error, Result};
pub use filter::{
    BannedTokens, Chain, Dry, DryConfig, ForcedTokens, History, LogitBias, LogitsFilter, MinNewTokens, MinP,
    NoRepeatNgram, OccurrencePenalty, RepetitionPenalty, Temperature, TopK, TopNSigma, TopP, Typical, Xtc,
};
pub use generate::{GenerateOptions, Generated, Streamer, generate};
pub use generator::{Generator, GeneratorBuilder};
pub use gguf::{
    tokenizer_config_from_gguf, tokenizer_config_to_gguf, tokenizer_from_gguf, tokenizer_to_gguf,
};
#[cfg(feature = "grammar")]
pub use grammar::{Grammar, GrammarCompiler, GrammarDrafter};
pub use lm::{BatchLm, CausalLm, StateLm};
pub use logprobs::{Logprobs, TokenLogprob};
pub use mamba_ops::Draw;
pub use mirostat::Mirostat;
pub use prefix_cache::{PrefixCache, PrefixCacheOptions, PrefixStats, Reuse};
pub use prompt::PROMPT_PIECE;
pub use sampler::{ArgMax, Multinomial, Sampler};
pub use sampling::{Sampling, SamplingConfig};
pub use score::{Score, score};
pub use speculative::{Drafter, ModelDrafter, NgramDrafter, Speculative, SpeculativeStats};
pub use state::GenerationState;
pub use stop::StopStrings;
#[cfg(feature = "stream")]
pub use stream::{Sender, SpawnedStream, spawn_stream};
pub use text::TextStream;
pub use text_generator::{TextGenerator, TextOptions};
pub use timings::Timings;
pub use token::{FinishReason, Token, Tokens};

/// The code of the workspace's README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
