//! The bytes that tokens stand for.

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// How a vocabulary spells bytes.
#[derive(Debug, PartialEq)]
enum Spelling {
    /// One letter a byte, as GPT-2 does.
    ByteLevel,
    /// As text, in which some strings stand for others, and maybe `<0xE2>` for a byte.
    Pieces { replace: Vec<(String, String)>, byte_fallback: bool },
}

/// The bytes of each token, by id; of special tokens none, as they have no text.
///
/// # Errors
/// If the decoder of the tokenizer is none that makes text of tokens one by one.
pub(super) fn token_bytes(tokenizer: &Tokenizer) -> Result<Vec<Option<Vec<u8>>>> {
    let decoder = tokenizer.get_decoder().map(serde_json::to_value).transpose();
    let decoder = decoder.map_err(|e| Error::Tokenizer(e.into()))?.unwrap_or(Value::Null);
    let Some(spelling) = Spelling::of(&decoder) else {
        return Err(Error::Grammar(format!(
            "the tokenizer does not say the bytes of its tokens: its decoder is {decoder}, expected ByteLevel, Metaspace, \
             or a Sequence of Replace, ByteFallback, Fuse and Strip"
        )));
    };
    let special = tokenizer.get_added_tokens_decoder();
    let mut bytes = Vec::new();
    for (token, id) in tokenizer.get_vocab(true) {
        let id = id as usize;
        if bytes.len() <= id {
            bytes.resize(id + 1, None);
        }
        if special.get(&(id as u32)).is_none_or(|token| !token.special) {
            bytes[id] = Some(spelling.bytes(&token));
        }
    }
    Ok(bytes)
}

impl Spelling {
    fn of(decoder: &Value) -> Option<Self> {
        let parts = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array()?.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let (mut replace, mut byte_fallback) = (Vec::new(), false);
        for part in parts {
            match part["type"].as_str()? {
                "ByteLevel" => return Some(Self::ByteLevel),
                "ByteFallback" => byte_fallback = true,
                "Metaspace" => replace.push((part["replacement"].as_str()?.into(), " ".into())),
                "Replace" => {
                    let pattern = part["pattern"]["String"].as_str()?;
                    replace.push((pattern.into(), part["content"].as_str()?.into()));
                }
                // What changes the start or the end of a whole text only.
                "Fuse" | "Strip" => {}
                _ => return None,
            }
        }
        Some(Self::Pieces { replace, byte_fallback })
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            // As the decoder does it: what has other letters stands for itself.
            Self::ByteLevel => {
                token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into())
            }
            Self::Pieces { replace, byte_fallback } => {
                if let Some(byte) = fallback_byte(token).filter(|_| *byte_fallback) {
                    return vec![byte];
                }
                let mut text = token.to_owned();
                for (pattern, content) in replace {
                    text = text.replace(pattern, content);
                }
                text.into_bytes()
            }
        }
    }
}

/// The byte of a token such as `<0xE2>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>').filter(|hex| hex.len() == 2)?;
    u8::from_str_radix(hex, 16).ok()
}

/// The byte that a letter of the byte-level alphabet stands for: itself if it is printable, else the n-th of the others from
/// U+0100 on.
fn byte_of(letter: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(letter) {
        code @ 0..0x100 => u8::try_from(code).ok().filter(printable),
        code => (0..=u8::MAX).filter(|byte| !printable(byte)).nth((code - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::decoders::byte_level::ByteLevel;
    use tokenizers::decoders::wordpiece::WordPiece;
    use tokenizers::models::bpe::{BPE, Vocab};

    use super::*;

    fn tokenizer(tokens: &[&str], decoder: &str) -> Tokenizer {
        let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.to_string(), id)).collect();
        let bpe = BPE::builder().vocab_and_merges(vocab, vec![]).build().unwrap();
        let mut tokenizer = Tokenizer::new(bpe);
        tokenizer.with_decoder(Some(serde_json::from_str::<tokenizers::DecoderWrapper>(decoder).unwrap()));
        tokenizer
    }

    /// The whole alphabet, as the library has it.
    #[test]
    fn byte_level_letters_are_those_of_the_library() {
        let letters = ByteLevel::alphabet();
        let bytes: std::collections::BTreeSet<u8> = letters.iter().map(|&c| byte_of(c).unwrap()).collect();
        assert_eq!((letters.len(), bytes.len()), (256, 256));
        let others = (0..0x300).filter_map(char::from_u32).filter(|c| !letters.contains(c));
        assert!(
            others.count() > 500 && (0..0x300).filter_map(char::from_u32).filter_map(byte_of).count() == 256
        );
        let names: Vec<String> = letters.iter().map(|c| c.to_string()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let tokenizer = tokenizer(
            &names,
            r#"{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}"#,
        );
        for (id, bytes) in token_bytes(&tokenizer).unwrap().into_iter().enumerate() {
            let text = tokenizer.decode(&[id as u32], false).unwrap();
            assert_eq!(String::from_utf8_lossy(&bytes.unwrap()), text);
        }
    }

    #[test]
    fn pieces_are_spelled_as_their_decoder_reads_them() {
        let llama = r#"{"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
        let tokens = ["▁na", "<0xC3>", "<0xAF>", "<0x4>", "▁", "x"];
        let bytes = token_bytes(&tokenizer(&tokens, llama)).unwrap();
        let bytes: Vec<&[u8]> = bytes.iter().flatten().map(Vec::as_slice).collect();
        assert_eq!(bytes, [b" na".as_slice(), &[0xC3], &[0xAF], b"<0x4>", b" ", b"x"]);
        let metaspace =
            r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}"#;
        let bytes = token_bytes(&tokenizer(&tokens, metaspace)).unwrap();
        assert_eq!(bytes[1].as_deref(), Some(b"<0xC3>".as_slice()));
        assert_eq!(bytes[0].as_deref(), Some(b" na".as_slice()));
    }

    #[test]
    fn special_tokens_have_no_bytes_and_added_ones_do() {
        let mut tokenizer = tokenizer(&["a"], r#"{"type": "Fuse"}"#);
        tokenizer.add_special_tokens([tokenizers::AddedToken::from("<end>", true)]).unwrap();
        tokenizer.add_tokens([tokenizers::AddedToken::from("  ", false)]).unwrap();
        let expected = [Some(b"a".to_vec()), None, Some(b"  ".to_vec())];
        assert_eq!(token_bytes(&tokenizer).unwrap(), expected);
    }

    #[test]
    fn a_decoder_that_makes_no_bytes_is_refused() {
        let mut tokenizer = tokenizer(&["a"], r#"{"type": "Fuse"}"#);
        tokenizer.with_decoder(Some(WordPiece::default()));
        let error = token_bytes(&tokenizer).unwrap_err().to_string();
        assert!(
            error.starts_with("grammar: the tokenizer does not say the bytes") && error.contains("WordPiece"),
            "{error}"
        );
        tokenizer.with_decoder(None::<WordPiece>);
        let error = token_bytes(&tokenizer).unwrap_err().to_string();
        assert!(error.contains("its decoder is null, expected ByteLevel"), "{error}");
    }
}
