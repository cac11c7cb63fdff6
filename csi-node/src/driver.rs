//! The parts of a running driver, put together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix_csi_proto::System;

use crate::config::Config;
use crate::ops::Operations;
use crate::store::{NodeStore, RegisterError};
use crate::substituter::{self, BinaryCache, Fetches, Substituter, Trust};
use crate::tenancy::Tenants;
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

/// How often what was registered is synced.
const SYNCED: Duration = Duration::from_secs(5);
/// By then kubelet has asked again for every volume that an earlier process was fetching for.
const ADOPTED: Duration = Duration::from_mins(10);

/// A driver, without its sockets.
#[derive(Clone)]
pub struct Driver {
    pub(crate) options: Arc<DriverOptions>,
    pub(crate) store: Arc<NodeStore>,
    pub(crate) fetches: Fetches,
    pub(crate) volumes: Volumes,
    pub(crate) tenants: Tenants,
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
            tenants: Tenants::default(),
            ops: Operations::default(),
            building: Arc::default(),
        }
    }

    /// Puts in order what an earlier process left. Only while nothing is served yet.
    pub fn recover(&self) -> Result<(), RegisterError> {
        self.store.recover()?;
        self.store.empty_trash_later();
        Ok(())
    }

    /// Syncs what was registered, now and then, and lets go of what nobody has adopted. Never ends.
    pub async fn look_after_the_store(&self) {
        let start = tokio::time::Instant::now();
        let mut tick = tokio::time::interval_at(start + SYNCED, SYNCED);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let now = tick.tick().await;
            let store = Arc::clone(&self.store);
            let is_late = now.duration_since(start) > ADOPTED;
            let looked_after = tokio::task::spawn_blocking(move || {
                if is_late {
                    store.staging().discard_leftovers();
                }
                store.sync()
            });
            if let Ok(Err(error)) = looked_after.await {
                let error = anyhow::Error::new(error);
                tracing::error!("the store is not synced: {error:#}");
            }
        }
    }
}

/// Starts the substituter that `config` describes.
pub fn start_substituter(store: Arc<NodeStore>, config: &Config) -> anyhow::Result<Substituter> {
    let client = substituter::client(config)?;
    let logins = Arc::new(config.logins().context("the credentials for binary caches")?);
    let cache = |url: &reqwest::Url| {
        let (client, logins) = (client.clone(), Arc::clone(&logins));
        // Zero means no limit, as in Nix: more than any cache takes.
        let connections = if config.http_connections == 0 { 1024 } else { config.http_connections };
        BinaryCache::new(url.clone(), client, logins, connections, config.download_attempts)
    };
    let caches = config.substituters.iter().map(cache).collect();
    let trust = Trust { keys: config.trusted_keys(), require_sigs: config.require_sigs };
    Substituter::new(store, caches, trust).context("cannot start restore threads")
}
