//! Writes what [`read`](super::read) reads: as `torch.save` writes a dictionary of tensors.

use std::io::Write;

use candle_core::{DType, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::checkpoint::{Outgoing, TensorInfo};
use crate::{AtomicFile, Error, Result};

/// What archives of torch have in front of the names of their files.
const ROOT: &str = "archive";

/// Writes tensors under their names, one after another, and tells `report` of each; those that share their memory share a storage.
pub(crate) fn write(
    file: AtomicFile,
    tensors: &[Outgoing],
    mut report: impl FnMut(&str, TensorInfo),
) -> Result<()> {
    let path = file.path().to_path_buf();
    let fail = |e: zip::result::ZipError| Error::io(&path, e.into());
    let mut storages: Vec<Vec<&Outgoing>> = vec![];
    let mut pickle = Pickle::new();
    for outgoing in tensors {
        let Outgoing { name, tensor, dtype } = outgoing;
        let shares = |other: &&Outgoing| (other.tensor.id(), other.dtype) == (tensor.id(), *dtype);
        let storage = match storages.iter().position(|known| known.iter().any(shares)) {
            Some(storage) => storage,
            None => {
                storages.push(vec![]);
                storages.len() - 1
            }
        };
        storages[storage].push(outgoing);
        let Some(class) = storage_class(*dtype) else {
            let message = format!("is {}, which torch files cannot hold", dtype.as_str());
            return Err(Error::tensor(&path, name, message));
        };
        pickle.tensor(name, tensor, class, storage);
    }
    let mut zip = ZipWriter::new_stream(file);
    // As torch does: never compressed, so that the bytes can be mapped into memory where they lie.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
    let mut entry = |name: &str, bytes: &[u8]| {
        zip.start_file(format!("{ROOT}/{name}"), options).map_err(fail)?;
        zip.write_all(bytes).map_err(|e| Error::io(&path, e))
    };
    entry("data.pkl", &pickle.end())?;
    entry("byteorder", b"little")?;
    for (i, shared) in storages.iter().enumerate() {
        if let Some(first) = shared.first() {
            entry(&format!("data/{i}"), &first.bytes()?)?;
        }
        shared.iter().for_each(|outgoing| report(&outgoing.name, outgoing.info()));
    }
    entry("version", b"3\n")?;
    zip.finish().map_err(fail)?.into_inner().commit().map_err(|e| Error::io(&path, e))
}

fn storage_class(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F64 => "DoubleStorage",
        DType::F32 => "FloatStorage",
        DType::F16 => "HalfStorage",
        DType::BF16 => "BFloat16Storage",
        _ => return None,
    })
}

/// A pickle of protocol 2 that holds a dictionary.
struct Pickle(Vec<u8>);

impl Pickle {
    fn new() -> Self {
        Self(b"\x80\x02}(".to_vec()) // protocol 2, an empty dictionary, a mark
    }

    /// Adds a tensor as torch builds it again: of a storage, an offset, shape and strides, without gradient and hooks.
    fn tensor(&mut self, name: &str, tensor: &Tensor, class: &str, storage: usize) {
        self.text(name);
        self.0.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.0.extend(format!("ctorch\n{class}\n").bytes());
        self.text(&storage.to_string());
        self.text("cpu");
        self.integer(tensor.elem_count());
        self.0.extend(b"tQ"); // the tuple is the name of a storage
        self.integer(0);
        let mut strides: Vec<usize> = tensor
            .dims()
            .iter()
            .rev()
            .scan(1, |all, extent| Some(std::mem::replace(all, *all * extent)))
            .collect();
        strides.reverse();
        for extents in [tensor.dims(), &strides] {
            self.0.push(b'(');
            extents.iter().for_each(|extent| self.integer(*extent));
            self.0.push(b't');
        }
        self.0.extend(b"\x89ccollections\nOrderedDict\n)RtR"); // False, the call without arguments, the call of all
    }

    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.bytes());
    }

    fn integer(&mut self, value: usize) {
        match i32::try_from(value) {
            Ok(value) => {
                self.0.push(b'J');
                self.0.extend(value.to_le_bytes());
            }
            Err(_) => {
                self.0.extend(b"\x8a\x08"); // a long of eight bytes
                self.0.extend((value as u64).to_le_bytes());
            }
        }
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend(b"u."); // what stands behind the mark are items; the end
        self.0
    }
}
