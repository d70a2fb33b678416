//! Which tensors of a checkpoint were used.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;

use super::{Checkpoint, Entry, NameMap};

/// The tensors of a checkpoint that were not read exactly once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Tensors that nobody read, less those that the [`NameMap`] allows.
    pub unread: Vec<String>,
    /// Tensors that were read more than once.
    pub repeated: Vec<String>,
}

impl Coverage {
    /// Whether each tensor was read exactly once.
    pub fn is_complete(&self) -> bool {
        self.unread.is_empty() && self.repeated.is_empty()
    }
}

/// Says what is amiss, in the words of an error message: `unread: a, b; read more than once: c`.
impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [("unread", &self.unread), ("read more than once", &self.repeated)];
        let parts = parts.into_iter().filter(|(_, names)| !names.is_empty());
        let parts: Vec<_> = parts.map(|(what, names)| format!("{what}: {}", names.join(", "))).collect();
        f.write_str(if parts.is_empty() { "each tensor was read once" } else { "" })?;
        f.write_str(&parts.join("; "))
    }
}

impl Checkpoint {
    /// How often each tensor was read since the checkpoint was opened; one that was read in parts counts when all are.
    pub fn read_counts(&self) -> BTreeMap<&str, usize> {
        let count =
            |entry: &Entry| entry.reads.load(Ordering::Relaxed) / entry.parts.load(Ordering::Relaxed).max(1);
        self.tensors.iter().map(|(name, entry)| (name.as_str(), count(entry))).collect()
    }

    /// The tensors that were not read since the checkpoint was opened, sorted.
    pub fn unread(&self) -> Vec<String> {
        self.read_counts().into_iter().filter(|(_, n)| *n == 0).map(|(name, _)| name.to_string()).collect()
    }

    /// Which tensors were not read exactly once, apart from those that `names` allows to stay unread.
    pub fn coverage(&self, names: &NameMap) -> Coverage {
        let mut coverage = Coverage::default();
        for (name, reads) in self.read_counts() {
            match reads {
                0 if !names.may_stay_unread(name) => coverage.unread.push(name.to_string()),
                0 | 1 => {}
                _ => coverage.repeated.push(name.to_string()),
            }
        }
        coverage
    }
}
