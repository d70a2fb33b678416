//! The GGUF format of llama.cpp: keys and values, then a table of tensors, then their bytes, often quantized.
//!
//! Versions 2 and 3, little-endian. What a file says about a model is [`Metadata`]; [`Checkpoint`](super::Checkpoint)
//! finds the tensors. Types in which tensors can be stored are listed by [`GgmlType`]. [`Writer`] writes such files, and
//! [`Model::save_gguf`](crate::Model::save_gguf) a whole model.

mod cursor;
pub(super) mod dequantize;
mod ggml_type;
mod metadata;
mod writer;

use std::collections::HashSet;
use std::path::Path;

use self::cursor::Cursor;
use super::stored::{Encoding, Stored, elem_count};
use crate::{Error, Result};

pub use self::ggml_type::GgmlType;
pub use self::metadata::{Array, Metadata, Value};
pub use self::writer::{TensorSpec, Writer};

/// The first four bytes of a file.
const MAGIC: &[u8] = b"GGUF";

/// Where tensors begin, unless the file says otherwise: at multiples of this.
const DEFAULT_ALIGNMENT: usize = 32;

/// The key that says otherwise.
/// More than a page of any machine, and little enough to be filled with zeros behind each tensor.
const MAX_ALIGNMENT: usize = 1 << 24;
const ALIGNMENT_KEY: &str = "general.alignment";

/// ggml has no tensors of more axes.
const MAX_AXES: u32 = 4;

/// The least bytes of a key with its value: a length, a type, one byte.
const LEAST_ENTRY: usize = 8 + 4 + 1;

/// The least bytes of a row in the table of tensors: a length, the number of axes, a type, an offset.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;

/// Reads the header of a file that lies in memory, and finds the tensors.
///
/// # Errors
/// If the file is not GGUF, a number in it does not fit the file, a name is not UTF-8 or is there twice, or tensors do
/// not lie within the file, aligned and apart from each other.
pub(crate) fn read(path: &Path, file: &[u8]) -> Result<(Metadata, Vec<(String, Stored)>)> {
    let fail = |message: String| Error::checkpoint(path, message);
    if file.is_empty() {
        return Err(fail("is empty".into()));
    }
    if !file.starts_with(MAGIC) {
        return Err(fail("is not GGUF: it does not begin with these letters".into()));
    }
    let mut cursor = Cursor::new(file, MAGIC.len());
    match cursor.scalar::<u32>().map_err(fail)? {
        2 | 3 => {}
        version if version & 0xffff == 0 => {
            return Err(fail("is a big-endian GGUF file, which is not supported".into()));
        }
        version => return Err(fail(format!("has GGUF version {version}, expected 2 or 3"))),
    }
    // The number of tensors stands first, but the table of tensors follows the metadata.
    let tensors = cursor.count("tensors", LEAST_TENSOR).map_err(fail)?;
    let metadata = metadata(path, &mut cursor)?;
    let alignment = alignment(&metadata).map_err(fail)?;
    let rows = (0..tensors).map(|_| Row::read(path, &mut cursor)).collect::<Result<Vec<_>>>()?;
    let mut names = HashSet::with_capacity(rows.len());
    if let Some(twice) = rows.iter().find(|row| !names.insert(row.name)) {
        return Err(Error::tensor(path, twice.name, "is there twice"));
    }
    // Offsets are counted from here.
    let start = cursor.position().checked_next_multiple_of(alignment);
    let start = start.ok_or_else(|| fail(format!("has `{ALIGNMENT_KEY}` {alignment}")))?;
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let stored = row.locate(start, alignment, file.len());
        found.push((row.name.to_string(), stored.map_err(|message| Error::tensor(path, row.name, message))?));
    }
    check_apart(path, &found)?;
    Ok((metadata, found))
}

fn metadata(path: &Path, cursor: &mut Cursor) -> Result<Metadata> {
    let fail = |message: String| Error::checkpoint(path, message);
    let mut metadata = Metadata::default();
    for _ in 0..cursor.count("keys", LEAST_ENTRY).map_err(fail)? {
        let key = cursor.text().map_err(fail)?;
        let name = || format!("key `{}`", key.escape_default());
        let value = value(cursor).map_err(|message| fail(format!("{} {message}", name())))?;
        if metadata.set(key, value).is_some() {
            return Err(fail(format!("has {} twice", name())));
        }
    }
    Ok(metadata)
}

fn value(cursor: &mut Cursor) -> std::result::Result<Value, String> {
    Ok(match cursor.scalar::<u32>()? {
        0 => Value::U8(cursor.scalar()?),
        1 => Value::I8(cursor.scalar()?),
        2 => Value::U16(cursor.scalar()?),
        3 => Value::I16(cursor.scalar()?),
        4 => Value::U32(cursor.scalar()?),
        5 => Value::I32(cursor.scalar()?),
        6 => Value::F32(cursor.scalar()?),
        7 => Value::Bool(cursor.scalar()?),
        8 => Value::String(cursor.text()?.to_string()),
        9 => Value::Array(array(cursor)?),
        10 => Value::U64(cursor.scalar()?),
        11 => Value::I64(cursor.scalar()?),
        12 => Value::F64(cursor.scalar()?),
        other => return Err(format!("has a value of type {other}, which is unknown")),
    })
}

fn array(cursor: &mut Cursor) -> std::result::Result<Array, String> {
    let of = "values";
    Ok(match cursor.scalar::<u32>()? {
        0 => Array::U8(cursor.scalars(of)?),
        1 => Array::I8(cursor.scalars(of)?),
        2 => Array::U16(cursor.scalars(of)?),
        3 => Array::I16(cursor.scalars(of)?),
        4 => Array::U32(cursor.scalars(of)?),
        5 => Array::I32(cursor.scalars(of)?),
        6 => Array::F32(cursor.scalars(of)?),
        7 => Array::Bool(cursor.scalars(of)?),
        8 => {
            // Each text has at least its length in the file.
            let count = cursor.count("texts", 8)?;
            Array::String(
                (0..count)
                    .map(|_| Ok(cursor.text()?.to_string()))
                    .collect::<std::result::Result<_, String>>()?,
            )
        }
        9 => return Err("is an array of arrays, which is not supported".into()),
        10 => Array::U64(cursor.scalars(of)?),
        11 => Array::I64(cursor.scalars(of)?),
        12 => Array::F64(cursor.scalars(of)?),
        other => return Err(format!("has values of type {other}, which is unknown")),
    })
}

fn alignment(metadata: &Metadata) -> std::result::Result<usize, String> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    let alignment = value.as_u64().and_then(|n| usize::try_from(n).ok());
    let alignment = alignment.filter(|n| n.is_power_of_two() && *n <= MAX_ALIGNMENT);
    alignment.ok_or_else(|| {
        format!("has `{ALIGNMENT_KEY}` {value:?}, expected a power of two up to {MAX_ALIGNMENT}")
    })
}

/// A row in the table of tensors.
struct Row<'a> {
    name: &'a str,
    /// The last axis of the tensor stands first in the file.
    shape: Vec<usize>,
    kind: std::result::Result<GgmlType, String>,
    offset: u64,
}

impl<'a> Row<'a> {
    fn read(path: &Path, cursor: &mut Cursor<'a>) -> Result<Self> {
        let name = cursor.text().map_err(|message| Error::checkpoint(path, message))?;
        Self::read_rest(name, cursor).map_err(|message| Error::tensor(path, name, message))
    }

    fn read_rest(name: &'a str, cursor: &mut Cursor<'a>) -> std::result::Result<Self, String> {
        let axes: u32 = cursor.scalar()?;
        if axes > MAX_AXES {
            return Err(format!("has {axes} axes, expected at most {MAX_AXES}"));
        }
        let dims = (0..axes).map(|_| cursor.scalar()).collect::<std::result::Result<Vec<u64>, _>>()?;
        let impossible = || format!("has an impossible shape {dims:?}");
        let shape = dims.iter().rev().map(|dim| usize::try_from(*dim).map_err(|_| impossible()));
        let shape = shape.collect::<std::result::Result<Vec<usize>, _>>()?;
        elem_count(&shape).ok_or_else(impossible)?;
        Ok(Self { name, shape, kind: GgmlType::from_number(cursor.scalar()?), offset: cursor.scalar()? })
    }

    /// Where the tensor lies, with the bytes of tensors beginning at `start` of a file of `len` bytes.
    fn locate(&self, start: usize, alignment: usize, len: usize) -> std::result::Result<Stored, String> {
        let Self { shape, offset, .. } = self;
        let kind = self.kind.clone()?;
        let row = shape.last().copied().unwrap_or(1);
        let bytes = elem_count(shape).and_then(|count| kind.bytes(row, count)).ok_or_else(|| {
            format!("has rows of {row} elements, expected whole blocks of {} for {kind}", kind.block_size())
        })?;
        let offset = usize::try_from(*offset).ok().filter(|offset| offset.is_multiple_of(alignment));
        let Some(offset) = offset else {
            return Err(format!("has offset {}, expected a multiple of {alignment}", self.offset));
        };
        let first = start.checked_add(offset);
        let range = first.and_then(|first| Some(first..first.checked_add(bytes)?));
        let Some(range) = range.filter(|range| range.end <= len) else {
            return Err(format!(
                "goes past the end of the file: it needs {bytes} bytes at {offset} behind byte {start} of {len}"
            ));
        };
        let encoding = Ok(kind.dtype().map_or(Encoding::Blocks(kind), Encoding::Plain));
        Ok(Stored { encoding, shape: shape.clone(), bytes: range, strides: None })
    }
}

/// No two tensors share a byte.
fn check_apart(path: &Path, tensors: &[(String, Stored)]) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().filter(|(_, stored)| !stored.bytes.is_empty()).collect();
    order.sort_by_key(|(_, stored)| stored.bytes.start);
    match order.windows(2).find(|pair| pair[0].1.bytes.end > pair[1].1.bytes.start) {
        Some(pair) => Err(Error::tensor(path, &pair[1].0, format!("overlaps tensor `{}`", pair[0].0))),
        None => Ok(()),
    }
}
