//! What can go wrong.

use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that this crate reports.
///
/// Messages are lower case without a full stop, so that they can stand behind another message.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said: a part of the message, so no [`source`](std::error::Error::source), which those
        /// who print a chain of errors would print again.
        cause: std::io::Error,
    },

    /// A file does not hold what it should.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },

    /// An option has a value that cannot be.
    #[error("option `{name}` {message}")]
    Option {
        /// Its name.
        name: &'static str,
        /// What is wrong with it, to be read behind its name.
        message: String,
    },

    /// The adapters do not fit the model.
    #[error("adapter: {0}")]
    Adapter(String),

    /// A saved training does not fit the one that would go on from it.
    #[error("training state: {0}")]
    State(String),

    /// The data cannot be used.
    #[error("data: {0}")]
    Data(String),

    /// The processes of a training do not find each other, differ, or one of them is gone.
    #[error("parallel training: {0}")]
    Parallel(String),

    /// The model, or candle, refused.
    #[error(transparent)]
    Model(#[from] mamba_model::Error),
}

impl Error {
    pub(crate) fn io(path: &Path, cause: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), cause }
    }

    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn option(name: &'static str, message: impl Into<String>) -> Self {
        Self::Option { name, message: message.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Model(error.into())
    }
}

/// Requires `holds` of an option.
pub(crate) fn require(holds: bool, name: &'static str, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::option(name, message())) }
}
