//! Torch's checkpoint format: a zip archive with a pickle that says which tensors lie where, and their bytes.
//!
//! A pickle is a program. The one here is read by a [`machine`] that knows the few instructions and names that
//! `torch.save` writes for a dictionary of tensors, and refuses all others; nothing in the file is executed, and no
//! length in it is believed before it has been compared with the bytes that are there.

mod archive;
mod machine;
mod stack;
#[cfg(test)]
mod tests;
mod value;
mod writer;

use std::collections::HashSet;
use std::path::Path;

use self::archive::Archive;
use self::value::{Pickle, Storage, TensorView, Value};
pub(crate) use self::writer::write;
use super::stored::{Encoding, Stored, elem_count, is_contiguous, span};
use crate::{Error, Result};

/// How files begin that torch wrote before version 1.6: a pickle of its magic number.
const OLD_FORMAT: &[u8] =
    &[0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// Reads the pickle of an archive that lies in memory, and finds the tensors.
///
/// The pickle has to hold a dictionary of tensors, or a dictionary with such a one under `state_dict`. Entries that
/// are no tensors are passed over.
///
/// # Errors
/// If the file is not such an archive, the pickle does more than describe tensors, or a tensor does not lie within
/// its storage.
pub(crate) fn read(path: &Path, file: &[u8]) -> Result<Vec<(String, Stored)>> {
    let fail = |message: String| Error::checkpoint(path, message);
    if file.is_empty() {
        return Err(fail("is empty".into()));
    }
    if file.starts_with(OLD_FORMAT) {
        let advice = "load it with torch and save it again, best as safetensors";
        return Err(fail(format!("is in the format of torch before 1.6, which is not supported: {advice}")));
    }
    let archive = Archive::open(file).map_err(fail)?;
    let pickle = machine::run(&archive.pickle).map_err(|message| fail(format!("data.pkl {message}")))?;
    let (mut tensors, mut names) = (Vec::new(), HashSet::new());
    for (key, value) in state_dict(&pickle).map_err(|message| fail(message.into()))? {
        let Value::Tensor(id) = value else { continue };
        let Value::Str(name) = key else {
            return Err(fail("data.pkl has a tensor whose name is not a string".into()));
        };
        if !names.insert(*name) {
            return Err(Error::tensor(path, name, "is there twice"));
        }
        let (view, storage) = pickle.tensor(*id);
        let stored = locate(view, storage, &archive).map_err(|message| Error::tensor(path, name, message))?;
        tensors.push((name.to_string(), stored));
    }
    if tensors.is_empty() {
        return Err(fail("holds no tensors".into()));
    }
    Ok(tensors)
}

type Pairs<'p, 'a> = &'p [(Value<'a>, Value<'a>)];

fn state_dict<'p, 'a>(pickle: &'p Pickle<'a>) -> std::result::Result<Pairs<'p, 'a>, &'static str> {
    let Value::Dict(id) = pickle.root else { return Err("data.pkl does not hold a dictionary of tensors") };
    let pairs = pickle.dict(id);
    let nested = pairs.iter().find_map(|pair| match pair {
        (Value::Str("state_dict"), Value::Dict(id)) => Some(pickle.dict(*id)),
        _ => None,
    });
    Ok(nested.unwrap_or(pairs))
}

/// Where the tensor lies in the file, or what is wrong with it.
fn locate(view: &TensorView, storage: &Storage, archive: &Archive) -> std::result::Result<Stored, String> {
    let TensorView { shape, strides, offset, .. } = view;
    let (shape, strides) = (shape.to_vec(), strides.to_vec());
    let Some(entry) = archive.storages.get(storage.key) else {
        return Err(format!("lies in storage `{}`, which the archive lacks", storage.key.escape_default()));
    };
    let size = storage.kind.elem_size;
    if storage.len.checked_mul(size) != Some(entry.len()) {
        let (len, have) = (storage.len, entry.len());
        return Err(format!(
            "lies in a storage of {len} elements of {size} bytes, of which {have} bytes are there"
        ));
    }
    let (Some(count), Some(span)) = (elem_count(&shape), span(&shape, &strides)) else {
        return Err(format!("has an impossible shape {shape:?} with strides {strides:?}"));
    };
    if count > storage.len {
        return Err(format!("has shape {shape:?} but a storage of {} elements only", storage.len));
    }
    let first = if count == 0 { 0 } else { *offset };
    let Some(last) = first.checked_add(span).filter(|last| *last <= storage.len) else {
        let place = format!("offset {offset}, shape {shape:?} and strides {strides:?}");
        return Err(format!("has {place}, which leave its storage of {} elements", storage.len));
    };
    Ok(Stored {
        encoding: storage.kind.dtype.map(Encoding::Plain).map_err(str::to_string),
        bytes: entry.start + first * size..entry.start + last * size,
        strides: (!is_contiguous(&shape, &strides)).then_some(strides),
        shape,
    })
}
