//! Checkpoints in folders: which file is taken, how shards come together, and how errors name what is wrong.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use mamba_model::checkpoint::{Checkpoint, LocalDir, NameMap};
use mamba_model::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// A safetensors file of f32 vectors.
pub fn safetensors(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let data: Vec<_> = tensors.iter().map(|(name, values)| (*name, values.len(), bytes(values))).collect();
    let view = |(name, len, bytes)| (name, TensorView::new(Dtype::F32, vec![len], bytes).unwrap());
    safetensors::serialize(data.iter().map(|(name, len, bytes)| view((*name, *len, bytes))), None).unwrap()
}

/// The files of a checkpoint in two shards.
pub fn sharded() -> Vec<(&'static str, Vec<u8>)> {
    let map = r#"{"a":"model-00001-of-00002.safetensors","b":"model-00001-of-00002.safetensors",
                  "c":"model-00002-of-00002.safetensors"}"#;
    vec![
        ("model.safetensors.index.json", format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#).into_bytes()),
        ("model-00001-of-00002.safetensors", safetensors(&[("a", &[1.]), ("b", &[2., 3.])])),
        ("model-00002-of-00002.safetensors", safetensors(&[("c", &[4.; 600])])),
    ]
}

fn folder<'a>(files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(folder.path().join(name), contents).unwrap();
    }
    folder
}

fn open(path: &Path) -> Result<Checkpoint> {
    Checkpoint::open(&LocalDir::new(path)?)
}

fn error(folder: &TempDir) -> String {
    open(folder.path()).unwrap_err().to_string()
}

#[test]
fn safetensors_come_before_an_index_and_before_torch() {
    let mut files = sharded();
    files.push(("model.safetensors", safetensors(&[("whole", &[1.])])));
    files.push(("pytorch_model.bin", b"never looked at".to_vec()));
    let folder = folder(files);
    assert_eq!(open(folder.path()).unwrap().names().collect::<Vec<_>>(), ["whole"]);
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert_eq!(open(folder.path()).unwrap().names().count(), 3);
    std::fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    assert!(error(&folder).contains("pytorch_model.bin: is not a whole zip archive"));
    std::fs::remove_file(folder.path().join("pytorch_model.bin")).unwrap();
    let message = error(&folder);
    assert!(message.contains("no model.safetensors, ") && message.contains(folder.path().to_str().unwrap()));
}

#[test]
fn a_single_file_can_be_named() {
    let folder = folder([("other.safetensors", safetensors(&[("x", &[1., 2.])]))]);
    let checkpoint = open(&folder.path().join("other.safetensors")).unwrap();
    assert_eq!(checkpoint.path("x").unwrap(), folder.path().join("other.safetensors"));
    assert_eq!(checkpoint.tensor("x", &Device::Cpu).unwrap().to_vec1::<f32>().unwrap(), [1., 2.]);
}

#[test]
fn shards_have_to_agree_with_their_index() {
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let with = |name: &str, contents: Vec<u8>| {
        let folder = folder(sharded());
        std::fs::write(folder.path().join(name), contents).unwrap();
        error(&folder)
    };
    let message = with(second, safetensors(&[("d", &[1.])]));
    assert!(message.contains(&format!("{second}: tensor `c` is missing, though ")), "{message}");
    let message = with(second, safetensors(&[("a", &[1.]), ("c", &[1.])]));
    assert!(
        message.contains(&format!("{second}: tensor `a` is in ")) && message.contains(first),
        "{message}"
    );
    let message = with(first, Vec::new());
    assert!(message.contains(&format!("{first}: is empty")), "{message}");

    let folder = folder(sharded());
    std::fs::remove_file(folder.path().join(second)).unwrap();
    let message = error(&folder);
    assert!(
        message.contains(&format!("model.safetensors.index.json: lists `{second}`, which is missing")),
        "{message}"
    );
}

#[test]
fn an_index_cannot_point_outside_its_folder() {
    let outside = folder([("secret.safetensors", safetensors(&[("a", &[1.])]))]);
    let absolute = outside.path().join("secret.safetensors");
    for target in ["../secret.safetensors", absolute.to_str().unwrap()] {
        let index = serde_json::json!({"weight_map": {"a": target}}).to_string();
        let folder = folder([("model.safetensors.index.json", index.into_bytes())]);
        let message = error(&folder);
        assert!(
            message.contains("places tensor `a` in ") && message.contains("outside its folder"),
            "{message}"
        );
    }
}

#[test]
fn damaged_files_are_named() {
    let good = safetensors(&[("x", &[1., 2.])]);
    for (contents, expected) in [
        (Vec::new(), "is empty"),
        (good[..good.len() - 1].to_vec(), "is truncated"),
        ([good.as_slice(), b"x"].concat(), "is too long"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "is not safetensors"),
    ] {
        let message = error(&folder([("model.safetensors", contents)]));
        assert!(message.contains("model.safetensors: ") && message.contains(expected), "{message}");
    }
}

#[test]
fn every_tensor_is_accounted_for() {
    const NAMES: NameMap = NameMap::new(&[("head", "c")]).with_unread(&["b"]);
    let folder = folder(sharded());
    let checkpoint = Arc::new(open(folder.path()).unwrap());
    let weights = checkpoint.clone().var_builder(NAMES, DType::BF16, &Device::Cpu);
    let head: Tensor = weights.get(600, "head").unwrap();
    assert_eq!(head.dtype(), DType::BF16);
    assert_eq!(checkpoint.coverage(&NAMES).unread, ["a"]);
    weights.get(1, "a").unwrap();
    assert!(checkpoint.coverage(&NAMES).is_complete());
    assert_eq!(checkpoint.unread(), ["b"]);
    assert_eq!(checkpoint.read_counts()["c"], 1);

    let shape = weights.get((2, 300), "head").map_err(Error::from).unwrap_err();
    assert!(matches!(&shape, Error::Shape { tensor, got, expected, .. }
        if tensor == "c" && *got == [600] && *expected == [2, 300]));
    assert!(
        shape
            .to_string()
            .contains("model-00002-of-00002.safetensors: tensor `c` has shape [600], expected [2, 300]")
    );
    let missing = weights.get(1, "no.such").map_err(Error::from).unwrap_err().to_string();
    assert!(missing.contains("no tensor `no.such`"), "{missing}");
}

#[test]
fn what_is_not_committed_changes_nothing() {
    use std::io::Write;

    use mamba_model::AtomicFile;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    std::fs::write(&path, "old").unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"other").unwrap();
    file.sync().unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    drop(file);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    file.commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");

    // A name that cannot be given: a folder has it.
    let taken = folder.path().join("folder");
    std::fs::create_dir(&taken).unwrap();
    assert!(mamba_model::write_atomically(&taken, b"new").is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

/// The cause of an error with a file is a part of its message: who prints the chain, as `{:#}` of anyhow does, prints it once.
#[test]
fn errors_of_files_print_their_cause_once() {
    use mamba_model::config::{Mamba1Config, MixerSpec, ModelConfig};
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing/file");
    let cause = std::fs::read(&missing).unwrap_err().to_string();
    let config = ModelConfig::uniform(5, 4, 1, MixerSpec::Mamba1(Mamba1Config::new(4)));
    let model = mamba_model::Model::random(&config, 0, &Device::Cpu).unwrap();
    let errors = [
        anyhow::Error::from(mamba_model::InferenceCache::load(&missing, &config, &Device::Cpu).unwrap_err()),
        mamba_generate::GenerationState::load(&model, &missing).unwrap_err().into(),
        mamba_train::data::TokenWriter::create(&missing).err().unwrap().into(),
    ];
    for error in errors {
        assert_eq!(format!("{error:#}"), format!("{}: {cause}", missing.display()));
    }
}
