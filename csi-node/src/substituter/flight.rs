//! One path under way, for all fetches that need it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use nix_csi_store::{NarInfo, StorePath};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tracing::Instrument as _;

use super::error::FetchError;
use super::fair::Owner;
use super::fetch::Engine;
use super::lookup::{Caches, look_up};
use super::stop::{Stop, Waiting};
use super::turns::{Joining, Turns};
use crate::store::Staged;

type Outcome<T> = Result<Arc<T>, Arc<FetchError>>;
type Awaited<T> = Shared<BoxFuture<'static, Outcome<T>>>;

/// One path on its way. Ends early when the last one who waits for it drops it.
pub(super) struct Flight {
    /// What a cache says of it: known before the path is here.
    pub(super) info: Awaited<NarInfo>,
    /// The path itself.
    pub(super) staged: Awaited<Staged>,
    /// Which cache it comes from.
    pub(super) cache: Arc<Mutex<Option<Arc<str>>>>,
    decoded: Arc<AtomicU64>,
    joining: Joining,
    task: AbortHandle,
    _waiting: Waiting,
}

impl Flight {
    /// NAR bytes restored up to now, those of failed attempts included.
    pub(super) fn decoded(&self) -> u64 {
        self.decoded.load(Ordering::Relaxed)
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// All paths under way with the same credentials.
#[derive(Default)]
pub(super) struct Flights(Mutex<HashMap<StorePath, Weak<Flight>>>);

/// What a flight's task shows of itself.
pub(super) struct Shown {
    pub(super) stop: Stop,
    pub(super) decoded: Arc<AtomicU64>,
    pub(super) cache: Arc<Mutex<Option<Arc<str>>>>,
}

impl Flights {
    /// Joins the path's flight, or begins one: it waits in the turns of `owner` from here on.
    pub(super) fn join(
        &self,
        engine: &Arc<Engine>,
        caches: &Arc<Caches>,
        path: &StorePath,
        owner: Owner,
    ) -> Arc<Flight> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(path).and_then(Weak::upgrade) {
            flight.joining.join(owner);
            return flight;
        }
        if flights.len() >= 1024 && flights.len().is_power_of_two() {
            flights.retain(|_, flight| flight.strong_count() > 0);
        }
        let flight = Arc::new(begin(Arc::clone(engine), Arc::clone(caches), path.clone(), owner));
        flights.insert(path.clone(), Arc::downgrade(&flight));
        flight
    }
}

fn begin(engine: Arc<Engine>, caches: Arc<Caches>, path: StorePath, owner: Owner) -> Flight {
    let (stop, waiting) = Stop::new();
    let (joining, turns) = Turns::of(owner);
    let shown = Shown { stop, decoded: Arc::default(), cache: Arc::default() };
    let (decoded, cache) = (Arc::clone(&shown.decoded), Arc::clone(&shown.cache));
    let (found, info) = oneshot::channel();
    let span = tracing::info_span!("substitute", %path);
    let task = async move {
        let source = match look_up(&caches, &engine.trust, &turns, &path, &[]).await {
            Ok(source) => source,
            Err(error) => {
                let error = Arc::new(error);
                let _ = found.send(Err(Arc::clone(&error)));
                return Err(error);
            }
        };
        let _ = found.send(Ok(Arc::clone(&source.info)));
        engine.obtain(&caches, source, &turns, &shown).await.map(Arc::new).map_err(Arc::new)
    };
    let task = tokio::spawn(task.instrument(span));
    let abort = task.abort_handle();
    let stopped = || Arc::new(FetchError::Stopped);
    let info = info.map(move |info| info.unwrap_or_else(|_| Err(stopped()))).boxed().shared();
    let staged = task.map(move |staged| staged.unwrap_or_else(|_| Err(stopped()))).boxed().shared();
    Flight { info, staged, cache, decoded, joining, task: abort, _waiting: waiting }
}
