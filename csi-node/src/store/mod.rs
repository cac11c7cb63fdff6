//! The node store: a real Nix store under a directory of the host, written without Nix.
//!
//! ```text
//! <root>/format                     integer, see [`layout`]
//! <root>/lock                       held by the one process that writes
//! <root>/control.sock               where commands reach that process
//! <root>/durable                    what a power cut cannot take any more, see [`durable`]
//! <root>/provenance.sqlite          where paths came from, see [`provenance`]
//! <root>/nix/store/<hash>-<name>    sealed: 0444 or 0555, mtime 1
//! <root>/nix/var/nix/db/db.sqlite   what is valid: Nix's schema, Nix's locks
//! <root>/nix/var/nix/gcroots/nix-csi/<view>/<n>
//! <root>/staging/<n>                paths are restored here: a real GC deletes strangers in the store
//! <root>/views/<view>, <root>/volumes/<volume>, <root>/trash
//! ```
//! **Invariant:** a path is in the database only after every byte of it was verified and is in its place.
//! **Invariant:** paths in the database and in roots are logical (`/nix/store/…`), never `<root>/…`.

mod collect;
mod db;
mod durable;
mod graph;
mod layout;
mod locks;
mod provenance;
mod roots;
mod staging;
mod trash;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix_csi_store::{NarHash, StorePath};
use rustix::fs::CWD;

pub use collect::Collected;
pub use db::{DatabaseError, PathInfo};
pub use graph::Graph;
pub use layout::{Layout, OpenError, RootLock, control_socket};
pub use provenance::{Origin, ProvenanceError};
pub use roots::TempRoots;
pub use staging::{NoSpace, Place, Staged, Staging};

use crate::fault;
use crate::path_error::PathError;
use db::Database;
use durable::{Durable, Known};
use provenance::Provenance;
use trash::Trash;

/// Why restored paths could not be made part of the store.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The database would not take it.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Nor could be written down where they came from.
    #[error(transparent)]
    Provenance(#[from] ProvenanceError),
}

/// From this many paths on, a second thread moves half of them.
const MANY: usize = 16;

/// The store of one node. All of it blocks, none of it for long.
pub struct NodeStore {
    layout: Layout,
    db: Database,
    provenance: Provenance,
    trash: Trash,
    staging: Staging,
    durable: Durable,
    known: Known,
    /// Threads that give path locks back.
    unlocking: Mutex<Vec<JoinHandle<()>>>,
}

impl NodeStore {
    /// Opens the store under `root`, making what is missing.
    pub fn open(root: &Path) -> Result<Self, OpenError> {
        let layout = Layout::open(root)?;
        let db = Database::open(&layout)?;
        let provenance = Provenance::open(&layout.provenance())?;
        let trash = Trash::new(layout.trash());
        let staging = Staging::open(layout.staging(), trash.clone())
            .map_err(PathError::on("open", &layout.staging()))?;
        let (durable, known) = Durable::open(layout.root()).map_err(PathError::on("open", layout.root()))?;
        Ok(Self { layout, db, provenance, trash, staging, durable, known, unlocking: Mutex::default() })
    }

    /// Where things are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where paths are restored.
    pub fn staging(&self) -> &Staging {
        &self.staging
    }

    /// A name that no other call gets, of this process or of an earlier one.
    pub fn fresh_name(&self) -> String {
        self.trash.fresh_name()
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

    /// Moves restored paths into the store and registers them, in one transaction. They are valid then, and on
    /// the disk after the next [`NodeStore::sync`].
    ///
    /// All references must be valid already or among `staged`, and temporary roots must hold them all.
    /// Whatever another process registered in the meantime stays as it is. On error nothing of `staged`
    /// is registered; what was moved already is cleared away by the next try. Gives back those of `staged` that are
    /// valid with another content.
    pub fn register(&self, staged: &[Arc<Staged>]) -> Result<Vec<StorePath>, RegisterError> {
        let paths: Vec<_> = staged.iter().map(|staged| staged.info.path.clone()).collect();
        let locks = locks::PathLocks::acquire(&self.layout, &paths)
            .map_err(PathError::on("lock paths in", &self.layout.store_dir()))?;
        fault::point("register.locked");
        let valid = self.db.hashes(&paths)?;
        let (there, fresh): (Vec<_>, Vec<_>) =
            staged.iter().partition(|staged| valid.contains_key(&staged.info.path));
        let (same, others): (Vec<_>, Vec<_>) =
            there.into_iter().partition(|staged| valid.get(&staged.info.path) == Some(&staged.info.nar_hash));
        let different = others.iter().map(|staged| staged.info.path.clone()).collect();
        self.make_public(same.iter().map(|staged| (&staged.info.path, &staged.origin)))?;
        // Before they are valid: nobody may see them meanwhile.
        let origins: Vec<_> = fresh.iter().map(|staged| (&staged.info.path, &staged.origin)).collect();
        self.provenance.record(&origins)?;
        fault::point("register.noted");
        // Two threads are as many as one directory has use for.
        let (ours, others) = fresh.split_at(fresh.len() / 2);
        let move_all = |part: &[&Arc<Staged>]| part.iter().try_for_each(|staged| self.move_in(staged));
        if others.len() < MANY {
            move_all(&fresh)?;
        } else {
            std::thread::scope(|scope| {
                let Ok(other) = std::thread::Builder::new().spawn_scoped(scope, || move_all(others)) else {
                    return move_all(&fresh);
                };
                let moved = move_all(ours);
                moved.and(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })?;
        }
        fault::point("register.moved");
        self.db.register(&fresh.iter().map(|staged| &staged.info).collect::<Vec<_>>())?;
        fault::point("register.committed");
        self.unlocking.lock().unwrap_or_else(PoisonError::into_inner).extend(locks.release_later());
        Ok(different)
    }

    /// Moves one path into the store and seals it. Its lock must be held.
    fn move_in(&self, staged: &Staged) -> Result<(), RegisterError> {
        let target = self.layout.physical(&staged.info.path);
        let no_replace = rustix::fs::RenameFlags::NOREPLACE;
        let mut moved = rustix::fs::renameat_with(CWD, &staged.at, CWD, &target, no_replace);
        if moved == Err(rustix::io::Errno::EXIST) {
            // Left by somebody who was interrupted before registering it.
            self.discard(&target).map_err(PathError::on("clear away", &target))?;
            self.trash.empty_later();
            moved = rustix::fs::renameat_with(CWD, &staged.at, CWD, &target, no_replace);
        }
        moved.map_err(PathError::on("move into place", &target))?;
        staged.moved();
        if staged.is_dir {
            seal_top(&target).map_err(PathError::on("seal", &target))?;
        }
        Ok(())
    }

    /// Puts a path that was fetched again in the place of the files that are there, in one step. Those are
    /// discarded, never written to: whoever has them open keeps them as they are.
    pub fn replace(&self, staged: &Staged) -> Result<(), RegisterError> {
        let _locks = locks::PathLocks::acquire(&self.layout, std::slice::from_ref(&staged.info.path))
            .map_err(PathError::on("lock paths in", &self.layout.store_dir()))?;
        let target = self.layout.physical(&staged.info.path);
        let replaced = match fs::symlink_metadata(&target) {
            Ok(damaged) => {
                if damaged.is_dir() {
                    rustix::fs::chmod(&target, rustix::fs::Mode::from_raw_mode(0o755))
                        .map_err(PathError::on("unseal", &target))?;
                }
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(CWD, &staged.at, CWD, &target, exchange).map_err(io::Error::from)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let renamed = fs::rename(&staged.at, &target);
                staged.moved();
                renamed
            }
            Err(error) => Err(error),
        };
        // After an exchange the damaged files are what is discarded with `staged`.
        replaced.map_err(PathError::on("put the good files in place of", &target))?;
        if staged.is_dir {
            seal_top(&target).map_err(PathError::on("seal", &target))?;
        }
        Ok(())
    }

    /// Those of `paths` that a pod of `namespace` may not see (yet): they came with somebody's own credentials.
    pub fn denied(&self, namespace: &str, paths: &[StorePath]) -> Result<Vec<StorePath>, ProvenanceError> {
        self.provenance.denied(namespace, paths)
    }

    /// From now on pods of `namespace` may see `paths`.
    pub fn grant(&self, namespace: &str, paths: &[StorePath]) -> Result<(), ProvenanceError> {
        if paths.is_empty() { Ok(()) } else { self.provenance.grant(namespace, paths) }
    }

    /// What of `paths` came from a cache that gives it to everybody is not private any more.
    pub fn make_public<'a>(
        &self,
        paths: impl Iterator<Item = (&'a StorePath, &'a Origin)>,
    ) -> Result<(), ProvenanceError> {
        let public: Vec<_> = paths.filter(|(_, origin)| !origin.private).collect();
        if public.is_empty() { Ok(()) } else { self.provenance.make_public(&public) }
    }

    /// Where `path` came from, if it was fetched.
    pub fn origin(&self, path: &StorePath) -> Result<Option<Origin>, ProvenanceError> {
        self.provenance.of(path)
    }

    /// Writes a database of exactly `paths`, which must be closed under references, into the directory `dir`.
    pub fn export_database(&self, paths: &[StorePath], dir: &Path) -> Result<(), DatabaseError> {
        self.db.export(paths, dir)
    }

    /// The NAR hashes of those of `paths` that are valid.
    pub fn hashes(&self, paths: &[StorePath]) -> Result<HashMap<StorePath, NarHash>, DatabaseError> {
        self.db.hashes(paths)
    }

    /// All that one of `paths` refers to.
    pub fn references(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>, DatabaseError> {
        self.db.references(paths)
    }

    /// Waits until all that is registered now is on the disk, and remembers that it is. No lock of a path that was
    /// registered before is left then.
    pub fn sync(&self) -> Result<(), RegisterError> {
        let unlocking = std::mem::take(&mut *self.unlocking.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in unlocking {
            // One that panicked has given its locks back too.
            let _ = thread.join();
        }
        let row = self.db.last_row()?;
        if self.durable.covers(row) {
            return Ok(());
        }
        self.sync_anew()
    }

    /// The same, also where files changed and no row did.
    pub fn sync_anew(&self) -> Result<(), RegisterError> {
        let row = self.db.last_row()?;
        Ok(self.durable.sync(row).map_err(PathError::on("sync", self.layout.root()))?)
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
        self.trash.discard(path)
    }

    /// The same, of what may not be there.
    pub fn discard_if_there(&self, path: &Path) -> io::Result<()> {
        match self.discard(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            discarded => discarded,
        }
    }

    /// Puts in order what a process that was killed, or a machine that lost power, left: half fetched paths,
    /// half built views, and paths that the disk may not have.
    ///
    /// Only the holder of the root's lock may do it, and only before it begins to work.
    pub fn recover(&self) -> Result<(), RegisterError> {
        let at = self.layout.root();
        self.clear_leftovers().map_err(PathError::on("clear leftovers in", at))?;
        if let Known::UpTo(row) = self.known {
            self.check_beyond(row)?;
            // Views of this boot are trusted from here on, whatever becomes of this process.
            if self.db.last_row()? == 0 {
                self.durable.begin().map_err(PathError::on("write the mark in", at))?;
            } else {
                self.sync_anew()?;
            }
        }
        Ok(())
    }

    fn clear_leftovers(&self) -> io::Result<()> {
        // A path that was moved in and not registered is a stray for the collector only without its lock.
        locks::remove_stale(&self.layout)?;
        self.staging.sort_leftovers()?;
        // A view is not synced when it is built: after a boot, when nothing is mounted, all are built anew.
        let rebooted = self.known != Known::SameBoot;
        for entry in fs::read_dir(self.layout.views())? {
            let entry = entry?;
            if rebooted || entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.discard(&entry.path())?;
            }
        }
        // A view is rooted before it is built, so roots may be there without it. A retired one has those of its
        // id.
        let mut ids = HashSet::new();
        for entry in fs::read_dir(self.layout.views())? {
            let name = entry?.file_name();
            ids.extend(name.to_str().and_then(|name| name.split('.').next()).map(str::to_owned));
        }
        for entry in fs::read_dir(self.layout.view_roots())? {
            let name = entry?.file_name();
            if name.to_str().is_none_or(|name| !ids.contains(name)) {
                fs::remove_dir_all(self.layout.view_roots().join(&name))?;
            }
        }
        roots::remove_stale_temporary(&self.layout)
    }

    /// Hashes every path beyond `row` again. One that the disk lost is forgotten with all that refer to it.
    fn check_beyond(&self, row: i64) -> Result<(), RegisterError> {
        let unsure = self.db.beyond(row)?;
        if !unsure.is_empty() {
            tracing::info!(
                paths = unsure.len(),
                "checking what may not have reached the disk before the boot"
            );
        }
        let damaged: Vec<_> = unsure
            .into_iter()
            .filter(|info| match self.check(info) {
                Ok(()) => false,
                Err(damage) => {
                    tracing::warn!(path = %info.path, %damage, "lost in a power cut, fetched again when needed");
                    true
                }
            })
            .map(|info| info.path)
            .collect();
        self.forget(&damaged)
    }

    /// Says whether the files of a path are what its row in the database says.
    pub fn check(&self, info: &PathInfo) -> Result<(), Damage> {
        let (found, len) =
            crate::dump::hash(&self.layout.physical(&info.path)).map_err(Damage::Unreadable)?;
        if found == info.nar_hash && len == info.nar_size {
            Ok(())
        } else {
            Err(Damage::Hash { expected: info.nar_hash, found })
        }
    }

    /// Makes `paths` invalid, with all that refer to them, and takes their files away.
    pub fn forget(&self, paths: &[StorePath]) -> Result<(), RegisterError> {
        let _locks = locks::PathLocks::acquire(&self.layout, paths)
            .map_err(PathError::on("lock paths in", &self.layout.store_dir()))?;
        let forgotten = self.db.invalidate(paths)?;
        // Later, so that none of them is valid and looks like everybody's.
        self.provenance.forget(&forgotten)?;
        for path in forgotten {
            let at = self.layout.physical(&path);
            self.discard_if_there(&at).map_err(PathError::on("clear away", &at))?;
        }
        self.trash.empty_later();
        Ok(())
    }

    /// All valid paths.
    pub fn valid_paths(&self) -> Result<Vec<PathInfo>, DatabaseError> {
        self.db.beyond(0)
    }

    /// Deletes what was discarded.
    pub fn empty_trash(&self) -> io::Result<()> {
        self.trash.empty()
    }

    /// The same, beside everything else.
    pub fn empty_trash_later(&self) {
        self.trash.empty_later();
    }
}

/// How files differ from what the database says of them.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// They are not all there, or the disk does not give them.
    #[error("cannot be read: {0}")]
    Unreadable(io::Error),
    /// Other bytes.
    #[error("has hash {found}, must have {expected}")]
    Hash {
        /// What the database says.
        expected: NarHash,
        /// What the files have.
        found: NarHash,
    },
}

/// Which boot of the machine this is.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Seals the top of a restored directory, which had to stay writable to be moved.
fn seal_top(path: &Path) -> io::Result<()> {
    rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o555))?;
    let no_follow = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::utimensat(CWD, path, &crate::restore::STORE_TIME, no_follow)?)
}
