//! The settings of a model on the Hub.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::cache::RepoCache;
use super::client::Client;
use super::env::Settings;
use super::{HubModel, OnProgress, Progress, hub_error};
use crate::Result;
use crate::checkpoint::source::{is_inside, is_weights};

/// The settings of a [`HubModel`].
///
/// ```no_run
/// use mamba_model::checkpoint::{Checkpoint, HubBuilder, Progress};
///
/// let model = HubBuilder::from_env("state-spaces/mamba2-130m")
///     .revision("main")
///     .on_progress(|event| {
///         if let Progress::Finished { file } = event {
///             eprintln!("{file} is here");
///         }
///     })
///     .build()?;
/// let checkpoint = Checkpoint::open(&model)?;
/// # Ok::<_, mamba_model::Error>(())
/// ```
#[derive(Clone)]
pub struct HubBuilder {
    repo: String,
    revision: String,
    weights: Option<String>,
    endpoint: String,
    cache_dir: Option<PathBuf>,
    token: Option<String>,
    offline: bool,
    refresh: bool,
    retries: usize,
    backoff: Duration,
    on_progress: OnProgress,
}

impl HubBuilder {
    /// Settings for the repository `owner/name`, as the environment has them.
    ///
    /// These variables have the meaning and precedence that they have in Python's huggingface_hub: `HF_HOME`,
    /// `HF_HUB_CACHE` (formerly `HUGGINGFACE_HUB_CACHE`), `XDG_CACHE_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
    pub fn from_env(repo: impl Into<String>) -> Self {
        Self::from_vars(repo, |name| std::env::var(name).ok())
    }

    /// Settings as [`from_env`](Self::from_env) makes them, with another source of variables.
    pub fn from_vars(repo: impl Into<String>, var: impl Fn(&str) -> Option<String>) -> Self {
        let settings = Settings::read(var);
        Self {
            repo: repo.into(),
            revision: "main".into(),
            weights: None,
            endpoint: settings.endpoint.unwrap_or_else(|| "https://huggingface.co".into()),
            cache_dir: settings.cache_dir,
            token: settings.token,
            offline: settings.offline,
            refresh: false,
            retries: 5,
            backoff: Duration::from_millis(500),
            on_progress: Arc::new(|_| {}),
        }
    }

    /// A branch, a tag or a commit; `main` if not set.
    pub fn revision(self, revision: impl Into<String>) -> Self {
        Self { revision: revision.into(), ..self }
    }

    /// The file of weights to take, such as `model.Q8_0.gguf`, where a repository has several.
    pub fn weights(self, name: impl Into<String>) -> Self {
        Self { weights: Some(name.into()), ..self }
    }

    /// The address of the Hub or of a mirror.
    pub fn endpoint(self, endpoint: impl Into<String>) -> Self {
        Self { endpoint: endpoint.into(), ..self }
    }

    /// The folder of the cache, which holds one folder `models--owner--name` for each repository.
    pub fn cache_dir(self, folder: impl Into<PathBuf>) -> Self {
        Self { cache_dir: Some(folder.into()), ..self }
    }

    /// The token to show to the Hub, or none. It is not shown to the servers that the Hub redirects to.
    pub fn token(self, token: Option<String>) -> Self {
        Self { token, ..self }
    }

    /// Whether to make do with the cache and send no request.
    pub fn offline(self, offline: bool) -> Self {
        Self { offline, ..self }
    }

    /// Whether to ask the Hub for the newest commit of the revision once, instead of staying with the commit that
    /// the cache has for it.
    pub fn refresh(self, refresh: bool) -> Self {
        Self { refresh, ..self }
    }

    /// How many failures in a row to forgive that may pass (dropped connections, status 408, 429 and 5xx); 5 if not
    /// set. A connection that brought new bytes is no failure.
    pub fn retries(self, retries: usize) -> Self {
        Self { retries, ..self }
    }

    /// The wait after the first failure, doubled after each further one; half a second if not set.
    pub fn backoff(self, first: Duration) -> Self {
        Self { backoff: first, ..self }
    }

    /// A function that is told how downloads go on, to show a progress bar or to log.
    pub fn on_progress(self, report: impl Fn(Progress<'_>) + Send + Sync + 'static) -> Self {
        Self { on_progress: Arc::new(report), ..self }
    }

    /// The model with these settings. Sends no request.
    ///
    /// # Errors
    /// If the repository, the revision or the endpoint cannot be the name of one, or there is no folder for a cache.
    pub fn build(self) -> Result<HubModel> {
        let fail = |message: &str| Err(hub_error(&self.repo, &self.revision, message.into()));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let parts: Vec<_> = self.repo.split('/').collect();
        let is_name = |part: &&str| part.chars().all(plain) && !part.contains("..") && !part.contains("--");
        if !is_inside(&self.repo) || parts.len() > 2 || !parts.iter().all(is_name) {
            return fail("the repository is not of the form owner/name");
        }
        if !is_inside(&self.revision) {
            return fail("the revision is not the name of a branch, a tag or a commit");
        }
        if let Some(weights) = &self.weights
            && (!is_inside(weights) || !is_weights(Path::new(weights)))
        {
            return fail(&format!("`{}` is no file of weights", weights.escape_default()));
        }
        let endpoint = self.endpoint.trim_end_matches('/').to_string();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return fail(&format!("the endpoint `{}` is not an http address", endpoint.escape_default()));
        }
        if !self.token.iter().all(|token| token.bytes().all(|b| b.is_ascii_graphic())) {
            return fail("the token has characters that no token has");
        }
        let Some(cache_dir) = &self.cache_dir else {
            return fail("there is no home folder for the cache: set HF_HOME");
        };
        let cache = RepoCache::new(cache_dir, &self.repo);
        let client = Client::new(endpoint, self.repo.clone(), self.token, self.retries, self.backoff);
        let (repo, revision, weights, on_progress) =
            (self.repo, self.revision, self.weights, self.on_progress);
        let (offline, refresh, commit) = (self.offline, self.refresh, OnceLock::new());
        Ok(HubModel { repo, revision, weights, offline, refresh, commit, cache, client, on_progress })
    }
}

/// Leaves the token out.
impl fmt::Debug for HubBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("HubBuilder");
        out.field("repo", &self.repo).field("revision", &self.revision).field("endpoint", &self.endpoint);
        out.field("cache_dir", &self.cache_dir).field("offline", &self.offline).finish_non_exhaustive()
    }
}
