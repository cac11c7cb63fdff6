//! The story of a volume: publish and unpublish, from top to bottom.
//!
//! ```text
//! request ─▶ published already? ─▶ closure valid, or fetched ─▶ authorized ─▶ view, or built ─▶ record ─▶ mount
//! ```
//! Both may be called again at any time, also after they were killed half way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix_csi_proto::volume::{Medium, VolumeAttributes};
use tonic::Code;

use crate::driver::Driver;
use crate::fault;
use crate::kubernetes::Event;
use crate::limit::{self, LimitError, Node};
use crate::mount::{self, MountError, MountRequest};
use crate::ops::Busy;
use crate::path_error::PathError;
use crate::prepare::Prepared;
use crate::request::{PublishRequest, RequestError, UnpublishRequest};
use crate::store::{DatabaseError, ProvenanceError, RegisterError};
use crate::substituter::{CacheError, FetchError, Progress};
use crate::view::{ViewError, ViewSpec};
use crate::volume::{Limit, Mode, Pod, Record, VolumeError, VolumeId};
use crate::wanted::Wanted;

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
    /// Nobody waits for the volume.
    #[error("pod {namespace}/{name} is gone or being deleted, so its volume is not needed any more")]
    PodGone {
        /// The pod's namespace.
        namespace: String,
        /// Its name.
        name: String,
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
    /// The pod may not write, or not so much.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Nobody knows how much is free.
    #[error(transparent)]
    Space(PathError),
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
    /// A file of it was found to be damaged between the look-up and the mount.
    #[error(
        "the view was retired while it was about to be mounted, since its files were damaged; a new one is built"
    )]
    Retired,
    /// The driver is ending.
    #[error("the driver is stopping")]
    Stopping,
}

impl PublishError {
    /// What kubelet is told. No `_` arm: each new error chooses whether kubelet may forget the volume.
    pub fn code(&self) -> Code {
        match self {
            // Not final after all: then kubelet unpublishes what may be half there.
            Self::Busy(_) | Self::Fetching(_) | Self::PodGone { .. } | Self::Building | Self::Retired => {
                Code::Aborted
            }
            Self::Fetch(error) => fetch_code(error.root()),
            Self::Request(_) | Self::View(ViewError::Entry(_)) => Code::InvalidArgument,
            Self::View(ViewError::Io(error))
            | Self::Volume(VolumeError::Io(error))
            | Self::Target(error)
            | Self::Space(error) => io_code(&error.source),
            Self::View(ViewError::Database(error)) => database_code(error),
            Self::Limit(LimitError::Missing { .. } | LimitError::TooMuch { .. }) => Code::PermissionDenied,
            Self::Limit(LimitError::Low) => Code::ResourceExhausted,
            Self::Volume(VolumeError::Damaged { .. })
            | Self::View(ViewError::OtherFilesystem { .. })
            | Self::Mount(_) => Code::Internal,
            Self::Different { .. } | Self::Occupied { .. } => Code::AlreadyExists,
            Self::Elsewhere { .. } | Self::Limit(LimitError::NotEnforced { .. }) => Code::FailedPrecondition,
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
            CacheError::Unreachable { .. }
            | CacheError::Cut { .. }
            | CacheError::Status { .. }
            | CacheError::Paused { .. } => Code::Unavailable,
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
        FetchError::Register(RegisterError::Database(error)) | FetchError::Database(error) => {
            database_code(error)
        }
        FetchError::Provenance(error) | FetchError::Register(RegisterError::Provenance(error)) => match error
        {
            ProvenanceError::Sqlite { source, .. } => sqlite_code(source),
            ProvenanceError::Version { .. } => Code::Internal,
        },
        FetchError::Stopped | FetchError::Shared(_) => Code::Unavailable,
    }
}

fn database_code(error: &DatabaseError) -> Code {
    match error {
        DatabaseError::Io(error) => io_code(&error.source),
        DatabaseError::Sqlite(error) => sqlite_code(error),
        DatabaseError::Schema { .. } | DatabaseError::Row(_) | DatabaseError::DanglingReference { .. } => {
            Code::Internal
        }
    }
}

fn sqlite_code(error: &rusqlite::Error) -> Code {
    let is_full = error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull);
    if is_full { Code::ResourceExhausted } else { Code::Internal }
}

fn io_code(error: &std::io::Error) -> Code {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    // Without inodes the kernel says that there is no space, too.
    if matches!(error.kind(), StorageFull | QuotaExceeded) { Code::ResourceExhausted } else { Code::Internal }
}

impl Driver {
    /// Makes the volume visible at its target. On error nothing is mounted there by this call.
    pub async fn publish(&self, request: PublishRequest, patience: Duration) -> Result<(), PublishError> {
        let start = tokio::time::Instant::now();
        let operation = self.ops.begin(&request.volume)?;
        let PublishRequest { volume, target, mode, attributes, pod, credentials } = request;
        let VolumeAttributes { paths: packages, optional, entrypoints, database, size_limit, medium } =
            attributes;
        let limit = size_limit.map(|bytes| Limit { bytes, medium });
        let mut wanted = Wanted { spec: ViewSpec { packages, entrypoints, database }, optional };
        let (view, optional) = (wanted.complete().id().to_string(), wanted.record());
        let mut record = Record { volume, target, view, mode, pod, optional, limit };
        let found = match self.find(&record)? {
            Found::Published => return Ok(()),
            Found::Recorded(found) => Some(found),
            Found::Nothing => None,
        };
        if mode == Mode::ReadWrite {
            self.check_limit(&record, found.is_none())?;
        }
        // What the pod wrote lies over the view that it had.
        if let Some(optional) =
            found.filter(|found| found.mode == Mode::ReadWrite).and_then(|found| found.optional)
        {
            wanted = wanted.kept_as(&optional);
            record.optional = Some(optional);
        }
        let warm = self.warm(&wanted, &record.pod);
        let is_warm = warm.is_some();
        let prepared = if let Some(warm) = warm {
            warm
        } else {
            tokio::select! {
                prepared = self.prepare(wanted, &record, credentials.as_ref(), patience) => prepared?,
                () = self.options.kubernetes.gone(&record.pod) => {
                    self.fetches.release(record.volume.as_str());
                    let Pod { namespace, name, .. } = record.pod;
                    return Err(PublishError::PodGone { namespace, name });
                }
            }
        };
        let Prepared { view, id, left_out, using } = prepared;
        record.view = id.to_string();
        if let Some(optional) = record.optional.as_mut().filter(|_| !left_out.is_empty()) {
            optional.left_out = left_out;
        }
        // From here to its end even if the caller goes away: a mount is never left half done.
        let this = self.clone();
        blocking(move || {
            let mounted = this.mount(&view, &record);
            fault::point("publish.mounted");
            // The record says it from here on.
            drop((using, operation));
            mounted
        })
        .await??;
        self.metrics.published(is_warm, start.elapsed());
        Ok(())
    }

    /// Tells the pod why it has no volume. What merely takes its time is told by itself.
    pub(crate) fn tell_failure(&self, pod: &Pod, code: Code, message: &str) {
        let reason = match code {
            Code::Aborted => return,
            Code::InvalidArgument => "NixInvalidRequest",
            Code::NotFound => "NixNotFound",
            Code::PermissionDenied => "NixPermissionDenied",
            Code::FailedPrecondition => "NixFailedPrecondition",
            Code::ResourceExhausted => "NixNoSpace",
            Code::Unavailable => "NixUnavailable",
            Code::DataLoss => "NixDataLoss",
            _ => "NixFailed",
        };
        let message = message.to_owned();
        self.options.kubernetes.tell(pod, Event { reason, is_warning: true, message });
    }

    /// The next call for a volume that found the disk full may find some of it free.
    pub(crate) fn make_room_for(&self, error: &PublishError) {
        match error {
            PublishError::Fetch(error) if let FetchError::NoSpace { source, .. } = error.root() => {
                self.collector.make_room(source.needed);
            }
            error if error.code() == Code::ResourceExhausted => self.collector.make_room(0),
            _ => {}
        }
    }

    /// Removes the volume and all it wrote. Nothing there is well too.
    pub async fn unpublish(&self, request: UnpublishRequest) -> Result<(), PublishError> {
        self.fetches.release(request.volume.as_str());
        let operation = self.ops.begin(&request.volume)?;
        let this = self.clone();
        blocking(move || {
            // A damaged record must not keep a pod from ending.
            let recorded = this.volumes.read(&request.volume).ok().flatten();
            let target = recorded.as_ref().map(|record| &record.target);
            for target in target.into_iter().chain([&request.target]) {
                mount::unmount_and_remove(target)?;
            }
            fault::point("unpublish.unmounted");
            this.forget(&request.volume)?;
            fault::point("unpublish.forgotten");
            if let Some(record) = recorded {
                this.usage.touch(&record.view);
            }
            drop(operation);
            Ok::<_, PublishError>(())
        })
        .await??;
        self.store.empty_trash_later();
        Ok(())
    }

    /// Deletes all there is of a volume that is not mounted any more.
    pub(crate) fn forget(&self, volume: &VolumeId) -> Result<(), PublishError> {
        // Of a call that was killed while it was there.
        mount::unmount_and_remove(&self.volumes.memory(volume))?;
        Ok(self.volumes.remove(&self.store, volume)?)
    }

    /// What there is of this very volume. Another one at its target is an error.
    fn find(&self, wanted: &Record) -> Result<Found, PublishError> {
        let mounted = mount::is_mount_point(&wanted.target)?;
        let found = match self.volumes.read(&wanted.volume) {
            // Torn by a power cut: then nothing is mounted either, and it is written anew.
            Err(VolumeError::Damaged { .. }) if !mounted => None,
            found => found?,
        };
        let Some(found) = found else {
            let target = wanted.target.clone();
            return if mounted { Err(PublishError::Occupied { target }) } else { Ok(Found::Nothing) };
        };
        if found.target != wanted.target && mount::is_mount_point(&found.target)? {
            return Err(PublishError::Elsewhere { volume: found.volume.to_string(), target: found.target });
        }
        match (mounted, found.is_for(wanted)) {
            (true, true) => Ok(Found::Published),
            (true, false) => {
                Err(PublishError::Different { volume: found.volume.to_string(), target: found.target })
            }
            (false, true) => Ok(Found::Recorded(Box::new(found))),
            // Nothing shows it, so it is written anew.
            (false, false) => Ok(Found::Nothing),
        }
    }

    /// Whether the pod may write as much as it wants to. One that has begun to may go on.
    fn check_limit(&self, record: &Record, is_new: bool) -> Result<(), PublishError> {
        let node = Node {
            most: self.options.max_size_limit,
            has_quotas: self.has_quotas,
            is_low: is_new && self.collector.is_low().map_err(PublishError::Space)?,
        };
        Ok(limit::check(record.limit, is_new, node, || self.store.layout().root().to_owned())?)
    }

    /// Writes the record, then mounts. A mount that fails takes its record with it, unless the volume was
    /// there before: after a reboot it holds what the pod wrote.
    fn mount(&self, view: &Path, record: &Record) -> Result<(), PublishError> {
        fault::point("publish.found");
        let is_new = !self.volumes.exists(&record.volume);
        let written = self.volumes.write(record).map_err(PublishError::from);
        fault::point("publish.recorded");
        let mounted = written.and_then(|()| self.mount_at(view, record));
        if mounted.is_err() {
            let _ = mount::unmount_and_remove(&record.target);
            if is_new {
                let _ = self.forget(&record.volume);
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
        fault::point("publish.target-made");
        let shown = view.to_owned();
        let request = match record.mode {
            Mode::ReadOnly => MountRequest::ReadOnly { view: shown },
            Mode::ReadWrite => match record.limit {
                Some(Limit { bytes, medium: Medium::Memory }) => {
                    let memory = self.volumes.memory(&record.volume);
                    MountRequest::ReadWriteInMemory { view: shown, memory, bytes }
                }
                limit => {
                    let (upper, work) = self.volumes.upper_and_work(&record.volume);
                    let limit = limit.map(|limit| limit.bytes);
                    MountRequest::ReadWrite { view: shown, upper, work, limit }
                }
            },
        };
        match mount::mount(&request, &record.target) {
            Err(_) if !view.is_dir() => Err(PublishError::Retired),
            mounted => Ok(mounted?),
        }
    }
}

/// What there is of a volume.
enum Found {
    /// It is at its target.
    Published,
    /// A record without a mount: the node was restarted, or a call was killed before it mounted.
    Recorded(Box<Record>),
    /// Nothing of it.
    Nothing,
}

/// An error with all its causes: what becomes the text of the pod's event.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Transparent errors and libraries repeat what is inside them.
        if !message.ends_with(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
    message
}

/// Runs what blocks beside the threads of calls.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, PublishError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PublishError::Stopping)
}
