//! Collection: when the disk gets full, views that nobody uses go, the least recently used one first, and with them
//! the paths that only they needed.
//!
//! ```text
//! space ─▶ what is missing ─▶ plan ─▶ views to the trash ─▶ gc.lock: rows, files to the trash ─▶ empty it ─▶ again
//! ```
//! **Invariant:** a view goes only if no record and no mount names it, and nobody works with it; a path only if no
//! root, permanent or temporary, ours or Nix's, leads to it.

mod plan;
mod space;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

pub use space::Limits;

use crate::fault;
use crate::mount;
use crate::path_error::PathError;
use crate::store::{NodeStore, RegisterError};
use crate::tenancy::Tenants;
use crate::usage::Usage;
use crate::view;
use crate::volume::{Mode, VolumeError, Volumes};
use plan::{Nobodys, Unused, plan};
use space::Space;

/// Why nothing more is collected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CollectError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The store.
    #[error(transparent)]
    Store(#[from] RegisterError),
    /// The volumes cannot be listed, so nobody knows what is in use.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Nix's collector, perhaps an administrator's.
    #[error("another collector has held gc.lock for some seconds")]
    Busy,
    /// The table of mounts.
    #[error(transparent)]
    Mount(#[from] mount::MountError),
}

/// What went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Collection {
    /// Views, retired ones included.
    pub(crate) views: usize,
    /// Paths.
    pub(crate) paths: usize,
    /// The bytes of their NARs.
    pub(crate) bytes: u64,
    /// Whether there is as much free now as there should be.
    pub(crate) is_enough: bool,
}

/// Whatever collection needs. A clone is the same.
#[derive(Clone)]
pub(crate) struct Collector {
    store: Arc<NodeStore>,
    volumes: Volumes,
    usage: Usage,
    tenants: Tenants,
    limits: Limits,
    wanted: Arc<AtomicU64>,
    is_full: Arc<AtomicBool>,
    wake: Arc<Notify>,
}

/// What one round is for.
#[derive(Clone, Copy)]
struct Goal {
    /// So many bytes, or none: what could never fit costs nobody else anything.
    needed: u64,
    /// So many, or as many as can be.
    missing: u64,
    /// Some inodes. How many a path has is not written down, so that is found out in small steps.
    inodes: bool,
    /// Whether it helps to free less than what is needed.
    some_helps: bool,
    nobodys: Nobodys,
}

/// What one round has done.
#[derive(Default)]
struct Round {
    views: usize,
    paths: usize,
    bytes: u64,
}

impl Collector {
    pub(crate) fn new(
        store: Arc<NodeStore>,
        volumes: Volumes,
        usage: Usage,
        tenants: Tenants,
        limits: Limits,
    ) -> Self {
        let (wanted, is_full, wake) = (Arc::default(), Arc::default(), Arc::default());
        Self { store, volumes, usage, tenants, limits, wanted, is_full, wake }
    }

    /// Somebody found no room for `bytes`, or, if that is zero, for something of unknown size.
    pub(crate) fn make_room(&self, bytes: u64) {
        self.wanted.fetch_max(bytes, Ordering::Relaxed);
        if bytes == 0 {
            self.is_full.store(true, Ordering::Relaxed);
        }
        self.wake.notify_one();
    }

    /// Until somebody finds no room.
    pub(crate) async fn wanted(&self) {
        self.wake.notified().await;
    }

    /// Collects if there is less free than there should be, until there is as much as there should be. Blocks.
    pub(crate) fn collect_if_low(&self) -> Result<Option<Collection>, CollectError> {
        let wanted = self.wanted.swap(0, Ordering::Relaxed);
        let mut is_full = self.is_full.swap(false, Ordering::Relaxed);
        let mut space = self.space()?;
        let is_well = |space: Space| !space.is_low(self.limits) && space.free_bytes >= wanted && !is_full;
        if self.limits.min_free == Some(0) || is_well(space) {
            return Ok(None);
        }
        // What is there already is nobody's loss.
        self.empty_trash()?;
        space = self.space()?;
        if is_well(space) {
            return Ok(None);
        }
        let some_helps = space.is_low(self.limits) || is_full;
        let nobodys = if wanted > 0 || is_full { Nobodys::Last } else { Nobodys::First };
        let mut collection = Collection::default();
        loop {
            let missing = space.missing(self.limits);
            let needed = wanted.saturating_sub(space.free_bytes);
            // Something had no room, whatever the numbers say: so a step is made in any case.
            let inodes = missing.inodes > 0 || std::mem::take(&mut is_full);
            if needed == 0 && (!some_helps || (missing.is_nothing() && !inodes)) {
                collection.is_enough = true;
                break;
            }
            let round = self.round(Goal { needed, missing: missing.bytes, inodes, some_helps, nobodys })?;
            // Only then the filesystem has it back.
            self.empty_trash()?;
            collection.views += round.views;
            collection.paths += round.paths;
            collection.bytes += round.bytes;
            space = self.space()?;
            if round.views == 0 && round.paths == 0 {
                break;
            }
        }
        Ok(Some(collection))
    }

    fn empty_trash(&self) -> Result<(), CollectError> {
        let root = self.store.layout().root();
        Ok(self.store.empty_trash().map_err(PathError::on("empty the trash of", root))?)
    }

    /// Removes retired views that nothing shows any more.
    pub(crate) fn remove_retired(&self) -> Result<usize, CollectError> {
        let views: HashSet<_> = self.views()?.into_iter().collect();
        self.usage.retain(|view| views.contains(view));
        // Mostly there is none, and then nobody's record has to be read.
        let retired: Vec<_> = views.into_iter().filter(|name| view::is_retired(name)).collect();
        if retired.is_empty() {
            return Ok(0);
        }
        let mounted = mount::names_below(&self.store.layout().views())?;
        let mut overlaid = HashSet::new();
        for record in self.volumes.list()? {
            match record {
                Ok(record) if record.mode == Mode::ReadWrite => drop(overlaid.insert(record.view)),
                Ok(_) => {}
                // It may be any of these.
                Err(_) => overlaid.extend(mounted.iter().cloned()),
            }
        }
        // The table of mounts knows an overlay's view by the name that it had when it was mounted.
        let is_shown = |name: &str| {
            mounted.contains(name) || overlaid.contains(name.split('.').next().unwrap_or_default())
        };
        let mut removed = 0;
        for name in retired {
            if !is_shown(&name) {
                let at = self.store.layout().views().join(&name);
                self.store.discard(&at).map_err(PathError::on("clear away", &at))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Whether there is less free than there should be.
    pub(crate) fn is_low(&self) -> Result<bool, PathError> {
        Ok(self.space()?.is_low(self.limits))
    }

    /// Bytes and inodes that are free.
    pub(crate) fn free(&self) -> Result<(u64, u64), CollectError> {
        let space = self.space()?;
        Ok((space.free_bytes, space.free_inodes))
    }

    fn space(&self) -> Result<Space, PathError> {
        let root = self.store.layout().root();
        Space::of(root).map_err(PathError::on("ask for the space of", root))
    }

    fn views(&self) -> Result<Vec<String>, CollectError> {
        let dir = self.store.layout().views();
        let names = || -> io::Result<Vec<String>> {
            fs::read_dir(&dir)?
                .map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()))
                .filter(|name| name.as_ref().is_ok_and(|name| !name.is_empty()))
                .collect()
        };
        Ok(names().map_err(PathError::on("read", &dir))?)
    }

    /// Frees about what `goal` says, by the sizes of NARs.
    fn round(&self, goal: Goal) -> Result<Round, CollectError> {
        // In this order: whoever begins to use a view after the first line is noticed when it is to go.
        let last = self.usage.last();
        let mut used: HashSet<String> =
            self.volumes.list()?.into_iter().flatten().map(|record| record.view).collect();
        used.extend(mount::names_below(&self.store.layout().views())?);
        let views = self.views()?;
        let mut roots = self.store.view_roots()?;
        let graph = self.store.graph()?;
        let mut live = self.store.kept(&graph)?;
        // Roots without a view are of one that is being built, or was, and are used up in the same way.
        let names = views.iter().filter(|name| !name.starts_with('.') && !view::is_retired(name));
        let names: HashSet<_> = names.cloned().chain(roots.keys().cloned()).collect();
        let mut unused = Vec::new();
        for view in names {
            let roots = roots.remove(&view).unwrap_or_default();
            if used.contains(&view) {
                live.extend(roots);
            } else {
                let used = last.get(&view).copied().unwrap_or_default();
                unused.push(Unused { view, used, roots });
            }
        }
        let all: u64 = (0..graph.len()).map(|n| graph.size(n)).sum();
        let missing = if goal.inodes { goal.missing.max(all / 20).max(1) } else { goal.missing };
        let all_of_it = goal.needed.max(missing);
        let mut planned = plan(&graph, &live, unused.clone(), all_of_it, goal.nobodys);
        if planned.bytes < goal.needed {
            if !goal.some_helps {
                return Ok(Round::default());
            }
            planned = plan(&graph, &live, unused, missing, goal.nobodys);
        }
        drop(graph);
        let mut round = Round { views: self.remove_retired()?, ..Round::default() };
        for Unused { view, used, .. } in &planned.views {
            let at = self.store.layout().views().join(view);
            let remove = || {
                self.store.discard_if_there(&at)?;
                fault::point("collect.view-gone");
                self.store.remove_roots(view)
            };
            let removed = self.usage.remove_unless_used(view, *used, remove);
            if removed.map_err(PathError::on("clear away", &at))? {
                self.tenants.forget(view);
                round.views += 1;
            }
        }
        let collected = self.store.collect(&planned.paths)?.ok_or(CollectError::Busy)?;
        round.paths = collected.paths + collected.strays;
        round.bytes = planned.bytes;
        Ok(round)
    }
}
