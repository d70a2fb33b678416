//! Bytes that nobody meant: an error or tensors that can be read, never a panic.

use candle_core::Device;
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::files;

/// Opens a checkpoint of these files, and reads all that can be read.
fn read<'a>(files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(folder.path().join(name), contents).unwrap();
    }
    match Checkpoint::open(&LocalDir::new(folder.path()).unwrap()) {
        Ok(checkpoint) => {
            for name in checkpoint.names() {
                let _ = checkpoint.tensor(name, &Device::Cpu);
            }
        }
        Err(error) => assert!(error.to_string().contains(folder.path().to_str().unwrap()), "{error}"),
    }
}

fn damage() -> impl Strategy<Value = Vec<(Index, u8)>> {
    prop::collection::vec((any::<Index>(), any::<u8>()), 1..6)
}

fn damaged(mut bytes: Vec<u8>, damage: &[(Index, u8)]) -> Vec<u8> {
    for (at, byte) in damage {
        let at = at.index(bytes.len());
        bytes[at] = *byte;
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_safetensors(damage in damage()) {
        let good = files::safetensors(&[("a", &[1.; 5]), ("b.weight", &[2.; 3])]);
        read([("model.safetensors", damaged(good, &damage))]);
    }

    #[test]
    fn damaged_indices(damage in damage()) {
        let mut files = files::sharded();
        files[0].1 = damaged(std::mem::take(&mut files[0].1), &damage);
        read(files);
    }

    #[test]
    fn arbitrary_headers(header in "[\\[\\]{}\",:0-9a-zF_ -]{0,60}", tail in prop::collection::vec(any::<u8>(), 0..40)) {
        let length = (header.len() as u64).to_le_bytes();
        read([("model.safetensors", [&length, header.as_bytes(), &tail].concat())]);
    }

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), zip in any::<bool>()) {
        let name = if zip { "pytorch_model.bin" } else { "model.safetensors" };
        read([(name, if zip { [b"PK\x03\x04", bytes.as_slice()].concat() } else { bytes })]);
    }
}
