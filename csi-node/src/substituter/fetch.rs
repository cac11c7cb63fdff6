//! Fetching one closure: the walk over narinfos, the downloads beside it, and the registration at its end.

use std::collections::HashSet;
use std::io;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix_csi_store::{NarInfo, StorePath, TrustedKeys};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tracing::Instrument as _;

use super::cache::{BinaryCache, chunk};
use super::error::{CacheError, FetchError};
use super::pool::{Job, RestorePool};
use super::staging::Staging;
use crate::store::{NodeStore, Staged, TempRoots};

/// More paths than any closure that a pod should mount.
const MAX_PATHS: usize = 100_000;
/// Chunks between a socket and its decoder: when they are full, the socket is not read.
const CHUNKS: usize = 16;

/// Whose word counts.
#[derive(Debug, Clone)]
pub struct Trust {
    /// Keys whose signatures count.
    pub keys: TrustedKeys,
    /// Whether a path needs a signature at all. `false` only for closed test set-ups.
    pub require_sigs: bool,
}

/// How far a fetch is. Totals grow while the closure is being walked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Paths restored.
    pub paths: u64,
    /// Paths known to be needed.
    pub paths_total: u64,
    /// NAR bytes restored.
    pub bytes: u64,
    /// NAR bytes known to be needed.
    pub bytes_total: u64,
}

impl std::fmt::Display for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const MIB: u64 = 1 << 20;
        write!(
            f,
            "{} of {} MiB, {} of {} paths",
            self.bytes / MIB,
            self.bytes_total.div_ceil(MIB),
            self.paths,
            self.paths_total
        )
    }
}

/// A closure that is valid, and stays so as long as this lives.
#[derive(Debug)]
pub struct Closure {
    /// Every path of it, sorted.
    pub paths: Vec<StorePath>,
    /// How many of them had to be fetched.
    pub fetched: usize,
    _roots: TempRoots,
}

/// Fetches closures into one store.
#[derive(Clone)]
pub struct Substituter {
    store: Arc<NodeStore>,
    caches: Arc<[BinaryCache]>,
    trust: Arc<Trust>,
    connections: Arc<Semaphore>,
    pool: RestorePool,
}

impl Substituter {
    /// A substituter with its own restore threads.
    pub fn new(
        store: Arc<NodeStore>,
        caches: Vec<BinaryCache>,
        trust: Trust,
        connections: usize,
    ) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(2, NonZero::get);
        Ok(Self {
            store,
            caches: caches.into(),
            trust: Arc::new(trust),
            connections: Arc::new(Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS))),
            // Some of them wait for a slow cache at any time.
            pool: RestorePool::start(cores * 2)?,
        })
    }

    /// The store that it fetches into.
    pub fn store(&self) -> &Arc<NodeStore> {
        &self.store
    }

    /// Makes the closure of `roots` valid. On error the store is as it was.
    pub async fn fetch(
        &self,
        roots: &[StorePath],
        progress: &watch::Sender<Progress>,
    ) -> Result<Closure, FetchError> {
        let store = Arc::clone(&self.store);
        let mut pins = self.blocking(NodeStore::temp_roots).await??;
        let staging = self.blocking(|_| Staging::create(store)).await?.map_err(FetchError::Staging)?;
        let staged = self.walk(roots, &mut pins, &staging, progress).await?;
        let fetched = staged.len();
        if fetched > 0 {
            self.blocking(move |store| store.register(&staged)).await??;
        }
        let roots = roots.to_vec();
        let paths = self.blocking(move |store| store.closure(&roots)).await??.ok_or(FetchError::Stopped)?;
        Ok(Closure { paths, fetched, _roots: pins })
    }

    /// Restores every path of the closure that is not valid yet.
    async fn walk(
        &self,
        roots: &[StorePath],
        pins: &mut TempRoots,
        staging: &Arc<Staging>,
        progress: &watch::Sender<Progress>,
    ) -> Result<Vec<Staged>, FetchError> {
        // Dropping the sets ends what still runs in them.
        let mut lookups = JoinSet::new();
        let mut downloads = JoinSet::new();
        let mut seen = HashSet::new();
        let mut staged = Vec::new();
        let mut found = roots.to_vec();
        loop {
            found.retain(|path| seen.insert(path.clone()));
            for path in self.missing(pins, std::mem::take(&mut found)).await? {
                if lookups.len() + downloads.len() + staged.len() >= MAX_PATHS {
                    return Err(FetchError::TooManyPaths { limit: MAX_PATHS });
                }
                progress.send_modify(|progress| progress.paths_total += 1);
                let this = self.clone();
                lookups.spawn(async move { this.look_up(&path).await }.in_current_span());
            }
            tokio::select! {
                Some(looked_up) = lookups.join_next() => {
                    let sources = looked_up.map_err(|_| FetchError::Stopped)??;
                    progress.send_modify(|progress| progress.bytes_total += sources.info.nar_size);
                    found.clone_from(&sources.info.references);
                    let (this, staging) = (self.clone(), Arc::clone(staging));
                    downloads.spawn(async move { this.obtain(sources, staging).await }.in_current_span());
                }
                Some(downloaded) = downloads.join_next() => {
                    let path = downloaded.map_err(|_| FetchError::Stopped)??;
                    progress.send_modify(|progress| {
                        progress.paths += 1;
                        progress.bytes += path.info.nar_size;
                    });
                    staged.push(path);
                }
                else => return Ok(staged),
            }
        }
    }

    /// Those of `paths` that are not valid; all of them are safe from collectors from here on.
    async fn missing(
        &self,
        pins: &mut TempRoots,
        paths: Vec<StorePath>,
    ) -> Result<Vec<StorePath>, FetchError> {
        if paths.is_empty() {
            return Ok(paths);
        }
        // Short, unless a collector runs or a large closure is being registered.
        let mut roots = pins.clone();
        self.blocking(move |store| {
            let valid = store.pin(&mut roots, &paths)?;
            Ok(paths.into_iter().filter(|path| !valid.contains(path)).collect())
        })
        .await?
    }

    /// Asks the caches in their order, until one has the path in a way that can be used.
    async fn look_up(&self, path: &StorePath) -> Result<Source, FetchError> {
        self.look_up_from(path, 0).await
    }

    /// The same, beginning with the cache of that number.
    async fn look_up_from(&self, path: &StorePath, first: usize) -> Result<Source, FetchError> {
        let mut failed = None;
        for (number, cache) in self.caches.iter().enumerate().skip(first) {
            let _permit = self.connections.acquire().await.map_err(|_| FetchError::Stopped)?;
            match cache.narinfo(path).await {
                Ok(None) => {}
                Ok(Some(info)) => match self.check(&info, cache) {
                    Ok(()) => return Ok(Source { info, cache: cache.clone(), number }),
                    Err(error) => drop(failed.get_or_insert(error)),
                },
                Err(source) => {
                    let error = FetchError::Lookup { path: path.clone(), source };
                    // Whoever could not answer may have it: that is worth another try, a refusal is not.
                    if failed.as_ref().is_none_or(|failed| !failed.is_temporary()) && error.is_temporary() {
                        failed = Some(error);
                    } else {
                        failed.get_or_insert(error);
                    }
                }
            }
        }
        Err(failed.unwrap_or_else(|| FetchError::NotFound {
            path: path.clone(),
            caches: self.caches.iter().map(BinaryCache::name).collect::<Vec<_>>().join(", "),
        }))
    }

    fn check(&self, info: &NarInfo, cache: &BinaryCache) -> Result<(), FetchError> {
        match self.trust.keys.verify(&info.fingerprint(), &info.signatures) {
            Ok(_) => Ok(()),
            Err(_) if !self.trust.require_sigs => Ok(()),
            Err(source) => {
                Err(FetchError::Untrusted { path: info.path.clone(), cache: cache.name(), source })
            }
        }
    }

    /// Restores one path into `staging`: from its cache, again if the transfer was cut, then from the next.
    async fn obtain(&self, mut source: Source, staging: Arc<Staging>) -> Result<Staged, FetchError> {
        let mut dir = staging.dir().to_owned();
        let mut attempt = 0;
        loop {
            attempt += 1;
            let error = match self.download(&source, &staging, dir).await {
                Ok(staged) => return Ok(staged),
                Err(error) => error,
            };
            if !error.is_of_cache() {
                return Err(error);
            }
            tracing::info!(path = %source.info.path, cache = source.cache.name(), %error, attempt, "download failed");
            let again = format!("{}-{}-{attempt}", source.info.path.hash(), source.number);
            dir = staging.again(&again).map_err(FetchError::Staging)?;
            if error.is_temporary() && attempt < source.cache.attempts() {
                tokio::time::sleep(Duration::from_millis(100 << attempt.min(6))).await;
                continue;
            }
            let next = self.look_up_from(&source.info.path, source.number + 1).await;
            match next {
                // What was walked already must be what arrives.
                Ok(next) if next.info.references == source.info.references => (source, attempt) = (next, 0),
                _ => return Err(error),
            }
        }
    }

    /// Restores one path into `dir`, a directory in `staging`, once.
    async fn download(
        &self,
        Source { info, cache, .. }: &Source,
        staging: &Arc<Staging>,
        dir: PathBuf,
    ) -> Result<Staged, FetchError> {
        let name = cache.name();
        let failed = |source| FetchError::Download { path: info.path.clone(), cache: name.clone(), source };
        let _permit = self.connections.acquire().await.map_err(|_| FetchError::Stopped)?;
        let mut response = cache.nar(info).await.map_err(failed)?;
        // A thread is asked for only when there is something for it to do.
        let first = chunk(&mut response).await.map_err(failed)?.unwrap_or_default();
        let (chunks, receiver) = mpsc::channel(CHUNKS);
        let (done, mut restored) = oneshot::channel();
        self.pool.submit(Job {
            info: info.clone(),
            cache: name.clone(),
            chunks: receiver,
            staging: Arc::clone(staging),
            dir,
            done,
        });
        let at = tokio::select! {
            sent = send(first, &mut response, chunks) => {
                // A cut transfer is told as such, and not as what the decoder makes of it.
                sent.map_err(failed)?;
                restored.await
            }
            early = &mut restored => early,
        };
        Ok(Staged { info: info.clone().into(), at: at.map_err(|_| FetchError::Stopped)?? })
    }

    /// Runs what blocks beside the network's threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&NodeStore) -> T + Send + 'static,
    ) -> Result<T, FetchError> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(|_| FetchError::Stopped)
    }
}

/// Hands a transfer on to its restore thread. Ends early, and well, when that has enough.
async fn send(
    first: Bytes,
    response: &mut reqwest::Response,
    chunks: mpsc::Sender<Bytes>,
) -> Result<(), CacheError> {
    let mut next = Some(first);
    while let Some(bytes) = next {
        if !bytes.is_empty() && chunks.send(bytes).await.is_err() {
            break;
        }
        next = chunk(response).await?;
    }
    Ok(())
}

/// Where a path will be fetched from.
struct Source {
    info: NarInfo,
    cache: BinaryCache,
    /// Which of the caches that is.
    number: usize,
}
