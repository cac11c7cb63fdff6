//! Whether the store is what its database says, and how it becomes that again.
//!
//! Repair never writes to a file that is there: some pod may have it mapped. The good path is fetched into staging
//! and changes places with the damaged one. Every view that linked the damaged files is retired: it stays for the
//! volumes that show it, and is built anew for all later ones.
//!
//! It is the same in a running driver and without one; [`crate::control`] is how a command asks the driver.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use nix_csi_proto::control::verify_event::Event as Finding;
use nix_csi_proto::control::{Damaged, NotRepaired, Repaired, Verified};
use nix_csi_store::StorePath;
use tokio::sync::mpsc;

use crate::fault;
use crate::kubernetes::{Event, Kubernetes};
use crate::store::{NodeStore, PathInfo};
use crate::substituter::Substituter;
use crate::view;
use crate::volume::{Pod, Volumes};

/// Who is told what is found. When nobody reads any more, verification ends.
pub(crate) type Findings = mpsc::Sender<Finding>;

/// What repair needs beside the store.
#[derive(Clone)]
pub(crate) struct Repairer {
    pub(crate) substituter: Substituter,
    /// Held while a view is built: none may get links to files that are about to be exchanged.
    pub(crate) building: Arc<tokio::sync::Mutex<()>>,
    /// Tells the pods that show damaged files.
    pub(crate) kubernetes: Kubernetes,
}

/// Hashes every valid path and, with a repairer, fetches damaged ones again. The last that is told is `Verified`.
pub(crate) async fn verify(
    store: &Arc<NodeStore>,
    repair: Option<&Repairer>,
    findings: &Findings,
) -> anyhow::Result<Verified> {
    let (looking, told) = (Arc::clone(store), findings.clone());
    let (paths, damaged) = tokio::task::spawn_blocking(move || find_damage(&looking, &told)).await??;
    let mut good_again = 0;
    if let Some(repairer) = repair.filter(|_| !damaged.is_empty()) {
        let mut affected = Affected::default();
        for info in &damaged {
            let path = info.path.to_string();
            let finding = match repairer.repair(store, info).await {
                Ok((retired_views, pods)) => {
                    good_again += 1;
                    affected.add(&info.path, &pods);
                    let volumes = pods.into_keys().collect();
                    Finding::Repaired(Repaired { path, retired_views, volumes })
                }
                Err(error) => Finding::NotRepaired(NotRepaired { path, error: format!("{error:#}") }),
            };
            // What is damaged is repaired to the end, whoever still listens.
            let _ = findings.send(finding).await;
        }
        affected.tell(&repairer.kubernetes).await;
        let store = Arc::clone(store);
        tokio::task::spawn_blocking(move || {
            store.empty_trash()?;
            Ok::<_, anyhow::Error>(store.sync_anew()?)
        })
        .await??;
    }
    let verified = Verified { paths: paths as u64, damaged: damaged.len() as u64, repaired: good_again };
    let _ = findings.send(Finding::Verified(verified)).await;
    Ok(verified)
}

/// Hashes every valid path on all cores; gives back how many there are, and those that differ.
fn find_damage(store: &NodeStore, findings: &Findings) -> anyhow::Result<(usize, Vec<PathInfo>)> {
    let paths = store.valid_paths()?;
    let (next, damaged) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, NonZero::get) {
            scope.spawn(|| {
                while let Some(info) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if findings.is_closed() {
                        return;
                    }
                    let Err(damage) = store.check(info) else { continue };
                    // Collected since the list was made: then there is nothing to be damaged.
                    if !is_valid(store, &info.path) {
                        continue;
                    }
                    let (path, damage) = (info.path.to_string(), damage.to_string());
                    let _ = findings.blocking_send(Finding::Damaged(Damaged { path, damage }));
                    damaged.lock().unwrap_or_else(PoisonError::into_inner).push(info.clone());
                }
            });
        }
    });
    anyhow::ensure!(!findings.is_closed(), "nobody reads what is found any more");
    let mut damaged = damaged.into_inner().unwrap_or_else(PoisonError::into_inner);
    damaged.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((paths.len(), damaged))
}

/// An answer that cannot be had is no reason to keep quiet about damage.
fn is_valid(store: &NodeStore, path: &StorePath) -> bool {
    store.hashes(std::slice::from_ref(path)).map_or(true, |valid| valid.contains_key(path))
}

impl Repairer {
    /// Fetches a damaged path again and puts it in place of the damaged one. Gives back the views that it has retired,
    /// and the volumes that show them with their pods.
    async fn repair(
        &self,
        store: &Arc<NodeStore>,
        info: &PathInfo,
    ) -> anyhow::Result<(Vec<String>, BTreeMap<String, Pod>)> {
        let staged = self.substituter.fetch_again(&info.path).await?;
        anyhow::ensure!(
            staged.info.nar_hash == info.nar_hash,
            "the cache has another build of {} now: its hash is {}, the store's {}",
            info.path,
            staged.info.nar_hash,
            info.nar_hash
        );
        let building = Arc::clone(&self.building).lock_owned().await;
        let (store, path) = (Arc::clone(store), info.path.clone());
        tokio::task::spawn_blocking(move || {
            let _building = building;
            let mut roots = store.temp_roots()?;
            let is_valid = store.pin(&mut roots, std::slice::from_ref(&path))?.contains(&path);
            anyhow::ensure!(is_valid, "it was collected meanwhile");
            // In this order: if it ends in between, the damage is found again, and the views are not in use.
            let retired = view::retire(&store, &path).context("cannot retire a view")?;
            fault::point("repair.retired");
            store.replace(&staged)?;
            fault::point("repair.exchanged");
            let records = Volumes::at(store.layout().root()).list()?.into_iter().flatten();
            let pods = records
                .filter(|record| retired.contains(&record.view))
                .map(|record| (record.volume.to_string(), record.pod))
                .collect();
            Ok((retired, pods))
        })
        .await?
    }
}

/// Pods, and which damaged paths they show.
#[derive(Default)]
struct Affected(HashMap<String, (Pod, BTreeSet<StorePath>)>);

impl Affected {
    fn add(&mut self, path: &StorePath, pods: &BTreeMap<String, Pod>) {
        for pod in pods.values() {
            let (_, paths) = self.0.entry(pod.uid.clone()).or_insert_with(|| (pod.clone(), BTreeSet::new()));
            paths.insert(path.clone());
        }
    }

    /// One event for each pod, whatever became of the others.
    async fn tell(self, kubernetes: &Kubernetes) {
        for (pod, paths) in self.0.into_values() {
            kubernetes.tell_in_turn(&pod, damaged(&paths)).await;
        }
    }
}

fn damaged(paths: &BTreeSet<StorePath>) -> Event {
    // The advice first: a long list may be cut.
    let mut message = "delete this pod to get good files: on this node those of ".to_owned();
    for (n, path) in paths.iter().enumerate() {
        message.push_str(if n == 0 { "" } else { ", " });
        message.push_str(&path.to_string());
    }
    message.push_str(" were damaged and are repaired for new pods; this one still shows the damaged ones");
    Event { reason: "NixDamaged", is_warning: true, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_told_once_of_all_its_damaged_paths() {
        let pod = |uid: &str| Pod { namespace: "shop".into(), name: uid.into(), uid: uid.into() };
        let path = |name: &str| -> StorePath {
            format!("/nix/store/00bgd045z0d4icpbc2yyz4gx48ak44la-{name}").parse().unwrap()
        };
        let mut affected = Affected::default();
        let two = [("v1".to_owned(), pod("a")), ("v2".to_owned(), pod("b"))];
        affected.add(&path("libc"), &two.into());
        affected.add(&path("openssl"), &[("v1".to_owned(), pod("a"))].into());
        assert_eq!(affected.0.len(), 2);
        let message = damaged(&affected.0["a"].1).message;
        assert!(
            message.contains("-libc, /nix/store/") && message.contains("-openssl were damaged"),
            "{message}"
        );
    }
}
