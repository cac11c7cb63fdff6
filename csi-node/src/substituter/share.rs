//! One fetch for all who want the same packages, and for as long as it takes.
//!
//! A fetch belongs to the driver, not to the call that asked first: kubelet gives a call two minutes, a
//! large closure may need more. Whoever asks again finds the fetch as far as it has got.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use nix_csi_store::StorePath;
use tokio::sync::watch;
use tracing::Instrument as _;

use super::error::FetchError;
use super::fetch::{Closure, Progress, Substituter};

type Outcome = Result<Arc<Closure>, Arc<FetchError>>;

#[derive(Clone)]
struct Running {
    outcome: Shared<BoxFuture<'static, Outcome>>,
    progress: watch::Receiver<Progress>,
}

/// The fetches under way.
#[derive(Clone)]
pub struct Fetches {
    substituter: Substituter,
    running: Arc<Mutex<HashMap<Box<[StorePath]>, Running>>>,
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
        Self { substituter, running: Arc::default() }
    }

    /// Joins the fetch of `roots`, or begins it, and waits until it ends or `patience` does.
    pub async fn wait(
        &self,
        roots: &[StorePath],
        patience: impl Future<Output = ()>,
    ) -> Result<Waited, FetchError> {
        let running = self.join(roots);
        tokio::select! {
            outcome = running.outcome.clone() => match outcome {
                Ok(closure) => Ok(Waited::Done(closure)),
                Err(error) => Err(FetchError::Shared(error)),
            },
            () = patience => Ok(Waited::Running(running.progress.borrow().clone())),
        }
    }

    fn join(&self, roots: &[StorePath]) -> Running {
        // The order matters to a view, not to a fetch.
        let mut key = roots.to_vec();
        key.sort_unstable();
        key.dedup();
        let key: Box<[StorePath]> = key.into();
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fetch) = running.get(&key) {
            return fetch.clone();
        }
        let (sender, progress) = watch::channel(Progress::default());
        let (this, roots) = (self.clone(), key.clone());
        let task = tokio::spawn(
            async move {
                let fetched = this.substituter.fetch(&roots, &sender).await;
                // From here on a new call begins anew, and finds the closure valid or tries again.
                this.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&roots);
                fetched.map(Arc::new).map_err(Arc::new)
            }
            .in_current_span(),
        );
        let outcome = task.map(|joined| joined.unwrap_or_else(|_| Err(Arc::new(FetchError::Stopped))));
        let fetch = Running { outcome: outcome.boxed().shared(), progress };
        running.insert(key, fetch.clone());
        fetch
    }
}
