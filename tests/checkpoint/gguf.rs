//! GGUF files: every type to the bit, and whatever can be wrong with a file.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mamba_model::Result;
use mamba_model::checkpoint::{Checkpoint, LocalDir};

use crate::support::golden::{Golden, path};

fn open(file: &Path) -> Result<Checkpoint> {
    Checkpoint::open(&LocalDir::new(file)?)
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_type_is_dequantized_to_the_bit() {
    let checkpoint = open(&path("gguf/types.gguf")).unwrap();
    let golden = Golden::read(&path("gguf/types.safetensors"));
    let mut compared = vec![];
    for name in checkpoint.names() {
        let got = checkpoint.tensor_as(name, DType::F32, &Device::Cpu).unwrap();
        let want = &golden.tensors[name];
        assert_eq!(got.dims(), want.dims(), "{name}");
        assert_eq!(bits(&got), bits(want), "{name}");
        for dtype in [DType::BF16, DType::F16, DType::F64] {
            let got = checkpoint.tensor_as(name, dtype, &Device::Cpu).unwrap();
            assert_eq!(got.dtype(), dtype);
            let through_f32 = want.to_dtype(dtype).unwrap();
            let same = |x: &Tensor| bits(&x.to_dtype(DType::F32).unwrap());
            assert_eq!(same(&got), same(&through_f32), "{name} as {dtype:?}");
        }
        compared.push(name.to_string());
    }
    assert_eq!(compared.len(), 17, "{compared:?}");
}

/// A GGUF file written by hand.
#[derive(Clone)]
pub struct File {
    version: u32,
    tensors: Option<u64>,
    keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
    rows: Vec<(Vec<u8>, Vec<u64>, u32, u64)>,
    data: Vec<u8>,
}

fn text(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

impl File {
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensors.unwrap_or(self.rows.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for (name, dims, kind, offset) in &self.rows {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }

    /// The same in two files, the keys in the first.
    pub fn split(self) -> (Vec<u8>, Vec<u8>) {
        let (mut first, mut second) = (self.clone(), Self { keys: vec![], ..self });
        (first.rows, second.rows) = (vec![first.rows.remove(0)], vec![second.rows.remove(1)]);
        (first.bytes(), second.bytes())
    }

    fn key(mut self, key: &str, kind: u32, value: impl Into<Vec<u8>>) -> Self {
        self.keys.push((key.into(), kind, value.into()));
        self
    }

    fn row(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        self.rows.push((name.into(), dims.to_vec(), kind, offset));
        self
    }
}

/// Two tensors, 96 bytes, and keys of several types.
pub fn good() -> File {
    let file = File { version: 3, tensors: None, keys: vec![], rows: vec![], data: vec![1; 96] };
    let texts = [2u64.to_le_bytes().to_vec(), text("a"), text("")].concat();
    file.key("general.architecture", 8, text("test"))
        .key("test.block_count", 4, 7u32.to_le_bytes())
        .key("test.flag", 7, [1])
        .key("tokens", 9, [8u32.to_le_bytes().to_vec(), texts].concat())
        .row("a", &[4, 2], 0, 0)
        .row("b", &[32], 8, 32)
}

fn error(file: &File) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    let error = open(&path).unwrap_err().to_string();
    error
        .strip_prefix(&format!("checkpoint {}: ", path.display()))
        .unwrap_or_else(|| panic!("{error}"))
        .to_string()
}

#[test]
fn good_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    std::fs::write(&path, good().bytes()).unwrap();
    let checkpoint = open(&path).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.info("a").unwrap().shape, [2, 4]);
    let metadata = checkpoint.metadata().unwrap();
    assert_eq!(metadata.u64("test.block_count"), Some(7));
    assert_eq!(metadata.bool("test.flag"), Some(true));
    assert_eq!(metadata.strings("tokens").unwrap(), ["a", ""]);

    let aligned = File { data: vec![1; 160], ..good() };
    let mut aligned = aligned.key("general.alignment", 4, 64u32.to_le_bytes());
    aligned.rows[1].3 = 64;
    std::fs::write(&path, aligned.bytes()).unwrap();
    assert!(open(&path).is_ok());
}

#[test]
fn bad_files_say_what_is_wrong() {
    let mut checked = 0;
    let mut fails = |file: File, want: &str| {
        let error = error(&file);
        assert!(error.contains(want), "{error}\nlacks {want}");
        checked += 1;
    };
    let edit = |change: &dyn Fn(&mut File)| {
        let mut file = good();
        change(&mut file);
        file
    };
    fails(edit(&|f| f.version = 1), "has GGUF version 1, expected 2 or 3");
    fails(edit(&|f| f.version = 3 << 24), "is a big-endian GGUF file");
    fails(edit(&|f| (f.tensors, f.data) = (Some(3), vec![])), "is truncated");
    fails(edit(&|f| f.tensors = Some(u64::MAX)), "it would have 18446744073709551615 tensors");
    fails(edit(&|f| f.tensors = Some(1 << 40)), "it would have 1099511627776 tensors");
    // Counts and lengths that the file has no bytes for.
    let huge = (1u64 << 60).to_le_bytes();
    fails(good().key("x", 8, huge), "key `x` is truncated: it would have 1152921504606846976 bytes of text");
    for (kind, of) in [(0u32, "values"), (7, "values"), (8, "texts"), (12, "values")] {
        let array = [kind.to_le_bytes().to_vec(), huge.to_vec()].concat();
        fails(
            good().key("x", 9, array),
            &format!("key `x` is truncated: it would have 1152921504606846976 {of}"),
        );
    }
    // Arrays in arrays, a thousand deep, and types that are none.
    let nested: Vec<u8> =
        (0..1000).flat_map(|_| [9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat()).collect();
    fails(good().key("x", 9, nested), "key `x` is an array of arrays");
    fails(good().key("x", 13, []), "key `x` has a value of type 13, which is unknown");
    fails(
        good().key("x", 9, [99u32.to_le_bytes().to_vec(), huge.to_vec()].concat()),
        "key `x` has values of type 99",
    );
    fails(good().key("x", 7, [2]), "key `x` has no truth value at byte");
    fails(good().key("test.flag", 7, [0]), "has key `test.flag` twice");
    fails(good().key("x", 8, text([0xff, 0xfe])), "key `x` has a text that is not UTF-8");
    fails(edit(&|f| f.keys[0].0 = vec![0xff]), "has a text that is not UTF-8");
    fails(edit(&|f| f.rows[0].0 = vec![0xff]), "has a text that is not UTF-8");
    for alignment in [0u32, 3, 48] {
        let file = good().key("general.alignment", 4, alignment.to_le_bytes());
        fails(file, &format!("has `general.alignment` U32({alignment}), expected a power of two"));
    }
    fails(good().key("general.alignment", 8, text("32")), "expected a power of two");
    for alignment in [1u64 << 25, 1 << 62, 1 << 63] {
        let file = good().key("general.alignment", 10, alignment.to_le_bytes());
        fails(file, &format!("U64({alignment}), expected a power of two up to 16777216"));
    }
    // Rows of the table of tensors.
    fails(edit(&|f| f.rows[1].0 = b"a".to_vec()), "tensor `a` is there twice");
    fails(edit(&|f| f.rows[1].1 = vec![1; 5]), "tensor `b` has 5 axes, expected at most 4");
    fails(edit(&|f| f.rows[1].1 = vec![1 << 32, 1 << 32]), "tensor `b` has an impossible shape");
    fails(
        edit(&|f| f.rows[1].1 = vec![1_000_000_000]),
        "tensor `b` goes past the end of the file: it needs 1062500000 bytes",
    );
    fails(
        edit(&|f| f.rows[0].1 = vec![1_000_000_000]),
        "tensor `a` goes past the end of the file: it needs 4000000000 bytes",
    );
    fails(
        edit(&|f| f.rows[1].1 = vec![33]),
        "tensor `b` has rows of 33 elements, expected whole blocks of 32 for Q8_0",
    );
    fails(edit(&|f| f.rows[1].2 = 19), "tensor `b` has type IQ1_S, which is not supported");
    fails(edit(&|f| f.rows[1].2 = 77), "tensor `b` has type 77, which is unknown");
    fails(edit(&|f| f.rows[1].3 = 33), "tensor `b` has offset 33, expected a multiple of 32");
    fails(edit(&|f| f.rows[1].3 = u64::MAX - 31), "tensor `b` goes past the end of the file");
    fails(edit(&|f| f.rows[1].3 = 0), "overlaps tensor `");
    fails(edit(&|f| f.data.truncate(60)), "tensor `b` goes past the end of the file");
    assert_eq!(checked, 37);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for (bytes, want) in [(&b""[..], "is empty"), (b"GGML", "is not GGUF"), (b"GGUF\x03\0", "is truncated")] {
        std::fs::write(&path, bytes).unwrap();
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("x.gguf"), "{error}");
    }
}
