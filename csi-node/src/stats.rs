//! How much a volume holds, and whether it shows what it should.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix_csi_proto::csi::volume_usage::Unit;
use nix_csi_proto::csi::{NodeGetVolumeStatsResponse, VolumeCondition, VolumeUsage};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode as FileMode, OFlags, ResolveFlags};
use tonic::Code;

use crate::driver::Driver;
use crate::mount::{self, MountError};
use crate::path_error::PathError;
use crate::request::StatsRequest;
use crate::volume::{Mode, Record, VolumeError, VolumeId};

/// More views than this are not kept in mind.
const MANY_VIEWS: usize = 10_000;

/// Why nothing can be said of a volume.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// Nothing is known of it.
    #[error("there is no volume {volume} at {path:?} on this node")]
    NotFound {
        /// The volume.
        volume: VolumeId,
        /// Where it should be.
        path: String,
    },
    /// Its record.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Its mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Its files.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The driver is ending.
    #[error("the driver is stopping")]
    Stopping,
}

impl StatsError {
    /// What kubelet is told.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::Volume(_) | Self::Mount(_) | Self::Io(_) => Code::Internal,
            Self::Stopping => Code::Unavailable,
        }
    }
}

/// What files take: bytes on the disk, and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Size {
    bytes: u64,
    inodes: u64,
}

/// The sizes of views, which do not change. A clone is the same.
#[derive(Clone, Default)]
pub(crate) struct ViewSizes(Arc<Mutex<HashMap<String, Size>>>);

impl ViewSizes {
    /// The size of a view that is at `at`, measured once.
    fn of(&self, view: &str, at: &Path) -> io::Result<Size> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(view).copied();
        if let Some(size) = known {
            return Ok(size);
        }
        let size = size_of(at)?;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MANY_VIEWS {
            known.clear();
        }
        known.insert(view.to_owned(), size);
        Ok(size)
    }
}

impl Driver {
    /// What there is to say about a volume at its target. Blocks.
    pub(crate) fn stats(&self, request: &StatsRequest) -> Result<NodeGetVolumeStatsResponse, StatsError> {
        let StatsRequest { volume, path } = request;
        let not_found = || StatsError::NotFound { volume: volume.clone(), path: path.clone() };
        let record = self.volumes.read(volume)?.ok_or_else(not_found)?;
        if record.target != Path::new(path) || !mount::is_mount_point(&record.target)? {
            return Err(not_found());
        }
        let usage = self.usage_of(&record)?;
        Ok(NodeGetVolumeStatsResponse { usage, volume_condition: Some(self.condition(&record)) })
    }

    fn usage_of(&self, record: &Record) -> Result<Vec<VolumeUsage>, PathError> {
        if record.mode == Mode::ReadOnly {
            let Size { bytes, inodes } = self
                .view_sizes
                .of(&record.view, &record.target)
                .map_err(PathError::on("measure", &record.target))?;
            // As full as it ever will be.
            return Ok(vec![usage(Unit::Bytes, bytes, 0, bytes), usage(Unit::Inodes, inodes, 0, inodes)]);
        }
        // Of an overlay these are the numbers of what it writes into: of its own limit if it has one, else of the disk.
        let stat = rustix::fs::statvfs(&record.target).map_err(PathError::on("measure", &record.target))?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        let used = if record.limit.is_some() {
            let of = |all: u64, free: u64| all.saturating_sub(free);
            Size { bytes: bytes(of(stat.f_blocks, stat.f_bfree)), inodes: of(stat.f_files, stat.f_ffree) }
        } else {
            let (upper, _) = self.volumes.upper_and_work(&record.volume);
            size_of(&upper).map_err(PathError::on("measure", &upper))?
        };
        Ok(vec![
            usage(Unit::Bytes, bytes(stat.f_blocks), bytes(stat.f_bavail), used.bytes),
            usage(Unit::Inodes, stat.f_files, stat.f_favail, used.inodes),
        ])
    }

    /// Whether the volume shows what is in the node store now. A view that was retired shows files that were found
    /// damaged.
    fn condition(&self, record: &Record) -> VolumeCondition {
        let view = self.store.layout().views().join(&record.view);
        let inode = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
        let is_current = match record.mode {
            Mode::ReadOnly => inode(&view) == inode(&record.target),
            // An overlay has inodes of its own.
            Mode::ReadWrite => view.is_dir(),
        };
        if is_current {
            VolumeCondition { abnormal: false, message: "the volume shows its packages".to_owned() }
        } else {
            let message = "files of this volume were found damaged and are repaired, but it shows the damaged ones: \
                           delete the pod";
            VolumeCondition { abnormal: true, message: message.to_owned() }
        }
    }
}

fn usage(unit: Unit, total: u64, available: u64, used: u64) -> VolumeUsage {
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    VolumeUsage { unit: unit.into(), total: number(total), available: number(available), used: number(used) }
}

/// What is below `root`, and takes. No link is followed: what a pod wrote leads nowhere.
fn size_of(root: &Path) -> io::Result<Size> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::openat(CWD, root, flags, FileMode::empty())?;
    let mut size = Size::default();
    let mut open = vec![PathBuf::from(".")];
    while let Some(at) = open.pop() {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        // Gone meanwhile, or nested deeper than a path can say: what cannot be seen is not counted.
        let Ok(dir) = rustix::fs::openat2(&top, &at, flags, FileMode::empty(), resolve) else { continue };
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if matches!(name.as_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            size.bytes += u64::try_from(stat.st_blocks).unwrap_or_default() * 512;
            size.inodes += 1;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                open.push(at.join(name));
            }
        }
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_below_is_counted_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/file"), vec![1; 100_000]).unwrap();
        symlink("/", dir.path().join("a/out")).unwrap();
        let size = size_of(dir.path()).unwrap();
        assert_eq!(size.inodes, 4);
        assert!((100_000..200_000).contains(&size.bytes), "{size:?}");
        assert!(size_of(&dir.path().join("a/out")).is_err());
    }

    #[test]
    fn a_view_is_measured_once() {
        let dir = tempfile::tempdir().unwrap();
        let sizes = ViewSizes::default();
        assert_eq!(sizes.of("v", dir.path()).unwrap(), Size::default());
        fs::write(dir.path().join("file"), "x").unwrap();
        assert_eq!(sizes.of("v", dir.path()).unwrap(), Size::default());
        assert_eq!(sizes.of("w", dir.path()).unwrap().inodes, 1);
    }
}
