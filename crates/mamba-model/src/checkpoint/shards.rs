//! The index of a checkpoint that is split into several files.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::source::is_inside;
use super::unique::Unique;
use crate::{Error, Result};

/// An index larger than this is refused.
const MAX_INDEX_BYTES: u64 = 64 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: Unique<String>,
}

/// Reads which file holds which tensor.
///
/// # Errors
/// If the file is not such an index, lists nothing, or lists a file outside its folder.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let fail = |message: String| Error::checkpoint(path, message);
    let length = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > MAX_INDEX_BYTES {
        return Err(fail(format!("is no index of weights: it has {length} bytes")));
    }
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    parse(&text).map_err(fail)
}

fn parse(text: &[u8]) -> std::result::Result<BTreeMap<String, String>, String> {
    let index: Index = serde_json::from_slice(text).map_err(|e| format!("is no index of weights: {e}"))?;
    let Unique(files) = index.weight_map;
    if files.is_empty() {
        return Err("is an index that lists no tensors".into());
    }
    for (tensor, file) in &files {
        if !is_inside(file) {
            let (tensor, file) = (tensor.escape_default(), file.escape_default());
            return Err(format!("places tensor `{tensor}` in `{file}`, which is outside its folder"));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str =
        r#"{"metadata":{"total_size":8},"weight_map":{"a":"m-1-of-2.bin","b":"m-2-of-2.bin"}}"#;

    #[test]
    fn an_index_maps_tensors_to_files() {
        let index = parse(GOOD.as_bytes()).unwrap();
        assert_eq!(index["b"], "m-2-of-2.bin");
    }

    #[test]
    fn files_outside_the_folder_are_refused_by_name() {
        for bad in ["../evil.bin", "/etc/passwd", "a/../../b", "", "C:\\\\x"] {
            let text = format!(r#"{{"weight_map":{{"layer.weight":"{bad}"}}}}"#);
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.starts_with("places tensor `layer.weight` in `"), "{error}");
        }
    }

    #[test]
    fn what_is_no_index_is_an_error() {
        for bad in
            ["", "[]", "{}", "{", r#"{"weight_map":[]}"#, r#"{"weight_map":{}}"#, r#"{"weight_map":{"a":1}}"#]
        {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    /// Whether the two places are one or not.
    #[test]
    fn names_are_not_there_twice() {
        for second in ["m-1-of-2.bin", "m-2-of-2.bin"] {
            let text = format!(r#"{{"weight_map":{{"a.b":"m-1-of-2.bin","a.b":"{second}"}}}}"#);
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.starts_with("is no index of weights: `a.b` is there twice"), "{error}");
        }
        let maps = r#"{"weight_map":{"a":"m.bin"},"weight_map":{"a":"m.bin"}}"#;
        assert!(parse(maps.as_bytes()).unwrap_err().contains("duplicate field `weight_map`"));
    }

    #[test]
    fn what_is_not_utf_8_is_an_error() {
        for (name, file) in [(&b"\xff"[..], &b"m.bin"[..]), (b"a", b"\xffm.bin"), (b"\xc3\x28", b"m.bin")] {
            let text = [b"{\"weight_map\":{\"", name, b"\":\"", file, b"\"}}"].concat();
            let error = parse(&text).unwrap_err();
            assert!(error.starts_with("is no index of weights: invalid unicode code point"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn damaged_indices_never_panic(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
            let mut text = GOOD.as_bytes().to_vec();
            for (at, byte) in damage {
                let at = at.index(text.len());
                text[at] = byte;
            }
            if let Ok(index) = parse(&text) {
                prop_assert!(index.values().all(|file| is_inside(file)));
            }
        }
    }
}
