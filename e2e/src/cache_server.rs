//! A binary cache on a loopback port that behaves as a test tells it to, and remembers what it was asked.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Every file is said to be of that time. It has no rule of its own, so it never tells two bodies apart.
const LAST_MODIFIED: &str = "Thu, 01 Jan 1970 00:00:01 GMT";

/// How long an answer waits for something to happen. Then it begins all the same, and the test says what is missing.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What is done to the answers for some paths. All rules that fit are applied, the first one first.
#[derive(Debug, Clone)]
pub struct Rule {
    suffix: String,
    passes: usize,
    left: usize,
    changes: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Demand(String, u16),
    Status(u16),
    Header(String, String),
    Without(&'static str),
    Redirect(String),
    Body(Arc<[u8]>),
    CutAt(usize),
    Delay(Duration),
    Await(Event),
    NoRanges,
    HangUp,
}

/// What an answer can wait for.
#[derive(Debug, Clone)]
enum Event {
    /// So many requests are there at the same time.
    AtOnce(usize),
    /// Another server was asked for the same.
    Asked(Arc<State>),
}

impl Rule {
    /// For paths that end so, always; nothing is changed yet.
    pub fn on(suffix: impl Into<String>) -> Self {
        Self { suffix: suffix.into(), passes: 0, left: usize::MAX, changes: Vec::new() }
    }

    /// Only for so many requests.
    #[must_use]
    pub fn times(mut self, times: usize) -> Self {
        self.left = times;
        self
    }

    /// Not for the first so many requests.
    #[must_use]
    pub fn after(mut self, requests: usize) -> Self {
        self.passes = requests;
        self
    }

    /// Whether it is to be applied to one more request.
    fn takes(&mut self, path: &str) -> bool {
        if !path.ends_with(&self.suffix) {
            return false;
        }
        if self.passes > 0 {
            self.passes -= 1;
            return false;
        }
        let takes = self.left > 0;
        self.left = self.left.saturating_sub(1);
        takes
    }

    fn and(mut self, change: Change) -> Self {
        self.changes.push(change);
        self
    }

    /// 401, and nothing more, to whoever does not say this in `Authorization`.
    #[must_use]
    pub fn demand(self, authorization: impl Into<String>) -> Self {
        self.demand_or(authorization, 401)
    }

    /// That status, and nothing more, to whoever does not say this in `Authorization`.
    #[must_use]
    pub fn demand_or(self, authorization: impl Into<String>, status: u16) -> Self {
        self.and(Change::Demand(authorization.into(), status))
    }

    /// Another status, without a body.
    #[must_use]
    pub fn status(self, status: u16) -> Self {
        self.and(Change::Status(status))
    }

    /// A header, in place of one of that name.
    #[must_use]
    pub fn header(self, name: &str, value: &str) -> Self {
        self.and(Change::Header(name.to_ascii_lowercase(), value.to_owned()))
    }

    /// No header of that name.
    #[must_use]
    pub fn without(self, name: &'static str) -> Self {
        self.and(Change::Without(name))
    }

    /// 307 to the same path below another address.
    #[must_use]
    pub fn redirect(self, base: &str) -> Self {
        self.and(Change::Redirect(base.trim_end_matches('/').to_owned()))
    }

    /// Another body, whether there is a file or not.
    #[must_use]
    pub fn body(self, body: impl Into<Vec<u8>>) -> Self {
        self.and(Change::Body(body.into().into()))
    }

    /// The connection ends after so many bytes of the body.
    #[must_use]
    pub fn cut_at(self, bytes: usize) -> Self {
        self.and(Change::CutAt(bytes))
    }

    /// The answer begins later.
    #[must_use]
    pub fn delay(self, time: Duration) -> Self {
        self.and(Change::Delay(time))
    }

    /// The answer begins when so many requests are there at the same time, or were before.
    #[must_use]
    pub fn once_at_once(self, requests: usize) -> Self {
        self.and(Change::Await(Event::AtOnce(requests)))
    }

    /// The answer begins when another server was asked for the same.
    #[must_use]
    pub fn once_asked(self, other: &CacheServer) -> Self {
        self.and(Change::Await(Event::Asked(Arc::clone(&other.state))))
    }

    /// The whole file, whatever part of it was asked for.
    #[must_use]
    pub fn no_ranges(self) -> Self {
        self.and(Change::NoRanges)
    }

    /// The connection ends without an answer.
    #[must_use]
    pub fn hang_up(self) -> Self {
        self.and(Change::HangUp)
    }
}

/// A request, and what became of it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The request's target: a path, or an address if the server was used as a proxy.
    pub target: String,
    /// Its headers, in lower case.
    pub headers: BTreeMap<String, String>,
    /// When it came.
    pub at: Instant,
    /// The status of the answer, once it began.
    pub status: u16,
    /// How much of a body was sent, or was about to be.
    pub sent: usize,
}

impl Seen {
    /// A header, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// The server. It ends with the value.
pub struct CacheServer {
    port: u16,
    state: Arc<State>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    dir: PathBuf,
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<Seen>>,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl CacheServer {
    /// Serves `dir` until it is dropped. To be called in a runtime.
    pub fn start(dir: &Path) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let listener = TcpListener::from_std(listener)?;
        let state = Arc::new(State {
            dir: dir.to_owned(),
            rules: Mutex::default(),
            seen: Mutex::default(),
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            // They end with this task.
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                // A client that goes away is what some rules lead to.
                connections.spawn(async move { drop(state.converse(connection).await) });
            }
        });
        Ok(Self { port, state, accepting })
    }

    /// Its port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// Adds a rule.
    pub fn rule(&self, rule: Rule) {
        lock(&self.state.rules).push(rule);
    }

    /// Adds a rule that says what the cache says of itself.
    pub fn about(&self, text: &str) {
        self.rule(Rule::on("/nix-cache-info").body(text));
    }

    /// From now on without rules.
    pub fn behave(&self) {
        lock(&self.state.rules).clear();
    }

    /// The requests for targets that end so, in their order.
    pub fn requests(&self, suffix: &str) -> Vec<Seen> {
        lock(&self.state.seen).iter().filter(|seen| seen.target.ends_with(suffix)).cloned().collect()
    }

    /// The most requests that were there at the same time.
    pub fn most_at_once(&self) -> usize {
        self.state.most.load(Ordering::Relaxed)
    }
}

impl Drop for CacheServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    without: Vec<&'static str>,
    body: Arc<[u8]>,
    cut_at: usize,
    delay: Duration,
    awaits: Vec<Event>,
    ranges: bool,
    hang_up: bool,
}

impl Answer {
    fn new(file: Option<Vec<u8>>) -> Self {
        Self {
            status: if file.is_some() { 200 } else { 404 },
            headers: BTreeMap::new(),
            without: Vec::new(),
            body: file.unwrap_or_default().into(),
            cut_at: usize::MAX,
            delay: Duration::ZERO,
            awaits: Vec::new(),
            ranges: true,
            hang_up: false,
        }
    }

    fn only(&mut self, status: u16) {
        self.status = status;
        self.body = Arc::default();
    }

    /// Whether the next change is to be applied, too.
    fn apply(&mut self, change: Change, path: &str, asked: &BTreeMap<String, String>) -> bool {
        match change {
            Change::Demand(authorization, status) => {
                if asked.get("authorization") != Some(&authorization) {
                    self.only(status);
                    return false;
                }
            }
            Change::Status(status) => self.only(status),
            Change::Header(name, value) => drop(self.headers.insert(name, value)),
            Change::Without(name) => self.without.push(name),
            Change::Redirect(base) => {
                self.only(307);
                self.headers.insert("location".into(), base + path);
            }
            Change::Body(body) => (self.status, self.body) = (200, body),
            Change::CutAt(bytes) => self.cut_at = bytes,
            Change::Delay(time) => self.delay = time,
            Change::Await(event) => self.awaits.push(event),
            Change::NoRanges => self.ranges = false,
            Change::HangUp => self.hang_up = true,
        }
        true
    }

    /// Validators, and the part that was asked for if they still hold.
    fn finish(&mut self, asked: &BTreeMap<String, String>) {
        if self.status == 200 {
            let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(&self.body);
            self.headers.entry("etag".into()).or_insert_with(|| format!("\"{hash:x}\""));
            self.headers.entry("last-modified".into()).or_insert_with(|| LAST_MODIFIED.into());
        }
        for name in &self.without {
            self.headers.remove(*name);
        }
        let is_same = asked.get("if-range").is_none_or(|of| self.headers.values().any(|value| value == of));
        let range = asked.get("range").and_then(|range| first_byte(range));
        if let Some(first) = range.filter(|_| self.status == 200 && self.ranges && is_same) {
            let all = self.body.len();
            if first < all {
                self.headers.insert("content-range".into(), format!("bytes {first}-{}/{all}", all - 1));
                self.status = 206;
                self.body = self.body[first..].into();
            } else {
                self.only(416);
            }
        }
    }
}

/// Of `bytes=<first>-`, the only range that is understood.
fn first_byte(range: &str) -> Option<usize> {
    range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

impl State {
    /// Answers the requests of one connection, until it is told to end it.
    async fn converse(&self, connection: TcpStream) -> io::Result<()> {
        connection.set_nodelay(true)?;
        let mut connection = BufReader::new(connection);
        while let Some((target, headers)) = head(&mut connection).await? {
            let most = self.now.fetch_add(1, Ordering::Relaxed) + 1;
            self.most.fetch_max(most, Ordering::Relaxed);
            let number = {
                let mut seen = lock(&self.seen);
                let (target, headers) = (target.clone(), headers.clone());
                seen.push(Seen { target, headers, at: Instant::now(), status: 0, sent: 0 });
                seen.len() - 1
            };
            let answer = self.answer(&target, &headers).await;
            let goes_on = self.send(connection.get_mut(), answer, number).await;
            self.now.fetch_sub(1, Ordering::Relaxed);
            if !goes_on? {
                break;
            }
        }
        connection.get_mut().shutdown().await
    }

    async fn answer(&self, target: &str, headers: &BTreeMap<String, String>) -> Answer {
        // As a proxy: whatever host is asked for, it is this directory.
        let path = target.strip_prefix("http://").map_or(target, |rest| &rest[rest.find('/').unwrap_or(0)..]);
        let path = path.split('?').next().unwrap_or_default();
        let mut answer = Answer::new(tokio::fs::read(self.dir.join(path.trim_start_matches('/'))).await.ok());
        let changes: Vec<_> = lock(&self.rules)
            .iter_mut()
            .filter_map(|rule| rule.takes(path).then(|| rule.changes.clone()))
            .flatten()
            .collect();
        let _ = changes.into_iter().all(|change| answer.apply(change, path, headers));
        answer.finish(headers);
        tokio::time::sleep(answer.delay).await;
        for event in &answer.awaits {
            self.wait_for(event, path).await;
        }
        answer
    }

    async fn wait_for(&self, event: &Event, path: &str) {
        let start = Instant::now();
        let is_so = || match event {
            Event::AtOnce(requests) => self.most.load(Ordering::Relaxed) >= *requests,
            Event::Asked(other) => lock(&other.seen).iter().any(|seen| seen.target.ends_with(path)),
        };
        while !is_so() && start.elapsed() < LONGEST_WAIT {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether the connection can be used again.
    async fn send(&self, connection: &mut TcpStream, answer: Answer, number: usize) -> io::Result<bool> {
        if answer.hang_up {
            return Ok(false);
        }
        lock(&self.seen)[number].status = answer.status;
        let mut head = format!("HTTP/1.1 {} x\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
        head.extend(answer.headers.iter().flat_map(|(name, value)| [name, ": ", value, "\r\n"]));
        connection.write_all((head + "\r\n").as_bytes()).await?;
        let sent = &answer.body[..answer.cut_at.min(answer.body.len())];
        for piece in sent.chunks(64 * 1024) {
            // Whoever has received it finds it counted.
            lock(&self.seen)[number].sent += piece.len();
            connection.write_all(piece).await?;
        }
        Ok(sent.len() == answer.body.len())
    }
}

/// The target and the headers of the next request, or nothing if there is none.
async fn head(
    connection: &mut BufReader<TcpStream>,
) -> io::Result<Option<(String, BTreeMap<String, String>)>> {
    const LONGEST: u64 = 64 * 1024;
    let mut lines = connection.take(LONGEST).lines();
    let Some(request) = lines.next_line().await? else { return Ok(None) };
    let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    while let Some(line) = lines.next_line().await?.filter(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    Ok(Some((target, headers)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
