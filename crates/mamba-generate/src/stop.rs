//! Strings at which a text ends.

use crate::error::{Error, Result};

/// Finds the end of a text that comes in pieces: the first occurrence of one of some strings.
///
/// Pieces go in, and come out without what might be the beginning of a stop string; that is held back until it is known.
/// So nothing of a stop string comes out, wherever pieces are cut. If several occur, the one counts that is complete first,
/// and of those that end at the same place the longest.
///
/// # Example
/// ```
/// use mamba_generate::StopStrings;
///
/// let mut stops = StopStrings::new(["\nUser:"])?;
/// assert_eq!(stops.push("Well.\n"), "Well.");
/// assert_eq!(stops.push("Use"), "");
/// assert_eq!(stops.push("ful.\nUser: "), "\nUseful.");
/// assert_eq!(stops.matched(), Some("\nUser:"));
/// # Ok::<(), mamba_generate::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    matched: Option<usize>,
}

impl StopStrings {
    /// Makes one for these strings; for none, all text comes out as it goes in.
    ///
    /// # Errors
    /// If a string is empty, as it would occur everywhere.
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if stops.iter().any(String::is_empty) {
            return Err(Error::invalid("stop_strings", "stops", "\"\"", "strings that are not empty"));
        }
        Ok(Self { stops, held: String::new(), matched: None })
    }

    /// Adds a piece, and returns the text that is known to precede any stop string; nothing, once one has occurred.
    pub fn push(&mut self, piece: &str) -> String {
        if self.matched.is_some() {
            return String::new();
        }
        self.held.push_str(piece);
        let occurrences = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        if let Some((_, start, index)) = occurrences.min() {
            self.matched = Some(index);
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let known = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(known);
        std::mem::replace(&mut self.held, rest)
    }

    /// Ends the text, and returns what was held back: the beginning of a stop string that did not occur.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop string that occurred, if one did.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.stops[index].as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut stops = StopStrings::new(stops.iter().copied()).unwrap();
        let mut out: Vec<String> = pieces.iter().map(|piece| stops.push(piece)).collect();
        out.push(stops.flush());
        (out, stops.matched().map(String::from))
    }

    #[test]
    fn holds_back_the_longest_beginning() {
        assert_eq!(run(&["aab"], &["xaa", "a", "c"]).0, ["x", "a", "aac", ""]);
        assert_eq!(run(&["aab"], &["xaaab!"]), (vec!["xa".into(), "".into()], Some("aab".into())));
        assert_eq!(run(&["€uro"], &["1 €", "u"]).0, ["1 ", "", "€u"]);
        assert_eq!(run(&[], &["a", "b"]), (vec!["a".into(), "b".into(), "".into()], None));
    }

    #[test]
    fn the_first_complete_one_counts() {
        assert_eq!(run(&["abcd", "c"], &["xabcd"]), (vec!["xab".into(), "".into()], Some("c".into())));
        assert_eq!(run(&["b", "ab"], &["xab"]), (vec!["x".into(), "".into()], Some("ab".into())));
    }

    #[test]
    fn after_a_match_nothing_comes() {
        assert_eq!(run(&["."], &["a.b", "c"]).0, ["a", "", ""]);
    }

    #[test]
    fn an_empty_string_is_refused() {
        let error = StopStrings::new(["a", ""]).unwrap_err();
        assert_eq!(error.to_string(), "stop_strings: `stops` is \"\", expected strings that are not empty");
    }

    proptest! {
        /// However the text is cut, what comes out is what one piece gives, and no stop string is in it.
        #[test]
        fn cuts_do_not_matter(
            text in "[abé]{0,30}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cut in prop::collection::vec(any::<bool>(), 30),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (whole, matched) = run(&stops, &[&text]);
            let whole = whole.concat();
            let mut pieces = vec![String::new()];
            for (c, &cut) in text.chars().zip(&cut) {
                if cut {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push(c);
            }
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (out, matched_in_pieces) = run(&stops, &pieces);
            prop_assert_eq!(out.concat(), whole.clone());
            prop_assert_eq!(&matched_in_pieces, &matched);
            match matched {
                Some(stop) => prop_assert!(text.starts_with(&(whole.clone() + &stop))),
                None => prop_assert_eq!(&whole, &text),
            }
            prop_assert!(stops.iter().all(|stop| !whole.contains(stop)));
        }
    }
}
