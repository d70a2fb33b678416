//! Writes GGUF files, version 3: the header first, then tensor after tensor.

use std::collections::{HashSet, VecDeque};
use std::io::Write;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, WithDType};

use super::{ALIGNMENT_KEY, Array, GgmlType, MAGIC, MAX_AXES, Metadata, Value, alignment};
use crate::checkpoint::stored::elem_count;
use crate::{AtomicFile, Error, Result};

/// The version of the format that is written.
const VERSION: u32 = 3;

/// A tensor that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// The length of each axis, the last one running fastest.
    pub shape: Vec<usize>,
    /// How its elements are to be stored.
    pub kind: GgmlType,
}

impl TensorSpec {
    /// The bytes that the tensor takes in the file; `None` if its rows are no whole blocks.
    pub fn bytes(&self) -> Option<usize> {
        let row = self.shape.last().copied().unwrap_or(1);
        self.kind.bytes(row, elem_count(&self.shape)?)
    }
}

/// Writes a GGUF file, holding one tensor at a time.
///
/// The file appears under its name when it is complete; what was written of it is removed otherwise.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use mamba_model::checkpoint::gguf::{GgmlType, Metadata, TensorSpec, Value, Writer};
/// use mamba_model::checkpoint::{Checkpoint, LocalDir};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("x.gguf");
/// let mut metadata = Metadata::default();
/// metadata.set("general.architecture", Value::String("mamba".into()));
/// let row = Tensor::arange(0f32, 64., &Device::Cpu)?.reshape((2, 32))?;
/// let spec = TensorSpec { name: "x".into(), shape: vec![2, 32], kind: GgmlType::Q8_0 };
/// let mut writer = Writer::create(&path, &metadata, vec![spec])?;
/// writer.write(&row)?;
/// writer.finish()?;
///
/// let checkpoint = Checkpoint::open(&LocalDir::new(&path)?)?;
/// assert_eq!(checkpoint.tensor("x", &Device::Cpu)?.dims(), [2, 32]);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Writer {
    out: AtomicFile,
    alignment: usize,
    waiting: VecDeque<TensorSpec>,
}

impl Writer {
    /// Begins a file with this header: keys in their order with `general.architecture` first, then the tensors.
    ///
    /// # Errors
    /// If a tensor cannot be (its rows are no whole blocks, it has more than four axes, its name is there twice), its
    /// type cannot be written, `general.alignment` is no power of two up to 2^24, or the file cannot be written.
    pub fn create(path: impl AsRef<Path>, metadata: &Metadata, tensors: Vec<TensorSpec>) -> Result<Self> {
        let path = path.as_ref();
        let alignment = alignment(metadata).map_err(|message| Error::checkpoint(path, message))?;
        let header = header(path, metadata, &tensors, alignment)?;
        let out = AtomicFile::create(path).map_err(|e| Error::io(path, e))?;
        let mut writer = Self { out, alignment, waiting: tensors.into() };
        writer.put(&header)?;
        Ok(writer)
    }

    /// Writes the next of the tensors that were announced, converted or quantized to its type.
    ///
    /// Types of Candle are quantized by Candle.
    ///
    /// # Errors
    /// If no tensor is left, this one has another shape than announced, or the file cannot be written.
    pub fn write(&mut self, tensor: &Tensor) -> Result<()> {
        let Some(spec) = self.waiting.pop_front() else {
            return Err(Error::checkpoint(self.out.path(), "has all its tensors already"));
        };
        if tensor.dims() != spec.shape {
            let (got, expected) = (tensor.dims().to_vec(), spec.shape);
            return Err(Error::Shape { file: self.out.path().into(), tensor: spec.name, got, expected });
        }
        match quantized(spec.kind) {
            Some(dtype) => {
                // Candle quantizes all that is stored, so a part of a tensor must be a tensor of its own.
                let tensor = tensor.to_device(&Device::Cpu)?.force_contiguous()?;
                let blocks = QTensor::quantize(&tensor, dtype)?;
                self.put(&blocks.data()?)
            }
            None => self.put(&plain(tensor, spec.kind)?),
        }
    }

    /// Ends the file and gives it its name.
    ///
    /// # Errors
    /// If tensors are missing that were announced, or the file cannot be written.
    pub fn finish(self) -> Result<()> {
        if let Some(spec) = self.waiting.front() {
            return Err(Error::tensor(self.out.path(), &spec.name, "was announced, but not written"));
        }
        let path = self.out.path().to_owned();
        self.out.commit().map_err(|e| Error::io(&path, e))
    }

    /// Writes bytes, and zeros up to the next multiple of the alignment.
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = vec![0; bytes.len().next_multiple_of(self.alignment) - bytes.len()];
        let written = self.out.write_all(bytes).and_then(|()| self.out.write_all(&padding));
        written.map_err(|e| Error::io(self.out.path(), e))
    }
}

fn header(path: &Path, metadata: &Metadata, tensors: &[TensorSpec], alignment: usize) -> Result<Vec<u8>> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.iter().len() as u64).to_le_bytes());
    // Where readers look first.
    let first = |key: &str| !matches!(key, "general.architecture" | ALIGNMENT_KEY);
    let mut entries: Vec<_> = metadata.iter().collect();
    entries.sort_by_key(|(key, _)| first(key));
    for (key, value) in entries {
        put_text(&mut out, key);
        put_value(&mut out, value);
    }
    let (mut offset, mut names) = (0u64, HashSet::new());
    for spec in tensors {
        let TensorSpec { name, shape, kind } = spec;
        let fail = |message: String| Error::tensor(path, name, message);
        if shape.len() > MAX_AXES as usize {
            return Err(fail(format!("has {} axes, expected at most {MAX_AXES}", shape.len())));
        }
        if !names.insert(name) {
            return Err(fail("is there twice".into()));
        }
        if kind.dtype().is_none() && quantized(*kind).is_none() {
            return Err(fail(format!("is to have type {kind}, which can be read but not written")));
        }
        let bytes = spec.bytes().ok_or_else(|| {
            let block = kind.block_size();
            fail(format!("has shape {shape:?}, expected rows of whole blocks of {block} for {kind}"))
        })?;
        put_text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        out.extend(kind.number().to_le_bytes());
        out.extend(offset.to_le_bytes());
        let behind = bytes.checked_next_multiple_of(alignment).and_then(|n| offset.checked_add(n as u64));
        offset = behind.ok_or_else(|| fail(format!("has an impossible shape {shape:?}")))?;
    }
    Ok(out)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The number of a value's type, then the value.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(n) => put(0, &n.to_le_bytes()),
        Value::I8(n) => put(1, &n.to_le_bytes()),
        Value::U16(n) => put(2, &n.to_le_bytes()),
        Value::I16(n) => put(3, &n.to_le_bytes()),
        Value::U32(n) => put(4, &n.to_le_bytes()),
        Value::I32(n) => put(5, &n.to_le_bytes()),
        Value::F32(x) => put(6, &x.to_le_bytes()),
        Value::Bool(b) => put(7, &[(*b).into()]),
        Value::String(text) => {
            put(8, &[]);
            put_text(out, text);
        }
        Value::Array(array) => {
            put(9, &[]);
            put_array(out, array);
        }
        Value::U64(n) => put(10, &n.to_le_bytes()),
        Value::I64(n) => put(11, &n.to_le_bytes()),
        Value::F64(x) => put(12, &x.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let number: u32 = match array {
        Array::U8(_) => 0,
        Array::I8(_) => 1,
        Array::U16(_) => 2,
        Array::I16(_) => 3,
        Array::U32(_) => 4,
        Array::I32(_) => 5,
        Array::F32(_) => 6,
        Array::Bool(_) => 7,
        Array::String(_) => 8,
        Array::U64(_) => 10,
        Array::I64(_) => 11,
        Array::F64(_) => 12,
    };
    out.extend(number.to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::U16(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::I16(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::U32(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::I32(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::F32(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
        Array::Bool(v) => v.iter().for_each(|b| out.push((*b).into())),
        Array::String(v) => v.iter().for_each(|text| put_text(out, text)),
        Array::U64(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::I64(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Array::F64(v) => v.iter().for_each(|x| out.extend(x.to_le_bytes())),
    }
}

/// What Candle calls a type that it can quantize to.
fn quantized(kind: GgmlType) -> Option<GgmlDType> {
    Some(match kind {
        GgmlType::Q4_0 => GgmlDType::Q4_0,
        GgmlType::Q4_1 => GgmlDType::Q4_1,
        GgmlType::Q5_0 => GgmlDType::Q5_0,
        GgmlType::Q5_1 => GgmlDType::Q5_1,
        GgmlType::Q8_0 => GgmlDType::Q8_0,
        GgmlType::Q2_K => GgmlDType::Q2K,
        GgmlType::Q3_K => GgmlDType::Q3K,
        GgmlType::Q4_K => GgmlDType::Q4K,
        GgmlType::Q5_K => GgmlDType::Q5K,
        GgmlType::Q6_K => GgmlDType::Q6K,
        _ => return None,
    })
}

/// The bytes of the elements as plain numbers.
fn plain(tensor: &Tensor, kind: GgmlType) -> Result<Vec<u8>> {
    let dtype = kind.dtype().unwrap_or(DType::F32);
    let flat = tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?.flatten_all()?;
    fn bytes<T: WithDType, const N: usize>(flat: &Tensor, to_bytes: fn(T) -> [u8; N]) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(flat.elem_count() * N);
        flat.to_vec1::<T>()?.into_iter().for_each(|x| out.extend(to_bytes(x)));
        Ok(out)
    }
    match dtype {
        DType::F16 => bytes(&flat, half::f16::to_le_bytes),
        DType::BF16 => bytes(&flat, half::bf16::to_le_bytes),
        DType::F64 => bytes(&flat, f64::to_le_bytes),
        DType::I16 => bytes(&flat, i16::to_le_bytes),
        DType::I32 => bytes(&flat, i32::to_le_bytes),
        DType::I64 => bytes(&flat, i64::to_le_bytes),
        _ => bytes(&flat, f32::to_le_bytes),
    }
}
