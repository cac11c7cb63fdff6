//! Fetching one closure: the walk over narinfos, the paths that arrive beside it, and their registration.

use std::collections::{HashMap, HashSet};
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use nix_csi_store::StorePath;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval_at};

use super::budget::Budget;
use super::cache::BinaryCache;
use super::error::FetchError;
use super::fair::Owner;
use super::flight::{Flight, Flights};
use super::login::Logins;
use super::lookup::{Caches, Source, Trust, look_up};
use super::partial::closed;
use super::pool::RestorePool;
use super::turns::Turns;
use crate::store::{NodeStore, Origin, Staged, TempRoots};

/// What all decoders and buffers take together, unless one alone needs more.
const MEMORY: usize = 40 << 20;
/// A closure that takes longer than this is registered in parts, as far as it is closed.
const PART: Duration = Duration::from_secs(2);
/// How often those who watch are told.
const TOLD: Duration = Duration::from_millis(200);

/// How far a fetch is. Totals grow while the closure is being walked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Paths restored.
    pub paths: u64,
    /// Paths known to be needed.
    pub paths_total: u64,
    /// NAR bytes restored.
    pub bytes: u64,
    /// NAR bytes known to be needed.
    pub bytes_total: u64,
    /// The cache that the largest path under way comes from.
    pub cache: Option<Arc<str>>,
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
    /// Those of them that had to be fetched, and have the content that was fetched.
    pub fetched: HashSet<StorePath>,
    /// The bytes of the NARs of those.
    pub bytes: u64,
    /// How long their registration took, all parts of it together.
    pub registering: Duration,
    _roots: TempRoots,
}

/// How large a closure may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Largest {
    /// Paths of it that are fetched.
    pub paths: usize,
    /// The bytes of their NARs.
    pub bytes: u64,
}

impl Default for Largest {
    /// More than any closure that a pod should mount.
    fn default() -> Self {
        Self { paths: 100_000, bytes: 1 << 40 }
    }
}

/// What all fetches of a node work with, whoever's credentials they have.
pub(super) struct Engine {
    pub(super) store: Arc<NodeStore>,
    pub(super) trust: Trust,
    largest: Largest,
    pub(super) memory: Budget,
    pub(super) pool: RestorePool,
    /// How many paths needed more than the whole memory budget, and ran alone.
    pub(super) alone: AtomicU64,
    /// Paths fetched and registered, and the bytes of their NARs.
    fetched: (AtomicU64, AtomicU64),
    owners: AtomicU64,
}

impl Engine {
    fn next_owner(&self) -> Owner {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }
}

/// Fetches closures into one store, with certain credentials. A clone is the same.
#[derive(Clone)]
pub struct Substituter {
    engine: Arc<Engine>,
    caches: Arc<Caches>,
    /// Only those who have the same credentials share what is under way: an error of others is not theirs.
    flights: Arc<Flights>,
}

impl Substituter {
    /// A substituter with its own restore threads, one for each core.
    pub fn new(
        store: Arc<NodeStore>,
        caches: Vec<BinaryCache>,
        trust: Trust,
        largest: Largest,
    ) -> io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(2, NonZero::get);
        let engine = Engine {
            store,
            trust,
            largest,
            memory: Budget::new(MEMORY, 4),
            pool: RestorePool::start(cores)?,
            alone: AtomicU64::new(0),
            fetched: Default::default(),
            owners: AtomicU64::new(0),
        };
        let caches = Arc::new(Caches { public: caches, private: Vec::new() });
        Ok(Self { engine: Arc::new(engine), caches, flights: Arc::default() })
    }

    /// One with a volume's own credentials. What it fetches with them is written down as private. Threads, memory and
    /// connections are the same.
    pub(super) fn with(&self, logins: &Arc<Logins>) -> Self {
        let public = self.caches.public.clone();
        let private = public.iter().filter_map(|cache| cache.seen_with(logins)).collect();
        let caches = Arc::new(Caches { public, private });
        Self { engine: Arc::clone(&self.engine), caches, flights: Arc::default() }
    }

    /// Asks the caches for paths that are valid: who gives them to whoever has these credentials. The same error as if
    /// they were not valid here.
    pub async fn prove(&self, paths: &[StorePath]) -> Result<Vec<(StorePath, Origin)>, FetchError> {
        let turns = Turns::only(self.engine.next_owner());
        let asked = paths.to_vec();
        let valid = self.blocking(move |store| store.hashes(&asked)).await??;
        let mut answers: FuturesUnordered<_> =
            paths.iter().map(|path| self.who_gives(&turns, path)).collect();
        let mut proved = Vec::new();
        while let Some(source) = answers.next().await {
            let source = source?;
            let path = &source.info.path;
            // Another build of the same path is not what may be seen.
            if valid.get(path) != Some(&source.info.nar_hash) {
                let (path, cache) = (path.clone(), source.cache.name().to_string());
                return Err(FetchError::OtherContent { path, cache });
            }
            proved.push((path.clone(), source.origin()));
        }
        Ok(proved)
    }

    /// The store that it fetches into.
    pub fn store(&self) -> &Arc<NodeStore> {
        &self.engine.store
    }

    /// How many paths needed more memory to decompress than all of them together should take.
    pub fn ran_alone(&self) -> u64 {
        self.engine.alone.load(Ordering::Relaxed)
    }

    /// Who not only knows a path, but gives it: a narinfo is often there for everybody.
    async fn who_gives(&self, turns: &Turns, path: &StorePath) -> Result<Source, FetchError> {
        let mut except = Vec::new();
        let mut refused = None;
        loop {
            let source = match look_up(&self.caches, &self.engine.trust, turns, path, &except).await {
                Ok(source) => source,
                Err(error) => return Err(refused.unwrap_or(error)),
            };
            match source.cache.gives(turns, &source.info).await {
                Ok(()) => return Ok(source),
                Err(error) => {
                    let (path, cache) = (path.clone(), source.cache.name().to_string());
                    refused = Some(FetchError::Download { path, cache, source: error });
                    except.push(source.number);
                }
            }
        }
    }

    /// How many paths were fetched, whoever wanted them, and how many bytes their NARs have.
    pub fn fetched(&self) -> (u64, u64) {
        let (paths, bytes) = &self.engine.fetched;
        (paths.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
    }

    /// Makes the closure of `roots` valid. On error what has arrived and is closed is valid, the rest is gone.
    pub async fn fetch(
        &self,
        roots: &[StorePath],
        progress: &watch::Sender<Progress>,
    ) -> Result<Closure, FetchError> {
        let pins = self.blocking(NodeStore::temp_roots).await??;
        let owner = self.engine.next_owner();
        let mut walk = Walk {
            substituter: self,
            owner,
            pins,
            seen: HashSet::new(),
            fetching: HashMap::new(),
            arrived: HashMap::new(),
            registered: HashSet::new(),
            others: HashSet::new(),
            registering: Duration::ZERO,
            bytes_total: 0,
            bytes_done: 0,
        };
        let walked = walk.run(roots, progress).await;
        // Also after an error: what is complete need not be fetched again.
        let registered = walk.register().await;
        walked?;
        registered?;
        let Walk { pins, mut registered, others, registering, bytes_done, .. } = walk;
        registered.retain(|path| !others.contains(path));
        let roots = roots.to_vec();
        let paths = self.blocking(move |store| store.closure(&roots)).await??.ok_or(FetchError::Stopped)?;
        Ok(Closure { paths, fetched: registered, bytes: bytes_done, registering, _roots: pins })
    }

    /// Fetches one path into staging, although it may be valid.
    pub async fn fetch_again(&self, path: &StorePath) -> Result<Arc<Staged>, FetchError> {
        let owner = self.engine.next_owner();
        let flight = self.flights.join(&self.engine, &self.caches, path, owner);
        flight.staged.clone().await.map_err(FetchError::Shared)
    }

    /// Runs what blocks beside the network's threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&NodeStore) -> T + Send + 'static,
    ) -> Result<T, FetchError> {
        let store = Arc::clone(&self.engine.store);
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(|_| FetchError::Stopped)
    }
}

/// A path that was restored, with its flight: so nobody else fetches it until it is registered.
type Arrived = (Arc<Staged>, Option<Arc<Flight>>);

/// One closure while it is being fetched.
struct Walk<'a> {
    substituter: &'a Substituter,
    owner: Owner,
    pins: TempRoots,
    seen: HashSet<StorePath>,
    /// Needed, and not here yet.
    fetching: HashMap<StorePath, Arc<Flight>>,
    /// Restored, and not registered yet.
    arrived: HashMap<StorePath, Arrived>,
    registered: HashSet<StorePath>,
    /// Those of them that somebody else has registered meanwhile, with another content.
    others: HashSet<StorePath>,
    registering: Duration,
    bytes_total: u64,
    bytes_done: u64,
}

impl Walk<'_> {
    /// Until every path of the closure that was not valid has arrived.
    async fn run(
        &mut self,
        roots: &[StorePath],
        progress: &watch::Sender<Progress>,
    ) -> Result<(), FetchError> {
        let mut infos = FuturesUnordered::new();
        let mut staged = FuturesUnordered::new();
        let start = tokio::time::Instant::now();
        let (mut part, mut told) = (interval_at(start + PART, PART), interval_at(start + TOLD, TOLD));
        for interval in [&mut part, &mut told] {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut found = roots.to_vec();
        let Largest { paths: most_paths, bytes: most_bytes } = self.substituter.engine.largest;
        loop {
            let mut new = HashSet::new();
            found.retain(|path| !self.seen.contains(path) && new.insert(path.clone()));
            let missing = self.missing(std::mem::take(&mut found)).await?;
            self.seen.extend(new);
            for path in missing {
                if self.fetching.len() + self.arrived.len() + self.registered.len() >= most_paths {
                    // Not all of them are on their way, so none counts as valid any more.
                    self.seen.clear();
                    return Err(FetchError::TooManyPaths { limit: most_paths });
                }
                let Substituter { engine, caches, flights } = self.substituter;
                let flight = flights.join(engine, caches, &path, self.owner);
                infos.push(flight.info.clone());
                staged.push(flight.staged.clone());
                self.fetching.insert(path, flight);
            }
            if infos.is_empty() && staged.is_empty() {
                progress.send_replace(self.progress());
                return Ok(());
            }
            tokio::select! {
                Some(info) = infos.next() => {
                    let info = info.map_err(FetchError::Shared)?;
                    self.bytes_total = self.bytes_total.saturating_add(info.nar_size);
                    if self.bytes_total > most_bytes {
                        return Err(FetchError::TooManyBytes { limit: most_bytes });
                    }
                    found.clone_from(&info.references);
                }
                Some(path) = staged.next() => {
                    let path = path.map_err(FetchError::Shared)?;
                    self.bytes_done += path.info.nar_size;
                    let flight = self.fetching.remove(&path.info.path);
                    self.arrived.insert(path.info.path.clone(), (path, flight));
                }
                _ = part.tick() => self.register().await?,
                _ = told.tick() => { progress.send_replace(self.progress()); }
            }
        }
    }

    fn progress(&self) -> Progress {
        let under_way: u64 = self.fetching.values().map(|flight| flight.decoded()).sum();
        let largest = self.fetching.values().max_by_key(|flight| flight.decoded());
        let cache =
            largest.and_then(|flight| flight.cache.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let here = self.arrived.len() + self.registered.len();
        Progress {
            paths: here as u64,
            paths_total: (here + self.fetching.len()) as u64,
            bytes: (self.bytes_done + under_way).min(self.bytes_total),
            bytes_total: self.bytes_total,
            cache,
        }
    }

    /// Those of `paths` that are not valid; all of them are safe from collectors from here on.
    async fn missing(&mut self, paths: Vec<StorePath>) -> Result<Vec<StorePath>, FetchError> {
        if paths.is_empty() {
            return Ok(paths);
        }
        // Short, unless a collector runs.
        let mut roots = self.pins.clone();
        self.substituter
            .blocking(move |store| {
                let valid = store.pin(&mut roots, &paths)?;
                Ok(paths.into_iter().filter(|path| !valid.contains(path)).collect())
            })
            .await?
    }

    /// Registers what has arrived and refers to nothing that has not. What has to wait is written down, so that
    /// it outlives this process.
    async fn register(&mut self) -> Result<(), FetchError> {
        let references: HashMap<_, _> =
            self.arrived.iter().map(|(path, (staged, _))| (path, &staged.info.references[..])).collect();
        // What was seen, and neither is on its way nor has arrived, is valid.
        let is_valid = |path: &StorePath| self.seen.contains(path) && !self.fetching.contains_key(path);
        let ready: HashSet<StorePath> = closed(&references, is_valid).into_iter().cloned().collect();
        let (ready, waiting): (Vec<_>, Vec<_>) =
            self.arrived.drain().partition(|(path, _)| ready.contains(path));
        self.arrived.extend(waiting);
        let waiting: Vec<_> = self.arrived.values().map(|(staged, _)| Arc::clone(staged)).collect();
        if ready.is_empty() && waiting.is_empty() {
            return Ok(());
        }
        let start = std::time::Instant::now();
        let (paths, ready): (Vec<_>, Vec<_>) = ready.into_iter().unzip();
        let registering: Vec<_> = ready.iter().map(|(staged, _): &Arrived| Arc::clone(staged)).collect();
        // Also if this walk is dropped meanwhile: what is being registered stays rooted until it is.
        let pins = self.pins.clone();
        let others = self
            .substituter
            .blocking(move |store| {
                let _pins = pins;
                for staged in waiting {
                    if let Err(error) = staged.record() {
                        tracing::warn!(%error, path = %staged.info.path, "cannot record what was restored");
                    }
                }
                if registering.is_empty() { Ok(Vec::new()) } else { store.register(&registering) }
            })
            .await??;
        let (of_paths, of_bytes) = &self.substituter.engine.fetched;
        of_paths.fetch_add(paths.len() as u64, Ordering::Relaxed);
        let bytes = ready.iter().map(|(staged, _)| staged.info.nar_size).sum();
        of_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.registered.extend(paths);
        self.others.extend(others);
        self.registering += start.elapsed();
        Ok(())
    }
}
