//! Requests to the Hub, and what its answers mean.

use std::time::Duration;

use serde::Deserialize;
use ureq::http::header::{ACCEPT_ENCODING, AUTHORIZATION, LOCATION, RANGE, RETRY_AFTER};
use ureq::http::{HeaderMap, Response, StatusCode, Uri};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use super::cache::{is_commit, is_etag};

/// Redirects that are followed before an answer counts as a loop.
const MAX_REDIRECTS: usize = 10;
/// No longer wait between two attempts than this, whatever the server asks for.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A list of files longer than this is refused.
const MAX_LISTING_BYTES: u64 = 32 << 20;

/// Why a request did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// It will not succeed later either.
    Final(String),
    /// It may succeed later; the server may have said when.
    Passing(String, Option<Duration>),
}

/// What the Hub says about a file.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    /// The file is there.
    Found(Remote),
    /// The revision has no such file.
    Missing {
        /// The commit of the revision, if the Hub says it.
        commit: Option<String>,
    },
}

/// A file on the Hub.
#[derive(Debug, PartialEq)]
pub(super) struct Remote {
    pub etag: String,
    pub commit: String,
    pub size: Option<u64>,
}

pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    repo: String,
    token: Option<String>,
    retries: usize,
    backoff: Duration,
}

impl Client {
    pub fn new(
        endpoint: String,
        repo: String,
        token: Option<String>,
        retries: usize,
        backoff: Duration,
    ) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("mamba-model/", env!("CARGO_PKG_VERSION"), "; rust"))
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)));
        let config = if is_loopback(&endpoint) { config.proxy(None) } else { config };
        Self { agent: config.build().into(), endpoint, repo, token, retries, backoff }
    }

    /// Asks whether a revision has a file, and for its version.
    pub fn look(&self, revision: &str, name: &str) -> Result<Answer, Failure> {
        let mut url = self.url(revision, name);
        for _ in 0..MAX_REDIRECTS {
            let answer = self.send(self.agent.head(&url), &url)?;
            let (status, headers) = (answer.status(), answer.headers());
            if status == StatusCode::NOT_FOUND {
                return self.not_found(headers);
            }
            let target = redirect(&url, &answer)?;
            match target {
                // The Hub's own redirects, of renamed models and small files, are followed; one to where the
                // contents lie comes with all that is asked here.
                Some((target, relative)) if relative || text(headers, "x-repo-commit").is_none() => {
                    url = target
                }
                Some(_) => return remote(headers, text(headers, "x-linked-size")),
                None if status.is_success() => {
                    return remote(
                        headers,
                        text(headers, "x-linked-size").or(text(headers, "content-length")),
                    );
                }
                None => return Err(self.refusal(&answer)),
            }
        }
        Err(Failure::Final("the server redirects in a circle".into()))
    }

    /// Asks for the contents of a file from byte `start` on.
    pub fn get(&self, commit: &str, name: &str, start: u64) -> Result<Response<Body>, Failure> {
        let mut url = self.url(commit, name);
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if start > 0 {
                request = request.header(RANGE, format!("bytes={start}-"));
            }
            let answer = self.send(request, &url)?;
            match redirect(&url, &answer)? {
                Some((target, _)) => url = target,
                None if answer.status().is_success()
                    || answer.status() == StatusCode::RANGE_NOT_SATISFIABLE =>
                {
                    return Ok(answer);
                }
                None => return Err(self.refusal(&answer)),
            }
        }
        Err(Failure::Final("the server redirects in a circle".into()))
    }

    /// Asks for the names of all files of a revision, and for its commit.
    pub fn list(&self, revision: &str) -> Result<(String, Vec<String>), Failure> {
        let mut url =
            format!("{}/api/models/{}/revision/{}", self.endpoint, self.repo, percent_encode(revision));
        for _ in 0..MAX_REDIRECTS {
            let answer = self.send(self.agent.get(&url), &url)?;
            if answer.status() == StatusCode::NOT_FOUND {
                self.not_found(answer.headers())?;
                return Err(Failure::Final("the server lists no files".into()));
            }
            match redirect(&url, &answer)? {
                Some((target, _)) => url = target,
                None if answer.status().is_success() => return listing(answer),
                None => return Err(self.refusal(&answer)),
            }
        }
        Err(Failure::Final("the server redirects in a circle".into()))
    }

    fn url(&self, revision: &str, name: &str) -> String {
        let name: Vec<_> = name.split('/').map(percent_encode).collect();
        format!("{}/{}/resolve/{}/{}", self.endpoint, self.repo, percent_encode(revision), name.join("/"))
    }

    /// Sends a request; the token goes to the Hub itself only, not to where it redirects.
    fn send(&self, request: RequestBuilder<WithoutBody>, url: &str) -> Result<Response<Body>, Failure> {
        let mut request = request.header(ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.token
            && origin(url) == origin(&self.endpoint)
        {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        request.call().map_err(failure)
    }

    fn not_found(&self, headers: &HeaderMap) -> Result<Answer, Failure> {
        let private = if self.token.is_none() { ", or it is private: then set HF_TOKEN" } else { "" };
        match text(headers, "x-error-code") {
            Some("RepoNotFound") => Err(Failure::Final(format!("there is no such repository{private}"))),
            Some("RevisionNotFound") => Err(Failure::Final("the repository has no such revision".into())),
            _ => {
                let commit = text(headers, "x-repo-commit").filter(|commit| is_commit(commit));
                Ok(Answer::Missing { commit: commit.map(str::to_string) })
            }
        }
    }

    fn refusal(&self, answer: &Response<Body>) -> Failure {
        let (status, headers) = (answer.status(), answer.headers());
        let said = text(headers, "x-error-message").unwrap_or_default();
        let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
        let said = if said.is_empty() { said } else { format!(" ({said})") };
        let status = status.as_u16();
        let page = || format!("{}/{}", self.endpoint, self.repo);
        match status {
            401 | 403 if text(headers, "x-error-code") == Some("GatedRepo") => Failure::Final(format!(
                "access is gated{said}: ask for it at {}, then set HF_TOKEN to a token of that account",
                page()
            )),
            401 | 403 if self.token.is_none() => Failure::Final(format!(
                "status {status}{said}: the repository does not exist, or needs a token: set HF_TOKEN"
            )),
            401 | 403 => Failure::Final(format!(
                "status {status}{said}: the repository does not exist, or the token in HF_TOKEN may not read it"
            )),
            408 | 429 | 500..=599 => {
                let wait = text(headers, RETRY_AFTER.as_str()).and_then(|seconds| seconds.parse().ok());
                Failure::Passing(format!("status {status}{said}"), wait.map(Duration::from_secs))
            }
            _ => Failure::Final(format!("status {status}{said}")),
        }
    }

    /// How long to wait after `failures` failures in a row, or `None` to give up.
    pub fn wait(&self, failures: usize, asked: Option<Duration>) -> Option<Duration> {
        let doubled = self.backoff.saturating_mul(1 << failures.saturating_sub(1).min(10));
        (failures <= self.retries).then(|| asked.unwrap_or(doubled).min(MAX_WAIT))
    }
}

/// The message after the last of several failures.
pub(super) fn gave_up(reason: &str, failures: usize) -> String {
    if failures == 1 { reason.to_string() } else { format!("{reason}; gave up after {failures} attempts") }
}

/// Where an answer redirects to, and whether that is within the same server.
fn redirect(url: &str, answer: &Response<Body>) -> Result<Option<(String, bool)>, Failure> {
    if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let target = text(answer.headers(), LOCATION.as_str()).unwrap_or_default();
    if target.starts_with('/') && !target.starts_with("//") {
        return Ok(origin(url).map(|(scheme, host)| (format!("{scheme}://{host}{target}"), true)));
    }
    let secure = target.starts_with("https://");
    if secure || (target.starts_with("http://") && url.starts_with("http://")) {
        return Ok(Some((target.to_string(), false)));
    }
    Err(Failure::Final("the server redirects to nowhere, or from https to http".into()))
}

/// What the Hub says about a revision.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

fn listing(answer: Response<Body>) -> Result<(String, Vec<String>), Failure> {
    let text =
        answer.into_body().into_with_config().limit(MAX_LISTING_BYTES).read_to_string().map_err(failure)?;
    let unusable = |what: String| Failure::Final(format!("the server does not answer as a Hub: {what}"));
    let listing: Listing = serde_json::from_str(&text).map_err(|e| unusable(e.to_string()))?;
    if !is_commit(&listing.sha) {
        return Err(unusable("its list of files names no commit".into()));
    }
    Ok((listing.sha, listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect()))
}

fn remote(headers: &HeaderMap, size: Option<&str>) -> Result<Answer, Failure> {
    let etag = text(headers, "x-linked-etag").or(text(headers, "etag")).unwrap_or_default();
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    let commit = text(headers, "x-repo-commit").unwrap_or_default();
    if !is_etag(etag) || !is_commit(commit) {
        return Err(Failure::Final(
            "the server does not answer as a Hub: no usable ETag and X-Repo-Commit".into(),
        ));
    }
    let size = size.and_then(|size| size.parse().ok());
    Ok(Answer::Found(Remote { etag: etag.to_string(), commit: commit.to_string(), size }))
}

fn failure(error: ureq::Error) -> Failure {
    use ureq::Error::{ConnectionFailed, HostNotFound, Io, Protocol, Timeout};
    match error {
        HostNotFound => Failure::Final(
            "the host cannot be found; without a network, HF_HUB_OFFLINE=1 uses what is in the cache".into(),
        ),
        Io(_) | Timeout(_) | ConnectionFailed | Protocol(_) => Failure::Passing(error.to_string(), None),
        _ => Failure::Final(error.to_string()),
    }
}

/// A header as text, if it is there and is text.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, and host with port, of an address.
fn origin(url: &str) -> Option<(String, String)> {
    let url: Uri = url.parse().ok()?;
    Some((url.scheme_str()?.to_string(), url.authority()?.as_str().to_ascii_lowercase()))
}

/// Whether requests go to this machine itself, where no proxy of the environment is asked.
fn is_loopback(endpoint: &str) -> bool {
    let uri: Option<Uri> = endpoint.parse().ok();
    let host = uri.as_ref().and_then(|uri| uri.host()).unwrap_or_default();
    host == "localhost" || host.starts_with("127.") || host == "[::1]"
}

fn percent_encode(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    part.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_encoded() {
        let client = Client::new("http://h".into(), "o/n".into(), None, 0, Duration::ZERO);
        assert_eq!(
            client.url("refs/pr/1", "a b/c?.json"),
            "http://h/o/n/resolve/refs%2Fpr%2F1/a%20b/c%3F.json"
        );
    }

    #[test]
    fn origins_differ_by_scheme_host_and_port() {
        assert_eq!(origin("https://Hub.co/a"), origin("https://hub.co/b?c"));
        for other in
            ["http://hub.co", "https://hub.co:8443", "https://hub.co.evil.net", "https://hub.co@evil.net"]
        {
            assert_ne!(origin("https://hub.co"), origin(other));
        }
    }

    #[test]
    fn waits_double_obey_the_server_and_end() {
        let client = Client::new("http://h".into(), "o/n".into(), None, 3, Duration::from_millis(100));
        let waits: Vec<_> = (1..5).map(|n| client.wait(n, None).map(|wait| wait.as_millis())).collect();
        assert_eq!(waits, [Some(100), Some(200), Some(400), None]);
        assert_eq!(client.wait(1, Some(Duration::from_secs(7))), Some(Duration::from_secs(7)));
        assert_eq!(client.wait(1, Some(Duration::from_secs(7777))), Some(MAX_WAIT));
    }
}
