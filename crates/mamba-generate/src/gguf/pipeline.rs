//! How texts are cut before BPE, by the names that llama.cpp gives to the ways of known tokenizers.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::bad;
use crate::Result;

/// Contractions in any case, words with a character before, up to three digits, signs, lines, spaces: GPT-4 and Llama 3.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits: Qwen 2.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words end where small letters meet capitals: Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The names under which llama.cpp knows ways of cutting, one for each way, to be tried in this order when writing.
pub(super) const NAMES: [&str; 9] =
    ["gpt-2", "mpt", "llama-bpe", "dbrx", "qwen2", "stablelm2", "tekken", "refact", "falcon"];

/// What surrounds BPE.
pub(super) struct Pipeline {
    pub normalizer: Option<NormalizerWrapper>,
    pub pre_tokenizer: Option<PreTokenizerWrapper>,
    pub decoder: DecoderWrapper,
    /// Whether a word that is a token is taken whole, whatever the merges make of it.
    pub ignore_merges: bool,
    /// Whether texts begin with the token for it, if the file does not say.
    pub add_bos: bool,
}

impl Pipeline {
    /// What the name of a pre-tokenizer stands for.
    pub fn of(pre: &str) -> Option<Self> {
        let (normalizer, pre_tokenizer, ignore_merges, add_bos): (Option<NormalizerWrapper>, _, bool, bool) =
            match pre {
                "default" | "gpt-2" | "gpt2" | "phi-2" | "jais" | "trillion" | "granite-docling" => {
                    (None, gpt2(), false, false)
                }
                // The vocabulary of GPT-NeoX, which all of state-spaces' models have, composes characters first.
                "mpt" | "olmo" | "gpt-neox" => (Some(NFC.into()), gpt2(), false, false),
                "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" => {
                    (None, cut(LLAMA3)?, true, true)
                }
                "dbrx" | "smaug-bpe" | "chatglm-bpe" => (None, cut(LLAMA3)?, false, false),
                "qwen2" => (Some(NFC.into()), cut(QWEN2)?, false, false),
                "stablelm2" | "hunyuan" | "solar-open" => (None, cut(QWEN2)?, false, false),
                "tekken" => (None, cut(TEKKEN)?, true, true),
                "refact" | "starcoder" | "command-r" | "smollm" | "codeshell" | "exaone" => {
                    (None, Sequence::new(vec![Digits::new(true).into(), gpt2()]).into(), false, false)
                }
                "falcon" => {
                    let three = Split::new(
                        SplitPattern::Regex("[0-9][0-9][0-9]".into()),
                        SplitDelimiterBehavior::Isolated,
                        false,
                    );
                    let steps: Vec<PreTokenizerWrapper> = vec![
                        Punctuation::new(SplitDelimiterBehavior::Contiguous).into(),
                        gpt2(),
                        Digits::new(false).into(),
                        three.ok()?.into(),
                    ];
                    (None, Sequence::new(steps).into(), false, false)
                }
                _ => return None,
            };
        let decoder = ByteLevel::new(false, true, true).into();
        Some(Self { normalizer, pre_tokenizer: Some(pre_tokenizer), decoder, ignore_merges, add_bos })
    }

    /// Spaces become a character of their own, with one before the text if `space`.
    pub fn sentence_piece(space: bool) -> Self {
        let replace = |from: &str, to: &str| Replace::new(from, to).ok();
        let prepend = space.then(|| Prepend::new("▁".into()).into());
        let normalizers: Vec<NormalizerWrapper> =
            prepend.into_iter().chain(replace(" ", "▁").map(Into::into)).collect();
        let mut decoders: Vec<DecoderWrapper> = replace("▁", " ").map(Into::into).into_iter().collect();
        decoders.extend([ByteFallback::new().into(), Fuse::new().into()]);
        if space {
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        Self {
            normalizer: Some(Normalizers::new(normalizers).into()),
            pre_tokenizer: None,
            decoder: Decoders::new(decoders).into(),
            ignore_merges: false,
            add_bos: true,
        }
    }

    pub fn apply(self, tokenizer: &mut Tokenizer) -> Result<()> {
        let normalizer = tokenizer.with_normalizer(self.normalizer);
        normalizer.map_err(|e| bad(super::PRE, format!("cannot be used: {e}")))?;
        tokenizer.with_pre_tokenizer(self.pre_tokenizer);
        tokenizer.with_decoder(Some(self.decoder));
        Ok(())
    }
}

/// Cut as GPT-2 does it, with bytes as characters.
fn gpt2() -> PreTokenizerWrapper {
    ByteLevel::new(false, true, true).into()
}

/// Cut where an expression says, with bytes as characters.
fn cut(pattern: &str) -> Option<PreTokenizerWrapper> {
    let pattern = SplitPattern::Regex(pattern.into());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).ok()?;
    Some(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
}
