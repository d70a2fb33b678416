//! The Hub's protocol, against a server on this machine.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::Device;
use mamba_model::checkpoint::{Checkpoint, HubBuilder, HubModel, ModelSource, Progress};
use tempfile::TempDir;

use crate::files;
use crate::mock_hub::{Fault, MockHub, REPO, commit, etag};

struct Fixture {
    hub: MockHub,
    cache: TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self { hub: MockHub::start(), cache: tempfile::tempdir().unwrap() }
    }

    fn builder(&self) -> HubBuilder {
        let builder = HubBuilder::from_vars(REPO, |_| None).endpoint(self.hub.url() + "/");
        builder.cache_dir(self.cache.path()).backoff(Duration::from_millis(1)).retries(2)
    }

    fn model(&self) -> HubModel {
        self.builder().build().unwrap()
    }

    fn path(&self, below: impl AsRef<Path>) -> std::path::PathBuf {
        self.cache.path().join("models--owner--name").join(below)
    }
}

fn large() -> Vec<u8> {
    (0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn error(result: mamba_model::Result<Option<std::path::PathBuf>>) -> String {
    let error = result.unwrap_err().to_string();
    assert!(error.starts_with("hub: owner/name at revision "), "{error}");
    error
}

#[test]
fn a_file_is_fetched_once_and_lies_as_python_lays_it() {
    let fixture = Fixture::new();
    fixture.hub.file("config.json", "{}").file("model.safetensors", large());
    let model = fixture.model();
    assert_eq!(model.commit(), None);
    let (small, big) = (model.require("config.json").unwrap(), model.require("model.safetensors").unwrap());
    assert_eq!(std::fs::read(&small).unwrap(), b"{}");
    assert_eq!(std::fs::read(&big).unwrap(), large());
    assert_eq!(model.commit(), Some(commit('a')));
    assert!(!fixture.hub.requests().is_empty());

    assert_eq!(std::fs::read_to_string(fixture.path("refs/main")).unwrap(), commit('a'));
    assert_eq!(small, fixture.path("snapshots").join(commit('a')).join("config.json"));
    #[cfg(unix)]
    assert_eq!(std::fs::read_link(&big).unwrap(), Path::new("../../blobs").join(etag(&large())));
    let mut blobs: Vec<_> = std::fs::read_dir(fixture.path("blobs"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    let mut expected = [etag(b"{}"), etag(&large())];
    blobs.sort();
    expected.sort();
    assert_eq!(blobs, expected);
    assert!(fixture.cache.path().join(".locks/models--owner--name").join(etag(b"{}") + ".lock").exists());

    for model in [model, fixture.model()] {
        assert_eq!(model.require("config.json").unwrap(), small);
        assert_eq!(model.require("model.safetensors").unwrap(), big);
    }
    assert_eq!(fixture.hub.requests().len(), 0);
}

#[test]
fn a_missing_file_is_none_and_asked_for_once() {
    let fixture = Fixture::new();
    fixture.hub.file("config.json", "{}");
    assert_eq!(fixture.model().file("model.safetensors").unwrap(), None);
    assert_eq!(fixture.hub.requests().len(), 1);
    assert!(fixture.path(".no_exist").join(commit('a')).join("model.safetensors").exists());
    assert_eq!(fixture.model().file("model.safetensors").unwrap(), None);
    assert_eq!(fixture.hub.requests().len(), 0);
    let error = fixture.model().require("tokenizer.json").unwrap_err().to_string();
    assert_eq!(error, "no tokenizer.json in owner/name at revision main");
}

#[test]
fn revisions_are_kept_apart_and_all_files_come_from_one_commit() {
    let fixture = Fixture::new();
    let (hub, new) = (&fixture.hub, commit('b'));
    hub.file("config.json", "old").file("more.json", "old").revision("refs/pr/1", &new);
    hub.file_at(&new, "config.json", "new").file_at(&new, "more.json", "new");
    let read = |model: &HubModel, name: &str| std::fs::read_to_string(model.require(name).unwrap()).unwrap();
    let branch = |revision: &str| fixture.builder().revision(revision).build().unwrap();

    assert_eq!(read(&branch("main"), "config.json"), "old");
    assert_eq!(read(&branch("refs/pr/1"), "config.json"), "new");
    assert_eq!(std::fs::read_to_string(fixture.path("refs/refs/pr/1")).unwrap(), new);
    assert_eq!(read(&branch(&new), "config.json"), "new");
    assert!(!fixture.path("refs").join(&new).exists());

    // The branch moves: who has its old commit stays with it until told to look.
    hub.revision("main", &new);
    assert_eq!(read(&branch("main"), "more.json"), "old");
    let fresh = fixture.builder().refresh(true).build().unwrap();
    assert_eq!((read(&fresh, "config.json"), read(&fresh, "more.json")), ("new".into(), "new".into()));
    assert_eq!(read(&branch("main"), "more.json"), "new");
}

#[test]
fn missing_repositories_and_revisions_are_named() {
    let fixture = Fixture::new();
    let wrong = fixture.builder().revision("v9").build().unwrap();
    assert!(
        error(wrong.file("config.json"))
            .contains("at revision v9: config.json: the repository has no such revision")
    );
    let other = HubBuilder::from_vars("owner/other", |_| None).endpoint(fixture.hub.url());
    let other = other.cache_dir(fixture.cache.path()).build().unwrap();
    let error = other.file("config.json").unwrap_err().to_string();
    assert!(
        error.contains("owner/other at revision main") && error.contains("no such repository"),
        "{error}"
    );
    for bad in ["", "a/b/c", "../x", "a/..", "/etc", "a\\b", "o/n?x", "http://h/o/n"] {
        assert!(HubBuilder::from_vars(bad, |_| None).cache_dir("/tmp").build().is_err(), "{bad}");
    }
    assert!(fixture.builder().revision("../main").build().is_err());
    assert!(fixture.builder().endpoint("ftp://hub").build().is_err());
    assert!(self::error(fixture.model().file("../config.json")).contains("points outside"));
}

#[test]
fn a_private_repository_asks_for_a_token_and_only_the_hub_sees_it() {
    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large()).private("hf_secret");
    let message = error(fixture.model().file("model.safetensors"));
    assert!(message.contains("401") && message.contains("set HF_TOKEN"), "{message}");
    let wrong = fixture.builder().token(Some("hf_wrong".into())).build().unwrap();
    assert!(error(wrong.file("model.safetensors")).contains("the token in HF_TOKEN may not read it"));
    fixture.hub.requests();

    let vars = |name: &str| (name == "HF_TOKEN").then(|| "hf_secret\n".to_string());
    let builder =
        HubBuilder::from_vars(REPO, vars).endpoint(fixture.hub.url()).cache_dir(fixture.cache.path());
    assert!(!format!("{builder:?}").contains("secret"));
    let model = builder.build().unwrap();
    assert!(!format!("{model:?}").contains("secret"));
    assert!(model.file("model.safetensors").unwrap().is_some());
    for request in fixture.hub.requests() {
        assert_eq!(request.token.is_some(), !request.elsewhere, "{request:?}");
    }
}

#[test]
fn a_gated_repository_says_where_to_ask() {
    let fixture = Fixture::new();
    fixture.hub.file("config.json", "{}").fault("HEAD", Fault::Status(403, "X-Error-Code: GatedRepo\r\n"));
    let message = error(fixture.model().file("config.json"));
    assert!(message.contains("gated") && message.contains("/owner/name, then set HF_TOKEN"), "{message}");
}

#[test]
fn errors_that_pass_are_retried_and_others_are_not() {
    let fixture = Fixture::new();
    fixture.hub.file("config.json", "{}");
    fixture.hub.fault("HEAD", Fault::Status(503, "")).fault("HEAD", Fault::Status(429, "Retry-After: 0\r\n"));
    fixture.hub.fault("GET", Fault::Status(500, ""));
    assert!(fixture.model().file("config.json").unwrap().is_some());
    assert_eq!(fixture.hub.requests().len(), 3 + 2);

    for _ in 0..3 {
        fixture.hub.fault("HEAD", Fault::Status(502, ""));
    }
    let message = error(fixture.model().file("more.json"));
    assert!(message.contains("more.json: status 502; gave up after 3 attempts"), "{message}");
    fixture.hub.requests();
    fixture.hub.fault("HEAD", Fault::Status(400, ""));
    assert!(error(fixture.model().file("more.json")).ends_with("status 400"));
    assert_eq!(fixture.hub.requests().len(), 1);
}

#[test]
fn a_cut_download_is_resumed_even_by_another_run() {
    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large());
    // Each cut brings bytes, so that more of them than there are retries do no harm.
    for at in [70_000, 50_000, 30_000, 20_000] {
        fixture.hub.fault("GET", Fault::Cut(at));
    }
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = events.clone();
    let report = move |event: Progress<'_>| log.lock().unwrap().push(format!("{event:?}"));
    let path = fixture.builder().on_progress(report).build().unwrap().require("model.safetensors").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), large());
    let ranges: Vec<_> =
        fixture.hub.requests().into_iter().filter(|r| r.elsewhere).map(|r| r.range).collect();
    let at = |n: &str| Some(format!("bytes={n}-"));
    assert_eq!(ranges, [None, at("70000"), at("120000"), at("150000"), at("170000")]);
    let events = events.lock().unwrap();
    assert!(
        events[0].contains("Started") && events[0].contains("total: Some(200000), resumed: 0"),
        "{}",
        events[0]
    );
    assert_eq!(events.iter().filter(|e| e.starts_with("Retrying")).count(), 4);
    assert!(events.last().unwrap().starts_with("Finished"));

    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large());
    fixture.hub.fault("GET", Fault::Cut(70_000)).fault("GET", Fault::Cut(0));
    let hasty = fixture.builder().retries(0).build().unwrap();
    error(hasty.file("model.safetensors"));
    assert!(!fixture.path("blobs").join(etag(&large())).exists());
    fixture.hub.requests();
    // The second fault comes first now; then the rest is fetched.
    assert_eq!(std::fs::read(fixture.model().require("model.safetensors").unwrap()).unwrap(), large());
    assert!(fixture.hub.requests().iter().any(|r| r.range == at("70000")));
}

#[test]
fn a_server_that_ignores_ranges_and_leftovers_that_are_too_long_are_no_harm() {
    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large());
    fixture.hub.fault("GET", Fault::Cut(70_000)).fault("GET", Fault::IgnoreRange);
    assert_eq!(std::fs::read(fixture.model().require("model.safetensors").unwrap()).unwrap(), large());

    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large());
    std::fs::create_dir_all(fixture.path("blobs")).unwrap();
    let partial = fixture.path("blobs").join(etag(&large()) + ".incomplete");
    std::fs::write(&partial, vec![0; 300_000]).unwrap();
    assert_eq!(std::fs::read(fixture.model().require("model.safetensors").unwrap()).unwrap(), large());
    assert!(!partial.exists());
}

#[test]
fn contents_that_do_not_match_their_hash_never_reach_the_cache() {
    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large()).fault("GET", Fault::Garble);
    assert_eq!(std::fs::read(fixture.model().require("model.safetensors").unwrap()).unwrap(), large());

    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large()).fault("GET", Fault::Garble).fault("GET", Fault::Garble);
    assert!(error(fixture.model().file("model.safetensors")).contains("SHA-256"));
    assert_eq!(std::fs::read_dir(fixture.path("blobs")).unwrap().count(), 0);
}

#[test]
fn offline_sends_nothing_and_says_so() {
    let fixture = Fixture::new();
    fixture.hub.file("config.json", "{}");
    let vars = |name: &str| (name == "HF_HUB_OFFLINE").then(|| "1".to_string());
    let offline =
        HubBuilder::from_vars(REPO, vars).endpoint(fixture.hub.url()).cache_dir(fixture.cache.path());
    let offline = offline.build().unwrap();
    let message = error(offline.file("config.json"));
    assert!(message.contains("not in the cache") && message.contains("HF_HUB_OFFLINE"), "{message}");
    fixture.model().require("config.json").unwrap();
    fixture.hub.requests();
    assert!(offline.file("config.json").unwrap().is_some());
    let message = offline.require("tokenizer.json").unwrap_err().to_string();
    assert!(message.contains("tokenizer.json") && message.contains("HF_HUB_OFFLINE is set"), "{message}");
    let message = Checkpoint::open(&offline).unwrap_err().to_string();
    assert!(message.contains("model.safetensors") && message.contains("HF_HUB_OFFLINE"), "{message}");
    assert_eq!(fixture.hub.requests().len(), 0);
}

#[test]
fn a_cache_that_python_has_filled_is_read_without_requests() {
    let fixture = Fixture::new();
    let snapshot = fixture.path("snapshots").join(commit('c'));
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(fixture.path("refs")).unwrap();
    std::fs::write(fixture.path("refs/main"), commit('c')).unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    assert_eq!(fixture.model().require("config.json").unwrap(), snapshot.join("config.json"));
    let at_commit = fixture.builder().revision(commit('c')).build().unwrap();
    assert!(at_commit.file("config.json").unwrap().is_some());
    assert_eq!(fixture.hub.requests().len(), 0);
}

#[test]
fn a_sharded_checkpoint_is_fetched_whole_and_then_found_without_requests() {
    let fixture = Fixture::new();
    for (name, contents) in files::sharded() {
        fixture.hub.file(name, contents);
    }
    for round in 0..2 {
        let checkpoint = Checkpoint::open(&fixture.model()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(checkpoint.tensor("c", &Device::Cpu).unwrap().dims(), [600]);
        assert_eq!(fixture.hub.requests().is_empty(), round == 1);
    }
}

#[test]
fn a_file_that_many_want_at_once_is_fetched_once() {
    let fixture = Fixture::new();
    fixture.hub.file("model.safetensors", large());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(fixture.model().file("model.safetensors").unwrap().is_some()));
        }
    });
    let contents = fixture.hub.requests().into_iter().filter(|r| r.elsewhere && r.method == "GET");
    assert_eq!(contents.count(), 1);
}

#[test]
fn a_server_that_is_no_hub_or_is_not_there_is_an_error() {
    let fixture = Fixture::new();
    fixture.hub.fault("HEAD", Fault::Status(200, "ETag: \"../../evil\"\r\n"));
    assert!(error(fixture.model().file("config.json")).contains("does not answer as a Hub"));
    fixture.hub.fault("HEAD", Fault::Status(302, "Location: nowhere\r\n"));
    assert!(error(fixture.model().file("config.json")).contains("redirects"));
    fixture.hub.fault("HEAD", Fault::Status(302, "Location: http://[bad\r\n"));
    error(fixture.model().file("config.json"));
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = fixture.builder().endpoint(format!("http://{closed}")).build().unwrap();
    assert!(error(gone.file("config.json")).contains("gave up after 3 attempts"));
}

/// A repository with one GGUF file needs no name of it; one with several says so, and takes the one that is named.
#[test]
fn gguf_files_are_found_by_listing() {
    let gguf = crate::gguf::good().bytes();
    let fixture = Fixture::new();
    fixture.hub.file("README.md", "x").file("sub/y.gguf", "").file("m.Q8_0.gguf", gguf.clone());
    let checkpoint = Checkpoint::open(&fixture.model()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    let asked = fixture.hub.requests();
    assert!(asked.iter().any(|request| request.path.starts_with("/api/models/owner/name/revision/")));

    // Offline, what is in the cache.
    let offline = fixture.builder().offline(true).build().unwrap();
    assert!(Checkpoint::open(&offline).is_ok());
    assert!(fixture.hub.requests().is_empty());

    fixture.hub.file("m.Q4_0.gguf", gguf.clone());
    let error = Checkpoint::open(&fixture.model()).unwrap_err().to_string();
    assert!(error.contains("has several files of weights, name one of m.Q4_0.gguf, m.Q8_0.gguf"), "{error}");
    let named = |name: &str| fixture.builder().weights(name).build();
    assert!(Checkpoint::open(&named("m.Q4_0.gguf").unwrap()).is_ok());
    assert!(named("../x.gguf").is_err() && named("README.md").is_err());

    fixture.hub.file("other.safetensors", files::safetensors(&[("c", &[1.])]));
    let checkpoint = Checkpoint::open(&named("other.safetensors").unwrap()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["c"]);
    fixture.hub.fault("GET", Fault::Status(503, ""));
    assert!(Checkpoint::open(&fixture.model()).unwrap_err().to_string().contains("has several"));
}

/// The parts of a split file come together, and say what is missing.
#[test]
fn parts_of_a_gguf_file() {
    let part = |number: usize| format!("m-{number:05}-of-00002.gguf");
    let (first, second) = crate::gguf::good().split();
    let fixture = Fixture::new();
    fixture.hub.file(&part(1), first).file(&part(2), second);
    let checkpoint = Checkpoint::open(&fixture.model()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.metadata().unwrap().u64("test.block_count"), Some(7));

    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(checkpoint.path("a").unwrap(), folder.path().join(part(1))).unwrap();
    let open = |path: &Path| Checkpoint::open(&mamba_model::checkpoint::LocalDir::new(path).unwrap());
    let error = open(&folder.path().join(part(1))).unwrap_err().to_string();
    assert!(error.contains("no m-00002-of-00002.gguf in"), "{error}");
    std::fs::copy(checkpoint.path("b").unwrap(), folder.path().join(part(2))).unwrap();
    assert!(open(folder.path()).is_ok() && open(&folder.path().join(part(1))).is_ok());
}
