//! Torch's checkpoint format: a zip archive with a pickle that says which tensors lie where, and their bytes.
//!
//! A pickle is a program. The one here is read by a [`machine`] that knows the few instructions and names that
//! `torch.save` writes for a dictionary of tensors, and refuses all others; nothing in the file is executed, and no
//! length in it is believed before it has been compared with the bytes that are there.

mod archive;
mod machine;
mod value;

use std::collections::HashSet;
use std::path::Path;

use self::archive::Archive;
use self::value::{Pickle, Storage, TensorView, Value};
use super::stored::{Stored, elem_count, is_contiguous, span};
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
        dtype: storage.kind.dtype.map_err(str::to_string),
        bytes: entry.start + first * size..entry.start + last * size,
        strides: (!is_contiguous(&shape, &strides)).then_some(strides),
        shape,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use candle_core::DType;
    use proptest::prelude::*;
    use zip::write::SimpleFileOptions;
    use zip::{CompressionMethod, ZipWriter};

    use super::*;

    /// Writes pickles as torch does, without memo.
    #[derive(Default)]
    struct Writer(Vec<u8>);

    impl Writer {
        fn raw(&mut self, bytes: &[u8]) -> &mut Self {
            self.0.extend_from_slice(bytes);
            self
        }
        fn str(&mut self, s: &str) -> &mut Self {
            self.raw(b"X").raw(&(s.len() as u32).to_le_bytes()).raw(s.as_bytes())
        }
        fn global(&mut self, module: &str, name: &str) -> &mut Self {
            self.raw(format!("c{module}\n{name}\n").as_bytes())
        }
        fn int(&mut self, n: i32) -> &mut Self {
            self.raw(b"J").raw(&n.to_le_bytes())
        }
        fn tuple(&mut self, items: &[i32]) -> &mut Self {
            self.raw(b"(");
            for n in items {
                self.int(*n);
            }
            self.raw(b"t")
        }
        fn storage(&mut self, class: &str, key: &str, len: i32) -> &mut Self {
            self.raw(b"(").str("storage").global("torch", class).str(key).str("cpu").int(len).raw(b"tQ")
        }
        fn tensor(
            &mut self,
            storage: (&str, &str, i32),
            offset: i32,
            shape: &[i32],
            strides: &[i32],
        ) -> &mut Self {
            self.global("torch._utils", "_rebuild_tensor_v2").raw(b"(");
            self.storage(storage.0, storage.1, storage.2).int(offset).tuple(shape).tuple(strides);
            self.raw(b"\x89").global("collections", "OrderedDict").raw(b")RtR")
        }
    }

    /// A pickle of a dictionary whose items `write` adds.
    fn dict(write: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
        let mut w = Writer::default();
        w.raw(b"\x80\x02}(");
        write(&mut w);
        w.raw(b"u.");
        w.0
    }

    fn archive(entries: &[(&str, &[u8])], compression: CompressionMethod) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in entries {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(compression)).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn stored(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
        let names: Vec<_> = storages.iter().map(|(key, _)| format!("m/data/{key}")).collect();
        let mut entries = vec![("m/data.pkl", pickle), ("m/byteorder", b"little".as_slice())];
        entries.extend(names.iter().zip(storages).map(|(name, (_, bytes))| (name.as_str(), *bytes)));
        archive(&entries, CompressionMethod::Stored)
    }

    fn good() -> Vec<u8> {
        let pickle = dict(|w| {
            w.str("a").tensor(("FloatStorage", "0", 6), 0, &[2, 3], &[3, 1]);
            w.str("tied").tensor(("FloatStorage", "0", 6), 0, &[2, 3], &[3, 1]);
            w.str("turned").tensor(("FloatStorage", "0", 6), 0, &[3, 2], &[1, 3]);
            w.str("tail").tensor(("FloatStorage", "0", 6), 4, &[2], &[1]);
            w.str("half").tensor(("HalfStorage", "1", 1), 0, &[], &[]);
            w.str("empty").tensor(("LongStorage", "2", 0), 0, &[0, 4], &[4, 1]);
            w.str("mask").tensor(("BoolStorage", "3", 2), 0, &[2], &[1]);
            w.str("epoch").int(3)
        });
        stored(&pickle, &[("0", &[7; 24]), ("1", &[1, 2]), ("2", &[]), ("3", &[0, 1])])
    }

    fn error(file: &[u8]) -> String {
        let error = read(Path::new("m.bin"), file).unwrap_err().to_string();
        assert!(error.starts_with("checkpoint m.bin: "), "{error}");
        error
    }

    #[test]
    fn a_dictionary_of_tensors_is_read() {
        let file = good();
        let tensors = read(Path::new("m.bin"), &file).unwrap();
        let names: Vec<_> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "tied", "turned", "tail", "half", "empty", "mask"]);
        let (a, tied, turned, tail) = (&tensors[0].1, &tensors[1].1, &tensors[2].1, &tensors[3].1);
        assert_eq!((a.shape.as_slice(), &a.dtype, &a.strides), (&[2, 3][..], &Ok(DType::F32), &None));
        assert_eq!(&file[a.bytes.clone()], [7; 24]);
        assert_eq!((a, a.bytes.len()), (tied, 24));
        assert_eq!(turned.strides, Some(vec![1, 3]));
        assert_eq!(tail.bytes, a.bytes.start + 16..a.bytes.end);
        assert_eq!((tensors[4].1.bytes.len(), tensors[4].1.shape.len()), (2, 0));
        assert_eq!(tensors[6].1.dtype, Err("BoolStorage".to_string()));
    }

    #[test]
    fn ordered_dictionaries_with_metadata_parameters_and_nesting_are_read() {
        let mut w = Writer::default();
        w.raw(b"\x80\x02}").str("state_dict").global("collections", "OrderedDict").raw(b")R(").str("p");
        w.global("torch._utils", "_rebuild_parameter").raw(b"(");
        w.tensor(("FloatStorage", "0", 1), 0, &[1], &[1]).raw(b"\x88").global("collections", "OrderedDict");
        w.raw(b")RtRu}").str("_metadata").global("collections", "OrderedDict").raw(b")Rsbs.");
        let tensors = read(Path::new("m.bin"), &stored(&w.0, &[("0", &[0; 4])])).unwrap();
        assert_eq!((tensors.len(), tensors[0].0.as_str()), (1, "p"));
    }

    #[test]
    fn what_is_not_such_an_archive_is_named() {
        assert!(error(&[]).ends_with("is empty"));
        assert!(error(b"hello").contains("zip"));
        assert!(error(&[OLD_FORMAT, &[0; 90]].concat()).contains("before 1.6"));
        assert!(error(&archive(&[("x", b"")], CompressionMethod::Stored)).contains("data.pkl"));
        let (pickle, entry) = (dict(|w| w.str("a").int(1)), "m/data.pkl");
        assert!(error(&stored(&pickle, &[])).contains("holds no tensors"));
        assert!(error(&stored(b"\x80\x02K\x01.", &[])).contains("dictionary"));
        let big = [(entry, pickle.as_slice()), ("m/byteorder", b"big")];
        assert!(error(&archive(&big, CompressionMethod::Stored)).contains("big-endian"));
        let two = [(entry, pickle.as_slice()), ("n/data.pkl", &pickle)];
        assert!(error(&archive(&two, CompressionMethod::Stored)).contains("more than one"));
        let whole = good();
        for n in (0..whole.len()).step_by(7) {
            error(&whole[..n]);
        }
    }

    #[test]
    fn compressed_tensors_and_compressed_bombs_are_refused() {
        let pickle = dict(|w| w.str("a").tensor(("FloatStorage", "0", 6), 0, &[6], &[1]));
        let entries = [("m/data.pkl", pickle.as_slice()), ("m/data/0", &[0; 24])];
        assert!(error(&archive(&entries, CompressionMethod::Deflated)).contains("compressed"));
        let bomb = vec![b'N'; 40 << 20];
        assert!(
            error(&archive(&[("m/data.pkl", &bomb)], CompressionMethod::Deflated)).contains("larger than")
        );
    }

    #[test]
    fn tensors_have_to_lie_in_their_storage() {
        let case = |len: i32, offset: i32, shape: &[i32], strides: &[i32]| {
            let pickle = dict(|w| w.str("a").tensor(("FloatStorage", "0", len), offset, shape, strides));
            let error = error(&stored(&pickle, &[("0", &[0; 24])]));
            assert!(error.contains("tensor `a` ") || error.contains("data.pkl"), "{error}");
            error
        };
        assert!(
            case(7, 0, &[2], &[1]).contains("storage of 7 elements of 4 bytes, of which 24 bytes are there")
        );
        assert!(case(6, 1, &[2, 3], &[3, 1]).contains("leave its storage"));
        assert!(case(6, i32::MAX, &[1], &[1]).contains("leave its storage"));
        assert!(case(6, 0, &[2, 2], &[5, 1]).contains("leave its storage"));
        assert!(case(6, 0, &[i32::MAX, i32::MAX], &[0, 0]).contains("impossible shape"));
        assert!(case(6, 0, &[1000], &[0]).contains("a storage of 6 elements only"));
        assert!(case(6, 0, &[0, i32::MAX, i32::MAX], &[1, 1, 1]).contains("impossible shape"));
        case(6, -1, &[1], &[1]);
        case(6, 0, &[-1], &[1]);
        case(6, 0, &[2], &[]);
        case(-6, 0, &[2], &[1]);
        let pickle = dict(|w| w.str("a").tensor(("FloatStorage", "9", 6), 0, &[6], &[1]));
        assert!(error(&stored(&pickle, &[("0", &[0; 24])])).contains("storage `9`, which the archive lacks"));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut file = good();
            for (at, byte) in damage {
                let at = at.index(file.len());
                file[at] = byte;
            }
            if let Ok(tensors) = read(Path::new("m.bin"), &file) {
                for (_, stored) in tensors {
                    prop_assert!(stored.elements(&file, 1).is_some());
                }
            }
        }
    }
}
