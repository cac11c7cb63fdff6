//! One fetch for all who want the same packages and have the same credentials, and for as long as it takes.
//!
//! A fetch belongs to the driver, not to the call that asked first: kubelet gives a call two minutes, a
//! large closure may need more. Whoever asks again finds the fetch as far as it has got.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use nix_csi_store::StorePath;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::Instrument as _;

use super::error::FetchError;
use super::fetch::{Closure, Progress, Substituter};
use super::login::{Credentials, CredentialsId};

type Outcome = Result<Arc<Closure>, Arc<FetchError>>;

#[derive(Clone)]
struct Running {
    outcome: Shared<BoxFuture<'static, Outcome>>,
    progress: watch::Receiver<Progress>,
    task: AbortHandle,
}

/// A fetch that runs, or one that has ended while nobody looked.
enum Joined {
    Running(Running),
    Kept(Arc<Closure>),
}

/// How long a fetch goes on that nobody waits for. Kubelet asks again within two minutes, as long as there is a pod.
const WANTED: Duration = Duration::from_mins(5);

/// Who wants which fetch, and until when. By the clock that nobody sets.
#[derive(Default)]
struct Leases {
    wanted: HashMap<String, (Key, Instant)>,
    /// What was fetched for them, and they have not heard of yet. Rooted as long as it is here.
    kept: HashMap<Key, Arc<Closure>>,
}

impl Leases {
    fn renew(&mut self, who: &str, key: &Key, now: Instant) {
        self.wanted.insert(who.to_owned(), (key.clone(), now + WANTED));
    }

    fn expire(&mut self, now: Instant) {
        self.wanted.retain(|_, (_, until)| *until > now);
        self.sweep();
    }

    fn end(&mut self, who: &str) -> Option<Key> {
        let ended = self.wanted.remove(who);
        self.sweep();
        ended.map(|(key, _)| key)
    }

    fn keep(&mut self, key: &Key, closure: &Arc<Closure>) {
        if self.wants(key) {
            self.kept.insert(key.clone(), Arc::clone(closure));
        }
    }

    fn sweep(&mut self) {
        let Self { wanted, kept } = self;
        kept.retain(|key, _| wanted.values().any(|(wanted, _)| wanted == key));
    }

    fn wants(&self, key: &Key) -> bool {
        self.wanted.values().any(|(wanted, _)| wanted == key)
    }
}

/// How long it is remembered what caches answered to credentials, and the credentials themselves.
const REMEMBERED: Duration = Duration::from_mins(10);

type Key = (Option<CredentialsId>, Box<[StorePath]>);

/// The fetches under way.
#[derive(Clone)]
pub struct Fetches {
    /// With this node's own credentials.
    substituter: Substituter,
    /// With those of volumes, and when they were last asked for.
    others: Arc<Mutex<HashMap<CredentialsId, (Substituter, Instant)>>>,
    running: Arc<Mutex<HashMap<Key, Running>>>,
    leases: Arc<Mutex<Leases>>,
}

/// How a fetch is, when the patience of a call is at its end.
pub enum Waited {
    /// It is complete.
    Done(Arc<Closure>),
    /// It goes on.
    Running(Progress),
}

impl Fetches {
    /// No fetches yet.
    pub fn new(substituter: Substituter) -> Self {
        Self { substituter, others: Arc::default(), running: Arc::default(), leases: Arc::default() }
    }

    /// The substituter for whoever has `credentials`, or none of their own.
    pub fn substituter(&self, credentials: Option<&Credentials>) -> Substituter {
        let Some(Credentials { logins, id }) = credentials else { return self.substituter.clone() };
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let (substituter, used) = others.entry(*id).or_insert_with(|| (self.substituter.with(logins), now));
        *used = now;
        substituter.clone()
    }

    /// Joins the fetch of `roots` with the same credentials, or begins it, and waits until it ends or `patience` does.
    /// The fetch goes on for `who`, also after this was dropped: until it is released, or has not asked for too long.
    pub async fn wait(
        &self,
        who: &str,
        credentials: Option<&Credentials>,
        roots: &[StorePath],
        patience: impl Future<Output = ()>,
    ) -> Result<Waited, FetchError> {
        let running = match self.join(who, credentials, roots) {
            Joined::Running(running) => running,
            Joined::Kept(closure) => return Ok(Waited::Done(self.ended(who, closure))),
        };
        tokio::select! {
            outcome = running.outcome.clone() => match self.ended(who, outcome) {
                Ok(closure) => Ok(Waited::Done(closure)),
                Err(error) => Err(FetchError::Shared(error)),
            },
            () = patience => Ok(Waited::Running(running.progress.borrow().clone())),
        }
    }

    /// `who` does not want its fetch any more. One that nobody wants ends; what has arrived of it stays.
    pub fn release(&self, who: &str) {
        let released = self.leases().end(who);
        if let Some(key) = released {
            self.end_unless_wanted(&key);
        }
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Ends the fetches that nobody has asked for in a while, and forgets credentials that nobody has used.
    pub fn end_unwanted(&self) {
        let now = Instant::now();
        self.leases().expire(now);
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.retain(|_, (_, used)| now.duration_since(*used) < REMEMBERED);
        drop(others);
        let running: Vec<_> =
            self.running.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        for key in running {
            self.end_unless_wanted(&key);
        }
    }

    fn end_unless_wanted(&self, key: &Key) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock that `join` holds while it takes a lease: nobody joins what ends here.
        if !self.leases().wants(key)
            && let Some(fetch) = running.remove(key)
        {
            tracing::info!(progress = %*fetch.progress.borrow(), "nobody wants this fetch any more");
            fetch.task.abort();
        }
    }

    fn ended<T>(&self, who: &str, outcome: T) -> T {
        self.leases().end(who);
        outcome
    }

    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, who: &str, credentials: Option<&Credentials>, roots: &[StorePath]) -> Joined {
        // The order matters to a view, not to a fetch.
        let mut key = roots.to_vec();
        key.sort_unstable();
        key.dedup();
        let roots: Box<[StorePath]> = key.into();
        let key = (credentials.map(|credentials| credentials.id), roots);
        let substituter = self.substituter(credentials);
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        self.leases().renew(who, &key, Instant::now());
        if let Some(fetch) = running.get(&key) {
            return Joined::Running(fetch.clone());
        }
        if let Some(closure) = self.leases().kept.get(&key) {
            return Joined::Kept(Arc::clone(closure));
        }
        let (sender, progress) = watch::channel(Progress::default());
        let (this, finished) = (self.clone(), key.clone());
        let task = tokio::spawn(
            async move {
                let fetched = substituter.fetch(&finished.1, &sender).await;
                // From here on a new call begins anew, and finds the closure valid or tries again.
                let mut running = this.running.lock().unwrap_or_else(PoisonError::into_inner);
                // It may be another one by now, if this one was ended in this moment.
                if running.get(&finished).is_some_and(|fetch| fetch.task.id() == tokio::task::id()) {
                    running.remove(&finished);
                }
                let outcome = fetched.map(Arc::new).map_err(Arc::new);
                if let Ok(closure) = &outcome {
                    // Kubelet may ask again in two minutes only: until then nothing is to take it away.
                    this.leases().keep(&finished, closure);
                }
                outcome
            }
            .in_current_span(),
        );
        let abort = task.abort_handle();
        let outcome = task.map(|joined| joined.unwrap_or_else(|_| Err(Arc::new(FetchError::Stopped))));
        let fetch = Running { outcome: outcome.boxed().shared(), progress, task: abort };
        running.insert(key, fetch.clone());
        Joined::Running(fetch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_lasts_until_nobody_has_asked_for_five_minutes() {
        let key: Key = (None, Box::default());
        let now = Instant::now();
        let mut leases = Leases::default();
        leases.renew("a", &key, now);
        leases.renew("b", &key, now + WANTED / 2);
        leases.expire(now + WANTED);
        assert!(leases.wants(&key) && leases.wanted.len() == 1, "b asked later");
        leases.expire(now + WANTED * 2);
        assert!(!leases.wants(&key));
    }
}
