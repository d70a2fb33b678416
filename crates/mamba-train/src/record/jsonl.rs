//! A JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// A file that grows by one JSON object a line; each line is written at once.
///
/// # Example
/// ```
/// use mamba_train::record::JsonLines;
/// use serde_json::json;
///
/// let folder = tempfile::tempdir()?;
/// let mut lines = JsonLines::append(folder.path().join("metrics.jsonl"))?;
/// for step in 1..4 {
///     lines.write(&json!({ "step": step }))?;
/// }
/// lines.retain(|line| line["step"].as_u64() < Some(3))?;
/// lines.write(&json!({ "step": 9 }))?;
/// assert_eq!(lines.read()?, [json!({ "step": 1 }), json!({ "step": 2 }), json!({ "step": 9 })]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens a file to write behind its end; makes it if need be.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn append(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let file =
            OpenOptions::new().create(true).append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If the disk is full.
    pub fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(value).map_err(|e| Error::file(&self.path, e.to_string()))? + "\n";
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io(&self.path, e))
    }

    /// All complete lines.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(&self) -> Result<Vec<Value>> {
        let text = std::fs::read_to_string(&self.path).map_err(|e| Error::io(&self.path, e))?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Removes the lines that `keep` does not accept.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn retain(&mut self, keep: impl Fn(&Value) -> bool) -> Result<()> {
        let kept: String =
            self.read()?.into_iter().filter(|line| keep(line)).map(|line| format!("{line}\n")).collect();
        mamba_model::write_atomically(&self.path, kept.as_bytes()).map_err(|e| Error::io(&self.path, e))?;
        *self = Self::append(&self.path)?;
        Ok(())
    }
}
