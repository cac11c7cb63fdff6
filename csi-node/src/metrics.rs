//! What the driver counts, for Prometheus.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

use crate::gc::Collection;

/// From a warm publish to a closure that takes as long as a call may.
const SECONDS: [f64; 14] =
    [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0, 60.0, 120.0];

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    call: &'static str,
    code: String,
}

/// Whether a volume found its view.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Found {
    view: &'static str,
}

/// All that is counted. A clone counts the same.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    calls: Family<Ended, Counter>,
    published: Family<Found, Histogram>,
    fetched_paths: Counter,
    fetched_bytes: Counter,
    ran_alone: Gauge<u64, AtomicU64>,
    left_out: Counter,
    copied_files: Counter,
    profile_collisions: Counter,
    fetches: Gauge,
    volumes: Gauge,
    free_bytes: Gauge<u64, AtomicU64>,
    free_inodes: Gauge<u64, AtomicU64>,
    collections: Counter,
    collections_in_vain: Counter,
    collected_views: Counter,
    collected_paths: Counter,
    collected_bytes: Counter,
}

/// What is looked up when somebody asks, and not counted.
pub(crate) struct State {
    /// Paths and bytes.
    pub(crate) fetched: (u64, u64),
    pub(crate) ran_alone: u64,
    pub(crate) fetches: usize,
    pub(crate) volumes: usize,
    pub(crate) free_bytes: u64,
    pub(crate) free_inodes: u64,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("nix_csi");
        let mut inner = Inner {
            calls: Family::default(),
            published: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            fetched_paths: Counter::default(),
            fetched_bytes: Counter::default(),
            ran_alone: Gauge::default(),
            left_out: Counter::default(),
            copied_files: Counter::default(),
            profile_collisions: Counter::default(),
            fetches: Gauge::default(),
            volumes: Gauge::default(),
            free_bytes: Gauge::default(),
            free_inodes: Gauge::default(),
            collections: Counter::default(),
            collections_in_vain: Counter::default(),
            collected_views: Counter::default(),
            collected_paths: Counter::default(),
            collected_bytes: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("calls", "Calls of kubelet, by how they ended", inner.calls.clone());
        registry.register_with_unit(
            "publish_duration",
            "How long a successful publish took, with a view that was there (warm) or not (cold)",
            Unit::Seconds,
            inner.published.clone(),
        );
        registry.register("fetched_paths", "Store paths fetched for volumes", inner.fetched_paths.clone());
        let (help, of) = ("NAR bytes fetched for volumes", inner.fetched_bytes.clone());
        registry.register_with_unit("fetched", help, Unit::Bytes, of);
        let help =
            "Paths that needed more memory than all together should take, and ran alone, since the start";
        registry.register("paths_alone", help, inner.ran_alone.clone());
        let help = "Optional paths that volumes do without";
        registry.register("optional_paths_left_out", help, inner.left_out.clone());
        let help = "Files copied into views because they can have no more links";
        registry.register("view_copied_files", help, inner.copied_files.clone());
        let help = "Files that several packages of a view have, of which one is in its profile";
        registry.register("profile_collisions", help, inner.profile_collisions.clone());
        registry.register("fetches", "Fetches under way", inner.fetches.clone());
        registry.register("volumes", "Volumes that are recorded", inner.volumes.clone());
        let (help, of) = ("Bytes free where the store is", inner.free_bytes.clone());
        registry.register_with_unit("filesystem_free", help, Unit::Bytes, of);
        let help = "Inodes free where the store is";
        registry.register("filesystem_free_inodes", help, inner.free_inodes.clone());
        registry.register("collections", "Collections of what is not used", inner.collections.clone());
        let help = "Collections after which the disk was still too full";
        registry.register("collections_in_vain", help, inner.collections_in_vain.clone());
        registry.register("collected_views", "Views collected", inner.collected_views.clone());
        registry.register("collected_paths", "Store paths collected", inner.collected_paths.clone());
        let (help, of) = ("NAR bytes collected", inner.collected_bytes.clone());
        registry.register_with_unit("collected", help, Unit::Bytes, of);
        inner.registry = registry;
        Self(Arc::new(inner))
    }

    /// A call has ended.
    pub(crate) fn ended(&self, call: &'static str, code: Code) {
        self.0.calls.get_or_create(&Ended { call, code: format!("{code:?}") }).inc();
    }

    /// A volume was published.
    pub(crate) fn published(&self, is_warm: bool, took: Duration) {
        let view = if is_warm { "warm" } else { "cold" };
        self.0.published.get_or_create(&Found { view }).observe(took.as_secs_f64());
    }

    /// A volume does without so many optional paths.
    pub(crate) fn left_out(&self, paths: usize) {
        self.0.left_out.inc_by(paths as u64);
    }

    /// A view was built.
    pub(crate) fn built(&self, copied: u64, collisions: u64) {
        self.0.copied_files.inc_by(copied);
        self.0.profile_collisions.inc_by(collisions);
    }

    /// A collection has ended.
    pub(crate) fn collected(&self, collection: &Collection) {
        self.0.collections.inc();
        if !collection.is_enough {
            self.0.collections_in_vain.inc();
        }
        self.0.collected_views.inc_by(collection.views as u64);
        self.0.collected_paths.inc_by(collection.paths as u64);
        self.0.collected_bytes.inc_by(collection.bytes);
    }

    /// Everything, in the text format of OpenMetrics.
    pub(crate) fn text(&self, state: &State) -> String {
        let Inner { ran_alone, fetches, volumes, free_bytes, free_inodes, .. } = &*self.0;
        let (paths, bytes) = state.fetched;
        self.0.fetched_paths.inner().store(paths, Ordering::Relaxed);
        self.0.fetched_bytes.inner().store(bytes, Ordering::Relaxed);
        ran_alone.set(state.ran_alone);
        fetches.set(i64::try_from(state.fetches).unwrap_or(i64::MAX));
        volumes.set(i64::try_from(state.volumes).unwrap_or(i64::MAX));
        free_bytes.set(state.free_bytes);
        free_inodes.set(state.free_inodes);
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = encode(&mut text, &self.0.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_written() {
        let metrics = Metrics::new();
        metrics.ended("publish", Code::NotFound);
        metrics.published(true, Duration::from_millis(1));
        metrics.left_out(2);
        metrics.built(3, 4);
        metrics.collected(&Collection { views: 1, paths: 2, bytes: 3, is_enough: false });
        let state =
            State { fetched: (3, 4096), ran_alone: 1, fetches: 2, volumes: 3, free_bytes: 4, free_inodes: 5 };
        let text = metrics.text(&state);
        for line in [
            "nix_csi_calls_total{call=\"publish\",code=\"NotFound\"} 1",
            "nix_csi_publish_duration_seconds_bucket{le=\"0.001\",view=\"warm\"} 1",
            "nix_csi_fetched_paths_total 3",
            "nix_csi_fetched_bytes_total 4096",
            "nix_csi_paths_alone 1",
            "nix_csi_optional_paths_left_out_total 2",
            "nix_csi_view_copied_files_total 3",
            "nix_csi_profile_collisions_total 4",
            "nix_csi_fetches 2",
            "nix_csi_volumes 3",
            "nix_csi_filesystem_free_bytes 4",
            "nix_csi_filesystem_free_inodes 5",
            "nix_csi_collections_in_vain_total 1",
            "nix_csi_collected_bytes_total 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
