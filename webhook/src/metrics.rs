//! What the webhook counts, for Prometheus.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::entry::Entry;
use crate::uninjected::Asked;

/// From a decision in memory to one that had to ask as long as it may.
const SECONDS: [f64; 10] = [0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.025, 0.1, 0.5, 1.0];

/// How a review ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reviewed {
    entry: &'static str,
    decision: &'static str,
}

/// How an owner or a Namespace was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It was known.
    InMemory,
    /// The API server was asked, and had it.
    Asked,
    /// It was asked, and there is none.
    Gone,
    /// It gave no answer.
    NoAnswer,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookedUp {
    found: &'static str,
}

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The API server took it.
    Written,
    /// The same was said a moment ago.
    Repeated,
    /// There were too many.
    Dropped,
    /// The API server did not take it.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Events {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Mapped {
    image_map: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Uninjected {
    asked: &'static str,
}

/// All that is counted. A clone counts the same.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    reviews: Family<Reviewed, Counter>,
    duration: Histogram,
    look_ups: Family<LookedUp, Counter>,
    events: Family<Events, Counter>,
    mapped: Family<Mapped, Counter>,
    known: Family<OfKind, Gauge>,
    expires: Gauge<u64, AtomicU64>,
    uninjected: Family<Uninjected, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("nix_csi_webhook");
        let mut inner = Inner {
            reviews: Family::default(),
            duration: Histogram::new(SECONDS),
            look_ups: Family::default(),
            events: Family::default(),
            mapped: Family::default(),
            known: Family::default(),
            expires: Gauge::default(),
            uninjected: Family::default(),
            registry: Registry::default(),
        };
        let help = "Reviews, by webhook entry and decision";
        registry.register("reviews", help, inner.reviews.clone());
        let help = "How long a review took, from the whole body to the answer";
        registry.register_with_unit("review_duration", help, Unit::Seconds, inner.duration.clone());
        let help = "Owners and Namespaces looked up for reviews";
        registry.register("look_ups", help, inner.look_ups.clone());
        registry.register("events", "Events for owners of pods", inner.events.clone());
        let help = "Containers that run packages instead of their image, by ImageMap";
        registry.register("image_map_hits", help, inner.mapped.clone());
        registry.register("known_objects", "Objects kept in memory", inner.known.clone());
        let help = "When the serving certificate ends, in seconds since 1970; 0 if there is none";
        registry.register("certificate_expiration_timestamp_seconds", help, inner.expires.clone());
        let help = "Pods without the packages that they are to have, by where that is said";
        registry.register("uninjected_pods", help, inner.uninjected.clone());
        inner.registry = registry;
        Self(Arc::new(inner))
    }
}

impl Metrics {
    /// A review has ended.
    pub(crate) fn reviewed(&self, entry: Entry, decision: &'static str, took: Duration) {
        self.0.reviews.get_or_create(&Reviewed { entry: entry.name(), decision }).inc();
        self.0.duration.observe(took.as_secs_f64());
    }

    /// An object was looked up.
    pub(crate) fn looked_up(&self, found: Found) {
        let found = match found {
            Found::InMemory => "memory",
            Found::Asked => "asked",
            Found::Gone => "gone",
            Found::NoAnswer => "no-answer",
        };
        self.0.look_ups.get_or_create(&LookedUp { found }).inc();
    }

    /// A container runs packages instead of its image, as an ImageMap says.
    pub(crate) fn mapped(&self, image_map: &str) {
        self.0.mapped.get_or_create_owned(&Mapped { image_map: image_map.to_owned() }).inc();
    }

    /// An event came to its end.
    pub(crate) fn told(&self, outcome: Told) {
        let outcome = match outcome {
            Told::Written => "written",
            Told::Repeated => "repeated",
            Told::Dropped => "dropped",
            Told::Failed => "failed",
        };
        self.0.events.get_or_create(&Events { outcome }).inc();
    }

    /// So many pods lack their packages.
    pub(crate) fn uninjected(&self, counts: [(Asked, usize); 3]) {
        for (asked, count) in counts {
            let gauge = self.0.uninjected.get_or_create_owned(&Uninjected { asked: asked.name() });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Everything, in the text format of OpenMetrics. `known` says how many objects there are of which kind.
    pub(crate) fn text(
        &self,
        known: impl IntoIterator<Item = (String, usize)>,
        expires: Option<u64>,
    ) -> String {
        for (kind, count) in known {
            let gauge = self.0.known.get_or_create_owned(&OfKind { kind });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.0.expires.set(expires.unwrap_or(0));
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
        let metrics = Metrics::default();
        metrics.reviewed(Entry::Namespace, "injected", Duration::from_micros(200));
        metrics.looked_up(Found::InMemory);
        metrics.told(Told::Repeated);
        let text = metrics.text([("ReplicaSet".to_owned(), 3)], Some(1_800_000_000));
        for line in [
            "nix_csi_webhook_reviews_total{entry=\"namespace\",decision=\"injected\"} 1",
            "nix_csi_webhook_review_duration_seconds_bucket{le=\"0.00025\"} 1",
            "nix_csi_webhook_look_ups_total{found=\"memory\"} 1",
            "nix_csi_webhook_events_total{outcome=\"repeated\"} 1",
            "nix_csi_webhook_known_objects{kind=\"ReplicaSet\"} 3",
            "nix_csi_webhook_certificate_expiration_timestamp_seconds 1800000000",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
