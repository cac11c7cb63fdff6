//! The parts of a running driver, put together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix_csi_proto::System;
use tokio::task::JoinSet;

use crate::config::Config;
use crate::gc::{CollectError, Collection, Collector, Limits};
use crate::kubernetes::Kubernetes;
use crate::metrics::{Metrics, State};
use crate::mount;
use crate::ops::Operations;
use crate::publish::PublishError;
use crate::stats::ViewSizes;
use crate::store::{NodeStore, RegisterError};
use crate::substituter::{self, BinaryCache, FetchError, Fetches, Substituter, Trust};
use crate::tenancy::Tenants;
use crate::usage::Usage;
use crate::volume::Volumes;

/// What a driver must be told about its node.
#[derive(Clone)]
pub struct DriverOptions {
    /// The node's name, which kubelet wants to hear again.
    pub node_name: String,
    /// What store paths this node can run.
    pub system: System,
    /// Where kubelet keeps its pods: no other place is ever mounted on.
    pub pods_dir: PathBuf,
    /// How long a call waits for a fetch. Kubelet's own deadline is two minutes.
    pub patience: Duration,
    /// Who is asked about pods, and told events.
    pub kubernetes: Kubernetes,
    /// How much of the disk is kept free.
    pub limits: Limits,
    /// The most that a read-write volume may ask for. With it each of them must ask.
    pub max_size_limit: Option<u64>,
    /// Whether to take the startup taint off the node when kubelet knows the driver.
    pub remove_startup_taint: bool,
}

/// How often what was registered is synced.
const SYNCED: Duration = Duration::from_secs(5);
/// How often it is looked whether there is room.
const COLLECTED: Duration = Duration::from_secs(10);
/// How often volumes are compared with what kubelet knows.
const RECONCILED: Duration = Duration::from_mins(1);
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
    pub(crate) usage: Usage,
    pub(crate) collector: Collector,
    pub(crate) metrics: Metrics,
    pub(crate) view_sizes: ViewSizes,
    /// Whether the store's filesystem enforces what a volume may write.
    pub(crate) has_quotas: bool,
    pub(crate) ops: Operations,
    /// One view is built at a time: both cores are in it, and a second call for it finds it done.
    pub(crate) building: Arc<tokio::sync::Mutex<()>>,
    /// Held by whoever verifies the store.
    pub(crate) verifying: Arc<tokio::sync::Mutex<()>>,
}

impl Driver {
    /// A driver on a store that is open and locked.
    pub fn new(store: Arc<NodeStore>, substituter: Substituter, options: DriverOptions) -> Self {
        let (volumes, tenants) = (Volumes::new(&store), Tenants::default());
        let has_quotas = mount::has_quotas(store.layout().root());
        tracing::info!(has_quotas, "whether the filesystem of the store limits what volumes may write");
        let usage = Usage::load(store.layout().usage());
        let (of, limits) = (Arc::clone(&store), options.limits);
        let collector = Collector::new(of, volumes.clone(), usage.clone(), tenants.clone(), limits);
        Self {
            options: Arc::new(options),
            volumes,
            store,
            has_quotas,
            fetches: Fetches::new(substituter),
            tenants,
            usage,
            collector,
            metrics: Metrics::new(),
            view_sizes: ViewSizes::default(),
            ops: Operations::default(),
            building: Arc::default(),
            verifying: Arc::default(),
        }
    }

    /// Puts in order what an earlier process left. Only while nothing is served yet.
    pub fn recover(&self) -> Result<(), PublishError> {
        self.store.recover().map_err(FetchError::from)?;
        self.reconcile_or_warn();
        self.store.empty_trash_later();
        Ok(())
    }

    /// Kubelet knows the driver: pods that need it may come. To be called in a runtime.
    pub(crate) fn registered(&self) {
        if self.options.remove_startup_taint {
            let kubernetes = self.options.kubernetes.clone();
            tokio::spawn(async move { kubernetes.untaint().await });
        }
    }

    /// What is counted, with what is looked up now.
    pub fn metrics_text(&self) -> String {
        let (free_bytes, free_inodes) = self.collector.free().unwrap_or_default();
        let substituter = self.fetches.substituter(None);
        self.metrics.text(&State {
            fetched: substituter.fetched(),
            ran_alone: substituter.ran_alone(),
            fetches: self.fetches.running(),
            volumes: self.volumes.ids().map_or(0, |volumes| volumes.len()),
            free_bytes,
            free_inodes,
        })
    }

    /// The last thing before the process ends: what was registered is on the disk then.
    pub fn finish(&self) -> Result<(), RegisterError> {
        self.save_usage();
        self.store.sync()
    }

    fn save_usage(&self) {
        if let Err(error) = self.usage.save() {
            tracing::warn!(%error, "cannot write down which views were used last");
        }
    }

    /// Does what is to be done beside calls, until what this gives back is dropped. To be called in a runtime.
    pub fn work_beside(&self) -> JoinSet<()> {
        let mut beside = JoinSet::new();
        let this = self.clone();
        beside.spawn(async move { this.look_after_the_store().await });
        let this = self.clone();
        beside.spawn(async move { this.collect_garbage().await });
        let this = self.clone();
        beside.spawn(async move { this.reconcile_now_and_then().await });
        beside
    }

    /// Removes what is left of volumes that kubelet has forgotten, now and then. Never ends.
    async fn reconcile_now_and_then(&self) {
        loop {
            tokio::time::sleep(RECONCILED).await;
            let this = self.clone();
            let _ = tokio::task::spawn_blocking(move || this.reconcile_or_warn()).await;
        }
    }

    /// A target that cannot be looked at is no reason not to serve the others.
    fn reconcile_or_warn(&self) {
        if let Err(error) = self.reconcile() {
            let error = anyhow::Error::new(error);
            tracing::warn!("cannot compare the volumes with what kubelet knows: {error:#}");
        }
    }

    /// Syncs what was registered, now and then, and lets go of what nobody has adopted. Never ends.
    async fn look_after_the_store(&self) {
        let start = tokio::time::Instant::now();
        let mut tick = tokio::time::interval_at(start + SYNCED, SYNCED);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let now = tick.tick().await;
            self.fetches.end_unwanted();
            let this = self.clone();
            let is_late = now.duration_since(start) > ADOPTED;
            let looked_after = tokio::task::spawn_blocking(move || {
                this.save_usage();
                if is_late {
                    this.store.staging().discard_leftovers();
                }
                this.store.sync()
            });
            if let Ok(Err(error)) = looked_after.await {
                let error = anyhow::Error::new(error);
                tracing::error!("the store is not synced: {error:#}");
            }
        }
    }
}

impl Driver {
    /// Keeps some of the disk free. Never ends.
    async fn collect_garbage(&self) {
        loop {
            let collector = self.collector.clone();
            let collected = tokio::task::spawn_blocking(move || {
                let retired = collector.remove_retired()?;
                Ok::<_, CollectError>((retired, collector.collect_if_low()?))
            });
            match collected.await {
                Ok(Ok((_, Some(collection)))) => {
                    self.metrics.collected(&collection);
                    let Collection { views, paths, bytes, is_enough } = collection;
                    if is_enough {
                        tracing::info!(views, paths, bytes, "collected what was not used");
                    } else {
                        tracing::warn!(
                            views,
                            paths,
                            bytes,
                            "collected all that is not used, and the disk is still too full"
                        );
                    }
                }
                Ok(Ok((0, None))) | Err(_) => {}
                Ok(Ok((_, None))) => self.store.empty_trash_later(),
                Ok(Err(error)) => {
                    let error = anyhow::Error::new(error);
                    tracing::error!("cannot collect what is not used: {error:#}");
                }
            }
            tokio::select! {
                () = self.collector.wanted() => {}
                () = tokio::time::sleep(COLLECTED) => {}
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
    Substituter::new(store, caches, trust, config.largest).context("cannot start restore threads")
}
