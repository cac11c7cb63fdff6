//! The story of a volume: publish and unpublish, from top to bottom.
//!
//! ```text
//! request ─▶ published already? ─▶ closure valid, or fetched ─▶ authorized ─▶ view, or built ─▶ record ─▶ mount
//! ```
//! Both may be called again at any time, also after they were killed half way.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::Code;

use crate::driver::Driver;
use crate::mount::{self, MountError, MountRequest};
use crate::ops::Busy;
use crate::path_error::PathError;
use crate::request::{PublishRequest, RequestError, UnpublishRequest};
use crate::store::{DatabaseError, RegisterError};
use crate::substituter::{CacheError, Closure, Credentials, FetchError, Progress, Waited};
use crate::tenancy::authorize;
use crate::view::{self, ViewError, ViewSpec};
use crate::volume::{Mode, Record, VolumeError};

/// Why a volume is not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The request cannot be served, now or later.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Another call for the volume runs.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The fetch goes on; the next call finds it further on.
    #[error("fetching the closure: {0}; this continues")]
    Fetching(Progress),
    /// The caches are asked whether this namespace may have what is private to others; the next call asks on.
    #[error(
        "the closure is here; asking the caches whether namespace {namespace} may have all of it; this continues"
    )]
    Authorizing {
        /// The namespace.
        namespace: String,
    },
    /// The view is being built; the next call finds it.
    #[error("the closure is here, its view is being built; this continues")]
    Building,
    /// The closure cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The view cannot be built.
    #[error("cannot build the view")]
    View(#[from] ViewError),
    /// The volume's record.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The directory to mount on cannot be made.
    #[error(transparent)]
    Target(PathError),
    /// The same volume, with other arguments.
    #[error("volume {volume} is published at {} with other arguments", target.display())]
    Different {
        /// The volume.
        volume: String,
        /// Where it is.
        target: PathBuf,
    },
    /// The same volume, at another place.
    #[error("volume {volume} is published at {} already", target.display())]
    Elsewhere {
        /// The volume.
        volume: String,
        /// Where it is.
        target: PathBuf,
    },
    /// Something that is not ours.
    #[error("{} is in use by another mount", target.display())]
    Occupied {
        /// The target.
        target: PathBuf,
    },
    /// The driver is ending.
    #[error("the driver is stopping")]
    Stopping,
}

impl PublishError {
    /// What kubelet is told. No `_` arm: each new error chooses whether kubelet may forget the volume.
    pub fn code(&self) -> Code {
        match self {
            Self::Busy(_) | Self::Fetching(_) | Self::Authorizing { .. } | Self::Building => Code::Aborted,
            Self::Fetch(error) => fetch_code(error.root()),
            Self::Request(_) | Self::View(ViewError::Entry(_)) => Code::InvalidArgument,
            Self::View(ViewError::Io(error)) | Self::Volume(VolumeError::Io(error)) | Self::Target(error) => {
                io_code(&error.source)
            }
            Self::Volume(VolumeError::Damaged { .. }) | Self::Mount(_) => Code::Internal,
            Self::Different { .. } | Self::Occupied { .. } => Code::AlreadyExists,
            Self::Elsewhere { .. } => Code::FailedPrecondition,
            Self::Stopping => Code::Unavailable,
        }
    }
}

fn fetch_code(error: &FetchError) -> Code {
    match error {
        FetchError::NotFound { .. } => Code::NotFound,
        FetchError::Untrusted { .. }
        | FetchError::Window { .. }
        | FetchError::OtherContent { .. }
        | FetchError::TooManyPaths { .. }
        | FetchError::TooManyBytes { .. } => Code::FailedPrecondition,
        FetchError::NoSpace { .. } => Code::ResourceExhausted,
        FetchError::Lookup { source, .. } | FetchError::Download { source, .. } => match source {
            CacheError::Unauthorized { .. } => Code::PermissionDenied,
            CacheError::Unreachable { .. } | CacheError::Status { .. } | CacheError::Paused { .. } => {
                Code::Unavailable
            }
            CacheError::Gone { .. } => Code::NotFound,
            CacheError::File { .. } => Code::Internal,
            CacheError::TooLong { .. }
            | CacheError::NarInfo { .. }
            | CacheError::StoreDir { .. }
            | CacheError::Encoding { .. }
            | CacheError::Undecodable { .. }
            | CacheError::OtherPath { .. }
            | CacheError::NarUrl { .. } => Code::DataLoss,
        },
        FetchError::Decode { .. }
        | FetchError::Nar { .. }
        | FetchError::Size { .. }
        | FetchError::ContentAddress { .. }
        | FetchError::Hash { .. } => Code::DataLoss,
        FetchError::Restore { source, .. } | FetchError::Staging(source) => io_code(source),
        FetchError::Register(RegisterError::Io(error)) => io_code(&error.source),
        FetchError::Register(RegisterError::Database(error)) | FetchError::Database(error) => match error {
            DatabaseError::Io(error) => io_code(&error.source),
            DatabaseError::Sqlite(error)
                if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) =>
            {
                Code::ResourceExhausted
            }
            DatabaseError::Sqlite(_)
            | DatabaseError::Schema { .. }
            | DatabaseError::Row(_)
            | DatabaseError::DanglingReference { .. } => Code::Internal,
        },
        FetchError::Provenance(_) | FetchError::Register(RegisterError::Provenance(_)) => Code::Internal,
        FetchError::Stopped | FetchError::Shared(_) => Code::Unavailable,
    }
}

fn io_code(error: &std::io::Error) -> Code {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    // Without inodes the kernel says that there is no space, too.
    if matches!(error.kind(), StorageFull | QuotaExceeded) { Code::ResourceExhausted } else { Code::Internal }
}

impl Driver {
    /// Makes the volume visible at its target. On error nothing is mounted there by this call.
    pub async fn publish(&self, request: PublishRequest) -> Result<(), PublishError> {
        let operation = self.ops.begin(&request.volume)?;
        let spec = ViewSpec {
            packages: request.attributes.paths.clone(),
            entrypoints: request.attributes.entrypoints.clone(),
        };
        let record = Record {
            volume: request.volume,
            target: request.target,
            view: spec.id().to_string(),
            mode: request.mode,
            pod: request.pod,
        };
        if self.is_published(&record)? {
            return Ok(());
        }
        // Two look-ups, whatever the view has in it.
        let known = self.tenants.may_see(&record.pod.namespace, &spec.id());
        let view = match view::find(&self.store, &spec.id()).filter(|_| known) {
            Some(view) => view,
            None => self.make_view(spec, &record.pod.namespace, request.credentials.as_ref()).await?,
        };
        // From here to its end even if the caller goes away: a mount is never left half done.
        let this = self.clone();
        blocking(move || {
            let mounted = this.mount(&view, &record);
            drop(operation);
            mounted
        })
        .await?
    }

    /// Removes the volume and all it wrote. Nothing there is well too.
    pub async fn unpublish(&self, request: UnpublishRequest) -> Result<(), PublishError> {
        let operation = self.ops.begin(&request.volume)?;
        let this = self.clone();
        blocking(move || {
            // A damaged record must not keep a pod from ending.
            let recorded = this.volumes.read(&request.volume).ok().flatten().map(|record| record.target);
            for target in recorded.iter().chain([&request.target]) {
                mount::unmount_and_remove(target)?;
            }
            this.volumes.remove(&this.store, &request.volume)?;
            drop(operation);
            Ok::<_, PublishError>(())
        })
        .await??;
        self.store.empty_trash_later();
        Ok(())
    }

    /// Whether this very volume is at its target. Another one there is an error.
    fn is_published(&self, wanted: &Record) -> Result<bool, PublishError> {
        let mounted = mount::is_mount_point(&wanted.target)?;
        let found = match self.volumes.read(&wanted.volume) {
            // Torn by a power cut: then nothing is mounted either, and it is written anew.
            Err(VolumeError::Damaged { .. }) if !mounted => None,
            found => found?,
        };
        let Some(found) = found else {
            let target = wanted.target.clone();
            return if mounted { Err(PublishError::Occupied { target }) } else { Ok(false) };
        };
        if found.target != wanted.target && mount::is_mount_point(&found.target)? {
            return Err(PublishError::Elsewhere { volume: found.volume.to_string(), target: found.target });
        }
        if mounted && found != *wanted {
            return Err(PublishError::Different { volume: found.volume.to_string(), target: found.target });
        }
        // A record without a mount: the node was restarted, or a call was killed before it mounted.
        Ok(mounted)
    }

    /// Fetches what is missing, asks whether the pod may see it, and builds the view unless it is there: as far as one
    /// call's time goes.
    async fn make_view(
        &self,
        spec: ViewSpec,
        namespace: &str,
        credentials: Option<&Credentials>,
    ) -> Result<PathBuf, PublishError> {
        let id = spec.id();
        let deadline = tokio::time::Instant::now() + self.options.patience;
        let patience = tokio::time::sleep_until(deadline);
        let closure = match self.fetches.wait(credentials, &spec.packages, patience).await? {
            Waited::Done(closure) => closure,
            Waited::Running(progress) => return Err(PublishError::Fetching(progress)),
        };
        let substituter = self.fetches.substituter(credentials);
        let authorized = authorize(&self.store, &substituter, namespace, &spec.packages, &closure);
        match tokio::time::timeout_at(deadline, authorized).await {
            Ok(authorized) => authorized?,
            Err(_) => return Err(PublishError::Authorizing { namespace: namespace.to_owned() }),
        }
        // Goes on when the call ends: the next one finds the view.
        let this = self.clone();
        let building = tokio::spawn(async move { this.build_view(spec, closure).await });
        match tokio::time::timeout_at(deadline, building).await {
            Ok(built) => {
                let view = built.map_err(|_| PublishError::Stopping)??;
                self.tenants.allow(namespace, &id);
                Ok(view)
            }
            Err(_) => Err(PublishError::Building),
        }
    }

    async fn build_view(&self, spec: ViewSpec, closure: Arc<Closure>) -> Result<PathBuf, PublishError> {
        let building = self.building.clone().lock_owned().await;
        if view::find(&self.store, &spec.id()).is_none() {
            self.tenants.forget(&spec.id());
        }
        let store = Arc::clone(&self.store);
        let built = blocking(move || {
            let view = view::build(&store, &spec, &closure.paths);
            // Only now may a collector look at the closure: the view has roots of its own.
            drop((closure, building));
            view
        })
        .await?;
        if built.is_err() {
            self.store.empty_trash_later();
        }
        Ok(built?)
    }

    /// Writes the record, then mounts. A mount that fails takes its record with it, unless the volume was
    /// there before: after a reboot it holds what the pod wrote.
    fn mount(&self, view: &Path, record: &Record) -> Result<(), PublishError> {
        let is_new = !self.volumes.exists(&record.volume);
        let written = self.volumes.write(record).map_err(PublishError::from);
        let mounted = written.and_then(|()| self.mount_at(view, record));
        if mounted.is_err() {
            let _ = mount::unmount_and_remove(&record.target);
            if is_new {
                let _ = self.volumes.remove(&self.store, &record.volume);
            }
        }
        mounted
    }

    fn mount_at(&self, view: &Path, record: &Record) -> Result<(), PublishError> {
        // Only the last directory: if kubelet has removed the pod's own, the pod is gone.
        match std::fs::create_dir(&record.target) {
            Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(PublishError::Target(PathError::on("create", &record.target)(source)));
            }
            _ => {}
        }
        let view = view.to_owned();
        let request = match record.mode {
            Mode::ReadOnly => MountRequest::ReadOnly { view },
            Mode::ReadWrite => {
                let (upper, work) = self.volumes.upper_and_work(&record.volume);
                MountRequest::ReadWrite { view, upper, work }
            }
        };
        Ok(mount::mount(&request, &record.target)?)
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, PublishError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PublishError::Stopping)
}
