//! Events on what owns pods: whoever annotated a Deployment sees no warning and no denial of its pods.
//!
//! Nothing waits for them. They are queued, a few are kept, and the same is not said again for a while.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::mpsc;

use crate::metrics::{Metrics, Told};
use crate::origin::ObjectRef;

/// Events that wait. More are dropped: they are a convenience, and the API server has other work.
const QUEUED: usize = 64;
/// How many of what was said are remembered.
const REMEMBERED: usize = 4096;
/// How long the same is not said again. The API server forgets events after an hour.
const SAID_AGAIN: Duration = Duration::from_mins(10);
/// The pause after each, so that an avalanche of pods is no avalanche of events.
const PAUSE: Duration = Duration::from_millis(50);
/// How long an answer may take.
const ANSWERED: Duration = Duration::from_secs(5);

/// Who writes events.
const MANAGER: &str = "nix-csi-webhook";

/// One word for machines. An event of the same reason is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// New pods get packages.
    NixInjected,
    /// New pods are refused.
    NixRefused,
    /// It could not be read what new pods are to get, so they got nothing.
    NixOwnerUnknown,
    /// Pods exist without the packages that they are to have.
    NixUninjected,
}

/// What is said about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The object.
    pub about: ObjectRef,
    /// Its namespace.
    pub namespace: String,
    /// Why.
    pub reason: Reason,
    /// For the person.
    pub message: String,
}

/// Where events go. A clone is the same place.
#[derive(Clone)]
pub struct Events {
    queue: Option<mpsc::Sender<Event>>,
    metrics: Metrics,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::NixInjected => "NixInjected",
            Self::NixRefused => "NixRefused",
            Self::NixOwnerUnknown => "NixOwnerUnknown",
            Self::NixUninjected => "NixUninjected",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::NixInjected => "Normal",
            Self::NixRefused | Self::NixOwnerUnknown | Self::NixUninjected => "Warning",
        }
    }
}

impl Events {
    /// Nowhere.
    pub fn none() -> Self {
        Self { queue: None, metrics: Metrics::default() }
    }

    /// To the API server.
    pub fn to(client: kube::Client, metrics: Metrics) -> Self {
        let (queue, mut waiting) = mpsc::channel::<Event>(QUEUED);
        let counted = metrics.clone();
        tokio::spawn(async move {
            let mut said = Said::default();
            while let Some(event) = waiting.recv().await {
                if !said.is_new(&event, Instant::now()) {
                    counted.told(Told::Repeated);
                    continue;
                }
                match tokio::time::timeout(ANSWERED, write(&client, &event)).await {
                    Ok(Ok(())) => counted.told(Told::Written),
                    Ok(Err(error)) => {
                        tracing::debug!(%error, reason = event.reason.name(), "cannot write an event");
                        counted.told(Told::Failed);
                    }
                    Err(_) => counted.told(Told::Failed),
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Self { queue: Some(queue), metrics }
    }

    /// Says it, some time, if there is room.
    pub(crate) fn tell(&self, event: Event) {
        let Some(queue) = &self.queue else { return };
        if queue.try_send(event).is_err() {
            self.metrics.told(Told::Dropped);
        }
    }
}

/// What was said lately, and about what.
#[derive(Default)]
struct Said(HashMap<(String, Reason), (String, Instant)>);

impl Said {
    /// Whether this was not said lately. From now on it was.
    fn is_new(&mut self, event: &Event, now: Instant) -> bool {
        let is_fresh = |at: &Instant| now.duration_since(*at) < SAID_AGAIN;
        let key = (event.about.uid.clone(), event.reason);
        if self.0.get(&key).is_some_and(|(message, at)| *message == event.message && is_fresh(at)) {
            return false;
        }
        if self.0.len() >= REMEMBERED {
            self.0.retain(|_, (_, at)| is_fresh(at));
        }
        if self.0.len() >= REMEMBERED {
            self.0.clear();
        }
        self.0.insert(key, (event.message.clone(), now));
        true
    }
}

async fn write(client: &kube::Client, event: &Event) -> Result<(), kube::Error> {
    let now = Timestamp::now().to_string();
    let name = event_name(&event.about, event.reason);
    let written = json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": name, "namespace": event.namespace},
        "involvedObject": {
            "apiVersion": event.about.api_version, "kind": event.about.kind,
            "namespace": event.namespace, "name": event.about.name, "uid": event.about.uid,
        },
        "type": event.reason.kind(),
        "reason": event.reason.name(),
        "message": shortened(&event.message),
        "source": {"component": MANAGER},
        "firstTimestamp": now, "lastTimestamp": now, "count": 1,
    });
    let events = Api::<v1::Event>::namespaced(client.clone(), &event.namespace);
    events.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&written)).await.map(drop)
}

/// One for each object and reason.
fn event_name(about: &ObjectRef, reason: Reason) -> String {
    let uid: String = about.uid.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
    let name: String = about.name.chars().take(180).collect();
    format!("{}.{}.{}", name.trim_end_matches(['.', '-']), uid, reason.name()).to_ascii_lowercase()
}

/// As much as the server takes.
fn shortened(message: &str) -> &str {
    &message[..message.floor_char_boundary(1000)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(uid: &str, message: &str) -> Event {
        let about = ObjectRef {
            api_version: "apps/v1".into(),
            kind: "Deployment".into(),
            name: "web".into(),
            uid: uid.into(),
        };
        Event { about, namespace: "shop".into(), reason: Reason::NixInjected, message: message.into() }
    }

    #[test]
    fn the_same_is_said_once_in_a_while() {
        let (mut said, now) = (Said::default(), Instant::now());
        assert!(said.is_new(&event("1", "a"), now));
        assert!(!said.is_new(&event("1", "a"), now + SAID_AGAIN / 2));
        assert!(said.is_new(&event("2", "a"), now));
        assert!(said.is_new(&event("1", "b"), now));
        assert!(said.is_new(&event("1", "b"), now + SAID_AGAIN));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut said, now) = (Said::default(), Instant::now());
        for uid in 0..3 * REMEMBERED {
            said.is_new(&event(&uid.to_string(), "a"), now);
        }
        assert!(said.0.len() <= REMEMBERED);
    }

    #[test]
    fn the_name_of_an_event_is_one_of_an_object() {
        let about = event("3f0c7a52-8a5e-4a53-9d8e-0f2c51a6b7c8", "").about;
        assert_eq!(event_name(&about, Reason::NixRefused), "web.3f0c7a528a5e4a53.nixrefused");
    }
}
