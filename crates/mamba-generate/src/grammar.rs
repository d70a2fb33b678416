//! Constraints by JSON schema, regular expression or grammar.

mod drafter;
mod token_bytes;

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::panic_utils::catch_unwind;
use llguidance::{Matcher, ParserFactory};
use tokenizers::Tokenizer;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use crate::candidates::Candidates;
use crate::error::{Error, Result};
use crate::filter::{History, LogitsFilter};
pub use drafter::GrammarDrafter;
use token_bytes::token_bytes;

/// Makes [`Grammar`]s for the tokens of a tokenizer; made once, it serves any number of them.
///
/// # Example
/// See [`Grammar`].
#[derive(Clone)]
pub struct GrammarCompiler {
    factory: Arc<ParserFactory>,
    ends: Arc<[u32]>,
}

impl GrammarCompiler {
    /// Learns the bytes of all tokens.
    ///
    /// `vocab_size` is the number of logits, those of padding included, and `end_tokens` are those that may stand where the
    /// text may end: the stop tokens of the generation.
    ///
    /// # Errors
    /// If the tokenizer does not say the bytes of its tokens, or if it or `end_tokens` have ids from `vocab_size` on.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, end_tokens: &[u32]) -> Result<Self> {
        let mut words: Vec<Vec<u8>> = token_bytes(tokenizer)?
            .into_iter()
            .zip(0..)
            .map(|(bytes, id)| bytes.unwrap_or_else(|| special(tokenizer, id)))
            .collect();
        let greatest = end_tokens.iter().map(|&id| id as usize + 1).fold(words.len(), usize::max);
        let size = u32::try_from(vocab_size).ok().filter(|_| greatest <= vocab_size);
        let Some(size) = size else {
            let got = format_args!("{vocab_size}, with token {} among the tokens", greatest - 1);
            return Err(Error::invalid("grammar", "vocab_size", got, "a number above all tokens"));
        };
        words.resize(vocab_size, Vec::new()); // padding has no bytes and is never allowed
        let factory = catch_unwind(std::panic::AssertUnwindSafe(|| {
            let info = TokRxInfo::new(size, INVALID_TOKEN);
            let mut trie = TokTrie::from(&info, &words);
            if !end_tokens.is_empty() {
                trie = trie.with_eos_tokens(end_tokens);
            }
            let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&tokens)?;
            factory.quiet().limits_mut().verbose_errors = false;
            Ok(factory)
        }));
        let factory = Arc::new(factory.map_err(|e| Error::Grammar(brief(e)))?);
        Ok(Self { factory, ends: end_tokens.into() })
    }

    /// Text that is JSON of a schema.
    ///
    /// Properties come in the order of the schema. White space may stand wherever JSON has it, unless the schema says
    /// otherwise: `"x-guidance": {"whitespace_flexible": false}`.
    ///
    /// # Errors
    /// If `schema` is no JSON or no schema, has keywords that are not supported, or nothing satisfies it.
    pub fn json_schema(&self, schema: &str) -> Result<Grammar> {
        let schema = serde_json::from_str(schema)
            .map_err(|e| Error::Grammar(format!("the JSON schema is no JSON: {e}")))?;
        self.compile("JSON schema", TopLevelGrammar::from_json_schema(schema))
    }

    /// Text that a regular expression matches as a whole, in the syntax of the crate `regex`.
    ///
    /// # Errors
    /// If `pattern` is no regular expression, or matches nothing.
    pub fn regex(&self, pattern: &str) -> Result<Grammar> {
        // llguidance would drop it.
        if pattern.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 1 {
            return Err(Error::Grammar(
                "the regular expression cannot be used: it ends in a backslash".into(),
            ));
        }
        self.compile("regular expression", TopLevelGrammar::from_regex(pattern))
    }

    /// Text of a context-free grammar in the syntax of Lark, as llguidance extends it; it starts with the rule `start`.
    ///
    /// # Errors
    /// If `grammar` cannot be parsed, or allows nothing. (That a text may begin but could never end is not noticed.)
    pub fn lark(&self, grammar: &str) -> Result<Grammar> {
        self.compile("grammar", TopLevelGrammar::from_lark(grammar.into()))
    }

    fn compile(&self, what: &str, grammar: TopLevelGrammar) -> Result<Grammar> {
        let refused = |e| Error::Grammar(format!("the {what} cannot be used: {}", brief(e)));
        let start = Matcher::new(Ok(self.factory.create_parser(grammar).map_err(refused)?));
        // A grammar that allows nothing is told now, not when the prompt has been read.
        let mut grammar = Grammar {
            matcher: start.deep_clone(),
            start,
            read: Vec::new(),
            ends: self.ends.clone(),
            tokens: self.factory.tok_env().clone(),
        };
        match grammar.mask(0) {
            Ok(_) => Ok(grammar),
            Err(Error::Grammar(message)) => {
                Err(Error::Grammar(format!("the {what} allows nothing: {message}")))
            }
            Err(other) => Err(other),
        }
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = self.factory.tok_env().tok_trie().vocab_size();
        f.debug_struct("GrammarCompiler").field("vocab_size", &size).finish_non_exhaustive()
    }
}

/// Allows only what a grammar does: a filter that drops each token with which the generated text could not become a text of
/// the grammar.
///
/// It belongs before all other filters, so that these choose among what is allowed:
/// [`Sampling::push_front`](crate::Sampling::push_front). Any tokens whose bytes fit are allowed, not only those that the
/// tokenizer would make of the text. The end tokens are allowed where the text may end. Where it must end, as nothing can
/// follow, the generation ends with [`FinishReason::Complete`](crate::FinishReason::Complete), and needs no end token. A text that is
/// cut short by a length or a stop string is only the beginning of one of the grammar.
///
/// The filter remembers nothing that it cannot learn from the generated tokens, so generations with it are forked, saved, resumed, and
/// drafted for as any. A clone serves another generation, at the start or anywhere else.
///
/// # Errors
/// Generation ends with an error if the grammar allows something, but no token of the vocabulary can begin it; if a token was
/// generated that it does not allow, as filters that force tokens may do; or if the grammar is too complex to be followed.
///
/// # Example
/// ```
/// use mamba_generate::{Chain, GrammarCompiler, History, Multinomial, Sampling};
/// use tokenizers::Tokenizer;
/// use tokenizers::decoders::fuse::Fuse;
/// use tokenizers::models::bpe::BPE;
///
/// let vocab = [("1", 0), ("2", 1), ("12", 2), ("x", 3), ("-", 4)].map(|(token, id)| (token.to_string(), id));
/// let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, vec![]).build()?);
/// tokenizer.with_decoder(Some(Fuse::new()));
///
/// let compiler = GrammarCompiler::new(&tokenizer, 5, &[])?;
/// let grammar = compiler.regex(r"\d\d-\d")?;
/// let mut sampling = Sampling::new(Chain::new().with(grammar), Multinomial::with_seed(3));
/// let mut allowed = |generated: &[u32]| -> mamba_generate::Result<Vec<u32>> {
///     let left = sampling.filter(&[0.0; 5], History::new(generated, 0))?;
///     Ok(left.as_slice().iter().map(|c| c.id).collect())
/// };
/// assert_eq!(allowed(&[])?, [0, 1, 2]);
/// assert_eq!(allowed(&[1])?, [0, 1]);
/// assert_eq!(allowed(&[1, 0])?, [4]);
/// assert!(sampling.is_complete(History::new(&[2, 4, 1], 0))?);
/// assert!(compiler.regex("y").is_err()); // no token has this letter
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
///
/// # Source
/// The crate `llguidance`, whose documentation says which keywords of JSON schema and what of Lark it supports.
pub struct Grammar {
    /// Before the first token.
    start: Matcher,
    /// After those that were read.
    matcher: Matcher,
    read: Vec<u32>,
    ends: Arc<[u32]>,
    tokens: TokEnv,
}

impl Grammar {
    /// Brings the matcher to where the generated tokens are; from the start if these are not those it has read, and more.
    fn follow(&mut self, history: History<'_>) -> Result<()> {
        let generated = history.generated();
        if !generated.starts_with(&self.read) || self.matcher.is_error() {
            self.matcher = self.start.clone();
            self.read.clear();
        }
        for &id in &generated[self.read.len()..] {
            // Behind its end a text has nothing but end tokens.
            if self.matcher.is_stopped() && self.ends.contains(&id) {
                self.read.push(id);
                continue;
            }
            let position = history.tokens().len() - generated.len() + self.read.len();
            self.matcher.consume_token(id).map_err(|e| {
                let cause = brief(e);
                Error::Grammar(format!("token {id} at position {position} cannot be followed: {cause}"))
            })?;
            self.read.push(id);
        }
        Ok(())
    }

    /// The bytes that come next in any case.
    fn forced(&mut self, history: History<'_>) -> Result<Vec<u8>> {
        self.follow(history)?;
        Ok(self.matcher.clone().compute_ff_bytes()) // of a copy, as they were not generated yet
    }

    /// Tokens that spell `text`: those of the tokenizer if they do, else the longest that fit, one after the other, as far as
    /// there are any. A tokenizer spells a text from its beginning, and may put a space there.
    fn spell(&self, text: &str, tokenizer: &Tokenizer) -> Vec<u32> {
        let trie = self.tokens.tok_trie();
        if let Ok(encoding) = tokenizer.encode_fast(text, false) {
            let ids = encoding.get_ids();
            let known = ids.iter().all(|&id| (id as usize) < trie.vocab_size());
            if known && trie.decode_raw(ids) == text.as_bytes() {
                return ids.to_vec();
            }
        }
        let (mut ids, mut rest) = (Vec::new(), text.as_bytes());
        while !rest.is_empty()
            && let (id, length @ 1..) = trie.prefix_token_id(rest)
        {
            ids.push(id);
            rest = &rest[length..];
        }
        ids
    }

    /// What may come next; the end tokens if the text must end.
    fn mask(&mut self, position: usize) -> Result<SimpleVob> {
        self.matcher.compute_mask_or_eos().map_err(|e| match brief(e) {
            // The name of llguidance for an empty mask.
            none if none.starts_with("NoExtensionBias") => Error::Grammar(format!(
                "no token of the vocabulary can stand at position {position} of the text"
            )),
            cause => Error::Grammar(format!("at position {position}: {cause}")),
        })
    }
}

impl LogitsFilter for Grammar {
    fn apply(&mut self, candidates: &mut Candidates, history: History<'_>) -> Result<()> {
        self.follow(history)?;
        let mask = self.mask(history.tokens().len())?;
        candidates.retain(|c| (c.id as usize) < mask.len() && mask.is_allowed(c.id));
        Ok(())
    }

    fn is_complete(&mut self, history: History<'_>) -> Result<bool> {
        self.follow(history)?;
        Ok(self.matcher.is_stopped())
    }
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        // Each has caches of its own, so that threads do not wait for each other.
        Self {
            start: self.start.deep_clone(),
            matcher: self.matcher.deep_clone(),
            read: self.read.clone(),
            ends: self.ends.clone(),
            tokens: self.tokens.clone(),
        }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("read", &self.read).finish_non_exhaustive()
    }
}

/// How llguidance knows a special token: by its name behind a byte that no text has.
fn special(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let name = tokenizer.id_to_token(id).unwrap_or_default();
    match name.is_empty() {
        true => Vec::new(),
        false => [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat(),
    }
}

/// What an error says, without the state of the parser that may follow it, in one line.
fn brief(error: impl std::fmt::Display) -> String {
    let text = format!("{error:#}");
    let end = ["\n<", "<non-verbose/>", "<state>"].iter().filter_map(|mark| text.find(mark)).min();
    let text = &text[..end.unwrap_or(text.len())];
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}
