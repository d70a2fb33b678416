//! A small server that speaks the Hub's protocol on the loopback interface, counts what it is asked, and fails on
//! demand.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use sha2::{Digest, Sha256};

pub const REPO: &str = "owner/name";

/// Files of at least this size lie on another server, as large ones do on the Hub.
const LARGE: usize = 1000;

/// What goes wrong with the next request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The answer is this status.
    Status(u16, &'static str),
    /// The connection ends after this many bytes of contents.
    Cut(usize),
    /// The contents are those of another file of the same length.
    Garble,
    /// A range is not obeyed: the whole file comes.
    IgnoreRange,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
    /// Whether it went to the server of large files.
    pub elsewhere: bool,
}

#[derive(Default)]
struct State {
    revisions: HashMap<String, String>,
    files: HashMap<(String, String), Vec<u8>>,
    token: Option<String>,
    faults: Vec<(&'static str, Fault)>,
    requests: Vec<Request>,
    hub: String,
    elsewhere: String,
}

#[derive(Clone)]
pub struct MockHub(Arc<Mutex<State>>);

/// A commit id made of one digit.
pub fn commit(digit: char) -> String {
    digit.to_string().repeat(40)
}

pub fn etag(contents: &[u8]) -> String {
    let hash = format!("{:x}", Sha256::digest(contents));
    if contents.len() < LARGE { hash[..40].to_string() } else { hash }
}

impl MockHub {
    /// A server with one repository whose branch `main` is at `commit('a')`, without files.
    pub fn start() -> Self {
        let hub = Self(Arc::default());
        let (first, second) = (hub.listen(false), hub.listen(true));
        let mut state = hub.state();
        (state.hub, state.elsewhere) = (first, second);
        state.revisions = HashMap::from([("main".into(), commit('a')), (commit('a'), commit('a'))]);
        drop(state);
        hub
    }

    pub fn url(&self) -> String {
        self.state().hub.clone()
    }

    pub fn file(&self, name: &str, contents: impl Into<Vec<u8>>) -> &Self {
        self.file_at(&commit('a'), name, contents)
    }

    pub fn file_at(&self, commit: &str, name: &str, contents: impl Into<Vec<u8>>) -> &Self {
        self.state().files.insert((commit.into(), name.into()), contents.into());
        self
    }

    pub fn revision(&self, revision: &str, commit: &str) -> &Self {
        let mut state = self.state();
        state.revisions.insert(revision.into(), commit.into());
        state.revisions.insert(commit.into(), commit.into());
        drop(state);
        self
    }

    /// Answers only who shows this token.
    pub fn private(&self, token: &str) -> &Self {
        self.state().token = Some(token.into());
        self
    }

    /// Lets the next request with this method, or the next one of contents for "GET", go wrong.
    pub fn fault(&self, method: &'static str, fault: Fault) -> &Self {
        self.state().faults.push((method, fault));
        self
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn listen(&self, elsewhere: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let hub = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = hub.clone();
                std::thread::spawn(move || hub.serve(stream, elsewhere));
            }
        });
        url
    }

    /// Answers one request and closes the connection.
    fn serve(&self, mut stream: TcpStream, elsewhere: bool) -> Option<()> {
        let request = read(&stream, elsewhere)?;
        let mut state = self.state();
        state.requests.push(request.clone());
        let (mut head, contents) = state.answer(&request);
        let mut body = contents.unwrap_or_default();
        let sends = request.method == "GET" && head.starts_with("HTTP/1.1 20");
        let may = |(method, fault): &(&str, Fault)| match fault {
            Fault::Status(..) => *method == request.method,
            _ => sends,
        };
        let fault = state.faults.iter().position(may).map(|at| state.faults.remove(at).1);
        drop(state);
        let mut start = 0;
        if let (Some(range), true) = (&request.range, sends && fault != Some(Fault::IgnoreRange)) {
            start = range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().unwrap();
            let total = body.len();
            head = head.replace("200 OK", "206 Partial Content");
            head.push_str(&format!("Content-Range: bytes {start}-{}/{total}\r\n", total - 1));
        }
        match fault {
            Some(Fault::Status(status, header)) => {
                (head, body) = (format!("HTTP/1.1 {status} Fault\r\n{header}"), Vec::new());
            }
            Some(Fault::Garble) => body.iter_mut().for_each(|b| *b ^= 1),
            _ => {}
        }
        let body = &body[start..];
        write!(stream, "{head}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len()).ok()?;
        if request.method == "GET" {
            let sent = if let Some(Fault::Cut(at)) = fault { at } else { body.len() };
            stream.write_all(&body[..sent]).ok()?;
        }
        stream.flush().ok()
    }
}

impl State {
    /// What the Hub says about a commit, with fields that nobody asked for.
    fn listing(&self, commit: &str) -> Vec<u8> {
        let files = self.files.keys().filter(|(at, _)| at == commit);
        let siblings: Vec<_> = files.map(|(_, name)| serde_json::json!({"rfilename": name})).collect();
        serde_json::json!({"id": REPO, "sha": commit, "siblings": siblings, "tags": ["mamba"]})
            .to_string()
            .into_bytes()
    }

    /// The head of the answer without its length, and the contents of the file that it is about.
    fn answer(&self, request: &Request) -> (String, Option<Vec<u8>>) {
        let refuse =
            |status: &str, code: &str| (format!("HTTP/1.1 {status}\r\nX-Error-Code: {code}\r\n"), None);
        if !request.elsewhere && self.token.is_some() && self.token != request.token {
            return refuse("401 Unauthorized", "RepoNotFound");
        }
        if let Some(listed) = request.path.strip_prefix("/api/models/") {
            return match listed.split_once("/revision/").filter(|(repo, _)| *repo == REPO) {
                Some((_, revision)) => match self.revisions.get(&revision.replace("%2F", "/")) {
                    Some(commit) => ("HTTP/1.1 200 OK\r\n".into(), Some(self.listing(commit))),
                    None => refuse("404 Not Found", "RevisionNotFound"),
                },
                None => refuse("404 Not Found", "RepoNotFound"),
            };
        }
        let Some((repo, place)) = request.path[1..].split_once("/resolve/") else {
            return refuse("400 Bad Request", "");
        };
        let (revision, name) = place.split_once('/').unwrap();
        if repo != REPO {
            return refuse("404 Not Found", "RepoNotFound");
        }
        let Some(commit) = self.revisions.get(&revision.replace("%2F", "/")) else {
            return refuse("404 Not Found", "RevisionNotFound");
        };
        let Some(contents) = self.files.get(&(commit.clone(), name.to_string())) else {
            let (head, _) = refuse("404 Not Found", "EntryNotFound");
            return (format!("{head}X-Repo-Commit: {commit}\r\n"), None);
        };
        let etag = etag(contents);
        let head = format!("X-Repo-Commit: {commit}\r\nETag: \"{etag}\"\r\n");
        if contents.len() < LARGE || request.elsewhere {
            let body = if request.elsewhere {
                "HTTP/1.1 200 OK\r\n".into()
            } else {
                format!("HTTP/1.1 200 OK\r\n{head}")
            };
            return (body, Some(contents.clone()));
        }
        let location = format!("Location: {}{}\r\n", self.elsewhere, request.path);
        let linked = format!("X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n", contents.len());
        (format!("HTTP/1.1 302 Found\r\n{head}{linked}{location}"), None)
    }
}

fn read(stream: &TcpStream, elsewhere: bool) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next()?, words.next()?);
    let (mut range, mut token) = (None, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_string()),
            "authorization" => token = value.strip_prefix("Bearer ").map(str::to_string),
            _ => {}
        }
    }
    Some(Request { method, path, range, token, elsewhere })
}
