//! Tokenizers in the metadata of GGUF files.

mod config;
mod pipeline;
mod write;

use mamba_model::checkpoint::gguf::{Array, Metadata};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use self::pipeline::Pipeline;
use crate::{Error, Result};

pub use self::config::{tokenizer_config_from_gguf, tokenizer_config_to_gguf};
pub use self::write::tokenizer_to_gguf;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
const JSON: &str = "tokenizer.huggingface.json";

/// What a token is, in the numbers of llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Kind {
    fn of(number: Option<u64>) -> Self {
        match number {
            Some(2) => Self::Unknown,
            Some(3) => Self::Control,
            Some(4) => Self::UserDefined,
            Some(5) => Self::Unused,
            Some(6) => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// The tokenizer that a GGUF file describes.
///
/// Known are the byte-level BPE of `gpt2` with the pre-tokenizers of these families, and the BPE with scores of `llama`,
/// which is that of SentencePiece. Tokens that only fill up the vocabulary are left out. If the file holds a whole
/// `tokenizer.json` as well, as the keys allow, that is taken.
///
/// # Errors
/// If keys are missing or contradict each other, or the kind of tokenizer is none of these.
///
/// # Example
/// ```
/// use mamba_generate::{tokenizer_from_gguf, tokenizer_to_gguf};
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/models/mamba2-shakespeare/tokenizer.json");
/// let original = tokenizers::Tokenizer::from_file(path)?;
/// let metadata = tokenizer_to_gguf(&original)?; // keys to write with `Model::save_gguf`
/// let again = tokenizer_from_gguf(&metadata)?;
/// let text = "Farewell! God knows when we shall meet again.";
/// assert_eq!(again.encode(text, true)?.get_ids(), original.encode(text, true)?.get_ids());
/// # Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
/// ```
pub fn tokenizer_from_gguf(metadata: &Metadata) -> Result<Tokenizer> {
    if let Some(text) = metadata.str(JSON) {
        return Tokenizer::from_bytes(text).map_err(|e| bad(JSON, format!("is no tokenizer.json: {e}")));
    }
    let kind = metadata.str(MODEL).ok_or_else(|| bad(MODEL, "is missing".into()))?;
    let described = Described::read(metadata)?;
    let (bpe, pipeline) = match kind {
        "gpt2" => {
            let pre = metadata.str(PRE).unwrap_or("default");
            let pipeline =
                Pipeline::of(pre).ok_or_else(|| bad(PRE, format!("is `{pre}`, which is not known")))?;
            (byte_level(metadata, &described, pipeline.ignore_merges)?, pipeline)
        }
        "llama" => {
            let space = metadata.bool(ADD_SPACE).unwrap_or(true);
            (sentence_piece(metadata, &described)?, Pipeline::sentence_piece(space))
        }
        other => return Err(bad(MODEL, format!("is `{other}`, expected gpt2 or llama"))),
    };
    let mut tokenizer = Tokenizer::new(bpe);
    let (add_bos, normalized) = (pipeline.add_bos, pipeline.normalizer.is_some());
    pipeline.apply(&mut tokenizer)?;
    described.add_special(&mut tokenizer, normalized)?;
    described.add_template(metadata, add_bos, &mut tokenizer)?;
    Ok(tokenizer)
}

/// The error about a key.
fn bad(key: &str, message: String) -> Error {
    Error::Gguf { key: key.to_string(), message }
}

/// The tokens of a file.
struct Described<'a> {
    tokens: &'a [String],
    kinds: Vec<Kind>,
}

impl<'a> Described<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self> {
        let tokens = metadata.strings(TOKENS).ok_or_else(|| bad(TOKENS, "is missing".into()))?;
        let kinds = match metadata.array(KINDS) {
            Some(kinds) if kinds.len() != tokens.len() => {
                let message = format!("has {} values for {} tokens", kinds.len(), tokens.len());
                return Err(bad(KINDS, message));
            }
            Some(kinds) => kinds.iter().map(|kind| Kind::of(kind.as_u64())).collect(),
            None => vec![Kind::Normal; tokens.len()],
        };
        Ok(Self { tokens, kinds })
    }

    /// Ids, texts and kinds of the tokens that are in use.
    fn used(&self) -> impl Iterator<Item = (u32, &'a String, Kind)> {
        let all = self.tokens.iter().zip(&self.kinds).zip(0..);
        all.map(|((text, kind), id)| (id, text, *kind)).filter(|(.., kind)| *kind != Kind::Unused)
    }

    fn vocab(&self) -> Result<Vocab> {
        let mut vocab = Vocab::with_capacity(self.tokens.len());
        for (id, text, _) in self.used() {
            if let Some(other) = vocab.insert(text.clone(), id) {
                return Err(bad(TOKENS, format!("has `{}` twice, as {other} and {id}", text.escape_debug())));
            }
        }
        Ok(vocab)
    }

    /// Tokens that are found in a text before anything else.
    fn add_special(&self, tokenizer: &mut Tokenizer, normalized: bool) -> Result<()> {
        // Texts that users defined are looked for in what the normalizer leaves of a text, as Hugging Face does it.
        let token = |(_, text, kind): (u32, &String, Kind)| match kind {
            Kind::Control | Kind::Unknown => Some(AddedToken::from(text.clone(), true).normalized(false)),
            Kind::UserDefined => Some(AddedToken::from(text.clone(), false).normalized(normalized)),
            _ => None,
        };
        let tokens: Vec<_> = self.used().filter_map(token).collect();
        tokenizer.add_tokens(tokens).map_err(|e| bad(TOKENS, format!("cannot be used: {e}")))?;
        Ok(())
    }

    /// What stands around every text.
    fn add_template(&self, metadata: &Metadata, add_bos: bool, tokenizer: &mut Tokenizer) -> Result<()> {
        let token = |key: &str| -> Result<(String, u32)> {
            let id =
                metadata.u64(key).ok_or_else(|| bad(key, "is missing, though it is to be added".into()))?;
            let text = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
            let text =
                text.ok_or_else(|| bad(key, format!("is {id}, expected an id below {}", self.tokens.len())))?;
            Ok((text.clone(), id as u32))
        };
        let wanted = |add: &str, key: &str, default: bool| match metadata.bool(add) {
            Some(add) => add,
            None => default && metadata.u64(key).is_some(),
        };
        let bos = wanted(ADD_BOS, BOS, add_bos).then(|| token(BOS)).transpose()?;
        let eos = wanted(ADD_EOS, EOS, false).then(|| token(EOS)).transpose()?;
        if bos.is_none() && eos.is_none() {
            return Ok(());
        }
        let around = |sequence: &str, kind: u32| {
            let bos = bos.iter().map(|(text, _)| format!("{text}:{kind}"));
            let eos = eos.iter().map(|(text, _)| format!("{text}:{kind}"));
            bos.chain([format!("${sequence}:{kind}")]).chain(eos).collect::<Vec<_>>()
        };
        let pair = [around("A", 0), around("B", 1)].concat();
        let special: Vec<_> = bos.iter().chain(&eos).cloned().collect();
        let fail = |e: String| bad(BOS, format!("cannot be put before texts: {e}"));
        let template = TemplateProcessing::builder()
            .try_single(around("A", 0))
            .and_then(|builder| builder.try_pair(pair))
            .map_err(|e| fail(e.to_string()))?
            .special_tokens(special)
            .build()
            .map_err(|e| fail(e.to_string()))?;
        tokenizer.with_post_processor(Some(template));
        Ok(())
    }
}

/// The BPE of GPT-2, over bytes that stand for themselves as characters.
fn byte_level(metadata: &Metadata, described: &Described, ignore_merges: bool) -> Result<BPE> {
    let merges = metadata.strings(MERGES).ok_or_else(|| bad(MERGES, "is missing".into()))?;
    let pair = |merge: &String| {
        let (left, right) = merge.split_once(' ').ok_or_else(|| {
            bad(MERGES, format!("has `{}`, expected two tokens with a space between", merge.escape_debug()))
        })?;
        Ok((left.to_string(), right.to_string()))
    };
    let merges = merges.iter().map(pair).collect::<Result<Merges>>()?;
    let bpe = BPE::builder().vocab_and_merges(described.vocab()?, merges).ignore_merges(ignore_merges);
    bpe.build().map_err(|e| bad(MERGES, format!("cannot be used: {e}")))
}

/// The BPE of SentencePiece: of two neighbours that make a token, those with the highest score merge first.
fn sentence_piece(metadata: &Metadata, described: &Described) -> Result<BPE> {
    let Some(Array::F32(scores)) = metadata.array(SCORES) else {
        return Err(bad(SCORES, "is missing or holds no f32".into()));
    };
    if scores.len() != described.tokens.len() {
        let message = format!("has {} values for {} tokens", scores.len(), described.tokens.len());
        return Err(bad(SCORES, message));
    }
    let vocab = described.vocab()?;
    // A token that is longer than this is no word, and to try all of its cuts would take long.
    const LONGEST: usize = 256;
    let normal = |(id, text, kind): (u32, &'_ String, Kind)| {
        (kind == Kind::Normal && text.len() <= LONGEST).then_some((id, text.clone()))
    };
    let mut merges = vec![];
    for (id, text) in described.used().filter_map(normal) {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(l), Some(r)) = (vocab.get(left), vocab.get(right)) {
                merges.push((scores[id as usize], *l, *r, (left.to_string(), right.to_string())));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
    let unknown = described.used().find(|(.., kind)| *kind == Kind::Unknown).map(|(_, text, _)| text.clone());
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocab, merges.into_iter().map(|(.., pair)| pair).collect::<Merges>())
        .byte_fallback(described.kinds.contains(&Kind::Byte))
        .fuse_unk(true);
    if let Some(unknown) = unknown {
        bpe = bpe.unk_token(unknown);
    }
    bpe.build().map_err(|e| bad(TOKENS, format!("cannot be used: {e}")))
}
