//! Nix's lock files beside store paths, so that a real Nix and this program never write one path together.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use nix_csi_store::StorePath;
use rustix::fs::FlockOperation;

use super::layout::Layout;

/// Locks of several paths; all are free again when this is dropped.
pub(super) struct PathLocks {
    held: Vec<(PathBuf, File)>,
}

impl PathLocks {
    /// Waits until every lock is ours. Sorted, as Nix takes them: no two processes can wait for each other.
    pub(super) fn acquire(layout: &Layout, paths: &[StorePath]) -> io::Result<Self> {
        let mut sorted: Vec<_> = paths.iter().collect();
        sorted.sort_unstable();
        let mut locks = Self { held: Vec::with_capacity(sorted.len()) };
        for path in sorted {
            let mut file = layout.physical(path).into_os_string();
            file.push(".lock");
            let file = PathBuf::from(file);
            let lock = lock_fresh(&file, FlockOperation::LockExclusive)?;
            locks.held.push((file, lock));
        }
        Ok(locks)
    }

    /// Lets go of them in another thread: they keep nobody but others from these paths. Without a thread they go here.
    pub(super) fn release_later(self) -> Option<JoinHandle<()>> {
        std::thread::Builder::new().name("unlock".to_owned()).spawn(move || drop(self)).ok()
    }
}

impl Drop for PathLocks {
    fn drop(&mut self) {
        for (path, file) in &self.held {
            // Whoever waits for this file sees that it is not empty, and begins anew with another.
            let _ = fs::remove_file(path);
            let _ = io::Write::write_all(&mut &*file, b"d");
        }
    }
}

/// Gives back the locks that were held by processes that were killed. Whoever lives keeps theirs.
pub(super) fn remove_stale(layout: &Layout) -> io::Result<()> {
    for entry in fs::read_dir(layout.store_dir())? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        // A store path may have such a name, too: those nobody can write.
        let is_lock = |meta: &fs::Metadata| meta.is_file() && meta.size() == 0 && meta.mode() & 0o200 != 0;
        let opened = fs::symlink_metadata(&path).and_then(|meta| {
            is_lock(&meta).then(|| File::options().read(true).write(true).open(&path)).transpose()
        });
        let file = match opened {
            Ok(Some(file)) => file,
            Ok(None) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let is_free = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if is_free && file.metadata()?.nlink() > 0 {
            drop(PathLocks { held: vec![(path, file)] });
        }
    }
    Ok(())
}

/// Opens a lock file, making it if it is not there.
pub(super) fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Opens and locks a lock file that its last holder did not give up: those are unlinked and not empty.
pub(super) fn lock_fresh(path: &Path, operation: FlockOperation) -> io::Result<File> {
    loop {
        let file = open(path)?;
        rustix::fs::flock(&file, operation)?;
        // On a full disk it stays empty, but not linked.
        let found = file.metadata()?;
        if found.size() == 0 && found.nlink() > 0 {
            return Ok(file);
        }
    }
}
