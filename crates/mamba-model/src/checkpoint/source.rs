//! Where the files of a model come from.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A place that holds the files of one model.
///
/// Implemented for a folder on disk ([`LocalDir`]) and, with the feature `hub`, for a repository of the Hugging Face
/// Hub (`HubModel`).
pub trait ModelSource {
    /// The local path of a file of the model, fetched first if need be, or `None` if the model has no such file.
    ///
    /// `name` is relative to the model, with `/` between folders.
    ///
    /// # Errors
    /// If `name` points outside the model, or the file cannot be fetched or looked for.
    fn file(&self, name: &str) -> Result<Option<PathBuf>>;

    /// The names of the files of the model that are in no folder, sorted; nothing from a source that cannot tell.
    ///
    /// Files that have no fixed name, such as `*.gguf`, are found through it.
    ///
    /// # Errors
    /// If the names cannot be had.
    fn list(&self) -> Result<Vec<String>> {
        Ok(vec![])
    }

    /// Where this is, for messages: a path, or `owner/name at revision main`.
    fn describe(&self) -> String;

    /// The local path of a file that the model must have.
    ///
    /// # Errors
    /// As [`file`](Self::file), and [`Error::NoSuchFile`] if the model has no such file.
    fn require(&self, name: &str) -> Result<PathBuf> {
        self.file(name)?.ok_or_else(|| Error::NoSuchFile { name: name.to_string(), origin: self.describe() })
    }
}

/// A model in a folder on disk, or a single file of weights with its folder.
///
/// ```
/// use mamba_model::checkpoint::{LocalDir, ModelSource};
///
/// let folder = tempfile::tempdir()?;
/// std::fs::write(folder.path().join("config.json"), "{}")?;
/// let model = LocalDir::new(folder.path())?;
/// assert!(model.file("config.json")?.is_some());
/// assert!(model.file("model.safetensors")?.is_none());
/// assert!(model.file("../config.json").is_err());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LocalDir {
    folder: PathBuf,
    weights: Option<PathBuf>,
}

impl LocalDir {
    /// Opens a folder, or a file of weights: `x.safetensors`, `x.gguf`, or `x.bin`, `x.pt` or `x.pth` in torch's
    /// format.
    ///
    /// A file takes the place of all other weights in its folder; the rest of the folder, such as its
    /// `config.json`, is found as usual.
    ///
    /// # Errors
    /// If there is nothing at `path`, or it is a file that does not look like weights.
    pub fn new(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_dir() {
            return Ok(Self { folder: path.to_path_buf(), weights: None });
        }
        if !is_weights(path) {
            let message = "is neither a folder nor a file of weights (.safetensors, .gguf, .bin, .pt, .pth)";
            return Err(Error::io(path, std::io::Error::new(std::io::ErrorKind::InvalidInput, message)));
        }
        let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
        Ok(Self { folder, weights: Some(path.to_path_buf()) })
    }
}

/// The name under which a checkpoint looks for weights of this kind.
pub(super) fn standard_name(weights: &Path) -> Option<&'static str> {
    match weights.extension()?.to_str()? {
        "safetensors" => Some("model.safetensors"),
        "bin" | "pt" | "pth" => Some("pytorch_model.bin"),
        _ => None,
    }
}

/// Whether a file of this name can hold weights.
pub(super) fn is_weights(path: &Path) -> bool {
    standard_name(path).is_some() || path.extension().is_some_and(|extension| extension == "gguf")
}

impl ModelSource for LocalDir {
    fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        if !is_inside(name) {
            let message = format!("`{}` points outside the model", name.escape_default());
            return Err(Error::checkpoint(&self.folder, message));
        }
        if let Some(weights) = &self.weights
            && super::WEIGHT_FILES.contains(&name)
        {
            return Ok((standard_name(weights) == Some(name)).then(|| weights.clone()));
        }
        let path = self.folder.join(name);
        match std::fs::metadata(&path) {
            Ok(found) => Ok(found.is_file().then_some(path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&path, e)),
        }
    }

    fn list(&self) -> Result<Vec<String>> {
        let text = |name: &std::ffi::OsStr| name.to_str().map(str::to_owned);
        if let Some(weights) = &self.weights {
            return Ok(weights.file_name().and_then(text).into_iter().collect());
        }
        let fail = |e| Error::io(&self.folder, e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if entry.path().is_file() {
                names.extend(text(&entry.file_name()));
            }
        }
        names.sort();
        Ok(names)
    }

    fn describe(&self) -> String {
        self.weights.as_ref().unwrap_or(&self.folder).display().to_string()
    }
}

/// Whether a name with `/` between folders stays inside the folder it is relative to, on every system.
pub(crate) fn is_inside(name: &str) -> bool {
    let plain = |c: char| !c.is_control() && !matches!(c, '\\' | ':');
    name.chars().all(plain) && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for bad in
            ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".", "a/.", "C:\\x", "a\\b", "c:x", "a\0b"]
        {
            assert!(!is_inside(bad), "{bad:?}");
        }
        for good in ["model.safetensors", "a/b.json", "model-00001-of-00002.safetensors", "..x", "x..y"] {
            assert!(is_inside(good), "{good:?}");
        }
    }

    #[test]
    fn a_file_of_weights_replaces_the_weights_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "other.pt", "model.safetensors", "notes.txt"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let model = LocalDir::new(folder.path().join("other.pt")).unwrap();
        assert_eq!(model.file("model.safetensors").unwrap(), None);
        assert_eq!(model.file("pytorch_model.bin").unwrap(), Some(folder.path().join("other.pt")));
        assert!(model.require("config.json").is_ok());
        assert!(LocalDir::new(folder.path().join("notes.txt")).is_err());
    }

    #[test]
    fn missing_files_and_folders_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let model = LocalDir::new(folder.path()).unwrap();
        let error = model.require("config.json").unwrap_err().to_string();
        assert_eq!(error, format!("no config.json in {}", folder.path().display()));
        let error = LocalDir::new(folder.path().join("nowhere")).unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
    }
}
