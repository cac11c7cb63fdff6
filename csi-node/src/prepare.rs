//! From what a volume wants to its view: fetch, ask whether the pod may see it, build. As far as one call's time goes;
//! what is begun goes on without it, and the next call finds it further on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix_csi_store::StorePath;
use tokio::time::Instant;

use crate::driver::Driver;
use crate::fault;
use crate::kubernetes::Event;
use crate::publish::{PublishError, blocking, chain};
use crate::substituter::{Closure, Credentials, FetchError, Progress, Waited};
use crate::tenancy::authorize;
use crate::usage::Using;
use crate::view::{self, Built, Collisions, ViewId, ViewSpec};
use crate::volume::{Pod, Record, VolumeId};
use crate::wanted::{Wanted, is_left_out, names};

/// When a pod that waits for its closure is told so first, and how often then.
const FIRST_TOLD: Duration = Duration::from_secs(5);
const TOLD: Duration = Duration::from_secs(30);

/// A view that a volume can have.
pub(crate) struct Prepared {
    /// Where it is.
    pub(crate) view: PathBuf,
    /// What it is called.
    pub(crate) id: ViewId,
    /// The base names of optional paths that are not in it.
    pub(crate) left_out: Vec<String>,
    /// Keeps it until a record names it.
    pub(crate) using: Using,
}

/// Whose volume is being prepared, with what, and how much time there is.
struct Call<'a> {
    volume: &'a VolumeId,
    pod: &'a Pod,
    credentials: Option<&'a Credentials>,
    deadline: Instant,
    told: Instant,
}

impl Driver {
    /// The view with all that is wanted, if it is there and it is known that the pod may see it. Two look-ups,
    /// whatever it has in it.
    pub(crate) fn warm(&self, wanted: &Wanted, pod: &Pod) -> Option<Prepared> {
        let id = wanted.complete().id();
        let using = self.usage.begin(id.as_str());
        let known = self.tenants.may_see(&pod.namespace, &id);
        let view = view::find(&self.store, &id).filter(|_| known)?;
        Some(Prepared { view, id, left_out: Vec::new(), using })
    }

    /// Fetches what is missing, asks whether the pod may see it, and builds the view unless it is there.
    pub(crate) async fn prepare(
        &self,
        wanted: Wanted,
        Record { volume, pod, .. }: &Record,
        credentials: Option<&Credentials>,
        patience: Duration,
    ) -> Result<Prepared, PublishError> {
        let start = Instant::now();
        let mut call =
            Call { volume, pod, credentials, deadline: start + patience, told: start + FIRST_TOLD };
        let mut closures = vec![self.obtain(&wanted.spec.packages, &mut call).await?];
        let (mut optional, mut missing) = (Vec::new(), Vec::new());
        for path in wanted.optional.clone() {
            match self.obtain(std::slice::from_ref(&path), &mut call).await {
                Ok(closure) => {
                    closures.push(closure);
                    optional.push(path);
                }
                Err(PublishError::Fetch(error)) if is_left_out(&error) => missing.push((path, error)),
                Err(error) => return Err(error),
            }
        }
        let spec = wanted.with(&optional);
        let id = spec.id();
        // Until a record says that it is in use.
        let using = self.usage.begin(id.as_str());
        let ready = ready(&closures);
        // Goes on when the call ends: the next one finds the view.
        let (this, of) = (self.clone(), pod.clone());
        let building = tokio::spawn(async move { this.build_view(spec, closures, &of).await });
        let Ok(built) = tokio::time::timeout_at(call.deadline, building).await else {
            return Err(PublishError::Building);
        };
        let view = built.map_err(|_| PublishError::Stopping)??;
        self.tenants.allow(&pod.namespace, &id);
        self.options.kubernetes.tell(pod, ready(start.elapsed()));
        if !missing.is_empty() {
            self.metrics.left_out(missing.len());
            self.options.kubernetes.tell(pod, left_out(&missing));
        }
        Ok(Prepared { view, id, left_out: names(missing.iter().map(|(path, _)| path)), using })
    }

    /// The closure of `packages`, which the pod may see.
    async fn obtain(
        &self,
        packages: &[StorePath],
        call: &mut Call<'_>,
    ) -> Result<Arc<Closure>, PublishError> {
        let closure = loop {
            let patience = tokio::time::sleep_until(call.deadline.min(call.told));
            match self.fetches.wait(call.volume.as_str(), call.credentials, packages, patience).await? {
                Waited::Done(closure) => break closure,
                Waited::Running(progress) if Instant::now() >= call.deadline => {
                    return Err(PublishError::Fetching(progress));
                }
                Waited::Running(progress) => {
                    self.options.kubernetes.tell(call.pod, fetching(&progress));
                    call.told += TOLD;
                }
            }
        };
        fault::point("publish.fetched");
        let substituter = self.fetches.substituter(call.credentials);
        let authorized = authorize(&self.store, &substituter, &call.pod.namespace, packages, &closure);
        match tokio::time::timeout_at(call.deadline, authorized).await {
            Ok(authorized) => authorized?,
            // In the same words as if it were not here.
            Err(_) => return Err(PublishError::Fetching(Progress::default())),
        }
        Ok(closure)
    }

    /// Builds the view unless it is there. Whoever has it built is told what there is to say.
    async fn build_view(
        &self,
        spec: ViewSpec,
        closures: Vec<Arc<Closure>>,
        pod: &Pod,
    ) -> Result<PathBuf, PublishError> {
        let id = spec.id();
        let using = self.usage.begin(id.as_str());
        let building = self.building.clone().lock_owned().await;
        if view::find(&self.store, &id).is_none() {
            self.tenants.forget(id.as_str());
        }
        let store = Arc::clone(&self.store);
        let built = blocking(move || {
            let view = view::build_and_tell(&store, &spec, &union(&closures));
            // Only now may a collector look at the closures: the view has roots of its own.
            store.release(closures);
            drop((building, using));
            view
        })
        .await?;
        if built.is_err() {
            self.store.empty_trash_later();
        }
        let Built { path, copied, collisions } = built?;
        self.metrics.built(copied, collisions.count as u64);
        if collisions.count > 0 {
            self.options.kubernetes.tell(pod, collided(&collisions));
        }
        Ok(path)
    }
}

/// Every path of `closures`, sorted.
fn union(closures: &[Arc<Closure>]) -> Vec<StorePath> {
    let mut paths: Vec<_> = closures.iter().flat_map(|closure| &closure.paths).cloned().collect();
    if closures.len() > 1 {
        paths.sort_unstable();
        paths.dedup();
    }
    paths
}

/// What a pod is told that has to wait.
fn fetching(progress: &Progress) -> Event {
    let from = progress.cache.as_ref().map(|cache| format!(" from {cache}")).unwrap_or_default();
    Event { reason: "NixFetching", is_warning: false, message: format!("fetching {progress}{from}") }
}

/// What a pod is told when its closure is there and its view is built.
fn ready(closures: &[Arc<Closure>]) -> impl FnOnce(Duration) -> Event + use<> {
    const MIB: u64 = 1 << 20;
    let paths = union(closures).len();
    // What one of them has fetched is there for the next.
    let fetched: usize = closures.iter().map(|closure| closure.fetched.len()).sum();
    let bytes: u64 = closures.iter().map(|closure| closure.bytes).sum();
    move |elapsed| Event {
        reason: "NixReady",
        is_warning: false,
        message: format!(
            "{paths} store paths are ready after {:.1} s; {fetched} of them were fetched ({} MiB), {} were on the node",
            elapsed.as_secs_f64(),
            bytes.div_ceil(MIB),
            paths - fetched.min(paths),
        ),
    }
}

/// What a pod is told of optional paths that it does without.
fn left_out(missing: &[(StorePath, FetchError)]) -> Event {
    // The names first: they are what must not be cut off.
    let names: Vec<_> = missing.iter().map(|(path, _)| path.to_string()).collect();
    let reasons: Vec<_> = missing.iter().map(|(_, error)| chain(error)).collect();
    let message = format!("the volume does without {}: {}", names.join(", "), reasons.join("; "));
    Event { reason: "NixOptionalMissing", is_warning: true, message }
}

/// What a pod is told of a profile in which not every file of its packages is.
fn collided(Collisions { count, first }: &Collisions) -> Event {
    let shown = first.iter().map(|(at, taken, left)| {
        format!("{} is {} and not {}", at.display(), taken.display(), left.display())
    });
    let more = count - first.len();
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    let message = format!(
        "{count} times several packages have the same file, and the first one's is in /nix/var/result: {}{more}",
        shown.collect::<Vec<_>>().join(", "),
    );
    Event { reason: "NixProfileCollision", is_warning: true, message }
}
