//! What can go wrong, said with the file, the tensor or the field it went wrong with.

use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

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

    /// A model lacks a file that is needed.
    #[error("no {name} in {origin}")]
    NoSuchFile {
        /// The file, or the files of which one was needed.
        name: String,
        /// Where it was looked for, as [`ModelSource::describe`](crate::checkpoint::ModelSource::describe) says it.
        origin: String,
    },

    /// A file of weights, or an index of such files, is not what it should be.
    #[error("checkpoint {}: {message}", file.display())]
    Checkpoint {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        message: String,
    },

    /// A tensor of a checkpoint is not what it should be.
    #[error("checkpoint {}: tensor `{tensor}` {message}", file.display())]
    Tensor {
        /// The file that holds the tensor.
        file: PathBuf,
        /// The name of the tensor in that file.
        tensor: String,
        /// What is wrong with it, to be read behind its name.
        message: String,
    },

    /// A tensor of a checkpoint does not have the shape that the model gives it.
    #[error("checkpoint {}: tensor `{tensor}` has shape {got:?}, expected {expected:?}", file.display())]
    Shape {
        /// The file that holds the tensor.
        file: PathBuf,
        /// The name of the tensor in that file.
        tensor: String,
        /// The shape in the file.
        got: Vec<usize>,
        /// The shape that the model needs.
        expected: Vec<usize>,
    },

    /// A checkpoint lacks a tensor.
    #[error("checkpoint {origin}: no tensor {tensor}")]
    NoSuchTensor {
        /// The checkpoint.
        origin: String,
        /// The names that would have done, each in backquotes.
        tensor: String,
    },

    /// A configuration cannot be used.
    #[error("config{}: `{field}` {message}", in_file(file))]
    Config {
        /// The file it was read from, if any.
        file: Option<PathBuf>,
        /// The field, with dots between levels.
        field: String,
        /// What is wrong with it, to be read behind its name.
        message: String,
    },

    /// An inference cache does not fit the model, the batch or the file that it meets.
    #[error("cache: {0}")]
    Cache(String),

    /// The caller's input cannot be used: a token id out of range, an empty prompt.
    #[error("input: {0}")]
    Input(String),

    /// The Hub did not give a file.
    #[error("hub: {repo} at revision {revision}: {message}")]
    Hub {
        /// The repository, `owner/name`.
        repo: String,
        /// The branch, tag or commit.
        revision: String,
        /// What happened, and what can be done about it.
        message: String,
    },

    /// Candle refused an operation.
    #[error(transparent)]
    Candle(candle_core::Error),
}

fn in_file(file: &Option<PathBuf>) -> String {
    file.as_deref().map(|f| format!(" {}", f.display())).unwrap_or_default()
}

impl Error {
    pub(crate) fn io(path: &Path, cause: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), cause }
    }

    pub(crate) fn checkpoint(file: &Path, message: impl Into<String>) -> Self {
        Self::Checkpoint { file: file.to_path_buf(), message: message.into() }
    }

    pub(crate) fn tensor(file: &Path, tensor: &str, message: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_path_buf(), tensor: tensor.to_string(), message: message.into() }
    }
}

/// Drops the backtrace, which Candle would print as a part of the message, and gives back an error of ours that
/// went through Candle (see the other direction).
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::WithBacktrace { inner, .. } => (*inner).into(),
            candle_core::Error::Io(io) => match io.downcast::<Error>() {
                Ok(ours) => ours,
                Err(io) => Self::Candle(candle_core::Error::Io(io)),
            },
            other => Self::Candle(other),
        }
    }
}

/// For the places where Candle's traits ask for Candle's error, as the backend of a `VarBuilder` does: the error
/// travels inside an [`std::io::Error`] and comes out as it went in.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            ours => candle_core::Error::Io(std::io::Error::other(ours)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape_error() -> Error {
        Error::Shape {
            file: "/a/b/model.safetensors".into(),
            tensor: "backbone.norm_f.weight".into(),
            got: vec![3],
            expected: vec![4],
        }
    }

    #[test]
    fn a_shape_error_names_file_tensor_got_and_expected() {
        assert_eq!(
            shape_error().to_string(),
            "checkpoint /a/b/model.safetensors: tensor `backbone.norm_f.weight` has shape [3], expected [4]"
        );
    }

    #[test]
    fn a_config_error_names_its_file_if_it_has_one() {
        let error =
            |file| Error::Config { file, field: "ssm_cfg.d_state".into(), message: "is missing".into() };
        assert_eq!(error(None).to_string(), "config: `ssm_cfg.d_state` is missing");
        assert_eq!(
            error(Some("/m/config.json".into())).to_string(),
            "config /m/config.json: `ssm_cfg.d_state` is missing"
        );
    }

    #[test]
    fn an_error_survives_the_way_through_candle() {
        let candle: candle_core::Error = shape_error().into();
        assert_eq!(candle.to_string(), shape_error().to_string());
        assert!(matches!(Error::from(candle), Error::Shape { .. }));
    }

    #[test]
    fn backtraces_do_not_reach_the_message() {
        let inner = Box::new(candle_core::Error::Msg("no such op".into()));
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let error: Error = candle_core::Error::WithBacktrace { inner, backtrace }.into();
        assert_eq!(error.to_string(), "no such op");
    }
}
