//! Files that are complete under their name or not there.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A file that is written beside the one that is wanted and takes its place when it is complete: a full disk or a crash
/// leaves what was there before, and never half a file.
///
/// Dropped before [`commit`](Self::commit), it removes what was written.
///
/// # Example
/// ```
/// use std::io::Write;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("notes");
/// std::fs::write(&path, "one")?;
/// let mut file = mamba_model::AtomicFile::create(&path)?;
/// file.write_all(b"two")?;
/// assert_eq!(std::fs::read(&path)?, b"one");
/// file.commit()?;
/// assert_eq!(std::fs::read(&path)?, b"two");
/// # Ok::<_, std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    beside: PathBuf,
    file: BufWriter<File>,
    complete: bool,
}

impl AtomicFile {
    /// Begins a file beside `path`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(path: impl Into<PathBuf>) -> std::io::Result<Self> {
        let path = path.into();
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}.part", std::process::id()));
        let beside = PathBuf::from(beside);
        let file = BufWriter::with_capacity(1 << 20, File::create(&beside)?);
        Ok(Self { path, beside, file, complete: false })
    }

    /// Where the file is to be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the disk take what was written so far, so that [`commit`](Self::commit) fails for no want of space: for several
    /// files that belong together.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn sync(&mut self) -> std::io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_all()
    }

    /// Ends the file, has the disk take it, and gives it its name.
    ///
    /// # Errors
    /// If the disk is full, or the name cannot be given.
    pub fn commit(mut self) -> std::io::Result<()> {
        self.sync()?;
        std::fs::rename(&self.beside, &self.path)?;
        self.complete = true;
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.complete {
            let _ = std::fs::remove_file(&self.beside); // what led here is the error that matters
        }
    }
}

/// Writes a whole [`AtomicFile`].
///
/// # Errors
/// What the operating system says; the file is then as it was before.
///
/// # Example
/// ```
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("notes");
/// mamba_model::write_atomically(&path, b"one")?;
/// mamba_model::write_atomically(&path, b"two")?;
/// assert_eq!(std::fs::read(&path)?, b"two");
/// # Ok::<_, std::io::Error>(())
/// ```
pub fn write_atomically(path: impl AsRef<Path>, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = AtomicFile::create(path.as_ref())?;
    file.write_all(bytes)?;
    file.commit()
}
