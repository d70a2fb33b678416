//! Archives and pickles, good ones and hostile ones.

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

fn good_pickle() -> Vec<u8> {
    dict(|w| {
        w.str("a").tensor(("FloatStorage", "0", 6), 0, &[2, 3], &[3, 1]);
        w.str("tied").tensor(("FloatStorage", "0", 6), 0, &[2, 3], &[3, 1]);
        w.str("turned").tensor(("FloatStorage", "0", 6), 0, &[3, 2], &[1, 3]);
        w.str("tail").tensor(("FloatStorage", "0", 6), 4, &[2], &[1]);
        w.str("half").tensor(("HalfStorage", "1", 1), 0, &[], &[]);
        w.str("empty").tensor(("LongStorage", "2", 0), 0, &[0, 4], &[4, 1]);
        w.str("mask").tensor(("BoolStorage", "3", 2), 0, &[2], &[1]);
        w.str("epoch").int(3)
    })
}

fn archive_of(pickle: &[u8]) -> Vec<u8> {
    stored(pickle, &[("0", &[7; 24]), ("1", &[1, 2]), ("2", &[]), ("3", &[0, 1])])
}

fn good() -> Vec<u8> {
    archive_of(&good_pickle())
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
    assert_eq!(
        (a.shape.as_slice(), &a.encoding, &a.strides),
        (&[2, 3][..], &Ok(Encoding::Plain(DType::F32)), &None)
    );
    assert_eq!(&file[a.bytes.clone()], [7; 24]);
    assert_eq!((a, a.bytes.len()), (tied, 24));
    assert_eq!(turned.strides, Some(vec![1, 3]));
    assert_eq!(tail.bytes, a.bytes.start + 16..a.bytes.end);
    assert_eq!((tensors[4].1.bytes.len(), tensors[4].1.shape.len()), (2, 0));
    assert_eq!(tensors[6].1.encoding, Err("BoolStorage".to_string()));
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
    assert!(error(&archive(&[("m/data.pkl", &bomb)], CompressionMethod::Deflated)).contains("larger than"));
}

#[test]
fn tensors_have_to_lie_in_their_storage() {
    let case = |len: i32, offset: i32, shape: &[i32], strides: &[i32]| {
        let pickle = dict(|w| w.str("a").tensor(("FloatStorage", "0", len), offset, shape, strides));
        let error = error(&stored(&pickle, &[("0", &[0; 24])]));
        assert!(error.contains("tensor `a` ") || error.contains("data.pkl"), "{error}");
        error
    };
    assert!(case(7, 0, &[2], &[1]).contains("storage of 7 elements of 4 bytes, of which 24 bytes are there"));
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

/// A billion elements over ten bytes, one name for two tensors, and texts that are no texts.
#[test]
fn tensors_that_cannot_be_are_named() {
    let ten = |shape: &[i32], strides: &[i32]| {
        let pickle = dict(|w| w.str("a").tensor(("ByteStorage", "0", 10), 0, shape, strides));
        error(&stored(&pickle, &[("0", &[0; 10])]))
    };
    assert!(
        ten(&[1_000_000_000], &[1])
            .contains("tensor `a` has shape [1000000000] but a storage of 10 elements only")
    );
    assert!(ten(&[1_000_000_000], &[0]).contains("a storage of 10 elements only"));
    assert!(ten(&[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0]).contains("impossible shape"));
    let tensor = ("ByteStorage", "0", 10);
    let twice = dict(|w| w.str("a").tensor(tensor, 0, &[10], &[1]).str("a").tensor(tensor, 0, &[10], &[1]));
    assert!(error(&stored(&twice, &[("0", &[0; 10])])).contains("tensor `a` is there twice"));
    let mut w = Writer::default();
    w.raw(b"\x80\x02}(X\x01\x00\x00\x00\xff").tensor(tensor, 0, &[10], &[1]).raw(b"u.");
    assert!(error(&stored(&w.0, &[("0", &[0; 10])])).contains("a string that is not UTF-8"));
    let mut w = Writer::default();
    w.raw(b"\x80\x02}(").str("a").raw(b"ctorch._utils\n_rebuild\xff\n");
    assert!(error(&stored(&w.0, &[("0", &[0; 10])])).contains("a name that is not UTF-8"));
    // Lists in lists, a hundred thousand deep, and a type that nobody knows.
    let deep = [&b"\x80\x02"[..], &b"]".repeat(100_000), b"."].concat();
    assert!(error(&stored(&deep, &[])).contains("it needs more than"));
    let pickle = dict(|w| w.str("a").tensor(("QuantumStorage", "0", 10), 0, &[10], &[1]));
    assert!(error(&stored(&pickle, &[("0", &[0; 10])])).contains("`torch.QuantumStorage`"));
}

fn damage() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)
}

fn damaged(mut bytes: Vec<u8>, damage: Vec<(prop::sample::Index, u8)>) -> Vec<u8> {
    for (at, byte) in damage {
        let at = at.index(bytes.len());
        bytes[at] = byte;
    }
    bytes
}

/// Whether the file is refused, or all of its tensors lie in it.
fn is_safe(file: &[u8]) -> bool {
    let Ok(tensors) = read(Path::new("m.bin"), file) else { return true };
    let plain = Encoding::Plain(DType::U8);
    tensors.iter().all(|(_, stored)| {
        let encoding = *stored.encoding.as_ref().unwrap_or(&plain);
        stored.elements(file, encoding).is_some()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn damaged_archives_are_safe(damage in damage()) {
        prop_assert!(is_safe(&damaged(good(), damage)));
    }

    /// The archive is whole, so that its check sums do not keep the damage from the machine.
    #[test]
    fn damaged_pickles_are_safe(damage in damage()) {
        prop_assert!(is_safe(&archive_of(&damaged(good_pickle(), damage))));
    }

    #[test]
    fn programs_of_known_instructions_are_safe(ops in prop::collection::vec(prop::sample::select(OPS), 0..60)) {
        let pickle = [ops.concat().as_slice(), b"."].concat();
        prop_assert!(is_safe(&archive_of(&pickle)));
    }
}

/// Instructions with arguments, many of them parts of a tensor.
const OPS: &[&[u8]] = &[
    b"\x80\x02",
    b"}",
    b"]",
    b")",
    b"(",
    b"t",
    b"u",
    b"s",
    b"a",
    b"e",
    b"b",
    b"Q",
    b"R",
    b"N",
    b"\x88",
    b"q\x00",
    b"q\x01",
    b"h\x00",
    b"h\x01",
    b"K\x00",
    b"K\x06",
    b"J\xff\xff\xff\xff",
    b"\x8a\x01\x80",
    b"X\x01\x00\x00\x00a",
    b"\x85",
    b"\x86",
    b"\x87",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ",
    b"K\x00K\x06\x85K\x01\x85\x89ccollections\nOrderedDict\n)R",
    b"(K\x02K\x03tK\x03K\x01\x86",
];
