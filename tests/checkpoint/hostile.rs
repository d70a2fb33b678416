//! Bytes that nobody meant: an error or tensors that can be read, never a panic, and never memory that the file does not
//! account for.

use std::path::Path;

use candle_core::{DType, Device};
use mamba_model::Model;
use mamba_model::checkpoint::gguf::{Array, GgmlType, TensorSpec, Value, Writer};
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::support::alloc::peak_of_thread;
use crate::support::golden::path;
use crate::{files, gguf};

/// Bytes of memory for a byte of the file: a quantized element of two bits becomes four bytes, and the entry of a tensor
/// with its name has a few words beside it.
const FACTOR: usize = 32;

/// What is needed whatever the file: messages, buffers, the workings of the zip archive.
const BASE: usize = 1 << 20;

/// Does something with a folder of these files, and checks the memory that it takes.
fn within_bounds(files: &[(&str, Vec<u8>)], act: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(folder.path().join(name), contents).unwrap();
    }
    let bytes: usize = files.iter().map(|(_, contents)| contents.len()).sum();
    let ((), peak) = peak_of_thread(|| act(folder.path()));
    assert!(peak <= FACTOR * bytes + BASE, "{peak} bytes for a file of {bytes}");
}

/// Opens a checkpoint of these files, and reads all that can be read.
fn read<'a>(files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) {
    let files: Vec<_> = files.into_iter().collect();
    within_bounds(&files, |folder| match Checkpoint::open(&LocalDir::new(folder).unwrap()) {
        Ok(checkpoint) => {
            for name in checkpoint.names() {
                let _ = checkpoint.tensor(name, &Device::Cpu);
            }
        }
        Err(error) => assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}"),
    });
}

/// Loads a model of these files; whether there was one.
fn load(files: &[(&str, Vec<u8>)]) -> bool {
    let mut loaded = false;
    within_bounds(files, |folder| {
        let model = Model::from_pretrained(&LocalDir::new(folder).unwrap(), DType::F32, &Device::Cpu);
        loaded = model.is_ok();
        if let Err(error) = model {
            assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}");
        }
    });
    loaded
}

/// A change to a few bytes of a file.
#[derive(Clone, Debug)]
enum Edit {
    Byte(u8),
    /// Eight bytes, such as a length or a count.
    Word(u64),
    /// The file ends here.
    Cut,
}

fn edits() -> impl Strategy<Value = Vec<(Index, Edit)>> {
    let words = [0, 1, 31, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 60, 1 << 63, u64::MAX, u64::MAX - 31];
    let edit = prop_oneof![
        6 => any::<u8>().prop_map(Edit::Byte),
        3 => prop::sample::select(words.to_vec()).prop_map(Edit::Word),
        1 => Just(Edit::Cut),
    ];
    prop::collection::vec((any::<Index>(), edit), 1..6)
}

/// The file after some edits within its first `header` bytes.
fn damaged(mut bytes: Vec<u8>, header: usize, edits: &[(Index, Edit)]) -> Vec<u8> {
    for (at, edit) in edits {
        if bytes.is_empty() {
            break;
        }
        let at = at.index(bytes.len().min(header));
        match edit {
            Edit::Byte(byte) => bytes[at] = *byte,
            Edit::Word(word) => {
                for (place, byte) in bytes[at..].iter_mut().zip(word.to_le_bytes()) {
                    *place = byte;
                }
            }
            Edit::Cut => bytes.truncate(at),
        }
    }
    bytes
}

/// A committed file.
fn golden(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap()
}

/// A configuration of every family, and its weights.
const FAMILIES: &[(&str, &str)] = &[
    ("mamba_tied", "model.safetensors"),
    ("mamba2_g8", "model.safetensors"),
    ("ss_mamba1_options", "pytorch_model.bin"),
    ("ss_mamba2_partial_ssm", "pytorch_model.bin"),
    ("falcon_mamba_untied_bias", "model.safetensors"),
    ("jamba", "model.safetensors"),
    ("bamba_options", "model.safetensors"),
    ("granitemoehybrid", "model.safetensors"),
    ("granitemoehybrid_dense_rope", "model.safetensors"),
    ("nemotron_h_moe", "model.safetensors"),
    ("falcon_h1", "model.safetensors"),
    ("lfm2", "model.safetensors"),
    ("zamba2", "model.safetensors"),
    ("zamba", "model.safetensors"),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_safetensors(edits in edits()) {
        let good = files::safetensors(&[("a", &[1.; 5]), ("b.weight", &[2.; 3])]);
        read([("model.safetensors", damaged(good, usize::MAX, &edits))]);
    }

    #[test]
    fn damaged_indices(edits in edits()) {
        let mut files = files::sharded();
        files[0].1 = damaged(std::mem::take(&mut files[0].1), usize::MAX, &edits);
        read(files);
    }

    #[test]
    fn damaged_pickles(edits in edits(), from_the_end in any::<bool>()) {
        // The pickle stands first, the directory of the archive last.
        let mut good = golden("models/mamba_bin/pytorch_model.bin");
        let split = if from_the_end { good.len() - 3000 } else { 0 };
        let tail = damaged(good.split_off(split), 3000, &edits);
        read([("pytorch_model.bin", [good, tail].concat())]);
    }

    #[test]
    fn damaged_small_gguf(edits in edits()) {
        read([("model.gguf", damaged(gguf::good().bytes(), usize::MAX, &edits))]);
    }

    #[test]
    fn damaged_types(edits in edits()) {
        read([("model.gguf", damaged(golden("gguf/types.gguf"), 1200, &edits))]);
    }

    /// Keys that describe a model are as hostile as the table of its tensors.
    #[test]
    fn damaged_models(edits in edits(), (name, header) in prop::sample::select(vec![
        ("mamba2_quantized", 2500), ("jamba", 4400), ("granitemoehybrid", 4200), ("nemotron_h_moe", 3300), ("falcon_h1", 2900),
        ("lfm2", 2300),
    ])) {
        load(&[("model.gguf", damaged(golden(&format!("gguf/{name}.gguf")), header, &edits))]);
    }

    #[test]
    fn damaged_configs(edits in edits(), (family, weights) in prop::sample::select(FAMILIES)) {
        let config = damaged(golden(&format!("models/{family}/config.json")), usize::MAX, &edits);
        load(&[("config.json", config), (weights, golden(&format!("models/{family}/{weights}")))]);
    }

    /// One value of a configuration that is valid JSON, and impossible.
    #[test]
    fn absurd_configs(place in any::<Index>(), value in prop::sample::select(vec![
        "0", "-1", "1e9", "2147483647", "2147483648", "18446744073709551615", "1e308", "[]", "{}", "null", "\"x\"", "0.5",
    ]), (family, weights) in prop::sample::select(FAMILIES)) {
        let text = String::from_utf8(golden(&format!("models/{family}/config.json"))).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let is_field = |line: &usize| lines[*line].contains("\": ") && !lines[*line].ends_with(['[', '{']);
        let fields: Vec<usize> = (0..lines.len()).filter(is_field).collect();
        let line = fields[place.index(fields.len())];
        let (key, old) = lines[line].split_once(": ").unwrap();
        lines[line] = format!("{key}: {value}{}", if old.ends_with(',') { "," } else { "" });
        let config = lines.join("\n").into_bytes();
        load(&[("config.json", config), (weights, golden(&format!("models/{family}/{weights}")))]);
    }

    #[test]
    fn arbitrary_headers(header in "[\\[\\]{}\",:0-9a-zF_ -]{0,60}", tail in prop::collection::vec(any::<u8>(), 0..40)) {
        let length = (header.len() as u64).to_le_bytes();
        read([("model.safetensors", [&length, header.as_bytes(), &tail].concat())]);
    }

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..3) {
        let (name, magic) = [("pytorch_model.bin", &b"PK\x03\x04"[..]), ("x.gguf", b"GGUF\x03\0\0\0"), ("model.safetensors", b"")][kind as usize];
        read([(name, [magic, bytes.as_slice()].concat())]);
    }
}

/// Every number that describes a model, in turn absurd.
#[test]
fn absurd_keys() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    let (mut tried, mut refused) = (0, 0);
    for name in
        ["jamba", "granitemoehybrid", "bamba", "nemotron_h_moe", "falcon_h1", "lfm2", "falcon_mamba_tied"]
    {
        let good = Checkpoint::open(&LocalDir::new(path(&format!("gguf/{name}.gguf"))).unwrap()).unwrap();
        let tensors: Vec<_> =
            good.names().map(|name| (name, good.tensor(name, &Device::Cpu).unwrap())).collect();
        let spec = |(name, x): &(&str, candle_core::Tensor)| TensorSpec {
            name: (*name).into(),
            shape: x.dims().to_vec(),
            kind: GgmlType::F32,
        };
        for (key, value) in good.metadata().unwrap().iter().filter(|(key, _)| !key.starts_with("general.")) {
            let count = [0, 1, 3, i32::MAX as u32, u32::MAX].map(Value::U32);
            let number = [0.0, -1.0, f32::NAN, f32::INFINITY].map(Value::F32);
            let layers = [vec![], vec![0; 9], vec![-1; 4], vec![i32::MAX; 4]].map(|v| Array::I32(v).into());
            let values = match value {
                Value::F32(_) => number.to_vec(),
                Value::Array(_) => [layers.to_vec(), count.to_vec()].concat(),
                _ => [layers.to_vec(), count.to_vec(), number.to_vec()].concat(),
            };
            for value in values {
                let mut metadata = good.metadata().unwrap().clone();
                metadata.set(key, value);
                let mut writer =
                    Writer::create(&file, &metadata, tensors.iter().map(spec).collect()).unwrap();
                tensors.iter().for_each(|(_, x)| writer.write(x).unwrap());
                writer.finish().unwrap();
                tried += 1;
                refused += usize::from(!load(&[("x.gguf", std::fs::read(&file).unwrap())]));
            }
        }
    }
    assert!(tried > 1000 && refused > tried / 2, "{refused} of {tried} are refused");
}

/// What the random cases start from is sound, and most of what they do is not.
#[test]
fn the_cases_are_hostile() {
    let model = golden("gguf/mamba2_quantized.gguf");
    assert!(load(&[("model.gguf", model.clone())]));
    let mut refused = 0;
    for at in (0..2500).step_by(10) {
        let mut bytes = model.clone();
        bytes[at] ^= 0xff;
        refused += usize::from(!load(&[("model.gguf", bytes)]));
    }
    assert!(refused > 150, "{refused} of 250 are refused");
}

/// Configurations and indices that are no text, go on forever, or are other things than they should be.
#[test]
fn what_is_no_configuration_or_index_is_named() {
    let weights = golden("models/mamba_tied/model.safetensors");
    let deep = [&b"{\"model_type\":"[..], &b"[".repeat(1 << 20)].concat();
    let cases = [
        &b"\xff\xfe"[..],
        b"{\"model_type\":\"\xff\"}",
        b"",
        b"null",
        b"[]",
        b"{\"model_type\":[\"mamba\"]}",
        &deep,
    ];
    for config in cases {
        within_bounds(
            &[("config.json", config.to_vec()), ("model.safetensors", weights.clone())],
            |folder| {
                let error = Model::from_pretrained(&LocalDir::new(folder).unwrap(), DType::F32, &Device::Cpu);
                let error = error.unwrap_err().to_string();
                assert!(error.contains("config.json"), "{error}");
            },
        );
    }
    let (name, shard) = ("model.safetensors.index.json", "model-00001-of-00002.safetensors");
    let map =
        |tensor: &str, file: &str| format!("{{\"weight_map\":{{\"{tensor}\":\"{file}\"}}}}").into_bytes();
    let endless = [&b"{\"weight_map\":"[..], &b"{\"a\":".repeat(1 << 20)].concat();
    let many: String = (0..10_000).map(|i| format!("\"t{i}\":\"m-{i}.safetensors\",")).collect();
    for (index, want) in [
        (map("a", "\\u0000"), "outside its folder"),
        (map("a", &"x/".repeat(5000)), "outside its folder"),
        (map("a", name), "is not safetensors"), // itself
        (map("nothing", shard), "tensor `nothing` is missing"),
        (map("a\":\"x\",\"a", shard), "`a` is there twice"),
        (b"{\"weight_map\":{\"a\":\"\xff\"}}".to_vec(), "is no index of weights"),
        (endless, "is no index of weights"),
        (format!("{{\"weight_map\":{{{}\"z\":\"y\"}}}}", many).into_bytes(), "which is missing"),
    ] {
        let mut files = files::sharded();
        files[0].1 = index;
        within_bounds(&files, |folder| {
            let error = Checkpoint::open(&LocalDir::new(folder).unwrap()).unwrap_err().to_string();
            assert!(error.contains(want), "{error}\nlacks {want}");
        });
    }
}

/// A layer takes memory before its weights are looked for, so nobody may ask for many in a few bytes.
#[test]
fn too_many_layers() {
    for (family, field) in [("nemotron_h", "hybrid_override_pattern"), ("zamba2", "layers_block_type")] {
        let text = String::from_utf8(golden(&format!("models/{family}/config.json"))).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config.as_object_mut().unwrap().remove("layers_block_type");
        config[field] = match field {
            "hybrid_override_pattern" => "M".repeat(1 << 20).into(),
            _ => vec!["mamba"; 1 << 20].into(),
        };
        let error = mamba_model::config::ModelConfig::from_json(&config.to_string()).unwrap_err().to_string();
        assert!(error.contains(&format!("{field}` is 1048576, expected at most 4096 layers")), "{error}");
    }
}
