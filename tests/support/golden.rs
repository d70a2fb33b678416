//! Reads the committed outputs of published implementations.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

/// A path below `goldens/`.
pub fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(relative)
}

/// One file: its tensors and its options.
pub struct Golden {
    pub name: String,
    pub tensors: HashMap<String, Tensor>,
    pub options: HashMap<String, String>,
}

impl Golden {
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        Self {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            tensors: candle_core::safetensors::load(path, &Device::Cpu).unwrap(),
            options: header.metadata().clone().unwrap_or_default(),
        }
    }

    /// Every file of a folder, in the order of names.
    pub fn folder(relative: &str) -> Vec<Self> {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(path(relative)).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        paths.sort();
        paths.iter().map(|path| Self::read(path)).collect()
    }

    /// The tensors whose names begin with `prefix`, without it.
    pub fn with_prefix(&self, prefix: &str) -> HashMap<String, Tensor> {
        let strip = |(name, x): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_owned(), x.clone()));
        self.tensors.iter().filter_map(strip).collect()
    }

    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    pub fn flag(&self, name: &str) -> bool {
        self.option(name) == Some("true")
    }

    pub fn number(&self, name: &str) -> Option<f64> {
        self.option(name)
            .map(|value| value.parse().unwrap_or_else(|_| panic!("{}: {name} = {value}", self.name)))
    }

    /// How far what a file has of an output (`tolerance`) or gradient (`tolerance_grad`) is from `f64`.
    pub fn tolerance(&self, what: &str, name: &str) -> f64 {
        self.number(&format!("{what}.{name}")).or_else(|| self.number(what)).unwrap_or(0.0)
    }

    /// The dtype of 16 bits that a kernel on a GPU ran in to give this, if it did.
    pub fn half(&self) -> Option<DType> {
        self.option("dtype").map(|name| name.parse().unwrap()).filter(|dtype| *dtype != DType::F32)
    }
}
