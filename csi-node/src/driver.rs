//! The parts of a running driver, put together.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix_csi_proto::System;

use crate::config::Config;
use crate::ops::Operations;
use crate::store::NodeStore;
use crate::substituter::{self, BinaryCache, Fetches, Substituter, Trust};
use crate::volume::Volumes;

/// What a driver must be told about its node.
#[derive(Debug, Clone)]
pub struct DriverOptions {
    /// The node's name, which kubelet wants to hear again.
    pub node_name: String,
    /// What store paths this node can run.
    pub system: System,
    /// Where kubelet keeps its pods: no other place is ever mounted on.
    pub pods_dir: PathBuf,
    /// How long a call waits for a fetch. Kubelet's own deadline is two minutes.
    pub patience: Duration,
}

/// A driver, without its sockets.
#[derive(Clone)]
pub struct Driver {
    pub(crate) options: Arc<DriverOptions>,
    pub(crate) store: Arc<NodeStore>,
    pub(crate) fetches: Fetches,
    pub(crate) volumes: Volumes,
    pub(crate) ops: Operations,
    /// One view is built at a time: both cores are in it, and a second call for it finds it done.
    pub(crate) building: Arc<tokio::sync::Mutex<()>>,
}

impl Driver {
    /// A driver on a store that is open and locked.
    pub fn new(store: Arc<NodeStore>, substituter: Substituter, options: DriverOptions) -> Self {
        Self {
            options: Arc::new(options),
            volumes: Volumes::new(&store),
            store,
            fetches: Fetches::new(substituter),
            ops: Operations::default(),
            building: Arc::default(),
        }
    }

    /// Takes away what an earlier process left half done. Only while nothing is served yet.
    pub fn clear_leftovers(&self) {
        if let Err(error) = self.store.clear_leftovers() {
            tracing::warn!(%error, "cannot clear away what an earlier process left");
        }
        self.empty_trash_later();
    }

    /// Deletes what was discarded, beside everything else.
    pub(crate) fn empty_trash_later(&self) {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = store.empty_trash() {
                tracing::warn!(%error, "cannot empty the trash yet");
            }
        });
    }
}

/// The substituter that `config` describes.
pub(crate) fn substituter(store: Arc<NodeStore>, config: &Config) -> anyhow::Result<Substituter> {
    let client = substituter::client(config)?;
    let cache = |url: &reqwest::Url| BinaryCache::new(url.clone(), client.clone(), config.download_attempts);
    let caches = config.substituters.iter().map(cache).collect();
    let trust = Trust { keys: config.trusted_keys(), require_sigs: config.require_sigs };
    let substituter = Substituter::new(store, caches, trust, config.http_connections);
    substituter.map_err(|error: io::Error| anyhow::Error::new(error).context("cannot start restore threads"))
}
