//! The way of a file's contents into the cache.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::{Response, StatusCode};

use super::Progress;
use super::cache::RepoCache;
use super::client::{Client, Failure, Remote, gave_up, text};

/// One file on its way.
pub(super) struct Download<'a> {
    pub client: &'a Client,
    pub cache: &'a RepoCache,
    pub name: &'a str,
    pub remote: &'a Remote,
    pub progress: &'a dyn Fn(Progress<'_>),
}

impl Download<'_> {
    /// Brings the contents into the cache, unless they are there. What an earlier attempt has left is completed.
    pub fn run(&self) -> Result<(), String> {
        let blob = self.cache.blob(&self.remote.etag);
        let mut partial = blob.as_os_str().to_owned();
        partial.push(".incomplete");
        let partial = PathBuf::from(partial);
        let _lock = self.cache.lock(&self.remote.etag).map_err(|e| on_disk(self.cache.folder(), e))?;
        if blob.exists() {
            return Ok(());
        }
        if let Some(folder) = blob.parent() {
            fs::create_dir_all(folder).map_err(|e| on_disk(folder, e))?;
        }
        self.complete(&partial)?;
        fs::rename(&partial, &blob).map_err(|e| on_disk(&blob, e))?;
        (self.progress)(Progress::Finished { file: self.name });
        Ok(())
    }

    /// Tries until all bytes are there and are the right ones.
    fn complete(&self, partial: &Path) -> Result<(), String> {
        let (mut failures, mut was_wrong) = (0, false);
        loop {
            let before = length(partial);
            match self.attempt(partial) {
                Ok(()) if self.is_right(partial)? => return Ok(()),
                Ok(()) => {
                    fs::remove_file(partial).map_err(|e| on_disk(partial, e))?;
                    if std::mem::replace(&mut was_wrong, true) {
                        return Err("the contents do not have the SHA-256 that the server names".into());
                    }
                }
                Err(Failure::Final(reason)) => return Err(reason),
                Err(Failure::Passing(reason, asked)) => {
                    failures = if length(partial) > before { 1 } else { failures + 1 };
                    let Some(wait) = self.client.wait(failures, asked) else {
                        return Err(gave_up(&reason, failures));
                    };
                    (self.progress)(Progress::Retrying { file: self.name, reason: &reason, wait });
                    std::thread::sleep(wait);
                }
            }
        }
    }

    /// Asks once for the bytes that are missing.
    fn attempt(&self, partial: &Path) -> Result<(), Failure> {
        let write = |e| Failure::Final(on_disk(partial, e));
        let mut start = length(partial);
        let mut file = File::options().create(true).append(true).open(partial).map_err(write)?;
        if self.remote.size.is_some_and(|size| start > size) {
            file.set_len(0).map_err(write)?;
            start = 0;
        }
        if start > 0 && self.remote.size == Some(start) {
            return Ok(());
        }
        let answer = self.client.get(&self.remote.commit, self.name, start)?;
        if start > 0 && !continues(&answer, start) {
            file.set_len(0).map_err(write)?;
            start = 0;
            if answer.status() != StatusCode::OK {
                return Err(Failure::Passing("the server does not continue the download".into(), None));
            }
        }
        let total = self.remote.size.or_else(|| Some(answer.body().content_length()?.saturating_add(start)));
        (self.progress)(Progress::Started { file: self.name, total, resumed: start });
        let (mut body, mut buffer, mut done) = (answer.into_body().into_reader(), vec![0; 1 << 16], start);
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Failure::Passing(e.to_string(), None)),
            };
            done += count as u64;
            if total.is_some_and(|total| done > total) {
                file.set_len(0).map_err(write)?;
                return Err(Failure::Final("the server sends more bytes than it has named".into()));
            }
            file.write_all(&buffer[..count]).map_err(write)?;
            (self.progress)(Progress::Advanced { file: self.name, bytes: done });
        }
        match total {
            Some(total) if done < total => {
                Err(Failure::Passing(format!("the connection ended after {done} of {total} bytes"), None))
            }
            _ => Ok(()),
        }
    }

    /// Large files are named by the SHA-256 of their contents.
    fn is_right(&self, partial: &Path) -> Result<bool, String> {
        let etag = &self.remote.etag;
        if etag.len() != 64 || !etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(true);
        }
        let mut hash = Sha256::new();
        let mut file = File::open(partial).map_err(|e| on_disk(partial, e))?;
        io::copy(&mut file, &mut hash).map_err(|e| on_disk(partial, e))?;
        Ok(format!("{:x}", hash.finalize()).eq_ignore_ascii_case(etag))
    }
}

/// Whether an answer goes on where the file on disk ends.
fn continues(answer: &Response<Body>, start: u64) -> bool {
    let range = text(answer.headers(), "content-range").unwrap_or_default();
    answer.status() == StatusCode::PARTIAL_CONTENT && range.starts_with(&format!("bytes {start}-"))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.len())
}

fn on_disk(path: &Path, error: io::Error) -> String {
    format!("{}: {error}", path.display())
}
