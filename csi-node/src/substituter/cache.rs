//! One binary cache, over HTTP.

use std::time::Duration;

use bytes::Bytes;
use nix_csi_store::{NarInfo, StorePath};
use reqwest::{Client, Response, StatusCode, Url};

use super::error::CacheError;

/// Larger answers to a narinfo request are not read to their end.
const MAX_NARINFO: usize = 256 * 1024;

/// A binary cache that is asked by HTTP.
#[derive(Debug, Clone)]
pub struct BinaryCache {
    base: Url,
    client: Client,
    attempts: u32,
}

impl BinaryCache {
    /// The cache at `base`; a question without an answer is asked `attempts` times.
    pub fn new(mut base: Url, client: Client, attempts: u32) -> Self {
        // `join` replaces what stands behind the last slash.
        if !base.path().ends_with('/') {
            base.set_path(&format!("{}/", base.path()));
        }
        Self { base, client, attempts: attempts.max(1) }
    }

    /// How the cache is called in messages: its address, without what may be secret in it.
    pub fn name(&self) -> String {
        public(&self.base)
    }

    /// How often a question or a transfer is tried.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// What the cache says about `path`, or `None` if it does not have it.
    pub async fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, CacheError> {
        let url = self.join(&format!("{}.narinfo", path.hash()))?;
        let Some(mut response) = self.get(&url).await? else { return Ok(None) };
        let mut body = Vec::new();
        while let Some(chunk) = chunk(&mut response).await? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_NARINFO {
                return Err(CacheError::TooLong { url: public(&url), limit: MAX_NARINFO });
            }
        }
        let text = String::from_utf8_lossy(&body);
        let info: NarInfo =
            text.parse().map_err(|source| CacheError::NarInfo { url: public(&url), source })?;
        // The signature is over the path inside, so only this says that it is the path we mean.
        if info.path == *path {
            Ok(Some(info))
        } else {
            Err(CacheError::OtherPath { url: public(&url), found: info.path })
        }
    }

    /// The beginning of a NAR's transfer.
    pub async fn nar(&self, info: &NarInfo) -> Result<Response, CacheError> {
        let url = self.join(&info.url)?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(CacheError::NarUrl { url: public(&url) });
        }
        let gone = || CacheError::Gone { url: public(&url) };
        self.get(&url).await?.ok_or_else(gone)
    }

    fn join(&self, relative: &str) -> Result<Url, CacheError> {
        let without_query = || relative.split('?').next().unwrap_or_default().to_owned();
        self.base.join(relative).map_err(|_| CacheError::NarUrl { url: without_query() })
    }

    /// Asks until there is an answer, or the attempts are used up.
    async fn get(&self, url: &Url) -> Result<Option<Response>, CacheError> {
        let mut pause = Duration::from_millis(100);
        for _ in 1..self.attempts {
            match self.get_once(url).await {
                Err(error) if error.is_temporary() => {
                    tracing::debug!(%error, "asking again");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                answer => return answer,
            }
        }
        self.get_once(url).await
    }

    async fn get_once(&self, url: &Url) -> Result<Option<Response>, CacheError> {
        let response =
            self.client.get(url.clone()).send().await.map_err(|source| CacheError::Unreachable {
                url: public(url),
                source: source.without_url(),
            })?;
        match response.status() {
            status if status.is_success() => Ok(Some(response)),
            // Object stores that may not list say 403 for what is not there.
            StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::FORBIDDEN => Ok(None),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::PROXY_AUTHENTICATION_REQUIRED) => {
                Err(CacheError::Unauthorized { url: public(url), status })
            }
            status => Err(CacheError::Status { url: public(url), status }),
        }
    }
}

/// The next bytes of an answer, or `None` at its end.
pub(super) async fn chunk(response: &mut Response) -> Result<Option<Bytes>, CacheError> {
    let read = response.chunk().await;
    read.map_err(|source| CacheError::Unreachable {
        url: public(response.url()),
        source: source.without_url(),
    })
}

/// An address for messages: without user, password and query, which may hold a token.
fn public(url: &Url) -> String {
    let mut url = url.clone();
    let _ = (url.set_username(""), url.set_password(None));
    url.set_query(None);
    url.to_string()
}
