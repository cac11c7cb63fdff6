//! Whether the store is what its database says, and how it becomes that again.
//!
//! Repair never writes to a file that is there: some pod may have it mapped. The good path is fetched into staging
//! and changes places with the damaged one. Every view that linked the damaged files is retired: it stays for the
//! volumes that show it, and is built anew for all later ones.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;

use crate::progress::{Event, tell};
use crate::store::{Damage, NodeStore, PathInfo};
use crate::substituter::Substituter;
use crate::view;
use crate::volume::Volumes;

/// Hashes every valid path on all cores; gives back those that differ.
pub(crate) fn find_damage(store: &NodeStore) -> anyhow::Result<(usize, Vec<PathInfo>)> {
    let paths = store.valid_paths()?;
    let (next, damaged) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, NonZero::get) {
            scope.spawn(|| {
                while let Some(info) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(damage) = store.check(info) {
                        report(info, &damage);
                        damaged.lock().unwrap_or_else(PoisonError::into_inner).push(info.clone());
                    }
                }
            });
        }
    });
    let mut damaged = damaged.into_inner().unwrap_or_else(PoisonError::into_inner);
    damaged.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((paths.len(), damaged))
}

fn report(info: &PathInfo, damage: &Damage) {
    tell(&Event::Damaged { path: info.path.to_string(), damage: damage.to_string() });
}

/// Fetches a damaged path again and puts it in place of the damaged one.
pub(crate) async fn repair(
    store: &Arc<NodeStore>,
    substituter: &Substituter,
    info: &PathInfo,
) -> anyhow::Result<()> {
    let staged = substituter.fetch_again(&info.path).await?;
    anyhow::ensure!(
        staged.info.nar_hash == info.nar_hash,
        "the cache has another build of {} now: its hash is {}, the store's {}",
        info.path,
        staged.info.nar_hash,
        info.nar_hash
    );
    let (store, path) = (Arc::clone(store), info.path.clone());
    tokio::task::spawn_blocking(move || {
        // In this order: if it ends in between, the damage is found again, and the views are not in use.
        let retired_views = view::retire(&store, &path).context("cannot retire a view")?;
        store.replace(&staged)?;
        let mut volumes = Vec::new();
        for record in Volumes::at(store.layout().root()).list()?.into_iter().flatten() {
            if retired_views.contains(&record.view) {
                volumes.push(record.volume.to_string());
            }
        }
        tell(&Event::Repaired { path: path.to_string(), retired_views, volumes });
        Ok(())
    })
    .await?
}
