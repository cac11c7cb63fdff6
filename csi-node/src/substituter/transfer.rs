//! The bytes of one NAR file, as they come. A transfer that is cut goes on where it was, if the cache can.

use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use nix_csi_store::Compression;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Response, StatusCode, Url};
use tokio::io::AsyncReadExt as _;

use super::budget::Share;
use super::cache::{BinaryCache, public, retry_after};
use super::error::CacheError;

/// What is read of a file at once.
const READ: usize = 256 * 1024;

/// A transfer under way. It has its connection until it is dropped.
pub(super) struct Transfer {
    source: Source,
    _connection: Share,
}

enum Source {
    File { file: tokio::fs::File, path: PathBuf },
    Http(Box<Http>),
}

struct Http {
    cache: BinaryCache,
    url: Url,
    response: Response,
    encoding: Option<Compression>,
    /// What says that a later answer is about the same bytes.
    validator: Option<HeaderValue>,
    received: u64,
    /// How many bytes of an answer are to be left out, since they have been received before.
    again: u64,
    /// Where it ends, if the server said so. A stream of HTTP/2 that is reset without an error looks like one that ends.
    end: Option<u64>,
    resumed: u32,
}

impl Transfer {
    pub(super) fn from_file(file: tokio::fs::File, cache: &str, connection: Share) -> Self {
        Self { source: Source::File { file, path: cache.into() }, _connection: connection }
    }

    pub(super) fn from_response(
        cache: BinaryCache,
        url: Url,
        response: Response,
        connection: Share,
    ) -> Result<Self, CacheError> {
        let encoding = encoding(&url, response.headers())?;
        let validator = validator_of(response.headers());
        let end = length(response.headers());
        let http = Http { cache, url, response, encoding, validator, received: 0, again: 0, end, resumed: 0 };
        Ok(Self { source: Source::Http(Box::new(http)), _connection: connection })
    }

    /// How the server compressed the file on its way, beside what the narinfo says of the file itself.
    pub(super) fn encoding(&self) -> Option<Compression> {
        match &self.source {
            Source::File { .. } => None,
            Source::Http(http) => http.encoding,
        }
    }

    /// The next bytes, or `None` at the end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, CacheError> {
        match &mut self.source {
            Source::File { file, path } => {
                let mut bytes = BytesMut::with_capacity(READ);
                let read = file.read_buf(&mut bytes).await;
                read.map_err(|source| CacheError::File { path: path.clone(), source })?;
                Ok((!bytes.is_empty()).then(|| bytes.freeze()))
            }
            Source::Http(http) => http.chunk().await,
        }
    }
}

impl Http {
    async fn chunk(&mut self) -> Result<Option<Bytes>, CacheError> {
        loop {
            let mut error = match self.response.chunk().await {
                Ok(None) if self.end.is_some_and(|end| self.received < end) => CacheError::Cut {
                    url: public(&self.url),
                    received: self.received,
                    expected: self.end.unwrap_or_default(),
                },
                Ok(chunk) => {
                    let Some(mut chunk) = chunk else { return Ok(None) };
                    let known = usize::try_from(self.again).unwrap_or(usize::MAX).min(chunk.len());
                    let _ = chunk.split_to(known);
                    self.again -= known as u64;
                    if chunk.is_empty() {
                        continue;
                    }
                    self.received += chunk.len() as u64;
                    // It gets on, however often it is cut.
                    self.resumed = 0;
                    return Ok(Some(chunk));
                }
                Err(source) => CacheError::unreachable(&self.url, source),
            };
            // The old body is not asked again: after its error it looks as if it were complete.
            while let Some(again) = self.resume(error).await? {
                error = again;
            }
        }
    }

    /// Asks for the rest, or gives `error` back. What it gives back in `Ok` may go away if it asks again.
    async fn resume(&mut self, error: CacheError) -> Result<Option<CacheError>, CacheError> {
        let Some(validator) = &self.validator else { return Err(error) };
        if self.resumed >= self.cache.attempts() {
            return Err(error);
        }
        self.resumed += 1;
        tracing::debug!(%error, received = self.received, "a transfer was cut, asking for the rest");
        let pause = self.cache.pause().unwrap_or_default().max(retry_after(&error, self.resumed));
        tokio::time::sleep(pause).await;
        let mut headers = HeaderMap::new();
        let range = HeaderValue::from_str(&format!("bytes={}-", self.received));
        headers.insert(header::RANGE, range.unwrap_or(HeaderValue::from_static("bytes=0-")));
        headers.insert(header::IF_RANGE, validator.clone());
        let as_before = self.encoding.map_or("identity", Compression::as_str);
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(as_before));
        let rest = match self.cache.get_once(&self.url, &headers).await {
            Ok(Some(rest)) => rest,
            Ok(None) => return Err(CacheError::Gone { url: public(&self.url) }),
            Err(again) if again.is_temporary() => return Ok(Some(again)),
            // What was wrong first is what is wrong: 416 is said behind the last byte.
            Err(_) => return Err(error),
        };
        let length = length(rest.headers());
        let is_same = || validator_of(rest.headers()).as_ref() == Some(validator);
        (self.again, self.end) = match rest.status() {
            _ if encoding(&self.url, rest.headers())? != self.encoding => return Err(error),
            StatusCode::PARTIAL_CONTENT if first_byte(rest.headers()) == Some(self.received) => {
                (0, length.map(|length| self.received + length))
            }
            // All of it once more, from a cache that knows no ranges.
            StatusCode::OK if is_same() => (self.received, length),
            // Anything else are other bytes.
            _ => return Err(error),
        };
        self.response = rest;
        Ok(None)
    }
}

/// How long the body is.
pub(super) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A weak validator promises the same meaning, not the same bytes.
fn validator_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let strong = headers.get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    strong.or_else(|| headers.get(header::LAST_MODIFIED)).cloned()
}

/// Where a partial answer begins: `Content-Range: bytes <first>-<last>/<all>`.
fn first_byte(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

/// How an answer was compressed on its way.
pub(super) fn encoding(url: &Url, headers: &HeaderMap) -> Result<Option<Compression>, CacheError> {
    let Some(encoding) = headers.get(header::CONTENT_ENCODING) else { return Ok(None) };
    let encoding = String::from_utf8_lossy(encoding.as_bytes()).to_ascii_lowercase();
    Ok(Some(match &*encoding {
        "" | "identity" => return Ok(None),
        "zstd" => Compression::Zstd,
        "gzip" | "x-gzip" => Compression::Gzip,
        "br" => Compression::Brotli,
        "xz" => Compression::Xz,
        _ => return Err(CacheError::Encoding { url: public(url), encoding }),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::strong(&[("etag", "\"a\""), ("last-modified", "x")], Some("\"a\""))]
    #[case::weak(&[("etag", "W/\"a\"")], None)]
    #[case::time(&[("etag", "W/\"a\""), ("last-modified", "x")], Some("x"))]
    #[case::none(&[], None)]
    fn only_what_promises_the_same_bytes_is_a_validator(
        #[case] headers: &[(&'static str, &'static str)],
        #[case] expected: Option<&str>,
    ) {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
            .collect::<Vec<(header::HeaderName, _)>>()
            .into_iter()
            .collect();
        assert_eq!(validator_of(&headers).as_ref().map(|value| value.to_str().unwrap()), expected);
    }

    #[rstest]
    #[case("bytes 100-199/200", Some(100))]
    #[case("bytes */200", None)]
    #[case("200", None)]
    fn a_range_begins_somewhere(#[case] value: &'static str, #[case] expected: Option<u64>) {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_RANGE, HeaderValue::from_static(value));
        assert_eq!(first_byte(&headers), expected);
    }
}
