//! What other libraries read of our files is what is written today: goldens/checks keeps what they found, and of which bytes.

use std::path::Path;

use candle_core::DType;
use mamba_model::Model;
use mamba_model::checkpoint::gguf::{GgmlType, Metadata, Value};
use mamba_model::checkpoint::{Checkpoint, LocalDir};
use mamba_model::families::Family;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use super::gguf::load;
use crate::open;
use crate::support::golden::path;

fn record(name: &str) -> Json {
    let file = path("checks").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_str(&text).unwrap()
}

/// Of files, one behind another in the order of their names.
fn sha256(files: &[&Path]) -> String {
    let mut digest = Sha256::new();
    let mut files = files.to_vec();
    files.sort();
    files.iter().for_each(|file| digest.update(std::fs::read(file).unwrap()));
    hex(digest)
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Of all files of a model in goldens/models.
fn of_model(folder: &Path) -> String {
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    sha256(&files.iter().filter(|file| file.is_file()).map(|file| file.as_path()).collect::<Vec<_>>())
}

/// Of a GGUF file up to the numbers of its tensors.
fn of_head(file: &Path) -> String {
    let whole = std::fs::read(file).unwrap();
    let checkpoint = Checkpoint::open(&LocalDir::new(file).unwrap()).unwrap();
    // All are F32, each begins at a multiple of 32.
    let bytes = |name| checkpoint.info(name).unwrap().shape.iter().product::<usize>() * 4;
    let data: usize = checkpoint.names().map(|name| bytes(name).next_multiple_of(32)).sum();
    let mut digest = Sha256::new();
    digest.update(&whole[..whole.len() - data]);
    hex(digest)
}

fn write_gguf(model: &Model, file: &Path) {
    let mut extra = Metadata::default();
    extra.set("general.name", Value::String("model".into()));
    model.save_gguf(file, GgmlType::F32, extra, |_| {}).unwrap();
}

/// What every record says of itself, and its models.
fn found(record: &Json) -> Vec<(String, Json)> {
    let found: Vec<_> = record["found"].as_object().unwrap().clone().into_iter().collect();
    assert_eq!(record["models"], found.len());
    assert!(record["largest_difference"].as_f64().unwrap() <= record["limit"].as_f64().unwrap());
    // Some differ by more than the others, for a reason that the script gives, and have a limit of their own.
    let apart: Vec<_> = found.iter().filter(|(_, what)| what.pointer("/gguf/off_by").is_some()).collect();
    for (name, what) in &apart {
        assert!(
            what["gguf"]["off_by"].as_f64().unwrap() <= what["gguf"]["limit"].as_f64().unwrap(),
            "{name}"
        );
    }
    assert!(
        apart.len() <= 1 && record["comparisons"].as_u64().unwrap() as usize + apart.len() >= found.len()
    );
    assert!(record["by"].as_object().unwrap().values().all(Json::is_string));
    for (name, what) in &found {
        assert_eq!(
            what["model"],
            of_model(&path("models").join(name)).as_str(),
            "{name} is another model now"
        );
    }
    found
}

/// What ours does with files that contradict themselves is held to this by `laws::tied_heads` and
/// `saving::bad_checkpoints_say_what_is_wrong`.
#[test]
fn readings_of_transformers() {
    let found = found(&record("check_readings"));
    let cases: usize = found.iter().map(|(_, what)| what.as_object().unwrap().len() - 1).sum();
    assert_eq!((found.len(), cases), (4, 8));
}

#[test]
fn transformers_read_what_is_written_today() {
    let (mut folders, mut files) = (0, 0);
    for (name, found) in found(&record("check_saved")) {
        let place = tempfile::tempdir().unwrap();
        let model = open(&name, DType::F32);
        let (folder, file, again) =
            (place.path().join("f"), place.path().join("model.gguf"), place.path().join("g"));
        if let Some(read) = found.get("folder") {
            model.save_pretrained(&folder, DType::F32).unwrap();
            assert_eq!(read["weights"], sha256(&[&folder.join("model.safetensors")]).as_str(), "{name}");
            assert_eq!(read["config"], sha256(&[&folder.join("config.json")]).as_str(), "{name}");
            folders += 1;
        }
        if let Some(read) = found.get("gguf") {
            write_gguf(&model, &file);
            assert_eq!(read["head"], of_head(&file).as_str(), "{name}");
            load(&file, DType::F32).unwrap().save_pretrained(&again, DType::F32).unwrap();
            let read = &found["folder_from_gguf"];
            assert_eq!(read["config"], sha256(&[&again.join("config.json")]).as_str(), "{name}");
            files += 1;
        }
    }
    assert_eq!((folders, files), (31, 22));
}

#[test]
fn mamba_ssm_reads_what_is_written_today() {
    let (mut folders, mut files) = (0, 0);
    let layout = Family::named("state-spaces").unwrap();
    for (name, found) in found(&record("check_mamba_ssm")) {
        let place = tempfile::tempdir().unwrap();
        let model = open(&name, DType::F32);
        let (folder, file, again) =
            (place.path().join("f"), place.path().join("model.gguf"), place.path().join("g"));
        model.save_pretrained_as(layout, &folder, DType::F32).unwrap();
        assert_eq!(
            found["folder"]["weights"],
            sha256(&[&folder.join("pytorch_model.bin")]).as_str(),
            "{name}"
        );
        assert_eq!(found["folder"]["config"], sha256(&[&folder.join("config.json")]).as_str(), "{name}");
        folders += 1;
        if let Some(read) = found.get("folder_from_gguf") {
            write_gguf(&model, &file);
            load(&file, DType::F32).unwrap().save_pretrained_as(layout, &again, DType::F32).unwrap();
            assert_eq!(read["config"], sha256(&[&again.join("config.json")]).as_str(), "{name}");
            files += 1;
        }
    }
    assert_eq!((folders, files), (20, 8));
}

#[test]
fn llama_cpp_reads_what_is_written_today() {
    let record = record("check_llama_cpp");
    let mut files = 0;
    for (name, found) in found(&record) {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("model.gguf");
        write_gguf(&open(&name, DType::F32), &file);
        assert_eq!(found["gguf"]["head"], of_head(&file).as_str(), "{name}");
        files += 1;
    }
    assert!(files == 11, "{files} files");
    assert_eq!(record["trained"].as_object().unwrap().len(), 2);
    for (name, found) in record["trained"].as_object().unwrap() {
        let kinds: Vec<_> = found.as_object().unwrap().iter().filter(|(kind, _)| *kind != "model").collect();
        assert_eq!(kinds.len(), GgmlType::of_weights().count(), "{name}");
        let folder = match name.as_str() {
            "mamba2-shakespeare" => Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models").join(name),
            _ => path("models").join(name),
        };
        assert_eq!(found["model"], of_model(&folder).as_str(), "{name} is another model now");
        for (kind, found) in kinds {
            assert!(found["off_by"].as_f64().unwrap() <= found["limit"].as_f64().unwrap(), "{name} {kind}");
        }
    }
    // Nothing is left out in silence.
    let without = |field: &str| {
        record[field].as_object().map_or_else(|| record[field].as_array().unwrap().len(), |x| x.len())
    };
    let all = files + without("refused") + without("without_words");
    assert_eq!(all, crate::parity::tiny_checkpoints().len());
}
