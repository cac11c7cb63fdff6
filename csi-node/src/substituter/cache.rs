//! One binary cache, over HTTP or in a directory.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix_csi_store::{Compression, NarInfo, StorePath};
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::io::AsyncReadExt as _;

use super::budget::{Budget, Share};
use super::decode::decoder;
use super::error::CacheError;
use super::fair::Urgency;
use super::health::Health;
use super::info::{self, CacheInfo};
use super::login::Logins;
use super::transfer::{self, Transfer};
use super::turns::Turns;

/// Larger answers to a narinfo request are not read to their end.
const MAX_NARINFO: usize = 256 * 1024;
/// How long a path that was not there is not asked for again. It may be pushed at any moment.
const MISSING_FOR: Duration = Duration::from_secs(10);
/// When a cache that did not answer is asked again for what it is.
const ASKED_AGAIN: Duration = Duration::from_secs(5);
/// How long a cache may take to say what it is, and when one that took longer is asked again.
const ANSWERED: Duration = Duration::from_secs(3);
const HANGS: Duration = Duration::from_mins(1);
/// What decoding a narinfo may take, where it comes compressed.
const SMALL_MEMORY: u64 = 16 << 20;
/// More of them than this are swept.
const MANY_MISSING: usize = 10_000;
/// A pause between two attempts is never longer, whatever the cache asks for.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// A binary cache, as it is seen with certain credentials. A clone is the same.
#[derive(Clone)]
pub struct BinaryCache(Arc<Cache>);

struct Cache {
    name: Arc<str>,
    place: Place,
    attempts: u32,
    /// Requests under way; one of them may hold no other.
    connections: Budget,
    info: tokio::sync::Mutex<Option<Known>>,
    health: Mutex<Health>,
    /// What led to its last pause.
    reason: Mutex<Arc<str>>,
    missing: Mutex<HashMap<StorePath, Instant>>,
}

/// What a cache said of itself, or the name of another store directory.
struct Known {
    said: Result<CacheInfo, String>,
    /// When it is asked again, because it could not be asked.
    until: Option<Instant>,
}

enum Place {
    Http { base: Url, client: Client, logins: Arc<Logins> },
    Directory(PathBuf),
}

impl BinaryCache {
    /// The cache at `base`, an `http`, `https` or `file` address. At most `connections` requests are under way
    /// at a time; one without an answer is made `attempts` times.
    pub fn new(
        mut base: Url,
        client: Client,
        logins: Arc<Logins>,
        connections: usize,
        attempts: u32,
    ) -> Self {
        let place = match base.to_file_path() {
            Ok(directory) if base.scheme() == "file" => Place::Directory(directory),
            _ => {
                // `join` replaces what stands behind the last slash.
                if !base.path().ends_with('/') {
                    base.set_path(&format!("{}/", base.path()));
                }
                Place::Http { base: base.clone(), client, logins }
            }
        };
        let connections = Budget::new(connections.max(1), 8);
        Self::at(public(&base).into(), place, attempts.max(1), connections)
    }

    /// One that has not answered anything yet.
    fn at(name: Arc<str>, place: Place, attempts: u32, connections: Budget) -> Self {
        Self(Arc::new(Cache {
            name,
            place,
            attempts,
            connections,
            info: tokio::sync::Mutex::default(),
            health: Mutex::default(),
            reason: Mutex::default(),
            missing: Mutex::default(),
        }))
    }

    /// The same cache as whoever has `logins` sees it, or `None` if they say nothing to it. Both share their
    /// connections, and nothing that the cache answers.
    pub(super) fn seen_with(&self, logins: &Arc<Logins>) -> Option<Self> {
        let Place::Http { base, client, .. } = &self.0.place else { return None };
        logins.header(base)?;
        let (base, client, logins) = (base.clone(), client.clone(), Arc::clone(logins));
        let place = Place::Http { base, client, logins };
        Some(Self::at(Arc::clone(&self.0.name), place, self.0.attempts, self.0.connections.clone()))
    }

    /// How the cache is called in messages: its address, without what may be secret in it.
    pub fn name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// How often a question or a transfer is tried.
    pub fn attempts(&self) -> u32 {
        self.0.attempts
    }

    /// Where the cache stands among others: lower is asked earlier. The cache is asked for it once; one that cannot
    /// be asked stands where one stands that says nothing. The only error is that it is of another store.
    pub(super) async fn priority(&self, turns: &Turns) -> Result<u32, CacheError> {
        let mut known = self.0.info.lock().await;
        let is_old = |known: &Known| known.until.is_some_and(|until| until < Instant::now());
        if known.as_ref().is_none_or(is_old) {
            // Waiting for the others' questions is not the cache's fault.
            let connection = self.connection(turns, Urgency::Question).await;
            let start = Instant::now();
            let asked = self.small(connection, "nix-cache-info", info::MAX_LEN);
            let (said, until) = match tokio::time::timeout(ANSWERED, asked).await {
                Ok(Ok(Some(text))) => (CacheInfo::parse(&String::from_utf8_lossy(&text)), None),
                Ok(Ok(None)) => (Ok(CacheInfo::default()), None),
                Ok(Err(error)) => {
                    tracing::debug!(%error, cache = %self.name(), "does not say what it is");
                    (Ok(CacheInfo::default()), Some(Instant::now() + ASKED_AGAIN))
                }
                // It does answer, and is asked again later only because it is not well.
                Err(_) if self.has_answered_since(start) => {
                    (Ok(CacheInfo::default()), Some(Instant::now() + ASKED_AGAIN))
                }
                // Whoever hangs is not waited for again soon: other caches may have everything.
                Err(_) => (Ok(CacheInfo::default()), Some(Instant::now() + HANGS)),
            };
            *known = Some(Known { said, until });
        }
        match known.as_ref().map(|known| known.said.clone()) {
            Some(Err(found)) => Err(CacheError::StoreDir { cache: self.name().to_string(), found }),
            Some(Ok(info)) => Ok(info.priority),
            None => Ok(CacheInfo::default().priority),
        }
    }

    /// What the cache says about `path`, or `None` if it does not have it.
    pub(super) async fn narinfo(
        &self,
        turns: &Turns,
        path: &StorePath,
    ) -> Result<Option<NarInfo>, CacheError> {
        if self.is_known_missing(path) {
            return Ok(None);
        }
        let file = format!("{}.narinfo", path.hash());
        let connection = self.connection(turns, Urgency::Question).await;
        let Some(body) = self.small(connection, &file, MAX_NARINFO).await? else {
            self.remember_missing(path);
            return Ok(None);
        };
        let url = || format!("{}/{file}", self.name().trim_end_matches('/'));
        let text = String::from_utf8_lossy(&body);
        let info: NarInfo = text.parse().map_err(|source| CacheError::NarInfo { url: url(), source })?;
        // The signature is over the path inside, so only this says that it is the path we mean.
        if info.path == *path {
            Ok(Some(info))
        } else {
            Err(CacheError::OtherPath { url: url(), found: info.path })
        }
    }

    /// The beginning of a NAR's transfer.
    pub(super) async fn nar(&self, turns: &Turns, info: &NarInfo) -> Result<Transfer, CacheError> {
        let connection = self.connection(turns, Urgency::Nar(info.nar_size)).await;
        match &self.0.place {
            Place::Directory(directory) => {
                let opened = self.open_nar(directory, info).await?;
                Ok(Transfer::from_file(opened, self.name(), connection))
            }
            Place::Http { base, .. } => {
                let url = nar_url(base, info)?;
                // Worth it only for what is not compressed, and then zstd is the one that costs least.
                let accepted =
                    if info.compression == Compression::None { ON_THE_WAY.as_str() } else { "identity" };
                let headers = accept(accepted);
                let gone = || CacheError::Gone { url: public(&url) };
                // Once: whoever asks for a NAR tries again with nothing in hand that others wait for.
                let response = self.get_once(&url, &headers).await?.ok_or_else(gone)?;
                Transfer::from_response(self.clone(), url.clone(), response, connection)
            }
        }
    }

    /// Whether the cache really gives the path's NAR. Not more than its first byte is asked for.
    pub(super) async fn gives(&self, turns: &Turns, info: &NarInfo) -> Result<(), CacheError> {
        let _connection = self.connection(turns, Urgency::Question).await;
        match &self.0.place {
            Place::Directory(directory) => self.open_nar(directory, info).await.map(drop),
            Place::Http { base, .. } => {
                let url = nar_url(base, info)?;
                let mut headers = accept("identity");
                headers.insert(header::RANGE, HeaderValue::from_static("bytes=0-0"));
                let gone = || CacheError::Gone { url: public(&url) };
                self.get(&url, &headers).await?.map(drop).ok_or_else(gone)
            }
        }
    }

    /// How much longer the cache is left alone, because it failed.
    pub(super) fn pause(&self) -> Option<Duration> {
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner).pause(Instant::now())
    }

    fn has_answered_since(&self, then: Instant) -> bool {
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner).has_answered_since(then)
    }

    /// Leaves the cache alone for a while, if `error` came after all attempts and says that it is the cache's.
    pub(super) fn failed(&self, error: &CacheError) {
        if !error.is_of_whole_cache() {
            return;
        }
        let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
        let reason = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        *self.0.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason.into();
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner).failed(Instant::now());
    }

    async fn connection(&self, turns: &Turns, urgency: Urgency) -> Share {
        turns.acquire(&self.0.connections, urgency, 1).await
    }

    /// A whole file of at most `limit` bytes, over that connection.
    async fn small(
        &self,
        _connection: Share,
        file: &str,
        limit: usize,
    ) -> Result<Option<Vec<u8>>, CacheError> {
        let too_long = |url| CacheError::TooLong { url, limit };
        match &self.0.place {
            Place::Directory(directory) => {
                let path = directory.join(file);
                let Some(opened) = self.open(&path).await? else { return Ok(None) };
                let mut body = Vec::new();
                let read = opened.take(limit as u64 + 1).read_to_end(&mut body).await;
                read.map_err(|source| CacheError::File { path: path.clone(), source })?;
                if body.len() > limit { Err(too_long(path.display().to_string())) } else { Ok(Some(body)) }
            }
            Place::Http { base, .. } => {
                let url = join(base, file)?;
                let Some((encoding, body)) = self.body(&url, limit).await? else { return Ok(None) };
                let Some(encoding) = encoding else { return Ok(Some(body)) };
                let mut decoded = Vec::new();
                decoder(encoding, &body[..], SMALL_MEMORY)
                    .and_then(|decoder| decoder.take(limit as u64 + 1).read_to_end(&mut decoded))
                    .map_err(|source| CacheError::Undecodable { url: public(&url), source })?;
                if decoded.len() > limit { Err(too_long(public(&url))) } else { Ok(Some(decoded)) }
            }
        }
    }

    /// The same, as it came. An answer that is cut is asked for again.
    async fn body(
        &self,
        url: &Url,
        limit: usize,
    ) -> Result<Option<(Option<Compression>, Vec<u8>)>, CacheError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let Some(response) = self.get(url, &accept("identity")).await? else { return Ok(None) };
            let encoding = transfer::encoding(url, response.headers())?;
            match whole(url, response, limit).await {
                Ok(body) => return Ok(Some((encoding, body))),
                Err(error) if !error.is_temporary() => return Err(error),
                Err(error) if attempt >= self.0.attempts => {
                    self.failed(&error);
                    return Err(error);
                }
                Err(error) => tokio::time::sleep(retry_after(&error, attempt)).await,
            }
        }
    }

    async fn open_nar(&self, directory: &Path, info: &NarInfo) -> Result<tokio::fs::File, CacheError> {
        let outside = || CacheError::NarUrl { url: info.url.clone() };
        let file = beneath(directory, &info.url).ok_or_else(outside)?;
        let gone = || CacheError::Gone { url: file.display().to_string() };
        self.open(&file).await?.ok_or_else(gone)
    }

    async fn open(&self, path: &Path) -> Result<Option<tokio::fs::File>, CacheError> {
        match tokio::fs::File::open(path).await {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CacheError::File { path: path.to_owned(), source }),
        }
    }

    fn is_known_missing(&self, path: &StorePath) -> bool {
        let missing = self.0.missing.lock().unwrap_or_else(PoisonError::into_inner);
        missing.get(path).is_some_and(|since| since.elapsed() < MISSING_FOR)
    }

    fn remember_missing(&self, path: &StorePath) {
        // A directory answers at once.
        if matches!(self.0.place, Place::Directory(_)) {
            return;
        }
        let mut missing = self.0.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.len() >= MANY_MISSING {
            missing.retain(|_, since| since.elapsed() < MISSING_FOR);
        }
        missing.insert(path.clone(), Instant::now());
    }

    /// Asks until there is an answer, or the attempts are used up. `None`: it is not there.
    async fn get(&self, url: &Url, headers: &HeaderMap) -> Result<Option<Response>, CacheError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let error = match self.get_once(url, headers).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !error.is_temporary() || matches!(error, CacheError::Paused { .. }) {
                return Err(error);
            }
            if attempt >= self.0.attempts {
                self.failed(&error);
                return Err(error);
            }
            tracing::debug!(%error, attempt, "asking again");
            tokio::time::sleep(retry_after(&error, attempt)).await;
        }
    }

    /// Asks once, unless the cache is left alone.
    pub(super) async fn get_once(
        &self,
        url: &Url,
        headers: &HeaderMap,
    ) -> Result<Option<Response>, CacheError> {
        let Place::Http { base, client, logins } = &self.0.place else { return Ok(None) };
        if let Some(pause) = self.pause() {
            let seconds = pause.as_secs() + 1;
            let reason = Arc::clone(&self.0.reason.lock().unwrap_or_else(PoisonError::into_inner));
            return Err(CacheError::Paused { cache: self.name().to_string(), seconds, reason });
        }
        let mut request = client.get(url.clone()).headers(headers.clone());
        // A narinfo may name any address, and no signature covers it.
        if url.origin() == base.origin()
            && let Some(login) = logins.header(url)
        {
            request = request.header(header::AUTHORIZATION, login);
        }
        let response = request.send().await.map_err(|source| CacheError::unreachable(url, source))?;
        let mut health = self.0.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.answered(response.status().as_u16(), Instant::now());
        drop(health);
        let url = || public(url);
        match response.status() {
            status if status.is_success() => Ok(Some(response)),
            // Object stores that may not list say 403 for what is not there.
            StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::FORBIDDEN => Ok(None),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::PROXY_AUTHENTICATION_REQUIRED) => {
                Err(CacheError::Unauthorized { url: url(), status })
            }
            status => {
                let after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok());
                let after = after.and_then(|after| after.parse().ok()).map(Duration::from_secs);
                Err(CacheError::Status { url: url(), status, after })
            }
        }
    }
}

/// The body of an answer, if all of it comes and it is not longer than `limit`.
async fn whole(url: &Url, mut response: Response, limit: usize) -> Result<Vec<u8>, CacheError> {
    let expected = transfer::length(response.headers());
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|source| CacheError::unreachable(url, source))? {
        body.extend_from_slice(&chunk);
        if body.len() > limit {
            return Err(CacheError::TooLong { url: public(url), limit });
        }
    }
    let received = body.len() as u64;
    match expected {
        Some(expected) if received < expected => {
            Err(CacheError::Cut { url: public(url), received, expected })
        }
        _ => Ok(body),
    }
}

/// How a NAR that is not compressed may come.
pub(super) const ON_THE_WAY: Compression = Compression::Zstd;

fn accept(encoding: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(encoding))])
}

/// How long to wait before the next attempt: longer each time, and never the same for all who wait.
pub(super) fn retry_after(error: &CacheError, attempt: u32) -> Duration {
    let asked_for = match error {
        CacheError::Status { after, .. } => *after,
        _ => None,
    };
    let overloaded =
        matches!(error, CacheError::Status { status, .. } if matches!(status.as_u16(), 429 | 503));
    let base = Duration::from_millis(if overloaded { 500 } else { 100 });
    let pause = match asked_for {
        // Never earlier.
        Some(pause) => pause.min(LONGEST_RETRY).mul_f64(1.0 + jitter() / 4.0),
        None => base.saturating_mul(1 << attempt.min(8)).mul_f64(0.75 + jitter() / 2.0),
    };
    pause.min(LONGEST_RETRY)
}

/// Between 0 and 1, another one each time.
fn jitter() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    let bits = RandomState::new().hash_one(0_u8) >> 32;
    f64::from(u32::try_from(bits).unwrap_or_default()) / f64::from(u32::MAX)
}

fn join(base: &Url, relative: &str) -> Result<Url, CacheError> {
    let without_query = || relative.split('?').next().unwrap_or_default().to_owned();
    base.join(relative).map_err(|_| CacheError::NarUrl { url: without_query() })
}

/// Where the NAR is that a narinfo of the cache at `base` names.
fn nar_url(base: &Url, info: &NarInfo) -> Result<Url, CacheError> {
    let url = join(base, &info.url)?;
    if matches!(url.scheme(), "http" | "https") {
        Ok(url)
    } else {
        Err(CacheError::NarUrl { url: public(&url) })
    }
}

/// A file below `directory`, or nothing if `relative` leads elsewhere.
fn beneath(directory: &Path, relative: &str) -> Option<PathBuf> {
    if Url::parse(relative).is_ok() {
        return None;
    }
    let relative = Path::new(relative.split('?').next()?);
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    inside.then(|| directory.join(relative))
}

/// An address for messages: without user, password and query, which may hold a token.
pub(crate) fn public(url: &Url) -> String {
    let mut url = url.clone();
    let _ = (url.set_username(""), url.set_password(None));
    url.set_query(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::below("nar/x.nar.zst", Some("/cache/nar/x.nar.zst"))]
    #[case::with_query("nar/x.nar?hash=1", Some("/cache/nar/x.nar"))]
    #[case::absolute("/etc/passwd", None)]
    #[case::elsewhere("file:///etc/passwd", None)]
    #[case::upwards("../x", None)]
    #[case::upwards_later("nar/../../x", None)]
    fn a_nar_of_a_directory_is_beneath_it(#[case] url: &str, #[case] expected: Option<&str>) {
        assert_eq!(beneath(Path::new("/cache"), url).as_deref(), expected.map(Path::new));
    }

    #[test]
    fn messages_hold_no_secret() {
        let url = "https://user:secret@cache.example/x?token=secret".parse().unwrap();
        assert_eq!(public(&url), "https://cache.example/x");
    }

    #[test]
    fn a_cache_may_ask_for_a_longer_pause_but_not_for_any() {
        let error =
            |after| CacheError::Status { url: String::new(), status: StatusCode::TOO_MANY_REQUESTS, after };
        assert_eq!(retry_after(&error(Some(Duration::from_hours(1))), 1), LONGEST_RETRY);
        assert!(retry_after(&error(Some(Duration::from_secs(2))), 1) >= Duration::from_secs(2));
        let short = retry_after(&error(None), 1);
        assert!(short >= Duration::from_millis(750) && short <= Duration::from_millis(1250), "{short:?}");
    }
}
