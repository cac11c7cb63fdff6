//! The node store: a real Nix store under a directory of the host, written without Nix.
//!
//! ```text
//! <root>/format                     integer, see [`layout`]
//! <root>/lock                       held by the one process that writes
//! <root>/boot                       the boot in which the views were built
//! <root>/nix/store/<hash>-<name>    sealed: 0444 or 0555, mtime 1
//! <root>/nix/var/nix/db/db.sqlite   what is valid: Nix's schema, Nix's locks
//! <root>/nix/var/nix/gcroots/nix-csi/<view>/<n>
//! <root>/staging/<fetch>            paths are restored here: a real GC deletes strangers in the store
//! <root>/views/<view>, <root>/volumes/<volume>, <root>/trash
//! ```
//! **Invariant:** a path is in the database only after every byte of it was verified and is in its place.
//! **Invariant:** paths in the database and in roots are logical (`/nix/store/…`), never `<root>/…`.

mod db;
mod layout;
mod locks;
mod roots;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use nix_csi_store::StorePath;

pub use db::{DatabaseError, PathInfo};
pub use layout::{Layout, OpenError, RootLock};
pub use roots::TempRoots;

use crate::path_error::PathError;
use db::Database;

/// Why restored paths could not be made part of the store.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The database would not take it.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

/// A path that was restored and verified, and waits to be moved into the store.
#[derive(Debug)]
pub struct Staged {
    /// What will be registered.
    pub info: PathInfo,
    /// Where it is.
    pub at: PathBuf,
}

/// The store of one node. All of it blocks, none of it for long.
pub struct NodeStore {
    layout: Layout,
    db: Database,
    started: u128,
    names: AtomicU64,
}

impl NodeStore {
    /// Opens the store under `root`, making what is missing.
    pub fn open(root: &Path) -> Result<Self, OpenError> {
        let layout = Layout::open(root)?;
        let db = Database::open(&layout)?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Ok(Self { layout, db, started, names: AtomicU64::new(0) })
    }

    /// Where things are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// A new, empty directory for a fetch.
    pub fn staging(&self) -> io::Result<PathBuf> {
        let dir = self.layout.staging().join(self.fresh_name());
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// A name that no other call gets, of this process or of an earlier one: in a container the process id
    /// is the same every time, so the time of the start stands for the process.
    pub fn fresh_name(&self) -> String {
        let n = self.names.fetch_add(1, Ordering::Relaxed);
        format!("{:x}-{n}", self.started)
    }

    /// Keeps `paths` from any collector, then says which of them are valid. In this order, and no other.
    pub fn pin(
        &self,
        roots: &mut TempRoots,
        paths: &[StorePath],
    ) -> Result<HashSet<StorePath>, RegisterError> {
        let at = self.layout.temp_roots();
        roots.add(paths).map_err(PathError::on("write", &at))?;
        Ok(self.db.valid(paths)?)
    }

    /// New temporary roots; they hold as long as the value lives.
    pub fn temp_roots(&self) -> Result<TempRoots, RegisterError> {
        let roots = TempRoots::create(&self.layout);
        Ok(roots.map_err(PathError::on("create a temporary root in", &self.layout.temp_roots()))?)
    }

    /// All that `roots` refer to, themselves included, sorted; `None` if one of them is not valid.
    pub fn closure(&self, roots: &[StorePath]) -> Result<Option<Vec<StorePath>>, DatabaseError> {
        if self.db.valid(roots)?.len() < roots.len() {
            return Ok(None);
        }
        self.db.closure(roots).map(Some)
    }

    /// Moves restored paths into the store and registers them, in one transaction.
    ///
    /// All references must be valid already or among `staged`, and temporary roots must hold them all.
    /// Whatever another process registered in the meantime stays as it is. On error nothing of `staged`
    /// is registered; what was moved already is cleared away by the next try.
    pub fn register(&self, staged: &[Staged]) -> Result<(), RegisterError> {
        let paths: Vec<_> = staged.iter().map(|staged| staged.info.path.clone()).collect();
        let _locks = locks::PathLocks::acquire(&self.layout, &paths)
            .map_err(PathError::on("lock paths in", &self.layout.store_dir()))?;
        let valid = self.db.valid(&paths)?;
        let mut fresh = Vec::with_capacity(staged.len());
        for Staged { info, at } in staged.iter().filter(|staged| !valid.contains(&staged.info.path)) {
            let target = self.layout.physical(&info.path);
            if fs::symlink_metadata(&target).is_ok() {
                // Left by somebody who was interrupted before registering it.
                self.discard(&target).map_err(PathError::on("clear away", &target))?;
            }
            fs::rename(at, &target).map_err(PathError::on("move into place", &target))?;
            seal_top(&target).map_err(PathError::on("seal", &target))?;
            fresh.push(info);
        }
        // A row must not survive a power cut that the bytes do not: contents first, then the commit.
        self.sync().map_err(PathError::on("sync", self.layout.root()))?;
        Ok(self.db.register(&fresh)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(fs::File::open(self.layout.root())?)?)
    }

    /// Writes the permanent roots of a view, which a real collector honours too.
    pub fn add_roots(&self, view: &str, paths: &[StorePath]) -> io::Result<()> {
        roots::add_permanent(&self.layout, view, paths)
    }

    /// Removes the roots of a view that is not there any more.
    pub fn remove_roots(&self, view: &str) -> io::Result<()> {
        roots::remove_permanent(&self.layout, view)
    }

    /// Takes `path` out of the way at once; it is unlinked by [`NodeStore::empty_trash`].
    pub fn discard(&self, path: &Path) -> io::Result<()> {
        // A directory can only change its parent while it is writable to its owner.
        if fs::symlink_metadata(path)?.is_dir() {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        fs::rename(path, self.layout.trash().join(self.fresh_name()))
    }

    /// Discards what a process that was killed left: half fetched paths and half built views.
    ///
    /// Only the holder of the root's lock may do it, and only before it begins to work.
    pub fn clear_leftovers(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.layout.staging())? {
            self.discard(&entry?.path())?;
        }
        // A view is not synced when it is built: after a boot, when nothing is mounted, all are built anew.
        let rebooted = !self.is_same_boot()?;
        for entry in fs::read_dir(self.layout.views())? {
            let entry = entry?;
            if rebooted || entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.discard(&entry.path())?;
            }
        }
        // A view is rooted before it is built, so roots may be there without it.
        for entry in fs::read_dir(self.layout.view_roots())? {
            let name = entry?.file_name();
            if !self.layout.views().join(&name).is_dir() {
                fs::remove_dir_all(self.layout.view_roots().join(&name))?;
            }
        }
        roots::remove_stale_temporary(&self.layout)
    }

    /// Whether the machine has not been started since the last call of this; remembers the boot.
    fn is_same_boot(&self) -> io::Result<bool> {
        let file = self.layout.root().join("boot");
        let now = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        if fs::read_to_string(&file).is_ok_and(|then| then == now) {
            return Ok(true);
        }
        fs::write(file, now)?;
        Ok(false)
    }

    /// Deletes what was discarded. Slow for large trees; nothing waits for it. What cannot be deleted is
    /// logged and tried again the next time, and keeps nothing else from being deleted.
    pub fn empty_trash(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.layout.trash())? {
            let path = entry?.path();
            let removed = if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            match removed {
                // Somebody else may be emptying it too.
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, path = %path.display(), "cannot delete this from the trash yet");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Seals the top of a restored path, which had to stay writable to be moved.
fn seal_top(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return Ok(());
    }
    let dir = fs::File::open(path)?;
    rustix::fs::fchmod(&dir, rustix::fs::Mode::from_raw_mode(0o555))?;
    Ok(rustix::fs::futimens(&dir, &crate::restore::STORE_TIME)?)
}
