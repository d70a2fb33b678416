//! Text files to a file of tokens.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::tokens::{TokenFile, TokenWriter};
use crate::{Error, Result};

/// How texts become tokens.
pub struct Encoding<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// A token behind each document.
    pub end: Option<u32>,
    /// The field of a JSON line that holds its text.
    pub field: &'a str,
}

impl std::fmt::Debug for Encoding<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoding").field("end", &self.end).field("field", &self.field).finish_non_exhaustive()
    }
}

/// Bytes of a text that are encoded at once.
const PIECE: usize = 1 << 20;

/// Encodes files into a file of tokens, in bounded memory: each file is a document, each line of a `.jsonl` or `.json` file
/// too. No special tokens are added but `end`. `progress` hears how many bytes were read.
///
/// # Errors
/// If a file cannot be read, is not UTF-8, or a line is not a JSON object with a text in that field; the error names file
/// and line.
pub fn encode(
    files: &[PathBuf],
    encoding: &Encoding,
    to: &Path,
    mut progress: impl FnMut(u64),
) -> Result<TokenFile> {
    let mut writer = TokenWriter::create(to)?;
    for path in files {
        let input = BufReader::new(File::open(path).map_err(|e| Error::io(path, e))?);
        let lines = path.extension().is_some_and(|e| e == "jsonl" || e == "json");
        match lines {
            true => encode_lines(path, input, encoding, &mut writer, &mut progress)?,
            false => {
                writer.begin_document();
                pieces(path, input, |text| {
                    progress(text.len() as u64);
                    writer.push(&encoding.ids(path, text)?)
                })?;
                writer.push(encoding.end.as_slice())?;
            }
        }
    }
    writer.finish()
}

impl Encoding<'_> {
    fn ids(&self, path: &Path, text: &str) -> Result<Vec<u32>> {
        let encoded = self.tokenizer.encode_fast(text, false);
        Ok(encoded.map_err(|e| Error::file(path, format!("cannot be encoded: {e}")))?.get_ids().to_vec())
    }
}

fn encode_lines(
    path: &Path,
    mut input: impl BufRead,
    encoding: &Encoding,
    writer: &mut TokenWriter,
    progress: &mut impl FnMut(u64),
) -> Result<()> {
    let mut line = String::new();
    for number in 1usize.. {
        line.clear();
        if input.read_line(&mut line).map_err(|e| Error::io(path, e))? == 0 {
            break;
        }
        progress(line.len() as u64);
        if line.trim().is_empty() {
            continue;
        }
        let wrong = |message: String| Error::file(path, format!("line {number} {message}"));
        let value: serde_json::Value =
            serde_json::from_str(&line).map_err(|e| wrong(format!("is not JSON: {e}")))?;
        let text = value.get(encoding.field).and_then(|text| text.as_str());
        let text = text.ok_or_else(|| wrong(format!("has no text in the field `{}`", encoding.field)))?;
        writer.begin_document();
        writer.push(&encoding.ids(path, text)?)?;
        writer.push(encoding.end.as_slice())?;
    }
    Ok(())
}

/// Hands a text to `f` in pieces of about a megabyte, cut where both parts are encoded as the whole is: before the last
/// whitespace that follows something else, which no token of the published tokenizers spans.
///
/// # Errors
/// If the input cannot be read or is not UTF-8; and those of `f`.
pub fn pieces(path: &Path, mut input: impl Read, mut f: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let (mut bytes, mut done) = (vec![], 0u64);
    loop {
        let wanted = (2 * PIECE).saturating_sub(bytes.len()).max(PIECE) as u64;
        let read = input.by_ref().take(wanted).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        let last = (read as u64) < wanted;
        let cut = if last { bytes.len() } else { cut(&bytes) };
        if cut > 0 {
            let text = std::str::from_utf8(&bytes[..cut]).map_err(|e| {
                Error::file(path, format!("is not UTF-8 at byte {}", done + e.valid_up_to() as u64))
            })?;
            f(text)?;
            bytes.drain(..cut);
            done += cut as u64;
        }
        if last {
            return Ok(());
        }
    }
}

fn cut(bytes: &[u8]) -> usize {
    let ends = |i: &usize| bytes[*i].is_ascii_whitespace() && !bytes[*i - 1].is_ascii_whitespace();
    (1..bytes.len()).rev().find(ends).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text() {
        let text: String = (0..400_000).map(|i| format!("wörd{i}  ")).collect();
        let (mut parts, mut whole) = (0, String::new());
        pieces(Path::new("x"), text.as_bytes(), |piece| {
            assert!(piece.len() <= 2 * PIECE);
            parts += 1;
            whole += piece;
            Ok(())
        })
        .unwrap();
        assert!(whole == text && parts > 2);
        let bad = [b"abc ".as_slice(), &[0xff, b' ']].concat();
        let error = pieces(Path::new("x"), &bad[..], |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "x: is not UTF-8 at byte 4");
    }
}
