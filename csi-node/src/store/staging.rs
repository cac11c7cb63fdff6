//! Where paths are restored, and wait until they can be registered.
//!
//! ```text
//! staging/<n>         one path, being restored or complete
//! staging/<n>.json    complete and verified: which path it is, and in which boot that was
//! ```
//! A path that has a record is adopted by the next process of the same boot instead of being fetched again. In
//! another boot nobody knows how much of it reached the disk, so it goes.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix_csi_store::{NarHash, NarInfo, StorePath};
use serde::{Deserialize, Serialize};

use super::boot_id;
use super::db::PathInfo;
use super::provenance::Origin;
use super::trash::Trash;

/// What is left free beside what was reserved: the database and the views need some.
const MARGIN: u64 = 32 << 20;

/// Not enough space for a path, known before a byte of it was written.
#[derive(Debug, thiserror::Error)]
#[error("{needed} bytes are needed, {free} are free in {}", root.display())]
pub struct NoSpace {
    /// What the path and those under way need.
    pub needed: u64,
    /// What the filesystem has.
    pub free: u64,
    /// Where.
    pub root: PathBuf,
}

/// The staging directory of a store. A clone is the same.
#[derive(Clone)]
pub struct Staging(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    open: Arc<OwnedFd>,
    trash: Trash,
    reserved: AtomicU64,
    leftovers: Mutex<HashMap<StorePath, Leftover>>,
}

/// A verified path that an earlier process left.
struct Leftover {
    at: PathBuf,
    nar_hash: NarHash,
    is_dir: bool,
    private: bool,
}

#[derive(Serialize, Deserialize)]
struct Record {
    boot: String,
    path: String,
    nar_hash: String,
    is_dir: bool,
    private: bool,
}

/// A place to restore one path in, with the space for it. What is there when it is dropped is discarded.
pub struct Place {
    staging: Staging,
    name: String,
    /// What is reserved and not written yet.
    unwritten: AtomicU64,
    is_kept: AtomicBool,
}

/// A path that was restored and verified. Unless it is moved into the store, it is discarded with this.
pub struct Staged {
    /// What will be registered.
    pub info: PathInfo,
    /// Where it came from.
    pub origin: Origin,
    pub(super) at: PathBuf,
    /// Whether it is a directory: then it is still writable to its owner, so that it can be moved.
    pub(super) is_dir: bool,
    state: Mutex<State>,
    trash: Trash,
}

/// What became of a staged path.
#[derive(Clone, Copy)]
struct State {
    is_moved: bool,
    is_recorded: bool,
}

impl std::fmt::Debug for Staged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Staged").field("path", &self.info.path).field("at", &self.at).finish_non_exhaustive()
    }
}

impl Staging {
    pub(super) fn open(dir: PathBuf, trash: Trash) -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = Arc::new(rustix::fs::open(&dir, flags, Mode::empty())?);
        let (reserved, leftovers) = (AtomicU64::new(0), Mutex::default());
        Ok(Self(Arc::new(Inner { dir, open, trash, reserved, leftovers })))
    }

    /// A place for a path of that size, if there is space for it beside all that is being restored.
    pub fn place(&self, size: u64) -> io::Result<Result<Place, NoSpace>> {
        let stat = rustix::fs::fstatvfs(&*self.0.open)?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let before = self.0.reserved.fetch_add(size, Ordering::Relaxed);
        let name = self.0.trash.fresh_name();
        let unwritten = AtomicU64::new(size);
        let place = Place { staging: self.clone(), name, unwritten, is_kept: AtomicBool::new(false) };
        let needed = before.saturating_add(size).saturating_add(MARGIN);
        if needed > free {
            let root = self.0.dir.clone();
            return Ok(Err(NoSpace { needed, free, root }));
        }
        Ok(Ok(place))
    }

    /// Whether an earlier process has left that path, and had it for somebody's own credentials.
    pub fn is_left_private(&self, path: &StorePath) -> bool {
        let leftovers = self.0.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        leftovers.get(path).is_some_and(|left| left.private)
    }

    /// The path that `info` describes, if an earlier process has restored and verified it. `origin` is who gives it
    /// now: whoever asked the earlier process for it does not matter.
    pub fn adopt(&self, info: &NarInfo, origin: impl FnOnce() -> Origin) -> Option<Staged> {
        let mut leftovers = self.0.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        let found = leftovers.get(&info.path)?;
        if found.nar_hash != info.nar_hash {
            return None;
        }
        let Leftover { at, is_dir, .. } = leftovers.remove(&info.path)?;
        tracing::info!(path = %info.path, "restored by an earlier process, not fetched again");
        Some(self.staged(info.clone().into(), origin(), at, is_dir, true))
    }

    fn staged(&self, info: PathInfo, origin: Origin, at: PathBuf, is_dir: bool, is_recorded: bool) -> Staged {
        Staged {
            info,
            origin,
            at,
            is_dir,
            state: Mutex::new(State { is_moved: false, is_recorded }),
            trash: self.0.trash.clone(),
        }
    }

    /// Sorts what an earlier process left: what is verified is kept for adoption, the rest is discarded.
    pub(super) fn sort_leftovers(&self) -> io::Result<()> {
        let boot = boot_id()?;
        let mut kept = HashMap::new();
        let mut others = Vec::new();
        for entry in fs::read_dir(&self.0.dir)? {
            let at = entry?.path();
            if at.extension().is_some_and(|extension| extension == "json") {
                continue;
            }
            match read_record(&record_of(&at), &boot) {
                Some((path, leftover)) if !kept.contains_key(&path) => drop(kept.insert(path, leftover(at))),
                _ => others.push(at),
            }
        }
        for at in others {
            self.0.trash.discard(&at)?;
        }
        for entry in fs::read_dir(&self.0.dir)? {
            let at = entry?.path();
            if at.extension().is_some_and(|extension| extension == "json") && !at.with_extension("").exists()
            {
                fs::remove_file(at)?;
            }
        }
        *self.0.leftovers.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok(())
    }

    /// Discards what nobody has adopted.
    pub fn discard_leftovers(&self) {
        let mut leftovers = self.0.leftovers.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, Leftover { at, .. }) in leftovers.drain() {
            discard(&self.0.trash, &at, true);
        }
    }
}

impl Place {
    /// The directory that it is in, open.
    pub fn parent(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.staging.0.open)
    }

    /// What to restore as, in that directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// So many bytes more are written: the filesystem counts them from here on.
    pub fn written(&self, bytes: u64) {
        let less = |left: u64| Some(left.saturating_sub(bytes));
        let before = self.unwritten.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let counted = before.map_or(0, |before| before.min(bytes));
        self.staging.0.reserved.fetch_sub(counted, Ordering::Relaxed);
    }

    /// Says that the path is complete and is what `info` says.
    pub fn verified(&self, info: PathInfo, origin: Origin, is_dir: bool) -> Staged {
        self.is_kept.store(true, Ordering::Release);
        self.staging.staged(info, origin, self.staging.0.dir.join(&self.name), is_dir, false)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.staging.0.reserved.fetch_sub(*self.unwritten.get_mut(), Ordering::Relaxed);
        if !*self.is_kept.get_mut() {
            discard(&self.staging.0.trash, &self.staging.0.dir.join(&self.name), false);
        }
    }
}

impl Staged {
    /// Writes down that the path is verified, so that it survives this process. Once is enough.
    pub fn record(&self) -> io::Result<()> {
        // Held until it is written: whoever moves the path meanwhile removes the record after that.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_moved || state.is_recorded {
            return Ok(());
        }
        let record = Record {
            boot: boot_id()?,
            path: self.info.path.to_string(),
            nar_hash: self.info.nar_hash.to_string(),
            is_dir: self.is_dir,
            private: self.origin.private,
        };
        state.is_recorded = true;
        fs::write(record_of(&self.at), serde_json::to_vec(&record)?)
    }

    /// It is in the store now.
    pub(super) fn moved(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_moved = true;
        if state.is_recorded {
            let _ = fs::remove_file(record_of(&self.at));
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let State { is_moved, is_recorded } = *self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !is_moved {
            discard(&self.trash, &self.at, is_recorded);
        }
    }
}

fn record_of(at: &Path) -> PathBuf {
    at.with_extension("json")
}

fn read_record(file: &Path, boot: &str) -> Option<(StorePath, impl FnOnce(PathBuf) -> Leftover + use<>)> {
    let record: Record = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let (path, nar_hash) = (record.path.parse().ok()?, record.nar_hash.parse().ok()?);
    let Record { is_dir, private, .. } = record;
    (record.boot == boot).then_some((path, move |at| Leftover { at, nar_hash, is_dir, private }))
}

fn discard(trash: &Trash, at: &Path, is_recorded: bool) {
    if is_recorded {
        let _ = fs::remove_file(record_of(at));
    }
    match trash.discard(at) {
        Ok(()) => trash.empty_later(),
        // Nothing was written yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(%error, at = %at.display(), "cannot discard this from staging yet"),
    }
}
