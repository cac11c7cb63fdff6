//! Deleting paths that nothing needs any more, beside fetches and beside any real Nix.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::Path;

use nix_csi_store::StorePath;
use rustix::fs::FlockOperation;

use super::{Graph, NodeStore, RegisterError, locks, roots};
use crate::fault;
use crate::path_error::PathError;

/// What a collection of paths has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Valid paths that are gone.
    pub paths: usize,
    /// Entries of the store directory that were never valid.
    pub strays: usize,
}

impl NodeStore {
    /// All valid paths.
    pub fn graph(&self) -> Result<Graph, RegisterError> {
        Ok(self.db.graph()?)
    }

    /// What no plan may delete: whatever has a root, the views' own set aside, and what this program did not fetch.
    /// What an administrator has put into the store, only an administrator takes out.
    pub fn kept(&self, graph: &Graph) -> Result<Vec<StorePath>, RegisterError> {
        let at = self.layout.root();
        let mut kept = roots::permanent(&self.layout).map_err(PathError::on("read the roots in", at))?;
        kept.extend(roots::temporary(&self.layout).map_err(PathError::on("read the roots in", at))?);
        let fetched = self.provenance.names()?;
        kept.extend(graph.paths().filter(|path| !fetched.contains(path.base_name())).cloned());
        Ok(kept)
    }

    /// The roots of the views, by view.
    pub fn view_roots(&self) -> Result<HashMap<String, Vec<StorePath>>, RegisterError> {
        let dir = self.layout.view_roots();
        Ok(roots::of_views(&dir).map_err(PathError::on("read", &dir))?)
    }

    /// Deletes those of `paths` that nothing needs, and what stands in the store directory and was never valid. Paths
    /// that somebody has begun to need meanwhile stay, and all that they refer to. `None`: another collector runs.
    pub fn collect(&self, paths: &[StorePath]) -> Result<Option<Collected>, RegisterError> {
        let at = self.layout.root();
        let Some(_gc_lock) = self.gc_lock().map_err(PathError::on("lock gc.lock in", at))? else {
            return Ok(None);
        };
        // From here on nobody gets a new root before this is done.
        let read = PathError::on("read the roots in", at);
        let in_use = || -> io::Result<Vec<StorePath>> {
            // The temporary ones first: whoever has built a view lets go of them only when it has roots.
            let mut in_use: Vec<_> = roots::temporary(&self.layout)?.into_iter().collect();
            in_use.extend(roots::of_views(&self.layout.view_roots())?.into_values().flatten());
            in_use.extend(roots::permanent(&self.layout)?);
            Ok(in_use)
        };
        let in_use = in_use().map_err(read)?;
        let live: HashSet<_> = self.db.closure(&in_use)?.into_iter().collect();
        let doomed: Vec<_> = paths.iter().filter(|path| !live.contains(*path)).cloned().collect();
        let deleted = self.db.delete(&doomed)?;
        fault::point("collect.rows-gone");
        // Later, so that none of them is valid and looks like everybody's.
        self.provenance.forget(&deleted)?;
        self.forget_strangers(&in_use)?;
        for path in &deleted {
            let at = self.layout.physical(path);
            self.discard_if_there(&at).map_err(PathError::on("clear away", &at))?;
        }
        fault::point("collect.files-gone");
        let strays = self.discard_strays(&in_use)?;
        Ok(Some(Collected { paths: deleted.len(), strays }))
    }

    /// Forgets where paths came from that a real Nix has deleted: the next one to bring them may be an administrator.
    /// Whatever is about to be valid is in use.
    fn forget_strangers(&self, in_use: &[StorePath]) -> Result<(), RegisterError> {
        let in_use: HashSet<_> = in_use.iter().collect();
        let fetched = self.provenance.names()?;
        let fetched = fetched.iter().filter_map(|name| StorePath::from_base_name(name).ok());
        let fetched: Vec<_> = fetched.filter(|path| !in_use.contains(path)).collect();
        let valid = self.db.valid(&fetched)?;
        let gone: Vec<_> = fetched.into_iter().filter(|path| !valid.contains(path)).collect();
        if gone.is_empty() { Ok(()) } else { Ok(self.provenance.forget(&gone)?) }
    }

    /// What was moved into the store and never registered: left by a process that was killed in between.
    fn discard_strays(&self, in_use: &[StorePath]) -> Result<usize, RegisterError> {
        let dir = self.layout.store_dir();
        let read = |error| RegisterError::from(PathError::on("read", &dir)(error));
        let in_use: HashSet<_> = in_use.iter().collect();
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(read)? {
            let name = entry.map_err(read)?.file_name();
            let Some(path) = name.to_str().and_then(|name| StorePath::from_base_name(name).ok()) else {
                continue;
            };
            // The name of a lock file is one of a store path too.
            let is_lock = Path::new(&name).extension().is_some_and(|extension| extension == "lock");
            if !is_lock && !in_use.contains(&path) {
                found.push(path);
            }
        }
        let valid = self.db.valid(&found)?;
        let mut strays = 0;
        for path in found.iter().filter(|path| !valid.contains(*path)) {
            // Whoever registers it holds this, whether it has a root or not.
            let lock = dir.join(format!("{}.lock", path.base_name()));
            if !lock.exists() && self.discard(&self.layout.physical(path)).is_ok() {
                strays += 1;
            }
        }
        Ok(strays)
    }

    /// Drops temporary roots of what has permanent ones now. Not while a collector runs: it may have read the permanent
    /// ones before they were there, and the temporary ones not yet.
    pub fn release(&self, roots: impl Send + 'static) {
        let Ok(file) = locks::open(&self.layout.gc_lock()) else { return drop(roots) };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            return drop(roots);
        }
        let waiting = std::thread::Builder::new().name("roots".to_owned()).spawn(move || {
            let _ = rustix::fs::flock(&file, FlockOperation::LockShared);
            drop(roots);
        });
        if let Err(error) = waiting {
            tracing::warn!(%error, "no thread to wait for a collector");
        }
    }

    /// Held by one collector at a time, ours or Nix's.
    fn gc_lock(&self) -> io::Result<Option<File>> {
        let file = locks::open(&self.layout.gc_lock())?;
        // Whoever writes a root holds it shared, for an instant.
        for _ in 0..100 {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(file)),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}
