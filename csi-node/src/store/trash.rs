//! Where things go that are not wanted any more: renamed at once, deleted later, beside everything else.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::fault;
use crate::unlink;

/// The trash of one store. A clone is the same.
#[derive(Clone)]
pub(super) struct Trash(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    started: u128,
    names: AtomicU64,
    /// Held by whoever is emptying.
    emptying: Mutex<()>,
    /// Whether somebody will begin to empty it soon.
    asked: AtomicBool,
}

impl Trash {
    pub(super) fn new(dir: PathBuf) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Self(Arc::new(Inner {
            dir,
            started,
            names: AtomicU64::new(0),
            emptying: Mutex::default(),
            asked: AtomicBool::new(false),
        }))
    }

    /// A name that no other call gets, of this process or of an earlier one: in a container the process id
    /// is the same every time, so the time of the start stands for the process.
    pub(super) fn fresh_name(&self) -> String {
        format!("{:x}-{}", self.0.started, self.0.names.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes `path` out of the way at once.
    pub(super) fn discard(&self, path: &Path) -> io::Result<()> {
        // A directory can only change its parent while it is writable to its owner.
        if fs::symlink_metadata(path)?.is_dir() {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        fs::rename(path, self.0.dir.join(self.fresh_name()))
    }

    /// Deletes what was discarded. Slow for large trees. What cannot be deleted is logged and tried again the
    /// next time, and keeps nothing else from being deleted.
    pub(super) fn empty(&self) -> io::Result<()> {
        let _alone = self.0.emptying.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.asked.store(false, Ordering::Release);
        let dir = File::open(&self.0.dir)?;
        for entry in fs::read_dir(&self.0.dir)? {
            let name = entry?.file_name();
            let entry = CString::new(name.as_bytes())?;
            let removed = unlink::remove(&dir, &entry);
            fault::point("trash.begun");
            if let Err(error) = removed {
                let name = name.display();
                tracing::warn!(%error, %name, "cannot delete this from the trash yet");
            }
        }
        Ok(())
    }

    /// Empties it in a thread of its own, unless one is about to.
    pub(super) fn empty_later(&self) {
        if self.0.asked.swap(true, Ordering::AcqRel) {
            return;
        }
        let trash = self.clone();
        let spawned = std::thread::Builder::new().name("trash".to_owned()).spawn(move || {
            if let Err(error) = trash.empty() {
                tracing::warn!(%error, "cannot empty the trash yet");
            }
        });
        if let Err(error) = spawned {
            self.0.asked.store(false, Ordering::Release);
            tracing::warn!(%error, "no thread to empty the trash");
        }
    }
}
