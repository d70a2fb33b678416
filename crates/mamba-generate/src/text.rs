//! Tokens to text, piece by piece.

use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// Turns tokens, one by one, into pieces of text that are valid UTF-8 and together are what the tokenizer makes of all
/// tokens at once.
///
/// A token may end in the middle of a character, and some decoders change the start of a text, so tokens cannot be decoded
/// each on its own: a few preceding ones are decoded along, and what may still change is held back until it cannot, or
/// until [`flush`](Self::flush). That is at most the last character, or a run of tokens of the form `<0xE2>`, which decoders
/// with a byte fallback judge as a whole.
///
/// It is `tokenizers`' `DecodeStream` in purpose. That one has no end, so an incomplete last character is lost; fails on some
/// runs of fallback bytes that `decode` accepts; starts without knowledge of a prompt; and decodes ever more tokens as
/// long as characters remain broken or special tokens are skipped.
///
/// # Example
/// ```
/// use mamba_generate::TextStream;
/// use tokenizers::Tokenizer;
/// use tokenizers::decoders::byte_level::ByteLevel;
/// use tokenizers::models::bpe::BPE;
///
/// // Three tokens: "na", and the two bytes of "ï" in the letters that byte-level tokenizers write for them.
/// let vocab = [("na", 0), ("Ã", 1), ("¯", 2)].map(|(token, id)| (token.to_string(), id));
/// let bpe = BPE::builder().vocab_and_merges(vocab, vec![]).build()?;
/// let mut tokenizer = Tokenizer::new(bpe);
/// tokenizer.with_decoder(Some(ByteLevel::default()));
///
/// let mut text = TextStream::new(&tokenizer);
/// assert_eq!(text.push(0)?.as_deref(), Some("na"));
/// assert_eq!(text.push(1)?, None);
/// assert_eq!(text.push(2)?.as_deref(), Some("ï"));
/// assert_eq!(text.push(1)?, None);
/// assert_eq!(text.flush()?.as_deref(), Some("\u{FFFD}")); // half a character, for ever
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
#[derive(Clone)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// The tokens that are decoded together: some whose text was sent, then those whose text was not.
    window: Vec<u32>,
    /// The text of the window that was sent.
    sent: String,
    /// Where the text of the window last came out whole: tokens before this index may be forgotten at the next such place.
    whole: usize,
    /// How many replacement characters end the context; they are not ours to send, unless they turn into something.
    broken_context: usize,
    /// At how many undecided tokens to look next for those that can be forgotten.
    crowded: usize,
}

/// Stands for a broken character in decoded text; at its end, for one that may become whole.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// How many tokens of context to decode along; decoders look back no further than a character.
const CONTEXT: usize = 16;

impl<'a> TextStream<'a> {
    /// Starts a text that skips special tokens.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            skip_special_tokens: true,
            window: Vec::new(),
            sent: String::new(),
            whole: 0,
            broken_context: 0,
            crowded: CROWDED,
        }
    }

    /// Sets whether special tokens, such as that for the end of a text, have no text; they have none by default.
    #[must_use]
    pub fn skip_special_tokens(mut self, skip: bool) -> Self {
        self.skip_special_tokens = skip;
        self
    }

    /// Starts the text anew after `ids`, such as a prompt, whose own text is not sent.
    ///
    /// It matters where a decoder treats the start of a text differently, as those do that strip its first space; and where
    /// `ids` end in the middle of a character, which is then sent once it is complete.
    ///
    /// # Errors
    /// If the tokenizer cannot decode `ids`.
    pub fn after(mut self, ids: &[u32]) -> Result<Self> {
        self.reset();
        let (mut tokens, mut run, mut in_run) = (Vec::with_capacity(CONTEXT), 0, true);
        for &id in ids.iter().rev() {
            let Some(token) = self.visible(id) else { continue };
            let byte = is_byte(&token);
            if tokens.len() >= CONTEXT && !byte {
                break;
            }
            in_run &= byte;
            run += usize::from(in_run);
            tokens.push(id);
        }
        tokens.reverse();
        self.window = tokens;
        self.sent = self.decode(&self.window)?;
        if !self.sent.ends_with(REPLACEMENT) {
            self.whole = self.window.len();
            return Ok(self);
        }
        // The context ends in a broken character. In a run of fallback bytes all are broken then, so what precedes it is
        // found by leaving out bytes, at most three of them.
        for n in 1..=run.min(3) {
            let text = self.decode(&self.window[..self.window.len() - n])?;
            if !text.ends_with(REPLACEMENT) {
                (self.sent, self.broken_context) = (text, n);
                return Ok(self);
            }
        }
        if run == 0 {
            self.sent.pop();
            self.broken_context = 1;
        }
        Ok(self)
    }

    /// Adds a token, and returns the text that is certain by now and was not returned before, if any.
    ///
    /// An id that the tokenizer does not know has no text.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Some(token) = self.visible(id) else { return Ok(None) };
        self.window.push(id);
        if is_byte(&token) {
            return Ok(None);
        }
        let text = self.decode(&self.window)?;
        let settled = text.strip_suffix(REPLACEMENT).unwrap_or(&text);
        let piece = self.unsent(settled);

        if settled.len() < text.len() {
            self.sent = settled.to_owned();
            self.forget_broken(&text)?;
        } else if piece.is_some() {
            self.window.drain(..self.whole);
            self.sent = if self.whole == 0 { text } else { self.decode(&self.window)? };
            self.whole = self.window.len();
            self.crowded = CROWDED;
        }
        Ok(piece)
    }

    /// Ends the text, and returns what was held back, if anything. The next token starts a new text.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn flush(&mut self) -> Result<Option<String>> {
        let text = self.decode(&self.window)?;
        let piece = self.unsent(&text);
        self.reset();
        Ok(piece)
    }

    fn reset(&mut self) {
        self.window.clear();
        self.sent.clear();
        self.whole = 0;
        self.broken_context = 0;
        self.crowded = CROWDED;
    }

    /// The token as the tokenizer spells it, if it counts in decoding.
    fn visible(&self, id: u32) -> Option<String> {
        let token = self.tokenizer.id_to_token(id)?;
        let special =
            self.skip_special_tokens && self.tokenizer.get_added_vocabulary().is_special_token(&token);
        (!special).then_some(token)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, self.skip_special_tokens).map_err(Error::Tokenizer)
    }

    /// What follows the text that was sent. If a decoder changed that, which none of the usual does, the change is sent.
    fn unsent(&mut self, text: &str) -> Option<String> {
        let mut rest = match text.strip_prefix(self.sent.as_str()) {
            Some(rest) => rest,
            None => {
                let same = text.chars().zip(self.sent.chars()).take_while(|(a, b)| a == b);
                &text[same.map(|(c, _)| c.len_utf8()).sum()..]
            }
        };
        if !rest.is_empty() {
            for _ in 0..std::mem::take(&mut self.broken_context) {
                rest = rest.strip_prefix(REPLACEMENT).unwrap_or(rest);
            }
        }
        (!rest.is_empty()).then(|| rest.to_owned())
    }

    /// Bounds the window while characters remain broken, as then no place is whole.
    ///
    /// The last few tokens suffice if the text is that of both parts together. Only byte-level decoders produce such text,
    /// and what they make of two parts depends on the three bytes at either side.
    fn forget_broken(&mut self, text: &str) -> Result<()> {
        if self.window.len() < self.crowded {
            return Ok(());
        }
        let (old, recent) = self.window.split_at(self.window.len() - CONTEXT);
        let recent_text = self.decode(recent)?;
        if self.decode(old)? + &recent_text == text {
            self.window = recent.to_vec();
            self.whole = 0;
            self.sent = recent_text.strip_suffix(REPLACEMENT).unwrap_or(&recent_text).to_owned();
        } else {
            self.crowded = self.window.len() * 2;
        }
        Ok(())
    }
}

/// How many tokens without a whole place are looked through for some to forget; doubled if none can be.
const CROWDED: usize = 4 * CONTEXT;

/// Whether a token is spelled `<0xE2>`: one byte, in vocabularies with a byte fallback.
fn is_byte(token: &str) -> bool {
    token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

impl std::fmt::Debug for TextStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextStream")
            .field("window", &self.window)
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use tokenizers::AddedToken;
    use tokenizers::decoders::byte_fallback::ByteFallback;
    use tokenizers::decoders::byte_level::ByteLevel;
    use tokenizers::decoders::fuse::Fuse;
    use tokenizers::decoders::sequence::Sequence;
    use tokenizers::decoders::strip::Strip;
    use tokenizers::models::bpe::BPE;
    use tokenizers::normalizers::replace::Replace;

    use super::*;

    /// The letters that byte-level tokenizers write for the bytes 0 to 255.
    fn byte_letters() -> Vec<char> {
        let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut others = 256..;
        (0..256)
            .map(|b| if printable(b) { b } else { others.next().unwrap() })
            .map(|c| char::from_u32(c).unwrap())
            .collect()
    }

    /// The byte-level tokenizer whose token `i` is the byte `i`, then "the", " th", two halves of emoji, and `<end>`, special.
    pub(crate) fn byte_level() -> Tokenizer {
        let letters = byte_letters();
        let spell = |bytes: &[u8]| bytes.iter().map(|&b| letters[usize::from(b)]).collect::<String>();
        let mut tokens: Vec<String> = (0..=255).map(|b| spell(&[b])).collect();
        let longer: [&[u8]; 4] = [b"the", b" th", b"a\xf0\x9f", b"\x98\x80b\xe2"];
        tokens.extend(longer.map(spell));
        tokenizer::<260>(tokens.try_into().unwrap(), ByteLevel::default())
    }

    /// Like those of the Llama family: `<0xHH>` for each byte, and "▁" for a space, stripped at the start.
    fn byte_fallback() -> Tokenizer {
        let mut tokens: Vec<String> = (0..=255).map(|b| format!("<0x{b:02X}>")).collect();
        tokens.extend(["▁a", "b", "▁", "é"].map(String::from));
        let decoder = Sequence::new(vec![
            Replace::new("▁", " ").unwrap().into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
            Strip::new(' ', 1, 0).into(),
        ]);
        tokenizer::<260>(tokens.try_into().unwrap(), decoder)
    }

    fn tokenizer<const N: usize>(
        tokens: [String; N],
        decoder: impl Into<tokenizers::DecoderWrapper>,
    ) -> Tokenizer {
        let mut ids = 0..;
        let vocab = tokens.map(|token| (token, ids.next().unwrap()));
        let bpe = BPE::builder().vocab_and_merges(vocab, vec![]).build().unwrap();
        let mut tokenizer = Tokenizer::new(bpe);
        tokenizer.with_decoder(Some(decoder));
        tokenizer.add_special_tokens([AddedToken::from("<end>", true)]).unwrap();
        tokenizer
    }

    fn streamed(mut stream: TextStream<'_>, ids: &[u32]) -> Vec<String> {
        let mut pieces = Vec::new();
        for &id in ids {
            pieces.extend(stream.push(id).unwrap());
        }
        pieces.extend(stream.flush().unwrap());
        assert!(pieces.iter().all(|piece| !piece.is_empty()));
        pieces
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn characters_come_whole_and_at_once() {
        let tokenizer = byte_level();
        let text = "aé€😀👩‍👩‍👧!";
        let pieces = streamed(TextStream::new(&tokenizer), &ids(text));
        let expected: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(pieces, expected);
        // Tokens across the borders of characters: "a" is sent before the emoji is whole.
        let pieces = streamed(TextStream::new(&tokenizer), &[258, 259, 0x82, 0xac]);
        assert_eq!(pieces, ["a", "😀b", "€"]);
    }

    #[test]
    fn broken_characters_are_replaced_once_that_is_certain() {
        let tokenizer = byte_level();
        let mut stream = TextStream::new(&tokenizer);
        let got: Vec<Option<String>> =
            [0xe2, 0x82, 0x41, 0x80, 0x80, 0x42].map(|id| stream.push(id).unwrap()).into();
        let text = |s: &str| Some(s.to_string());
        assert_eq!(got, [None, None, text("\u{FFFD}A"), None, text("\u{FFFD}"), text("\u{FFFD}B")]);
        assert_eq!(stream.flush().unwrap(), None);
    }

    #[test]
    fn a_replacement_character_of_the_model_is_text_like_any() {
        let tokenizer = byte_level();
        let pieces = streamed(TextStream::new(&tokenizer), &ids("a\u{FFFD}\u{FFFD}b"));
        assert_eq!(pieces.concat(), "a\u{FFFD}\u{FFFD}b");
        let pieces = streamed(TextStream::new(&tokenizer), &ids("a\u{FFFD}"));
        assert_eq!(pieces, ["a", "\u{FFFD}"]);
    }

    #[test]
    fn special_and_unknown_tokens() {
        let tokenizer = byte_level();
        let end = tokenizer.token_to_id("<end>").unwrap();
        let ids = [0x61, end, 0xc3, 9999, end, 0xa9, end];
        assert_eq!(streamed(TextStream::new(&tokenizer), &ids), ["a", "é"]);
        let shown = streamed(TextStream::new(&tokenizer).skip_special_tokens(false), &ids);
        assert_eq!(shown.concat(), tokenizer.decode(&ids, false).unwrap());
        assert_eq!(shown[1], "<end>");
    }

    #[test]
    fn a_flush_starts_a_new_text() {
        let tokenizer = byte_fallback();
        let mut stream = TextStream::new(&tokenizer);
        for _ in 0..2 {
            assert_eq!(stream.push(256).unwrap().as_deref(), Some("a"));
            assert_eq!(stream.push(256).unwrap().as_deref(), Some(" a"));
            assert_eq!(stream.push(0xe2).unwrap(), None);
            assert_eq!(stream.flush().unwrap().as_deref(), Some("\u{FFFD}"));
            assert_eq!(stream.flush().unwrap(), None);
        }
    }

    #[test]
    fn after_a_prompt_the_space_stays() {
        let tokenizer = byte_fallback();
        assert_eq!(streamed(TextStream::new(&tokenizer), &[256, 257]), ["a", "b"]);
        let after = |prompt: &[u32]| TextStream::new(&tokenizer).after(prompt).unwrap();
        assert_eq!(streamed(after(&[257]), &[256, 257]), [" a", "b"]);
        assert_eq!(streamed(after(&[257; 100]), &[256, 257]), [" a", "b"]);
        assert_eq!(streamed(after(&[]), &[256]), ["a"]);
        // A character that the prompt began is the text's, however long the run of bytes is.
        let mut prompt = ids(&"€".repeat(30));
        prompt.pop();
        assert_eq!(streamed(after(&prompt), &[0xac, 257]), ["€b"]);
        assert_eq!(streamed(after(&[257, 0xe2, 0x82]), &[257, 257]), ["b", "b"]);
        assert_eq!(streamed(after(&[257, 0x80, 0x80, 0x80, 0x80]), &[257]), ["b"]);
        assert_eq!(streamed(after(&[257, 0x80, 0x80, 0x80, 0x80]), &[0x80, 257]), ["\u{FFFD}b"]);
    }

    #[test]
    fn a_character_that_the_prompt_left_broken() {
        let tokenizer = byte_level();
        let after = |prompt: &[u32]| TextStream::new(&tokenizer).after(prompt).unwrap();
        assert_eq!(streamed(after(&[0x61, 0xe2, 0x82]), &[0xac, 0x62]), ["€", "b"]);
        assert_eq!(streamed(after(&[0x61, 0xe2, 0x82]), &[0x62]), ["b"]);
        assert_eq!(streamed(after(&[0x61, 0xe2, 0x82]), &[]), [""; 0]);
        assert_eq!(streamed(after(&ids("a\u{FFFD}")), &[0x62, 0x63]), ["b", "c"]);
        assert_eq!(streamed(after(&ids("a\u{FFFD}")), &[0xe2, 0x62]), ["\u{FFFD}b"]);
    }

    #[test]
    fn runs_of_fallback_bytes_wait_for_their_end() {
        let tokenizer = byte_fallback();
        // "A" as a byte, then half a character: the decoder breaks both, where DecodeStream has sent "A" and fails.
        let run = [0x41, 0xe2, 257];
        assert_eq!(streamed(TextStream::new(&tokenizer), &run), ["\u{FFFD}\u{FFFD}b"]);
        let mut theirs = tokenizer.decode_stream(true);
        assert!(run.iter().any(|&id| theirs.step(id).is_err()));
    }

    #[test]
    fn windows_stay_small_while_everything_is_broken() {
        let tokenizer = byte_level();
        let mut stream = TextStream::new(&tokenizer);
        let ids: Vec<u32> = (0..2000).map(|i| [0x80, 0xe2, 0xf0, 0xff][i / 3 % 4]).collect();
        let mut text = String::new();
        for &id in &ids {
            text += &stream.push(id).unwrap().unwrap_or_default();
            assert!(stream.window.len() <= CROWDED);
        }
        text += &stream.flush().unwrap().unwrap_or_default();
        assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn a_decoder_that_rewrites_loses_nothing_and_does_not_panic() {
        let decoder = Sequence::new(vec![Fuse::new().into(), Replace::new("éb", "€").unwrap().into()]);
        let tokenizer = tokenizer(["é", "b", "c"].map(String::from), decoder);
        assert_eq!(streamed(TextStream::new(&tokenizer), &[0, 1, 2]), ["é", "€", "c"]);
    }

    proptest! {
        /// Any tokens at all, with and without special ones and a context.
        #[test]
        fn the_pieces_are_the_text(
            // Bytes that begin and continue characters are frequent among these.
            ids in prop::collection::vec(prop_oneof![0u32..265, 0x80u32..0x100, 0xe0u32..0xf8], 0..200),
            skip in any::<bool>(),
            split in 0usize..200,
        ) {
            for tokenizer in [byte_level(), byte_fallback()] {
                let stream = TextStream::new(&tokenizer).skip_special_tokens(skip);
                let whole = tokenizer.decode(&ids, skip).unwrap();
                prop_assert_eq!(&streamed(stream.clone(), &ids).concat(), &whole);

                // After a context that is text, the pieces are the rest of the text.
                let (context, rest) = ids.split_at(split.min(ids.len()));
                let mut context = context.to_vec();
                context.push(257);
                let before = tokenizer.decode(&context, skip).unwrap();
                let both = tokenizer.decode(&[&context, rest].concat(), skip).unwrap();
                let pieces = streamed(stream.after(&context).unwrap(), rest);
                prop_assert_eq!(before + &pieces.concat(), both);
            }
        }

        /// Text comes back as it was, in pieces that are never held longer than a character.
        #[test]
        fn text_comes_back(text in any::<String>()) {
            let tokenizer = byte_level();
            prop_assert_eq!(streamed(TextStream::new(&tokenizer), &ids(&text)).concat(), text);
        }
    }
}
