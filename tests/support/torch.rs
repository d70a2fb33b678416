//! Writes checkpoints as `torch.save` does, apart from the code under test: tensors in any order of memory, in one file or in shards.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};

/// How the elements of matrices follow each other in their storages.
#[derive(Clone, Copy, PartialEq)]
pub enum Order {
    /// Row by row, as in memory that was never turned.
    Rows,
    /// Column by column, as `.t()` leaves it.
    Columns,
}

/// A file of tensors by name.
pub fn file(tensors: &BTreeMap<String, Tensor>, order: Order) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(".to_vec();
    let mut archive = Archive::default();
    let mut storages = vec![];
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        let (class, bytes) = storage(tensor, order);
        text(&mut pickle, name);
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut pickle, &i.to_string());
        text(&mut pickle, "cpu");
        integers(&mut pickle, &[tensor.elem_count()]);
        pickle.extend(b"tQ");
        integers(&mut pickle, &[0]);
        for extents in [tensor.dims(), &strides(tensor.dims(), order)] {
            pickle.push(b'(');
            integers(&mut pickle, extents);
            pickle.push(b't');
        }
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        storages.push(bytes);
    }
    pickle.extend(b"u.");
    archive.add("archive/data.pkl", &pickle);
    for (i, bytes) in storages.iter().enumerate() {
        archive.add(&format!("archive/data/{i}"), bytes);
    }
    archive.add("archive/version", b"3\n");
    archive.end()
}

/// Writes `pytorch_model.bin`, or so many shards of it and their index.
pub fn write(folder: &Path, tensors: &BTreeMap<String, Tensor>, order: Order, shards: usize) {
    if shards == 1 {
        return std::fs::write(folder.join("pytorch_model.bin"), file(tensors, order)).unwrap();
    }
    let name = |shard: usize| format!("pytorch_model-{:05}-of-{shards:05}.bin", shard + 1);
    let mut parts = vec![BTreeMap::new(); shards];
    let mut index = BTreeMap::new();
    for (i, (tensor, x)) in tensors.iter().enumerate() {
        parts[i % shards].insert(tensor.clone(), x.clone());
        index.insert(tensor.clone(), name(i % shards));
    }
    for (shard, part) in parts.iter().enumerate() {
        std::fs::write(folder.join(name(shard)), file(part, order)).unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": index});
    std::fs::write(folder.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
}

fn is_turned(shape: &[usize], order: Order) -> bool {
    order == Order::Columns && shape.len() == 2
}

fn strides(shape: &[usize], order: Order) -> Vec<usize> {
    if is_turned(shape, order) {
        return vec![1, shape[0]];
    }
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

fn storage(tensor: &Tensor, order: Order) -> (&'static str, Vec<u8>) {
    let tensor = if is_turned(tensor.dims(), order) { tensor.t().unwrap() } else { tensor.clone() };
    let flat = tensor.contiguous().unwrap().flatten_all().unwrap();
    match flat.dtype() {
        DType::F32 => {
            ("FloatStorage", flat.to_vec1::<f32>().unwrap().into_iter().flat_map(f32::to_le_bytes).collect())
        }
        DType::F16 => {
            let values = flat.to_vec1::<half::f16>().unwrap();
            ("HalfStorage", values.into_iter().flat_map(half::f16::to_le_bytes).collect())
        }
        other => panic!("{other:?} is not written"),
    }
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.bytes());
}

fn integers(pickle: &mut Vec<u8>, values: &[usize]) {
    for value in values {
        pickle.push(b'J');
        pickle.extend(i32::try_from(*value).unwrap().to_le_bytes());
    }
}

/// A zip archive without compression.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directory: Vec<u8>,
    entries: u16,
}

impl Archive {
    fn add(&mut self, name: &str, contents: &[u8]) {
        let (offset, len) = (self.bytes.len() as u32, contents.len() as u32);
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0]; // version, flags, method, time, date
        common.extend(crc32(contents).to_le_bytes());
        common.extend([len, len].map(u32::to_le_bytes).concat());
        common.extend([name.len() as u16, 0].map(u16::to_le_bytes).concat());
        self.bytes.extend(b"PK\x03\x04");
        self.bytes.extend(&common);
        self.bytes.extend(name.bytes());
        self.bytes.extend(contents);
        self.directory.extend(b"PK\x01\x02\x14\0");
        self.directory.extend(&common);
        self.directory.extend([0; 10]); // comment, disk, attributes
        self.directory.extend(offset.to_le_bytes());
        self.directory.extend(name.bytes());
        self.entries += 1;
    }

    fn end(mut self) -> Vec<u8> {
        let (start, len) = (self.bytes.len() as u32, self.directory.len() as u32);
        self.bytes.extend(&self.directory);
        self.bytes.extend(b"PK\x05\x06\0\0\0\0");
        self.bytes.extend([self.entries; 2].map(u16::to_le_bytes).concat());
        self.bytes.extend([len, start].map(u32::to_le_bytes).concat());
        self.bytes.extend([0; 2]);
        self.bytes
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256)
        .map(|byte| (0..8).fold(byte, |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())))
        .collect();
    !bytes.iter().fold(!0, |crc: u32, byte| (crc >> 8) ^ table[usize::from(crc as u8 ^ byte)])
}
