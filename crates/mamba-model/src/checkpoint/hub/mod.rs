//! Models on the Hugging Face Hub, fetched file by file into the cache that Python's huggingface_hub uses.

mod builder;
mod cache;
mod client;
mod download;
mod env;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use self::cache::RepoCache;
use self::client::{Answer, Client, Failure, Remote, gave_up};
use self::download::Download;
use super::source::{is_inside, standard_name};
use super::{ModelSource, WEIGHT_FILES};
use crate::{Error, Result};

pub use self::builder::HubBuilder;

/// What happens to a file on its way from the Hub. Nothing is reported for files that are in the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// Contents begin to arrive; again after each interruption.
    Started {
        /// The name of the file in its repository.
        file: &'a str,
        /// The number of bytes of the whole file, if the server says it.
        total: Option<u64>,
        /// The number of bytes that were there already.
        resumed: u64,
    },
    /// More bytes are on disk.
    Advanced {
        /// The name of the file in its repository.
        file: &'a str,
        /// The number of bytes on disk.
        bytes: u64,
    },
    /// Something failed that may pass: it is tried again after a wait.
    Retrying {
        /// The name of the file in its repository.
        file: &'a str,
        /// What failed.
        reason: &'a str,
        /// How long the wait is.
        wait: Duration,
    },
    /// The file is complete.
    Finished {
        /// The name of the file in its repository.
        file: &'a str,
    },
}

type OnProgress = Arc<dyn Fn(Progress<'_>) + Send + Sync>;

/// A model on the Hugging Face Hub.
///
/// Files are fetched when they are asked for and stay in the cache; a file in the cache is found without a request,
/// and so is the absence of a file that was once asked for. All files of one `HubModel` come from one commit: that
/// which the cache has for the revision, or else that of the first file which is fetched.
pub struct HubModel {
    repo: String,
    revision: String,
    weights: Option<String>,
    offline: bool,
    refresh: bool,
    commit: OnceLock<String>,
    cache: RepoCache,
    client: Client,
    on_progress: OnProgress,
}

impl HubModel {
    /// The commit that the files come from, if it is known yet.
    pub fn commit(&self) -> Option<String> {
        let cached = || (!self.refresh || self.offline).then(|| self.cache.commit(&self.revision)).flatten();
        self.commit.get().cloned().or_else(cached)
    }

    fn fail(&self, message: String) -> Error {
        hub_error(&self.repo, &self.revision, message)
    }

    fn fetch(&self, name: &str) -> Result<Option<PathBuf>> {
        let fail = |message: String| self.fail(format!("{name}: {message}"));
        let disk = |e: std::io::Error| Error::io(self.cache.folder(), e);
        let revision = self.commit().unwrap_or_else(|| self.revision.clone());
        match self.look(&revision, name).map_err(fail)? {
            Answer::Missing { commit } => {
                if let Some(commit) = commit.filter(|commit| self.pin(commit)) {
                    self.cache.note_missing(&commit, name).map_err(disk)?;
                    self.cache.set_commit(&self.revision, &commit).map_err(disk)?;
                }
                Ok(None)
            }
            Answer::Found(remote) => {
                if !self.pin(&remote.commit) {
                    return Err(fail("the server answers for another commit than before".into()));
                }
                self.download(name, &remote).map_err(fail)?;
                let path = self.cache.link(&remote.commit, name, &remote.etag).map_err(disk)?;
                self.cache.set_commit(&self.revision, &remote.commit).map_err(disk)?;
                Ok(Some(path))
            }
        }
    }

    /// Stays with this commit from now on; false if another one was taken before.
    fn pin(&self, commit: &str) -> bool {
        self.commit.get_or_init(|| self.commit().unwrap_or_else(|| commit.to_string())) == commit
    }

    fn download(&self, name: &str, remote: &Remote) -> std::result::Result<(), String> {
        Download { client: &self.client, cache: &self.cache, name, remote, progress: &*self.on_progress }
            .run()
    }

    /// Asks for a file until there is an answer.
    fn look(&self, revision: &str, name: &str) -> std::result::Result<Answer, String> {
        self.insist(name, || self.client.look(revision, name))
    }

    /// Repeats a request until it succeeds or there is no hope.
    fn insist<T>(
        &self,
        name: &str,
        request: impl Fn() -> std::result::Result<T, Failure>,
    ) -> std::result::Result<T, String> {
        let mut failures = 0;
        loop {
            match request() {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(reason)) => return Err(reason),
                Err(Failure::Passing(reason, asked)) => {
                    failures += 1;
                    let Some(wait) = self.client.wait(failures, asked) else {
                        return Err(gave_up(&reason, failures));
                    };
                    (self.on_progress)(Progress::Retrying { file: name, reason: &reason, wait });
                    std::thread::sleep(wait);
                }
            }
        }
    }
}

impl ModelSource for HubModel {
    fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        if !is_inside(name) {
            return Err(self.fail(format!("`{}` points outside the repository", name.escape_default())));
        }
        if let Some(weights) = &self.weights
            && WEIGHT_FILES.contains(&name)
            && weights != name
        {
            let stands_for_it = standard_name(Path::new(weights)) == Some(name);
            return if stands_for_it { self.file(weights) } else { Ok(None) };
        }
        let commit = self.commit();
        if let Some(commit) = &commit {
            let path = self.cache.pointer(commit, name);
            if path.is_file() {
                return Ok(Some(path));
            }
            if self.cache.is_known_missing(commit, name) {
                return Ok(None);
            }
        }
        if !self.offline {
            return self.fetch(name);
        }
        if commit.is_some_and(|commit| self.cache.has_snapshot(&commit)) {
            return Ok(None);
        }
        let folder = self.cache.folder().display();
        Err(self.fail(format!("{name} is not in the cache {folder}, and HF_HUB_OFFLINE forbids to fetch it")))
    }

    fn list(&self) -> Result<Vec<String>> {
        if let Some(weights) = &self.weights {
            return Ok(vec![weights.clone()]);
        }
        let mut names = if self.offline {
            let commit = self.commit().filter(|commit| self.cache.has_snapshot(commit));
            commit.map(|commit| self.cache.files(&commit)).unwrap_or_default()
        } else {
            let revision = self.commit().unwrap_or_else(|| self.revision.clone());
            let fail = |message: String| self.fail(format!("the list of files: {message}"));
            let (commit, names) =
                self.insist("the list of files", || self.client.list(&revision)).map_err(fail)?;
            if !self.pin(&commit) {
                return Err(fail("the server answers for another commit than before".into()));
            }
            names
        };
        names.retain(|name| is_inside(name) && !name.contains('/'));
        names.sort();
        Ok(names)
    }

    fn describe(&self) -> String {
        let Self { repo, revision, .. } = self;
        if self.offline {
            let folder = self.cache.folder().display();
            return format!(
                "the cached part of {repo} at revision {revision} ({folder}; HF_HUB_OFFLINE is set)"
            );
        }
        format!("{repo} at revision {revision}")
    }
}

/// Leaves the token out.
impl fmt::Debug for HubModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("HubModel");
        out.field("repo", &self.repo).field("revision", &self.revision).field("offline", &self.offline);
        out.field("cache", &self.cache.folder()).finish_non_exhaustive()
    }
}

fn hub_error(repo: &str, revision: &str, message: String) -> Error {
    Error::Hub { repo: repo.to_string(), revision: revision.to_string(), message }
}
