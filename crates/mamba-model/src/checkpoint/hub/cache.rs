//! The cache on disk, laid out as by Python's huggingface_hub, so that both find each other's files.
//!
//! ```text
//! models--owner--name/refs/main                    the commit that the branch was at
//! models--owner--name/blobs/<etag>                 contents; `<etag>.incomplete` while they are fetched
//! models--owner--name/snapshots/<commit>/<file>    link to a blob
//! models--owner--name/.no_exist/<commit>/<file>    a file that this commit does not have
//! .locks/models--owner--name/<etag>.lock           held by whoever fetches the blob
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The part of a cache that belongs to one repository.
#[derive(Clone, Debug)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub fn new(cache_dir: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self { folder: cache_dir.join(&name), locks: cache_dir.join(".locks").join(&name) }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit that a revision was at when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_string()).filter(|commit| is_commit(commit))
    }

    pub fn set_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    pub fn has_snapshot(&self, commit: &str) -> bool {
        self.folder.join("snapshots").join(commit).is_dir()
    }

    /// A file of a snapshot, whether it is there or not.
    pub fn pointer(&self, commit: &str, name: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit).join(name)
    }

    /// The names of the files of a snapshot that are in no folder.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let entries = fs::read_dir(self.folder.join("snapshots").join(commit));
        let files = entries.into_iter().flatten().flatten().filter(|entry| entry.path().is_file());
        files.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    pub fn is_known_missing(&self, commit: &str, name: &str) -> bool {
        self.folder.join(".no_exist").join(commit).join(name).exists()
    }

    pub fn note_missing(&self, commit: &str, name: &str) -> io::Result<()> {
        write(&self.folder.join(".no_exist").join(commit).join(name), b"")
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Waits until no other process fetches this blob, and keeps others waiting until the file is dropped.
    pub fn lock(&self, etag: &str) -> io::Result<File> {
        fs::create_dir_all(&self.locks)?;
        let path = self.locks.join(format!("{etag}.lock"));
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        file.lock()?;
        Ok(file)
    }

    /// Makes a file of a snapshot point to its blob, and returns it.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> io::Result<PathBuf> {
        let pointer = self.pointer(commit, name);
        if let Some(parent) = pointer.parent() {
            fs::create_dir_all(parent)?;
        }
        let up = "../".repeat(2 + name.matches('/').count());
        let target = Path::new(&up).join("blobs").join(etag);
        if fs::symlink_metadata(&pointer).is_ok() && !pointer.exists() {
            // A link whose blob was deleted.
            fs::remove_file(&pointer)?;
        }
        match symlink(&target, &pointer) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(pointer),
            // Windows lets only some users make links.
            Err(_) => fs::copy(self.blob(etag), &pointer).map(|_| pointer),
            Ok(()) => Ok(pointer),
        }
    }
}

/// Whether a string is a full commit id, which is a safe name of a folder as well.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a string can be the name of a blob.
pub(super) fn is_etag(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    !text.is_empty() && text.len() <= 128 && text.bytes().all(plain)
}

/// Writes a small file so that others see the old or the new one, never a part.
fn write(path: &Path, contents: &[u8]) -> io::Result<()> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}-{}.part", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::write(&partial, contents)?;
    fs::rename(&partial, path)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn names_of_blobs_and_commits_cannot_leave_their_folder() {
        for bad in ["", "..", "a/b", "W/\"x\"", "a.b", "a\\b", &"a".repeat(200)] {
            assert!(!is_etag(bad), "{bad}");
        }
        assert!(is_etag(COMMIT) && is_commit(COMMIT));
        assert!(!is_commit("main") && !is_commit(&COMMIT.to_uppercase()) && !is_commit(&COMMIT[1..]));
    }

    #[test]
    fn links_are_relative_at_any_depth_and_mended_when_their_blob_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), "o/n");
        for etag in ["one", "two"] {
            write(&cache.blob(etag), etag.as_bytes()).unwrap();
        }
        let path = cache.link(COMMIT, "a/b/c.json", "one").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one");
        fs::remove_file(cache.blob("one")).unwrap();
        cache.link(COMMIT, "a/b/c.json", "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
    }

    #[test]
    fn revisions_with_slashes_have_their_own_file_and_bad_refs_are_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), "o/n");
        assert_eq!(cache.commit("refs/pr/1"), None);
        cache.set_commit("refs/pr/1", COMMIT).unwrap();
        assert_eq!(cache.commit("refs/pr/1").as_deref(), Some(COMMIT));
        fs::write(folder.path().join("models--o--n/refs/refs/pr/1"), "../../x").unwrap();
        assert_eq!(cache.commit("refs/pr/1"), None);
    }
}
