//! The zip archive around a pickle.

use std::collections::HashMap;
use std::io::{Cursor, Read};
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

/// A pickle larger than this is refused: a tensor takes about two hundred bytes in it.
const MAX_PICKLE_BYTES: u64 = 16 << 20;

/// What is of interest in an archive.
pub(super) struct Archive {
    /// The pickle that describes the tensors.
    pub pickle: Vec<u8>,
    /// Where the bytes of each storage lie in the file.
    pub storages: HashMap<String, Range<usize>>,
}

impl Archive {
    /// Finds the pickle and the storages of an archive written by `torch.save`, or says what is wrong with it.
    pub fn open(file: &[u8]) -> Result<Self, String> {
        let mut zip = ZipArchive::new(Cursor::new(file))
            .map_err(|e| format!("is not a whole zip archive as torch.save writes it: {e}"))?;
        if zip.has_duplicate_names() {
            return Err("has two entries of the same name".into());
        }
        let names: Vec<String> = zip
            .file_names_raw()
            .map(|name| {
                String::from_utf8(name.to_vec()).map_err(|_| "has an entry whose name is not UTF-8".into())
            })
            .collect::<Result<_, String>>()?;
        let mut roots =
            names.iter().filter_map(|n| n.strip_suffix("/data.pkl")).filter(|root| !root.contains('/'));
        let Some(root) = roots.next() else {
            return Err("is a zip archive without data.pkl: torch.save did not write it".into());
        };
        if roots.next().is_some() {
            return Err("has more than one data.pkl".into());
        }
        let (mut pickle, mut storages) = (None, HashMap::new());
        for (index, name) in names.iter().enumerate() {
            match name.strip_prefix(root).and_then(|name| name.strip_prefix('/')) {
                Some("data.pkl") => pickle = Some(contents(&mut zip, index, "data.pkl", MAX_PICKLE_BYTES)?),
                Some("byteorder") => match contents(&mut zip, index, "byteorder", 16)?.trim_ascii() {
                    b"little" => {}
                    b"big" => return Err("holds big-endian tensors, which are not supported".into()),
                    _ => return Err("has an unknown byte order".into()),
                },
                Some(other) => {
                    if let Some(key) = other.strip_prefix("data/") {
                        storages.insert(key.to_string(), place(&mut zip, index, other, file.len())?);
                    }
                }
                None => {}
            }
        }
        let pickle = pickle.ok_or("has no data.pkl")?;
        Ok(Self { pickle, storages })
    }
}

type Zip<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// The bytes of a small entry, unpacked if need be.
fn contents(zip: &mut Zip, index: usize, name: &str, limit: u64) -> Result<Vec<u8>, String> {
    let entry = zip.by_index(index).map_err(|e| format!("has an unreadable entry {name}: {e}"))?;
    let mut bytes = Vec::new();
    entry
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| format!("has an unreadable entry {name}: {e}"))?;
    if bytes.len() as u64 > limit {
        return Err(format!("has an entry {name} larger than {limit} bytes"));
    }
    Ok(bytes)
}

/// Where the bytes of an entry lie that is neither compressed nor encrypted, as torch writes storages.
fn place(zip: &mut Zip, index: usize, name: &str, file_len: usize) -> Result<Range<usize>, String> {
    let name = name.escape_default();
    let entry = zip.by_index_raw(index).map_err(|e| format!("has an unreadable entry {name}: {e}"))?;
    if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
        return Err(format!("has a compressed or encrypted entry {name}, which torch.save does not write"));
    }
    let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
    let size =
        (entry.size() == entry.compressed_size()).then(|| usize::try_from(entry.size()).ok()).flatten();
    let range = start.zip(size).and_then(|(start, size)| Some(start..start.checked_add(size)?));
    range
        .filter(|range| range.end <= file_len)
        .ok_or_else(|| format!("is truncated: entry {name} goes past the end of the file"))
}
