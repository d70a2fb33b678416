//! That every golden file is the one that `goldens/MANIFEST.toml` names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[test]
fn goldens_are_those_of_the_manifest() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens");
    let text = std::fs::read_to_string(goldens.join("MANIFEST.toml")).unwrap();
    let value = |line: &str, key: &str| {
        Some(line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"')?.to_owned())
    };
    let of = |key: &'static str| text.lines().filter_map(move |line| value(line, key));
    let named: BTreeMap<String, String> = of("path").zip(of("sha256")).collect();

    let mut found = vec![];
    for entry in std::fs::read_dir(&goldens).unwrap() {
        let path = entry.unwrap().path();
        // Scripts, and texts beside the folders, are no goldens.
        if path.is_dir() && !path.ends_with("make") {
            files(&path, &mut found);
        }
    }
    let there = found.iter().map(|path| {
        let hash: String =
            Sha256::digest(std::fs::read(path).unwrap()).iter().map(|b| format!("{b:02x}")).collect();
        let parts: Vec<_> =
            path.strip_prefix(&goldens).unwrap().iter().map(|part| part.to_str().unwrap()).collect();
        (parts.join("/"), hash)
    });
    let there: BTreeMap<String, String> = there.collect();
    assert!(there.len() > 500, "{} files", there.len());
    for (path, hash) in &there {
        assert_eq!(named.get(path), Some(hash), "goldens/{path}: run goldens/make/manifest.py");
    }
    assert_eq!(there.len(), named.len(), "the manifest names files that are not there");
}
