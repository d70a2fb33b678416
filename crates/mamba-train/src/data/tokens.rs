//! A file of tokens: what a corpus is encoded into once.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use mamba_model::AtomicFile;

use crate::{Error, Result};

/// The first bytes of the file; four bytes a token follow, little-endian.
const MAGIC: [u8; 16] = *b"mamba tokens 1\n\0";
/// Set in the first token of a document.
const FIRST: u32 = 1 << 31;

/// Writes a file of tokens; nothing has the final name before [`finish`](Self::finish).
#[derive(Debug)]
pub struct TokenWriter {
    file: AtomicFile,
    starts: bool,
    len: u64,
}

impl TokenWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let begun = AtomicFile::create(&path).and_then(|mut file| {
            file.write_all(&MAGIC)?;
            Ok(file)
        });
        Ok(Self { file: begun.map_err(|e| Error::io(&path, e))?, starts: true, len: 0 })
    }

    /// Begins a document with the next token.
    pub fn begin_document(&mut self) {
        self.starts = true;
    }

    /// Adds tokens to the document.
    ///
    /// # Errors
    /// If an id is 2^31 or above, or the disk is full.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        for &id in ids {
            if id >= FIRST {
                return Err(Error::Data(format!("token id {id}, expected one below 2^31")));
            }
            let word = if std::mem::take(&mut self.starts) { id | FIRST } else { id };
            self.file.write_all(&word.to_le_bytes()).map_err(|e| Error::io(self.file.path(), e))?;
        }
        self.len += ids.len() as u64;
        Ok(())
    }

    /// Tokens so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Completes the file under its name, and opens it.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn finish(self) -> Result<TokenFile> {
        let path = self.file.path().to_owned();
        self.file.commit().map_err(|e| Error::io(&path, e))?;
        TokenFile::open(path)
    }
}

/// A file of tokens, read piece by piece.
///
/// # Example
/// ```
/// use mamba_train::data::{TokenFile, TokenWriter};
///
/// let folder = tempfile::tempdir()?;
/// let mut writer = TokenWriter::create(folder.path().join("text.tokens"))?;
/// for document in [[3, 1, 4], [1, 5, 9]] {
///     writer.begin_document();
///     writer.push(&document)?;
/// }
/// let tokens = writer.finish()?;
/// assert_eq!(tokens.len(), 6);
/// assert_eq!(tokens.read(1, 3)?, [(1, false), (4, false), (1, true)]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    file: Mutex<File>,
    len: u64,
}

impl TokenFile {
    /// Opens a file that a [`TokenWriter`] wrote.
    ///
    /// # Errors
    /// If it cannot be read, or is something else.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let mut file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let bytes = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        let mut magic = [0; MAGIC.len()];
        let complete = bytes >= MAGIC.len() as u64 && (bytes - MAGIC.len() as u64).is_multiple_of(4);
        if !complete || file.read_exact(&mut magic).is_err() || magic != MAGIC {
            return Err(Error::file(&path, "is not a file of tokens"));
        }
        Ok(Self { path, file: Mutex::new(file), len: (bytes - MAGIC.len() as u64) / 4 })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many tokens it has.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `count` tokens from `start` on, and whether each is the first of a document.
    ///
    /// # Errors
    /// If they go past the end.
    pub fn read(&self, start: u64, count: usize) -> Result<Vec<(u32, bool)>> {
        if start.checked_add(count as u64).is_none_or(|end| end > self.len) {
            let message = format!("has {} tokens, {count} from {start} were asked for", self.len);
            return Err(Error::file(&self.path, message));
        }
        let mut bytes = vec![0; 4 * count];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file
            .seek(SeekFrom::Start(MAGIC.len() as u64 + 4 * start))
            .and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|e| Error::io(&self.path, e))?;
        let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        Ok(bytes.chunks_exact(4).map(word).map(|word| (word & !FIRST, word & FIRST != 0)).collect())
    }
}
