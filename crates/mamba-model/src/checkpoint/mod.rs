//! The tensors of a checkpoint by name, wherever and however they are stored.
//!
//! A [`ModelSource`] finds files, [`Checkpoint`] finds tensors in them, a [`NameMap`] says how a family of models
//! spells their names. Files are mapped into memory: what is not asked for is not read.
//!
//! | file | format |
//! |---|---|
//! | `model.safetensors` | safetensors |
//! | `model.safetensors.index.json` and the files it lists | safetensors |
//! | `pytorch_model.bin` | `torch.save` of a dictionary of tensors, torch 1.6 or later |
//! | `pytorch_model.bin.index.json` and the files it lists | the same |
//! | a single file `*.gguf`, or its parts `*-00001-of-00003.gguf` and so on | [GGUF](gguf), quantized or not |
//!
//! A tensor goes from its file into the type and the order of the model without a second one beside it, but where a torch file has
//! a matrix column by column, or a GGUF file the rows of queries and keys in another order, or in two halves what the model has in
//! one: then one tensor of the file, or one of the model, is there beside the model. So loading takes the memory of the model and
//! of one tensor.

mod coverage;
mod form;
pub mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod names;
mod outgoing;
pub(crate) mod pickle;
pub(crate) mod safetensors;
mod shards;
mod source;
mod stored;
mod unique;
mod var_builder;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use self::gguf::GgmlType;
use self::stored::{Encoding, Stored};
use crate::{Error, Result};

pub use self::coverage::Coverage;
pub(crate) use self::form::{Form, Forms};
#[cfg(feature = "hub")]
pub use self::hub::{HubBuilder, HubModel, Progress};
pub use self::names::NameMap;
pub(crate) use self::outgoing::Outgoing;
pub use self::source::{LocalDir, ModelSource};

/// The files that may hold the weights of a model, or list such files, the preferred one first.
pub(crate) const WEIGHT_FILES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// Every tensor of a model by its name, in one file or in several.
///
/// Tensors are counted when they are read, so that a loader can prove that it used each of them exactly once:
/// see [`coverage`](Self::coverage).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use mamba_model::checkpoint::{Checkpoint, LocalDir};
///
/// let folder = tempfile::tempdir()?;
/// let weights = Tensor::arange(0f32, 6., &Device::Cpu)?.reshape((2, 3))?.to_dtype(DType::F16)?;
/// weights.save_safetensors("embedding.weight", folder.path().join("model.safetensors"))?;
///
/// let checkpoint = Checkpoint::open(&LocalDir::new(folder.path())?)?;
/// assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["embedding.weight"]);
/// let info = checkpoint.info("embedding.weight").unwrap();
/// assert_eq!((info.dtype, info.shape), (DType::F16, [2, 3].as_slice()));
/// assert_eq!(checkpoint.unread(), ["embedding.weight"]);
/// assert_eq!(checkpoint.tensor("embedding.weight", &Device::Cpu)?.dims(), [2, 3]);
/// assert!(checkpoint.unread().is_empty());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    origin: String,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
    metadata: Option<gguf::Metadata>,
}

/// What a checkpoint says about a tensor without reading it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorInfo<'a> {
    /// The type of the elements in the file; `f32` if they are quantized.
    pub dtype: DType,
    /// The length of each axis.
    pub shape: &'a [usize],
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    bytes: Mmap,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    stored: Stored,
    reads: AtomicUsize,
    /// Into how many parts reading has divided the tensor; 0 if it was read whole.
    parts: AtomicUsize,
}

/// How a file of weights is to be read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Format {
    Safetensors,
    Torch,
    Gguf,
}

impl Checkpoint {
    /// Finds the weights of a model and maps them into memory.
    ///
    /// The first of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` and
    /// `pytorch_model.bin.index.json` that the model has is taken, with the files that an index lists; if it has none
    /// of them, its only file `*.gguf`, with the parts that belong to it.
    ///
    /// # Errors
    /// If the model has none of these files or several `*.gguf`, one that is needed cannot be had, is damaged or is
    /// not in the format that its name says, or an index does not agree with its files.
    pub fn open(source: &dyn ModelSource) -> Result<Self> {
        let mut checkpoint =
            Self { origin: source.describe(), files: Vec::new(), tensors: BTreeMap::new(), metadata: None };
        for name in WEIGHT_FILES {
            let Some(path) = source.file(name)? else { continue };
            let format = if name.starts_with("model") { Format::Safetensors } else { Format::Torch };
            if name.ends_with(".json") {
                checkpoint.add_shards(source, &path, format)?;
            } else {
                checkpoint.add_file(path, format)?;
            }
            return Ok(checkpoint);
        }
        for name in gguf_files(source)? {
            checkpoint.add_file(source.require(&name)?, Format::Gguf)?;
        }
        Ok(checkpoint)
    }

    fn add_shards(&mut self, source: &dyn ModelSource, index: &Path, format: Format) -> Result<()> {
        let shard_of = shards::read(index)?;
        let mut shards: Vec<&String> = shard_of.values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            let path = source.file(shard)?.ok_or_else(|| {
                Error::checkpoint(index, format!("lists `{}`, which is missing", shard.escape_default()))
            })?;
            let first = self.files.len();
            self.add_file(path, format)?;
            let here = |name: &str| self.tensors.get(name).is_some_and(|entry| entry.file == first);
            let mut listed = shard_of.iter().filter(|(_, file)| *file == shard);
            if let Some((name, _)) = listed.find(|(name, _)| !here(name)) {
                let message = format!("is missing, though {} says that it is here", index.display());
                return Err(Error::tensor(&self.files[first].path, name, message));
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: PathBuf, format: Format) -> Result<()> {
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: the map is only read, and all that is read from it is checked or plain numbers. What is assumed is
        // that no other program shortens or rewrites the file meanwhile, as for every mapped checkpoint.
        let bytes = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let tensors = match format {
            Format::Safetensors => safetensors::read(&path, &bytes)?,
            Format::Torch => pickle::read(&path, &bytes)?,
            Format::Gguf => {
                let (metadata, tensors) = gguf::read(&path, &bytes)?;
                // What is said about the model stands in the first of several parts.
                self.metadata.get_or_insert(metadata);
                tensors
            }
        };
        let number = self.files.len();
        for (name, stored) in tensors {
            if let Some(other) = self.tensors.get(&name) {
                let other = self.files[other.file].path.display();
                return Err(Error::tensor(&path, &name, format!("is in {other} as well")));
            }
            self.tensors.insert(
                name,
                Entry { file: number, stored, reads: AtomicUsize::new(0), parts: AtomicUsize::new(0) },
            );
        }
        self.files.push(MappedFile { path, bytes });
        Ok(())
    }

    /// Where the checkpoint comes from, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The file that holds a tensor.
    pub fn path(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|entry| self.path_of(entry))
    }

    /// What a GGUF file says about its model; `None` for other files.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.metadata.as_ref()
    }

    /// Type and shape of a tensor, or `None` if there is none of this name or Candle lacks its type.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        let stored = &self.tensors.get(name)?.stored;
        Some(TensorInfo { dtype: stored.encoding.as_ref().ok()?.dtype(), shape: &stored.shape })
    }

    /// A copy of a tensor on a device, in the type in which it is stored, or in `f32` if it is quantized.
    ///
    /// # Errors
    /// If there is no tensor of this name, Candle lacks its type, or the device refuses it.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let dtype = self.info(name).map_or(DType::F32, |info| info.dtype);
        self.tensor_as(name, dtype, device)
    }

    /// A copy of a tensor on a device, converted to `dtype`. Quantized tensors go straight to that type.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn tensor_as(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.read(name, None, dtype, device)
    }

    /// The same for all of a tensor, or for one of so many equal parts along its first axis.
    fn read(
        &self,
        name: &str,
        part: Option<(usize, usize)>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let (encoding, elements) = self.elements(name, entry)?;
        let (mut shape, mut elements) = (entry.stored.shape.as_slice(), &*elements);
        if let Some((index, count)) = part {
            let fits = shape.first() == Some(&count) && index < count;
            let length = elements.len() / count.max(1);
            elements = fits.then(|| &elements[index * length..][..length]).ok_or_else(|| {
                let message = format!("has shape {shape:?}, of which part {index} of {count} was asked for");
                Error::tensor(self.path_of(entry), name, message)
            })?;
            shape = &shape[1..];
            entry.parts.store(count, Ordering::Relaxed);
        }
        let tensor = match encoding {
            Encoding::Blocks(kind) => {
                gguf::dequantize::dequantize(kind, elements, shape, dtype)?.to_device(device)?
            }
            Encoding::Plain(stored) => {
                // A type that grows is converted on the device, so that fewer bytes travel.
                let grows = stored.size_in_bytes() < dtype.size_in_bytes();
                let kind = if grows && !device.is_cpu() { None } else { GgmlType::of_plain(stored) };
                match kind.filter(|_| stored != dtype) {
                    // Straight from the file, without a tensor of the one type beside that of the other.
                    Some(kind) => {
                        gguf::dequantize::dequantize(kind, elements, shape, dtype)?.to_device(device)?
                    }
                    None => {
                        let first = if grows { device } else { &Device::Cpu };
                        let tensor = Tensor::from_raw_buffer(elements, stored, shape, first)?;
                        tensor.to_dtype(dtype)?.to_device(device)?
                    }
                }
            }
        };
        entry.reads.fetch_add(1, Ordering::Relaxed);
        Ok(tensor)
    }

    /// Whether two tensors are equal in type, shape and every byte, as a tied output head and its embedding are.
    ///
    /// Does not count as reading them.
    ///
    /// # Errors
    /// If one of them does not exist, or Candle lacks its type.
    pub fn same(&self, one: &str, other: &str) -> Result<bool> {
        let (a, b) = (self.entry(one)?, self.entry(other)?);
        if (&a.stored.encoding, &a.stored.shape) != (&b.stored.encoding, &b.stored.shape) {
            return Ok(false);
        }
        let in_place =
            (a.file, &a.stored.bytes, &a.stored.strides) == (b.file, &b.stored.bytes, &b.stored.strides);
        Ok(in_place || self.elements(one, a)?.1 == self.elements(other, b)?.1)
    }

    fn path_of(&self, entry: &Entry) -> &Path {
        &self.files[entry.file].path
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || Error::NoSuchTensor { origin: self.origin.clone(), tensor: format!("`{name}`") };
        self.tensors.get(name).ok_or_else(missing)
    }

    fn elements(&self, name: &str, entry: &Entry) -> Result<(Encoding, Cow<'_, [u8]>)> {
        let fail = |message: String| Error::tensor(self.path_of(entry), name, message);
        let stored = &entry.stored;
        let lacks = |dtype: &String| fail(format!("has dtype {dtype}, which Candle lacks"));
        let encoding = *stored.encoding.as_ref().map_err(lacks)?;
        let elements = stored.elements(&self.files[entry.file].bytes, encoding);
        Ok((encoding, elements.ok_or_else(|| fail("goes past the end of its file".into()))?))
    }
}

/// The names of the files of a GGUF model: its only file, or all parts of it in their order.
fn gguf_files(source: &dyn ModelSource) -> Result<Vec<String>> {
    let mut names = source.list()?;
    names.retain(|name| name.ends_with(".gguf") && part(name).is_none_or(|(_, number, _)| number == 1));
    match names.as_slice() {
        [] => Err(Error::NoSuchFile {
            name: format!("{}, *.gguf", WEIGHT_FILES.join(", ")),
            origin: source.describe(),
        }),
        [name] => Ok(match part(name) {
            Some((stem, _, parts)) => {
                (1..=parts).map(|number| format!("{stem}-{number:05}-of-{parts:05}.gguf")).collect()
            }
            None => vec![name.clone()],
        }),
        several => {
            let message = format!("has several files of weights, name one of {}", several.join(", "));
            Err(Error::Checkpoint { file: source.describe().into(), message })
        }
    }
}

/// What the name of a part says: `x-00002-of-00003.gguf` is number 2 of 3 of `x`.
fn part(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, parts) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| (text.len() == 5).then(|| text.parse::<usize>().ok()).flatten();
    Some((stem, digits(number)?, digits(parts)?))
}
