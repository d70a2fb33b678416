//! The loop with text: tokens generated, decoded, and ended at stop strings.

use std::iter::FusedIterator;
use std::ops::ControlFlow;

use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::stop::StopStrings;
use crate::text::TextStream;
use crate::token::{FinishReason, Tokens};

/// What a [`TextGenerator`] shows, and where it stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// Strings at which to stop; neither they nor what follows is shown. None by default.
    pub stop_strings: Vec<String>,
    /// Whether special tokens, such as that for the end of a text, are not shown. They are not by default.
    pub skip_special_tokens: bool,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { stop_strings: Vec::new(), skip_special_tokens: true }
    }
}

/// Generates text: an iterator of pieces, valid UTF-8 and not empty, that together are the continuation of the prompt.
///
/// A piece appears as soon as it is certain, which is usually with each token. The text of a stop token is not part of it,
/// nor is a stop string, nor what follows one. After an error, which comes when all text before it has, the iterator ends.
///
/// At a stop string the generation ends as it does at a token limit: the last token was not read by the model, see
/// [`Generator`](crate::Generator). The tokens that made the stop string are among the [`ids`](Self::ids).
///
/// # Example
/// See the [crate's](crate) page.
pub struct TextGenerator<'a, G: Tokens> {
    generator: G,
    stream: TextStream<'a>,
    stops: StopStrings,
    done: bool,
    /// An error to return after the text that precedes it.
    error: Option<Error>,
}

impl<'a, G: Tokens> TextGenerator<'a, G> {
    /// Makes text of what `generator`, plain or speculative, generates, as `tokenizer` decodes it after the prompt.
    ///
    /// Of a generation that was resumed, the text goes on where it was, with the same options.
    ///
    /// # Errors
    /// If a stop string is empty, or the tokenizer cannot decode the prompt.
    pub fn new(generator: G, tokenizer: &'a Tokenizer, options: TextOptions) -> Result<Self> {
        let mut stream = TextStream::new(tokenizer)
            .skip_special_tokens(options.skip_special_tokens)
            .after(generator.prompt())?;
        let mut stops = StopStrings::new(options.stop_strings)?;
        // Of a generation that was resumed, what was shown before is not shown again, and what was held back still is.
        let generated = generator.generated();
        let stopped = generator.finish_reason() == Some(FinishReason::StopToken); // which has no text
        for &id in &generated[..generated.len() - usize::from(stopped)] {
            stops.push(&stream.push(id)?.unwrap_or_default());
        }
        let done = stops.matched().is_some();
        Ok(Self { generator, stream, stops, done, error: None })
    }

    /// Why the generation ended, once the last piece has come; `None` before, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        match self.stops.matched() {
            Some(_) => Some(FinishReason::StopString),
            None if self.done && self.error.is_none() => self.generator.finish_reason(),
            None => None,
        }
    }

    /// The stop string at which the generation ended, if at one.
    pub fn stop_string(&self) -> Option<&str> {
        self.stops.matched()
    }

    /// The tokens that were generated so far, including those that have no text.
    pub fn ids(&self) -> &[u32] {
        self.generator.generated()
    }

    /// The generator of the tokens, for its timings, its cache and its pending token.
    pub fn generator(&self) -> &G {
        &self.generator
    }

    /// The generator of the tokens, to go on without text.
    pub fn into_generator(self) -> G {
        self.generator
    }

    /// Generates to the end, and shows every piece to `on_piece` as soon as it is certain, which may break off.
    ///
    /// Returns why it ended; nothing if it was broken off, and can be gone on with.
    ///
    /// # Errors
    /// As the iterator, after the text before the error.
    pub fn run(&mut self, mut on_piece: impl FnMut(&str) -> ControlFlow<()>) -> Result<Option<FinishReason>> {
        for piece in self.by_ref() {
            if on_piece(&piece?).is_break() {
                return Ok(None);
            }
        }
        Ok(self.finish_reason())
    }

    /// The text that is certain after one more token, or after the last.
    fn advance(&mut self) -> Result<String> {
        let piece = match self.generator.next() {
            Some(Ok(_)) if self.generator.finish_reason() == Some(FinishReason::StopToken) => None,
            Some(Ok(token)) => self.stream.push(token.id)?,
            ended => {
                self.done = true;
                self.error = ended.and_then(Result::err);
                self.stream.flush()?
            }
        };
        let mut text = self.stops.push(&piece.unwrap_or_default());
        if self.stops.matched().is_some() {
            self.done = true;
        } else if self.done {
            text += &self.stops.flush();
        }
        Ok(text)
    }
}

impl<G: Tokens> Iterator for TextGenerator<'_, G> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            match self.advance() {
                Ok(text) if text.is_empty() => {}
                Ok(text) => return Some(Ok(text)),
                Err(error) => {
                    self.done = true;
                    self.error = self.error.take().or(Some(error));
                }
            }
        }
        self.error.take().map(Err)
    }
}

impl<G: Tokens> FusedIterator for TextGenerator<'_, G> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::generator::Generator;
    use crate::text::tests::byte_level;

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn generator(model: &Fake, max_new_tokens: usize) -> Generator<'_, Fake> {
        Generator::builder(model).prompt(&[0x3e]).max_new_tokens(max_new_tokens).build().unwrap()
    }

    fn stopping_at<const N: usize>(stops: [&str; N]) -> TextOptions {
        TextOptions { stop_strings: stops.map(String::from).into(), ..TextOptions::default() }
    }

    fn pieces(text: &mut TextGenerator<'_, Generator<'_, Fake>>) -> Vec<String> {
        text.map(|piece| piece.unwrap()).collect()
    }

    #[test]
    fn text_comes_in_pieces_until_the_limit() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("hé😀!"));
        let mut text = TextGenerator::new(generator(&model, 7), &tokenizer, TextOptions::default()).unwrap();
        assert_eq!(text.finish_reason(), None);
        assert_eq!(pieces(&mut text), ["h", "é", "😀"]);
        assert_eq!(text.finish_reason(), Some(FinishReason::Length));
        assert_eq!(text.ids(), ids("hé😀"));
        assert!(text.next().is_none());
        // A limit in the middle of a character.
        let mut text = TextGenerator::new(generator(&model, 6), &tokenizer, TextOptions::default()).unwrap();
        assert_eq!(pieces(&mut text), ["h", "é", "\u{FFFD}"]);
    }

    #[test]
    fn a_stop_string_that_straddles_tokens_does_not_leak() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("go on.\n\nSTOP and more"));
        let mut text =
            TextGenerator::new(generator(&model, 100), &tokenizer, stopping_at([".\n\n", "STOP"])).unwrap();
        assert_eq!(pieces(&mut text).concat(), "go on");
        assert_eq!(text.finish_reason(), Some(FinishReason::StopString));
        assert_eq!(text.stop_string(), Some(".\n\n"));
        assert_eq!(text.ids(), ids("go on.\n\n"));
        assert!(text.next().is_none());
        // The model did not read the last token.
        assert_eq!(text.generator().cache()[..], ids(">go on.\n"));
        assert_eq!(text.generator().pending(), Some(u32::from(b'\n')));
    }

    #[test]
    fn resumed_text_equals_uninterrupted_wherever_it_was_cut() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("go 😀 on.\n\nSTOP and more"));
        for cut in 0..12 {
            let mut first =
                TextGenerator::new(generator(&model, 100), &tokenizer, stopping_at([".\n\n"])).unwrap();
            let mut shown = String::new();
            while first.ids().len() < cut {
                shown += &first.advance().unwrap();
            }
            let state = first.generator().state().unwrap();
            let rest = Generator::builder(&model).resume(state).max_new_tokens(100).build().unwrap();
            let mut rest = TextGenerator::new(rest, &tokenizer, stopping_at([".\n\n"])).unwrap();
            shown += &pieces(&mut rest).concat();
            assert_eq!(shown, "go 😀 on", "cut at {cut}");
            assert_eq!(rest.finish_reason(), Some(FinishReason::StopString));
        }
    }

    #[test]
    fn a_stop_string_inside_one_token() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &[0x2e, 256, 257, 0x21]); // . the  th !
        let mut text = TextGenerator::new(generator(&model, 4), &tokenizer, stopping_at(["h"])).unwrap();
        assert_eq!(pieces(&mut text), [".", "t"]);
        assert_eq!(text.ids(), [0x2e, 256]);
    }

    #[test]
    fn the_beginning_of_a_stop_string_comes_at_the_end() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("a.\n"));
        let mut text = TextGenerator::new(generator(&model, 3), &tokenizer, stopping_at([".\n\n"])).unwrap();
        assert_eq!(pieces(&mut text), ["a", ".\n"]);
        assert_eq!((text.finish_reason(), text.stop_string()), (Some(FinishReason::Length), None));
    }

    #[test]
    fn a_stop_string_completed_by_the_last_token_allowed() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("ab"));
        let mut text = TextGenerator::new(generator(&model, 2), &tokenizer, stopping_at(["b"])).unwrap();
        assert_eq!(pieces(&mut text), ["a"]);
        assert_eq!(text.finish_reason(), Some(FinishReason::StopString));
    }

    #[test]
    fn a_stop_token_has_no_text() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("a.b"));
        let generator = Generator::builder(&model).prompt(&[0x3e]).stop_tokens(&[0x2e]).build().unwrap();
        let mut text = TextGenerator::new(generator, &tokenizer, TextOptions::default()).unwrap();
        assert_eq!(pieces(&mut text), ["a"]);
        assert_eq!(text.finish_reason(), Some(FinishReason::StopToken));
        assert_eq!(text.ids(), ids("a."));
        // Nor does it have one when the generation is resumed, which has ended.
        let state = text.generator().state().unwrap();
        let ended = Generator::builder(&model).resume(state).stop_tokens(&[0x2e]).build().unwrap();
        let mut text = TextGenerator::new(ended, &tokenizer, stopping_at([".\n"])).unwrap();
        assert_eq!(pieces(&mut text), [""; 0]);
        assert_eq!(text.finish_reason(), Some(FinishReason::StopToken));
    }

    #[test]
    fn special_tokens_are_shown_if_asked() {
        let tokenizer = byte_level();
        let end = tokenizer.token_to_id("<end>").unwrap();
        let model = Fake::saying(1, &[0x61, end, 0x62]);
        for (skip_special_tokens, expected) in [(true, "ab"), (false, "a<end>b")] {
            let options = TextOptions { skip_special_tokens, ..TextOptions::default() };
            let mut text = TextGenerator::new(generator(&model, 3), &tokenizer, options).unwrap();
            assert_eq!(pieces(&mut text).concat(), expected);
        }
    }

    #[test]
    fn an_error_comes_after_the_text_before_it() {
        let tokenizer = byte_level();
        let model = Fake { fail_at: Some(4), ..Fake::saying(1, &ids("ab.")) };
        let mut text = TextGenerator::new(generator(&model, 9), &tokenizer, stopping_at([".\n"])).unwrap();
        let got: Vec<Result<String>> = text.by_ref().collect();
        let (error, pieces) = got.split_last().unwrap();
        let pieces: Vec<&str> = pieces.iter().map(|piece| piece.as_deref().unwrap()).collect();
        assert_eq!(pieces, ["a", "b", "."]);
        assert!(matches!(error, Err(Error::Model { .. })));
        assert!(text.next().is_none() && text.next().is_none());
        assert_eq!(text.finish_reason(), None);
    }

    #[test]
    fn no_tokens_no_text() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("a"));
        let mut text = TextGenerator::new(generator(&model, 0), &tokenizer, TextOptions::default()).unwrap();
        assert!(text.next().is_none());
        assert_eq!(text.finish_reason(), Some(FinishReason::Length));
    }

    #[test]
    fn pieces_are_shown_and_can_be_broken_off() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &ids("hé😀!"));
        let mut text = TextGenerator::new(generator(&model, 8), &tokenizer, TextOptions::default()).unwrap();
        let mut shown = vec![];
        let mut show = |piece: &str, last: &str| {
            shown.push(piece.to_owned());
            if piece == last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        assert_eq!(text.run(|piece| show(piece, "é")).unwrap(), None);
        assert_eq!(text.run(|piece| show(piece, "")).unwrap(), Some(FinishReason::Length));
        assert_eq!(shown, ["h", "é", "😀", "!"]);
        assert_eq!(text.into_generator().generated().len(), 8);
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let tokenizer = byte_level();
        let model = Fake::saying(1, &[]);
        assert!(TextGenerator::new(generator(&model, 1), &tokenizer, stopping_at([""])).is_err());
    }
}
