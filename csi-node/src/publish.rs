//! The story of a volume: publish and unpublish, from top to bottom.
//!
//! ```text
//! request ─▶ published already? ─▶ closure valid, or fetched ─▶ view, or built ─▶ record ─▶ mount
//! ```
//! Both may be called again at any time, also after they were killed half way.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix_csi_store::StorePath;
use tonic::Code;

use crate::driver::Driver;
use crate::mount::{self, MountError, MountRequest};
use crate::ops::Busy;
use crate::request::{PublishRequest, RequestError, UnpublishRequest};
use crate::store::{DatabaseError, RegisterError};
use crate::substituter::{CacheError, Closure, FetchError, Progress, Waited};
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
    #[error("cannot create {}", path.display())]
    Target {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
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
            Self::Request(_) => Code::InvalidArgument,
            Self::Busy(_) | Self::Fetching(_) => Code::Aborted,
            Self::Fetch(error) => fetch_code(error.root()),
            Self::View(ViewError::Entry(_)) => Code::InvalidArgument,
            Self::View(ViewError::Io { source, .. })
            | Self::Volume(VolumeError::Io { source, .. })
            | Self::Target { source, .. } => io_code(source),
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
        FetchError::Untrusted { .. } | FetchError::TooManyPaths { .. } => Code::FailedPrecondition,
        FetchError::Lookup { source, .. } | FetchError::Download { source, .. } => match source {
            CacheError::Unauthorized { .. } => Code::PermissionDenied,
            CacheError::Unreachable { .. } | CacheError::Status { .. } => Code::Unavailable,
            CacheError::TooLong { .. }
            | CacheError::NarInfo { .. }
            | CacheError::OtherPath { .. }
            | CacheError::NarUrl { .. } => Code::DataLoss,
        },
        FetchError::Decode { .. }
        | FetchError::Nar { .. }
        | FetchError::Size { .. }
        | FetchError::Hash { .. } => Code::DataLoss,
        FetchError::Restore { source, .. }
        | FetchError::Staging(source)
        | FetchError::Register(RegisterError::Io { source, .. }) => io_code(source),
        FetchError::Register(RegisterError::Database(error)) | FetchError::Database(error) => match error {
            DatabaseError::Io { source, .. } => io_code(source),
            DatabaseError::Sqlite(_)
            | DatabaseError::Schema { .. }
            | DatabaseError::Row(_)
            | DatabaseError::DanglingReference { .. } => Code::Internal,
        },
        FetchError::Stopped | FetchError::Shared(_) => Code::Unavailable,
    }
}

fn io_code(error: &std::io::Error) -> Code {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
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
        let view = match view::find(&self.store, &spec.id()) {
            Some(view) => view,
            None => self.build_view(spec).await?,
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
        self.empty_trash_later();
        Ok(())
    }

    /// Whether this very volume is at its target. Another one there is an error.
    fn is_published(&self, wanted: &Record) -> Result<bool, PublishError> {
        let mounted = mount::is_mount_point(&wanted.target)?;
        let Some(found) = self.volumes.read(&wanted.volume)? else {
            return if mounted {
                Err(PublishError::Occupied { target: wanted.target.clone() })
            } else {
                Ok(false)
            };
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

    async fn build_view(&self, spec: ViewSpec) -> Result<PathBuf, PublishError> {
        let closure = self.fetch(&spec.packages).await?;
        let building = self.building.clone().lock_owned().await;
        let store = Arc::clone(&self.store);
        blocking(move || {
            let view = view::build(&store, &spec, &closure.paths);
            // Only now may a collector look at the closure: the view has roots of its own.
            drop((closure, building));
            Ok(view?)
        })
        .await?
    }

    async fn fetch(&self, packages: &[StorePath]) -> Result<Arc<Closure>, PublishError> {
        let patience = tokio::time::sleep(self.options.patience);
        match self.fetches.wait(packages, patience).await? {
            Waited::Done(closure) => Ok(closure),
            Waited::Running(progress) => Err(PublishError::Fetching(progress)),
        }
    }

    /// Writes the record, then mounts. A mount that fails takes its record with it.
    fn mount(&self, view: &Path, record: &Record) -> Result<(), PublishError> {
        self.volumes.write(record)?;
        let mounted = self.mount_at(view, record);
        if mounted.is_err() {
            let _ = mount::unmount_and_remove(&record.target);
            let _ = self.volumes.remove(&self.store, &record.volume);
        }
        mounted
    }

    fn mount_at(&self, view: &Path, record: &Record) -> Result<(), PublishError> {
        let target = || record.target.clone();
        std::fs::create_dir_all(&record.target)
            .map_err(|source| PublishError::Target { path: target(), source })?;
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
