//! From a pod to where it comes from: from memory, and if something is not there yet, by asking once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::core::{ApiResource, ObjectMeta};
use kube::{Api, Client};
use nix_csi_proto::annotations::{INJECT, PREFIX};
use serde_json::Value;
use tokio::time::Instant;

use crate::entry::Entry;
use crate::image_map::ImageMaps;
use crate::image_map_watch::{self, LiveImageMaps};
use crate::index::{Index, Meta, follow};
use crate::kinds::OwnerKind;
use crate::metrics::{Found, Metrics};
use crate::origin::{Namespace, ObjectRef, Origin, Owner, REVISION};
use crate::source::is_settled_by;

/// How long all questions of one review may take together. The API server gives it 3 s.
const ANSWERED: Duration = Duration::from_millis(500);
/// Owners of owners that are looked at. A pod of a CronJob has two.
const DEPTH: usize = 4;

/// Why it is not known where a pod comes from.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The API server did not answer in time.
    #[error("no answer about {kind} {name} within {} ms", ANSWERED.as_millis())]
    Late {
        /// What was asked for.
        kind: String,
        /// Which one.
        name: String,
    },
    /// The API server did not say it.
    #[error("cannot read {kind} {name}")]
    Api {
        /// What was asked for.
        kind: String,
        /// Which one.
        name: String,
        /// What it said.
        source: Box<kube::Error>,
    },
}

/// Where pods come from, as far as it is known.
pub struct Origins {
    client: Option<Client>,
    kinds: Vec<Kind>,
    namespaces: Arc<Index<Namespace>>,
    image_maps: LiveImageMaps,
    metrics: Metrics,
}

struct Kind {
    resource: ApiResource,
    owners: Arc<Index<Owner>>,
}

impl Origins {
    /// Knows nothing yet, and asks `client`. [`Origins::follow`] makes it know.
    pub fn new(client: Client, more: impl IntoIterator<Item = OwnerKind>, metrics: Metrics) -> Self {
        let kinds = OwnerKind::built_in().chain(more);
        let kinds = kinds.map(|OwnerKind(resource)| Kind { resource, owners: Arc::default() }).collect();
        Self { client: Some(client), kinds, namespaces: Arc::default(), image_maps: Arc::default(), metrics }
    }

    /// Knows exactly these, for ever.
    pub fn fixed(owners: &[Owner], namespaces: Vec<Namespace>) -> Self {
        let kinds = OwnerKind::built_in().map(|OwnerKind(resource)| {
            let of_kind = owners.iter().filter(|owner| is_of(&resource, &owner.object));
            let of_kind = of_kind.map(|owner| (owner.object.uid.clone(), Arc::new(owner.clone()))).collect();
            let owners = Index::default();
            owners.replace(of_kind);
            Kind { resource, owners: Arc::new(owners) }
        });
        let kinds = kinds.collect();
        let known = Index::default();
        known.replace(namespaces.into_iter().map(|one| (one.name.clone(), Arc::new(one))).collect());
        let (namespaces, metrics) = (Arc::new(known), Metrics::default());
        Self { client: None, kinds, namespaces, image_maps: Arc::default(), metrics }
    }

    /// Begins to follow what happens in the cluster.
    pub fn follow(&self) {
        let Some(client) = &self.client else { return };
        for kind in &self.kinds {
            let api = Api::all_with(client.clone(), &kind.resource);
            let api_version = kind.resource.api_version.clone();
            let name = kind.resource.kind.clone();
            let keep = move |meta| owner(&api_version, &name, meta).map(|one| (one.object.uid.clone(), one));
            tokio::spawn(follow(api, Arc::clone(&kind.owners), keep));
        }
        let api = Api::all_with(client.clone(), &namespace_resource());
        let keep = |meta| namespace(meta).map(|one| (one.name.clone(), one));
        tokio::spawn(follow(api, Arc::clone(&self.namespaces), keep));
        tokio::spawn(image_map_watch::keep(client.clone(), Arc::clone(&self.image_maps)));
    }

    /// The same, with exactly these ImageMaps.
    #[must_use]
    pub fn with_image_maps(self, maps: ImageMaps) -> Self {
        self.image_maps.store(Arc::new(maps));
        self
    }

    /// Whether everything was listed once.
    pub fn is_synced(&self) -> bool {
        self.namespaces.is_synced() && self.kinds.iter().all(|kind| kind.owners.is_synced())
    }

    /// How many objects of each kind are known.
    pub(crate) fn known(&self) -> Vec<(String, usize)> {
        let owners = self.kinds.iter().map(|kind| (kind.resource.kind.clone(), kind.owners.len()));
        owners.chain([("Namespace".to_owned(), self.namespaces.len())]).collect()
    }

    /// Where `pod` comes from, as far as it is in memory.
    pub(crate) fn known_of(&self, namespace: &str, pod: &Value) -> Origin {
        let mut owners: Vec<Arc<Owner>> = Vec::new();
        let mut next = controller_of(pod);
        while let Some(reference) = next.take().filter(|_| owners.len() < DEPTH) {
            let kind = self.kinds.iter().find(|kind| is_of(&kind.resource, &reference));
            let Some(found) = kind.and_then(|kind| kind.owners.get(&reference.uid)) else { break };
            next.clone_from(&found.controller);
            owners.push(found);
        }
        let namespace = self.namespaces.get(namespace);
        Origin { owners, namespace, image_maps: self.image_maps.load_full() }
    }

    /// Where `pod` comes from. What the pod says itself may be enough: then nobody is asked.
    pub async fn of(&self, namespace: &str, pod: &Value, entry: Entry) -> Result<Origin, OriginError> {
        let is_settled = is_settled_by(pod);
        let asked_until = Instant::now() + ANSWERED;
        let mut owners: Vec<Arc<Owner>> = Vec::new();
        let mut next = controller_of(pod);
        while let Some(reference) = next.take().filter(|_| owners.len() < DEPTH) {
            let Some(kind) = self.kinds.iter().find(|kind| is_of(&kind.resource, &reference)) else { break };
            // A ReplicaSet carries a copy of what its Deployment says, or of what it said when that counted.
            let can_do_without =
                is_settled || owners.last().is_some_and(|last| last.object.kind == "ReplicaSet");
            let found = match kind.owners.get(&reference.uid) {
                Some(owner) => {
                    self.metrics.looked_up(Found::InMemory);
                    owner
                }
                None if can_do_without => break,
                None => match self.ask_owner(kind, namespace, &reference, asked_until).await? {
                    Some(owner) => Arc::new(owner),
                    None => break,
                },
            };
            next.clone_from(&found.controller);
            owners.push(found);
        }
        let known = self.namespaces.get(namespace);
        // The API server's selector has seen the label already, and the watch has not: ask.
        let is_stale = entry == Entry::Namespace && known.as_ref().is_some_and(|known| !known.is_opted_in());
        let namespace = if (known.is_none() || is_stale) && !is_settled {
            self.ask_namespace(namespace, asked_until).await?.map(Arc::new)
        } else {
            known
        };
        Ok(Origin { owners, namespace, image_maps: self.image_maps.load_full() })
    }

    async fn ask_owner(
        &self,
        kind: &Kind,
        namespace: &str,
        reference: &ObjectRef,
        until: Instant,
    ) -> Result<Option<Owner>, OriginError> {
        let Some(client) = self.client.clone() else { return Ok(None) };
        let api = Api::namespaced_with(client, namespace, &kind.resource);
        let meta = self.ask(api, &kind.resource, &reference.name, until).await?;
        let found = meta.and_then(|meta| owner(&kind.resource.api_version, &kind.resource.kind, meta));
        // Another one of the same name is none of this pod's.
        Ok(found.filter(|owner| owner.object.uid == reference.uid))
    }

    async fn ask_namespace(&self, name: &str, until: Instant) -> Result<Option<Namespace>, OriginError> {
        let Some(client) = self.client.clone() else { return Ok(None) };
        let resource = namespace_resource();
        let api = Api::all_with(client, &resource);
        Ok(self.ask(api, &resource, name, until).await?.and_then(namespace))
    }

    async fn ask(
        &self,
        api: Api<Meta>,
        resource: &ApiResource,
        name: &str,
        until: Instant,
    ) -> Result<Option<ObjectMeta>, OriginError> {
        let (kind, name) = (resource.kind.clone(), name.to_owned());
        let answer = match tokio::time::timeout_at(until, api.get_metadata_opt(&name)).await {
            Err(_) => Err(OriginError::Late { kind, name }),
            Ok(Err(source)) => Err(OriginError::Api { kind, name, source: Box::new(source) }),
            Ok(Ok(found)) => Ok(found.map(|object| object.metadata)),
        };
        self.metrics.looked_up(match &answer {
            Ok(Some(_)) => Found::Asked,
            Ok(None) => Found::Gone,
            Err(_) => Found::NoAnswer,
        });
        answer
    }
}

fn namespace_resource() -> ApiResource {
    ApiResource::erase::<k8s_openapi::api::core::v1::Namespace>(&())
}

/// Versions of one group show the same objects.
fn is_of(resource: &ApiResource, object: &ObjectRef) -> bool {
    object.group() == resource.group && object.kind == resource.kind
}

/// What controls a pod, by its own word. The API server has not checked that it exists.
pub(crate) fn controller_of(pod: &Value) -> Option<ObjectRef> {
    let references = pod.pointer("/metadata/ownerReferences")?.as_array()?;
    let controller = references.iter().find(|one| one.get("controller") == Some(&Value::Bool(true)))?;
    let field = |name: &str| controller.get(name).and_then(Value::as_str).map(str::to_owned);
    Some(ObjectRef {
        api_version: field("apiVersion")?,
        kind: field("kind")?,
        name: field("name")?,
        uid: field("uid")?,
    })
}

/// What is kept of an owner.
fn owner(api_version: &str, kind: &str, meta: ObjectMeta) -> Option<Owner> {
    let controller = meta.owner_references.into_iter().flatten().find(|one| one.controller == Some(true));
    let controller = controller.map(|one| ObjectRef {
        api_version: one.api_version,
        kind: one.kind,
        name: one.name,
        uid: one.uid,
    });
    let object =
        ObjectRef { api_version: api_version.into(), kind: kind.into(), name: meta.name?, uid: meta.uid? };
    Some(Owner { object, annotations: ours(meta.annotations), controller })
}

/// What is kept of a Namespace.
fn namespace(meta: ObjectMeta) -> Option<Namespace> {
    let inject = meta.labels.and_then(|mut labels| labels.remove(INJECT));
    Some(Namespace { name: meta.name?, inject, annotations: ours(meta.annotations) })
}

fn ours(annotations: Option<BTreeMap<String, String>>) -> BTreeMap<String, String> {
    let mut annotations = annotations.unwrap_or_default();
    annotations.retain(|key, _| key.starts_with(PREFIX) || key == REVISION);
    annotations
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
    use serde_json::json;

    #[test]
    fn little_is_kept_of_an_owner() {
        let note = |key: &str| (key.to_owned(), "x".to_owned());
        let meta = ObjectMeta {
            name: Some("web-1".into()),
            uid: Some("u1".into()),
            annotations: Some(
                [
                    note("nix.lillecarl.com/packages"),
                    note(REVISION),
                    note("kubectl.kubernetes.io/last-applied-configuration"),
                ]
                .into(),
            ),
            owner_references: Some(vec![
                OwnerReference { name: "other".into(), ..OwnerReference::default() },
                OwnerReference { name: "web".into(), controller: Some(true), ..OwnerReference::default() },
            ]),
            ..ObjectMeta::default()
        };
        let owner = owner("apps/v1", "ReplicaSet", meta).unwrap();
        assert_eq!(owner.annotations.len(), 2);
        assert_eq!(owner.controller.unwrap().name, "web");
    }

    #[test]
    fn a_pod_without_a_controller_has_none() {
        assert_eq!(controller_of(&json!({"metadata": {}})), None);
        let reference = json!({"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"});
        assert_eq!(controller_of(&json!({"metadata": {"ownerReferences": [reference]}})), None);
    }
}
