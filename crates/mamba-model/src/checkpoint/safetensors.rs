//! The safetensors format: a JSON header, then the bytes of the tensors without gaps.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use candle_core::DType;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo as Described};
use serde::de::IgnoredAny;

use super::stored::{Encoding, Stored, elem_count};
use super::unique::Unique;
use super::{Outgoing, TensorInfo};
use crate::{AtomicFile, Error, Result};

/// The header's length stands in the first eight bytes.
const LENGTH_BYTES: usize = 8;

/// Headers longer than this are refused, as by the safetensors crate.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// Reads the header of a file that lies in memory, and finds the tensors.
///
/// # Errors
/// If the file is empty, shorter or longer than its header says, or the header is not one.
pub(crate) fn read(path: &Path, file: &[u8]) -> Result<Vec<(String, Stored)>> {
    let (metadata, start) = header(path, file)?;
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        if elem_count(&info.shape).is_none() {
            return Err(Error::tensor(path, &name, format!("has an impossible shape {:?}", info.shape)));
        }
        let (from, to) = info.data_offsets;
        let stored = Stored {
            encoding: candle_dtype(info.dtype).map(Encoding::Plain),
            shape: info.shape.clone(),
            bytes: start + from..start + to,
            strides: None,
        };
        tensors.push((name, stored));
    }
    Ok(tensors)
}

/// The notes that a writer left in the header.
///
/// # Errors
/// As [`read`].
pub(crate) fn notes(path: &Path, file: &[u8]) -> Result<HashMap<String, String>> {
    Ok(header(path, file)?.0.metadata().clone().unwrap_or_default())
}

/// Writes what [`read`] reads, one tensor after another, and tells `report` of each.
///
/// # Errors
/// If the file cannot be written.
pub(crate) fn write(
    mut file: AtomicFile,
    mut tensors: Vec<Outgoing>,
    notes: HashMap<String, String>,
    mut report: impl FnMut(&str, TensorInfo),
) -> Result<()> {
    let path = file.path().to_path_buf();
    let fail = |e: std::io::Error| Error::io(&path, e);
    let refuse = |e: &dyn std::fmt::Display| Error::checkpoint(&path, format!("cannot be written: {e}"));
    // In the order of the safetensors crate: the widest types first, so that each lies at a multiple of its width.
    tensors.sort_by(|a, b| Dtype::from(b.dtype).cmp(&a.dtype.into()).then_with(|| a.name.cmp(&b.name)));
    let (mut described, mut end) = (vec![], 0);
    for Outgoing { name, tensor, dtype } in &tensors {
        let start = end;
        end += tensor.elem_count() * dtype.size_in_bytes();
        let shape = tensor.dims().to_vec();
        described
            .push((name.clone(), Described { dtype: (*dtype).into(), shape, data_offsets: (start, end) }));
    }
    let metadata = Metadata::new(Some(notes), described).map_err(|e| refuse(&e))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| refuse(&e))?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(fail)?;
    file.write_all(&header).map_err(fail)?;
    for tensor in &tensors {
        file.write_all(&tensor.bytes()?).map_err(fail)?;
        report(&tensor.name, tensor.info());
    }
    file.commit().map_err(fail)
}

/// The header, and where the bytes of the tensors begin.
///
/// It is parsed by the safetensors crate; what is done here is what version 0.8 of the crate leaves out: it adds lengths unchecked
/// in `SafeTensors::read_metadata`, and takes the last of several tensors of one name that lie at the same place.
fn header(path: &Path, file: &[u8]) -> Result<(Metadata, usize)> {
    let fail = |message: String| Error::checkpoint(path, message);
    if file.is_empty() {
        return Err(fail("is empty".into()));
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(fail("is too short for safetensors".into()));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(fail(format!("is not safetensors: its header would have {length} bytes")));
    }
    let Some((header, data)) = rest.split_at_checked(length) else {
        let message = format!("is truncated: its header has {length} bytes, {} are there", rest.len());
        return Err(fail(message));
    };
    let invalid = |e: serde_json::Error| fail(format!("has no valid safetensors header: {e}"));
    let metadata: Metadata = serde_json::from_slice(header).map_err(invalid)?;
    let _: Unique<IgnoredAny> = serde_json::from_slice(header).map_err(invalid)?;
    let (want, have) = (metadata.data_len(), data.len());
    if want != have {
        let what = if have < want { "is truncated" } else { "is too long" };
        return Err(fail(format!(
            "{what}: its tensors need {want} bytes behind the header, {have} are there"
        )));
    }
    Ok((metadata, LENGTH_BYTES + length))
}

fn candle_dtype(dtype: Dtype) -> std::result::Result<DType, String> {
    Ok(match dtype {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        other => return Err(other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(data);
        file
    }

    fn error(bytes: &[u8]) -> String {
        let error = read(Path::new("m.safetensors"), bytes).unwrap_err().to_string();
        assert!(error.starts_with("checkpoint m.safetensors: "), "{error}");
        error
    }

    const ONE: &str =
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"format":"pt"}}"#;

    #[test]
    fn a_good_file_is_read_and_every_other_length_of_it_is_an_error() {
        let good = file(ONE, &[0; 8]);
        let tensors = read(Path::new("m"), &good).unwrap();
        assert_eq!(tensors.len(), 1);
        assert_eq!((tensors[0].0.as_str(), tensors[0].1.bytes.len()), ("a", 8));
        for n in 0..good.len() {
            error(&good[..n]);
        }
        assert!(error(&[]).ends_with("is empty"));
        assert!(error(&good[..20]).contains("is truncated: its header has"));
        assert!(error(&good[..good.len() - 1]).contains("need 8 bytes behind the header, 7 are there"));
        assert!(error(&file(ONE, &[0; 9])).contains("is too long"));
    }

    #[test]
    fn hostile_headers_are_errors() {
        let tensor = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        error(&u64::MAX.to_le_bytes());
        error(&file("{", &[]));
        error(&file("[]", &[]));
        error(&file(&"[".repeat(100_000), &[]));
        error(&file(&tensor("F32", "[2]", "[8,0]"), &[0; 8]));
        error(&file(&tensor("F32", "[2]", "[4,12]"), &[0; 12]));
        error(&file(&tensor("F32", "[3]", "[0,8]"), &[0; 8]));
        // A billion elements over ten bytes, and two tensors over the same ones.
        error(&file(&tensor("U8", "[1000000000]", "[0,10]"), &[0; 10]));
        error(&file(&tensor("U8", "[1000000000]", "[0,1000000000]"), &[0; 10]));
        for (second, data) in [("[4,12]", 12), ("[0,8]", 8), ("[12,20]", 20)] {
            let pair = tensor("F32", "[2]", "[0,8]")
                .replace("}}", &format!("}},{}", &tensor("F32", "[2]", second)[1..]));
            let pair = pair.replacen("\"a\"", "\"b\"", 1);
            assert!(
                error(&file(&pair, &vec![0; data])).contains("has no valid safetensors header"),
                "{pair}"
            );
        }
        error(&file(&tensor("F32", "[-1]", "[0,4]"), &[0; 4]));
        error(&file(&tensor("F32", "[9223372036854775807,2]", "[0,8]"), &[0; 8]));
        error(&file(&tensor("Q4", "[2]", "[0,8]"), &[0; 8]));
        assert!(
            error(&file(&tensor("F32", "[0,9223372036854775807,4]", "[0,0]"), &[])).contains("impossible")
        );
        assert!(
            error(&file(&tensor("F32", "[4611686018427387904,0,8]", "[0,0]"), &[])).contains("impossible")
        );
    }

    /// The same bytes under one name twice, with escapes or without, and notes of one name.
    #[test]
    fn names_are_not_there_twice() {
        let tensor = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        for (first, second) in [("a", "a"), ("a", "\\u0061"), ("", "")] {
            let header = format!(r#"{{"{first}":{tensor},"{second}":{tensor}}}"#);
            let expected = format!("has no valid safetensors header: `{first}` is there twice at line 1");
            assert!(error(&file(&header, &[0; 8])).contains(&expected));
        }
        let twice = r#"{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,8]}}"#;
        assert!(error(&file(twice, &[0; 8])).contains("duplicate field `shape`"));
        let notes = r#"{"__metadata__":{"a":"1"},"__metadata__":{"a":"1"}}"#;
        assert!(error(&file(notes, &[])).contains("__metadata__`"));
    }

    /// In the name of a tensor, that of a note, its text, a type, and anywhere else.
    #[test]
    fn what_is_not_utf_8_is_an_error() {
        let good = r#"{"~":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"note":"~"}}"#;
        assert!(read(Path::new("m"), &file(good, &[0; 8])).is_ok());
        let places: Vec<usize> = (0..good.len()).collect();
        let mut named = 0;
        for bytes in [&[0xff][..], &[0xc3, 0x28], &[0xed, 0xa0, 0x80], &[0xf0, 0x9f]] {
            for &at in &places {
                let header = [&good.as_bytes()[..at], bytes, &good.as_bytes()[at + 1..]].concat();
                let whole = [&(header.len() as u64).to_le_bytes(), header.as_slice(), &[0; 8]].concat();
                let error = error(&whole);
                assert!(error.contains("has no valid safetensors header: "), "{error}");
                named +=
                    usize::from(good.as_bytes()[at] == b'~' && error.contains("invalid unicode code point"));
            }
        }
        assert_eq!(named, 8, "in the name and in the note, four times");
    }

    #[test]
    fn lengths_that_add_up_to_more_than_a_word_are_errors() {
        let part = usize::MAX / 8 + 1;
        let name = |i| format!(r#""t{i}":{{"dtype":"U8","shape":[{}],"data_offsets":"#, part - 1);
        let all: Vec<_> =
            (0..8).map(|i| format!("{}[{},{}]}}", name(i), i * (part - 1), (i + 1) * (part - 1))).collect();
        error(&file(&format!("{{{}}}", all.join(",")), &[0; 3]));
    }

    #[test]
    fn a_dtype_that_candle_lacks_is_kept_by_name() {
        let header = r#"{"mask":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}"#;
        let tensors = read(Path::new("m"), &file(header, &[1])).unwrap();
        assert_eq!(tensors[0].1.encoding, Err("BOOL".to_string()));
    }
}
