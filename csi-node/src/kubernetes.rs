//! What the driver asks and tells the API server: whether a pod is still there, and events on it. Nothing waits for
//! either, and without an API server volumes are published all the same.

use std::future::{Future, pending};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Request;
use k8s_openapi::api::core::v1;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::{Api, Patch, PatchParams};
use nix_csi_proto::annotations::STARTUP_TAINT;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::volume::Pod;

/// How often it is looked whether a pod that waits is still there.
const LOOKED: Duration = Duration::from_secs(5);
/// How long an answer may take.
const ANSWERED: Duration = Duration::from_secs(5);
/// The most between two tries to change the node.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// Events on their way at the same time. More are dropped: they are a convenience, and the server has other work.
const EVENTS: usize = 16;

/// Who writes events.
const MANAGER: &str = "nix-csi-node";

/// The API server, if there is one. A clone is the same.
#[derive(Clone, Default)]
pub struct Kubernetes(Option<Arc<Server>>);

struct Server {
    client: kube::Client,
    node: String,
    slots: Arc<Semaphore>,
}

/// What a pod's author is told beside what kubelet tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// One word for machines. An event of the same reason is replaced.
    pub(crate) reason: &'static str,
    pub(crate) is_warning: bool,
    pub(crate) message: String,
}

impl Kubernetes {
    /// The server that this process is a pod of, or none outside of a cluster.
    pub fn in_cluster(node: &str) -> anyhow::Result<Self> {
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
            return Ok(Self::default());
        }
        // An administrator may take the token away: then there are no events, and volumes all the same.
        let config = match kube::Config::incluster() {
            Ok(config) => config,
            Err(error) => {
                tracing::warn!(%error, "no service account: no events, and pods are not looked up");
                return Ok(Self::default());
            }
        };
        Ok(Self::with(kube::Client::try_from(config)?, node))
    }

    /// The server at an address, to which nobody has to say who they are.
    pub fn at(address: &str, node: &str) -> anyhow::Result<Self> {
        let client = kube::Client::try_from(kube::Config::new(address.parse()?))?;
        Ok(Self::with(client, node))
    }

    /// That server.
    pub fn with(client: kube::Client, node: &str) -> Self {
        let slots = Arc::new(Semaphore::new(EVENTS));
        Self(Some(Arc::new(Server { client, node: node.to_owned(), slots })))
    }

    /// Ends when the pod is gone, or is being deleted, or is another one of the same name. As long as the server does
    /// not say so, the pod is there.
    pub(crate) async fn gone(&self, pod: &Pod) {
        let Some(server) = &self.0 else { return pending().await };
        loop {
            tokio::time::sleep(LOOKED).await;
            match answered(server.is_there(pod)).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::debug!(error, "cannot ask whether the pod is still there"),
            }
        }
    }

    /// Takes the startup taint off this node. Ends when it is off; a server that does not answer is asked again.
    pub(crate) async fn untaint(&self) {
        let Some(server) = &self.0 else { return };
        let mut pause = Duration::from_secs(1);
        loop {
            match answered(server.untaint()).await {
                Ok(true) => tracing::info!(taint = STARTUP_TAINT, "took the startup taint off this node"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(
                        error,
                        taint = STARTUP_TAINT,
                        "cannot take the startup taint off this node"
                    );
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
            }
            return;
        }
    }

    /// Puts an event on a pod, some time.
    pub(crate) fn tell(&self, pod: &Pod, event: Event) {
        let Some(server) = self.0.clone() else { return };
        let Ok(slot) = Arc::clone(&server.slots).try_acquire_owned() else {
            tracing::debug!(reason = event.reason, "too many events at once, dropped");
            return;
        };
        let pod = pod.clone();
        tokio::spawn(async move {
            if let Err(error) = answered(server.write(&pod, &event)).await {
                tracing::debug!(error, reason = event.reason, "cannot write an event");
            }
            drop(slot);
        });
    }
}

impl Kubernetes {
    /// Puts an event on a pod: for those that must not be dropped because there are many at once.
    pub(crate) async fn tell_in_turn(&self, pod: &Pod, event: Event) {
        let Some(server) = &self.0 else { return };
        let slot = server.slots.acquire().await;
        if let Err(error) = answered(server.write(pod, &event)).await {
            tracing::warn!(error, reason = event.reason, pod.name, pod.namespace, "cannot write an event");
        }
        drop(slot);
    }
}

impl Server {
    /// Whether there was one to take off.
    async fn untaint(&self) -> Result<bool, kube::Error> {
        let node = Api::<v1::Node>::all(self.client.clone()).get(&self.node).await?;
        let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let patch = untaint_patch(taints.iter().map(|taint| taint.key.as_str()));
        if patch.is_empty() {
            return Ok(false);
        }
        let at = format!("/api/v1/nodes/{}?fieldManager={MANAGER}", self.node);
        let request = Request::patch(at)
            .header("content-type", "application/json-patch+json")
            .body(json!(patch).to_string().into_bytes())
            .map_err(kube::Error::HttpError)?;
        self.client.request::<serde_json::Value>(request).await?;
        Ok(true)
    }

    async fn is_there(&self, pod: &Pod) -> Result<bool, kube::Error> {
        let found = Api::<v1::Pod>::namespaced(self.client.clone(), &pod.namespace);
        let found = found.get_metadata_opt(&pod.name).await?;
        // Kubelet knows a static pod by the hash of its file; the server has a mirror of it, or not yet.
        let is_static = !pod.uid.contains('-');
        let Some(found) = found else { return Ok(is_static) };
        let mirrors = found.annotations().get("kubernetes.io/config.hash") == Some(&pod.uid);
        let is_same = found.metadata.uid.as_ref() == Some(&pod.uid) || mirrors;
        Ok(is_same && found.metadata.deletion_timestamp.is_none())
    }

    async fn write(&self, pod: &Pod, event: &Event) -> Result<(), kube::Error> {
        let now = Timestamp::now().to_string();
        let name = event_name(pod, event.reason);
        let event = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": pod.namespace},
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod",
                "namespace": pod.namespace, "name": pod.name, "uid": pod.uid,
            },
            "type": if event.is_warning { "Warning" } else { "Normal" },
            "reason": event.reason,
            "message": shortened(&event.message),
            "source": {"component": MANAGER, "host": self.node},
            "firstTimestamp": now, "lastTimestamp": now, "count": 1,
        });
        let events = Api::<v1::Event>::namespaced(self.client.clone(), &pod.namespace);
        events.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&event)).await.map(drop)
    }
}

/// The JSON patch that takes the startup taint out of a list with these keys. It fails where the list is another one by
/// then.
fn untaint_patch<'a>(
    keys: impl ExactSizeIterator<Item = &'a str> + DoubleEndedIterator,
) -> Vec<serde_json::Value> {
    let found = keys.enumerate().rev().filter(|(_, key)| *key == STARTUP_TAINT);
    // From the end, so that no number changes.
    let steps = found.flat_map(|(n, key)| {
        let at = format!("/spec/taints/{n}");
        [
            json!({"op": "test", "path": format!("{at}/key"), "value": key}),
            json!({"op": "remove", "path": at}),
        ]
    });
    steps.collect()
}

async fn answered<T>(question: impl Future<Output = Result<T, kube::Error>>) -> Result<T, String> {
    match tokio::time::timeout(ANSWERED, question).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}

/// One for each pod and reason: the name of the object, and of which of that name.
fn event_name(pod: &Pod, reason: &str) -> String {
    let uid: String = pod.uid.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
    let name: String = pod.name.chars().take(180).collect();
    format!("{}.{}.{}", name.trim_end_matches(['.', '-']), uid, reason).to_ascii_lowercase()
}

/// As much as the server takes.
fn shortened(message: &str) -> &str {
    &message[..message.floor_char_boundary(1000)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_startup_taint_is_taken_off() {
        assert_eq!(
            untaint_patch(["node.kubernetes.io/not-ready"].into_iter()),
            Vec::<serde_json::Value>::new()
        );
        let patch = untaint_patch([STARTUP_TAINT, "other", STARTUP_TAINT].into_iter());
        let expected = json!([
            {"op": "test", "path": "/spec/taints/2/key", "value": STARTUP_TAINT},
            {"op": "remove", "path": "/spec/taints/2"},
            {"op": "test", "path": "/spec/taints/0/key", "value": STARTUP_TAINT},
            {"op": "remove", "path": "/spec/taints/0"},
        ]);
        assert_eq!(json!(patch), expected);
    }

    #[test]
    fn the_name_of_an_event_is_one_of_an_object() {
        let pod = |name: &str| Pod {
            namespace: "shop".into(),
            name: name.into(),
            uid: "3f0c7a52-8a5e-4a53-9d8e-0f2c51a6b7c8".into(),
        };
        assert_eq!(event_name(&pod("web-1"), "NixReady"), "web-1.3f0c7a528a5e4a53.nixready");
        let long = event_name(&pod(&format!("{}-x", "a".repeat(179))), "NixReady");
        assert!(long.len() < 253 && !long.contains("-."), "{long}");
        assert_eq!(shortened(&"ä".repeat(600)).len(), 1000);
    }
}
