//! One path from a cache into staging: memory, connection, bytes, restore; again or elsewhere if that fails.

use std::io;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use nix_csi_store::{Compression, NarInfo};
use tokio::sync::mpsc;

use super::budget::Share;
use super::cache::{ON_THE_WAY, retry_after};
use super::error::{CacheError, FetchError};
use super::fair::Urgency;
use super::fetch::Engine;
use super::flight::Shown;
use super::lookup::{Caches, Proof, Source, look_up};
use super::pool::RestorePool;
use super::transfer::Transfer;
use super::turns::Turns;
use super::unpack::{Chunks, Unpack, Unpacked, largest_body};
use super::window;
use crate::fault;
use crate::store::{PathInfo, Place, Staged};

/// Up to this size a NAR is restored after it has arrived whole, beyond it while it arrives.
const WHOLE: u64 = 2 << 20;
/// Chunks between a socket and its decoder: when they are there, the socket is not read.
const CHUNKS: usize = 4;
/// What a stream takes beside its decoder: chunks under way and buffers between its threads.
const STREAM: u64 = 4 << 20;

/// What a connection has read and nobody has taken yet, as the HTTP library lets it grow.
const CONNECTION: u64 = 256 << 10;

/// How a NAR file is restored, and what that takes out of the memory budget.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Its bytes first, then the rest.
    Whole { limit: usize },
    /// Through decoders with this much memory.
    Stream { decoder: u64, is_nested: bool },
}

impl Way {
    /// What is expected of a path, before a byte of it has arrived.
    fn first(info: &NarInfo) -> Self {
        if info.nar_size > WHOLE {
            // What is not compressed may be on its way.
            let compression = Some(info.compression).filter(|of| *of != Compression::None);
            let decoder = window::expected(compression.unwrap_or(ON_THE_WAY));
            return Self::Stream { decoder, is_nested: false };
        }
        // What the cache says of the file's size is a hint; a larger one is taken as a stream.
        let most = largest_body(info.nar_size);
        let limit = info.file_size.unwrap_or(most).min(most);
        Self::Whole { limit: usize::try_from(limit).unwrap_or(usize::MAX) }
    }

    fn memory(self, info: &NarInfo) -> usize {
        let bytes = match self {
            Self::Whole { limit } => limit as u64 + CONNECTION,
            // A decoder reserves its window and touches as much of it as there is content. What comes out of an
            // outer one is content too, and may be more than the NAR.
            Self::Stream { decoder, is_nested: true } => decoder + STREAM,
            Self::Stream { decoder, is_nested: false } => {
                decoder.min(info.nar_size) + STREAM.min(info.nar_size)
            }
        };
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }
}

/// How an attempt ended that did not fail.
enum Attempt {
    Done(Unpacked),
    /// It needs another share of the memory: everything was given back, the transfer too.
    Anew(Way),
}

impl Engine {
    /// Restores what `source` has: from its cache, again if the transfer was cut, then from others.
    pub(super) async fn obtain(
        &self,
        caches: &Caches,
        mut source: Source,
        turns: &Turns,
        shown: &Shown,
    ) -> Result<Staged, FetchError> {
        let mut failed = Vec::new();
        // A cache that is left alone because of others was not tried: that is counted apart.
        let (mut attempt, mut pauses) = (0, 0);
        loop {
            // What proves itself by its content is looked at again in any case.
            if !matches!(source.proof, Proof::Content(_))
                && self.may_adopt(&source, turns).await
                && let Some(staged) = self.store.staging().adopt(&source.info, || source.origin())
            {
                return Ok(staged);
            }
            attempt += 1;
            *shown.cache.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(Arc::clone(source.cache.name()));
            let error = match self.download(&source, turns, shown).await {
                Ok(staged) => return Ok(staged),
                Err(error) => error,
            };
            if !error.is_of_cache() {
                return Err(error);
            }
            tracing::info!(path = %source.info.path, cache = %source.cache.name(), %error, attempt, "download failed");
            if let FetchError::Download { source: cause, .. } = &error
                && cause.is_temporary()
            {
                if matches!(cause, CacheError::Paused { .. }) && pauses < source.cache.attempts() {
                    (attempt, pauses) = (attempt - 1, pauses + 1);
                }
                if attempt < source.cache.attempts() {
                    // A cache that is left alone for a moment need not end what was half done.
                    let pause = source.cache.pause().unwrap_or_default().max(retry_after(cause, attempt));
                    tokio::time::sleep(pause).await;
                    continue;
                }
                source.cache.failed(cause);
            }
            failed.push(source.number);
            let next = look_up(caches, &self.trust, turns, &source.info.path, &failed).await;
            match next {
                // What was walked already must be what arrives.
                Ok(next) if next.info.references == source.info.references => {
                    (source, attempt, pauses) = (next, 0, 0);
                }
                _ => return Err(error),
            }
        }
    }

    /// Whether what an earlier process may have left can be taken. What came for somebody's credentials only is taken
    /// where the cache gives it now, too: a narinfo alone does not say that.
    async fn may_adopt(&self, source: &Source, turns: &Turns) -> bool {
        !self.store.staging().is_left_private(&source.info.path)
            || source.cache.gives(turns, &source.info).await.is_ok()
    }

    /// Restores one path from one cache, once.
    async fn download(&self, source: &Source, turns: &Turns, shown: &Shown) -> Result<Staged, FetchError> {
        let info = &source.info;
        let mut way = Way::first(info);
        // Whole, then as a stream, then with what it really needs.
        for _ in 0..3 {
            let place = self.place(info)?;
            match self.attempt(source, turns, way, &place, shown).await? {
                Attempt::Done(Unpacked { is_dir }) => {
                    fault::point("fetch.restored");
                    let info = PathInfo::from((**info).clone());
                    return Ok(place.verified(info, source.origin(), is_dir));
                }
                Attempt::Anew(other) => way = other,
            }
        }
        let (path, cache) = (info.path.clone(), source.cache.name().to_string());
        let other_each_time =
            io::Error::new(io::ErrorKind::InvalidData, "its window is another one each time");
        Err(FetchError::Decode { path, cache, source: other_each_time })
    }

    /// One system call, on a directory that is open: not worth another thread.
    fn place(&self, info: &NarInfo) -> Result<Arc<Place>, FetchError> {
        let place = self.store.staging().place(info.nar_size).map_err(FetchError::Staging)?;
        place.map(Arc::new).map_err(|source| FetchError::NoSpace { path: info.path.clone(), source })
    }

    async fn attempt(
        &self,
        source: &Source,
        turns: &Turns,
        way: Way,
        place: &Arc<Place>,
        shown: &Shown,
    ) -> Result<Attempt, FetchError> {
        let Source { info, cache, proof, .. } = source;
        let failed = |source| FetchError::Download {
            path: info.path.clone(),
            cache: cache.name().to_string(),
            source,
        };
        let memory = turns.acquire(&self.memory, Urgency::Nar(info.nar_size), way.memory(info)).await;
        let mut transfer = cache.nar(turns, info).await.map_err(failed)?;
        let compressions = [transfer.encoding().unwrap_or(Compression::None), info.compression];
        let is_nested = !compressions.contains(&Compression::None);
        let as_stream = |head: &[u8]| Way::Stream { decoder: decoder_memory(compressions, head), is_nested };
        let unpack = |memory| Unpack {
            info: Arc::clone(info),
            cache: Arc::clone(cache.name()),
            compressions,
            ca: match proof {
                Proof::Content(address) => Some(address.clone()),
                Proof::Signature(_) | Proof::None => None,
            },
            memory,
            place: Arc::clone(place),
            decoded: Arc::clone(&shown.decoded),
            stop: shown.stop.clone(),
        };
        let first = match way {
            Way::Whole { .. } if is_nested => return Ok(Attempt::Anew(as_stream(&[]))),
            Way::Whole { limit } => {
                let mut body = Vec::with_capacity(limit);
                while let Some(chunk) = transfer.chunk().await.map_err(failed)? {
                    if body.len() + chunk.len() > limit {
                        // More than it said: as a stream its memory is bounded in any case.
                        return Ok(Attempt::Anew(as_stream(&body)));
                    }
                    body.extend_from_slice(&chunk);
                }
                // The connection is free for the next one while this one is restored.
                drop(transfer);
                let needed = decoder_memory(compressions, &body);
                check_window(source, needed)?;
                return self.pool.whole(unpack(needed), body, memory).await.map(Attempt::Done);
            }
            Way::Stream { .. } => head(&mut transfer).await.map_err(failed)?,
        };
        let needed = decoder_memory(compressions, &first);
        check_window(source, needed)?;
        let Way::Stream { decoder, is_nested: was_nested } = way else { return Err(FetchError::Stopped) };
        if needed > decoder || is_nested != was_nested {
            return Ok(Attempt::Anew(as_stream(&first)));
        }
        if self.memory.exceeds(way.memory(info)) {
            tracing::info!(path = %info.path, window = needed, "needs more than the memory budget, runs alone");
            self.alone.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        self.stream(transfer, first, unpack(decoder), memory)
            .await
            .map_err(|error| match error {
                StreamError::Transfer(source) => failed(source),
                StreamError::Restore(error) => error,
            })
            .map(Attempt::Done)
    }

    async fn stream(
        &self,
        mut transfer: Transfer,
        first: Bytes,
        unpack: Unpack,
        memory: Share,
    ) -> Result<Unpacked, StreamError> {
        let (chunks, receiver) = mpsc::channel(CHUNKS);
        let receiver = Chunks::new(receiver, unpack.info.nar_size);
        let mut restored = RestorePool::stream(unpack, receiver, memory);
        let forwarding = async {
            let mut next = Some(first);
            while let Some(bytes) = next {
                if !bytes.is_empty() && chunks.send(bytes).await.is_err() {
                    break;
                }
                next = transfer.chunk().await?;
            }
            drop(chunks);
            Ok(())
        };
        let outcome = tokio::select! {
            sent = forwarding => {
                // A cut transfer is told as such, and not as what the decoder makes of it.
                if let Err(error) = sent {
                    // Its thread ends with the channel; only then is the place free again.
                    let _ = restored.await;
                    return Err(StreamError::Transfer(error));
                }
                restored.await
            }
            early = &mut restored => early,
        };
        outcome.unwrap_or(Err(FetchError::Stopped)).map_err(StreamError::Restore)
    }
}

fn check_window(Source { info, cache, .. }: &Source, needed: u64) -> Result<(), FetchError> {
    if needed <= window::LARGEST {
        return Ok(());
    }
    let (path, cache) = (info.path.clone(), cache.name().to_string());
    Err(FetchError::Window { path, cache, window: needed, limit: window::LARGEST })
}

enum StreamError {
    Transfer(super::error::CacheError),
    Restore(FetchError),
}

/// As many bytes as say what the decoder needs, or all there are.
async fn head(transfer: &mut Transfer) -> Result<Bytes, super::error::CacheError> {
    let Some(mut first) = transfer.chunk().await? else { return Ok(Bytes::new()) };
    while first.len() < window::HEAD
        && let Some(more) = transfer.chunk().await?
    {
        first = [first, more].concat().into();
    }
    Ok(first)
}

/// The memory of the decoders, one behind the other. Of the inner one only the usual is known.
fn decoder_memory([outer, inner]: [Compression; 2], head: &[u8]) -> u64 {
    match (outer, inner) {
        (Compression::None, only) | (only, Compression::None) => window::needed(only, head),
        (outer, inner) => window::needed(outer, head).saturating_add(window::expected(inner)),
    }
}
