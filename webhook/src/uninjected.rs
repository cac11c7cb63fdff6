//! Pods that exist without the packages that they are to have: they were made while nobody answered, or before somebody
//! annotated their owner or Namespace. Nothing is done to them; they are counted, and their owners are told.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::ListParams;
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client};
use nix_csi_proto::annotations::STATUS;
use serde_json::{Value, json};

use crate::decide::{Decision, decide, is_annotated};
use crate::events::{Event, Reason};
use crate::index::Meta;
use crate::origin::{ObjectRef, Origin};
use crate::origins::controller_of;
use crate::review::Reviewer;
use crate::source::{Source, wants};

/// Pods in one answer of the API server.
const PAGE: u32 = 500;
/// Pods that are looked at closely in one round. More are taken for what they look like from afar.
const CLOSELY: usize = 200;
/// How long it is waited for what owners and Namespaces say.
const LATER: Duration = Duration::from_secs(5);

/// Where the wish stands that was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Asked {
    Pod,
    Owner,
    Namespace,
}

impl Asked {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Owner, Self::Namespace];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Owner => "owner",
            Self::Namespace => "namespace",
        }
    }

    fn of(source: &Source) -> Self {
        match source {
            Source::Pod => Self::Pod,
            Source::Owner { .. } => Self::Owner,
            Source::Namespace { .. } => Self::Namespace,
        }
    }
}

/// Looks for such pods `every` so often, for ever.
pub(crate) async fn watch_out(reviewer: Arc<Reviewer>, client: Client, every: Duration) {
    loop {
        while !reviewer.origins.is_synced() {
            tokio::time::sleep(LATER).await;
        }
        match look(&reviewer, &client).await {
            Ok(found) => tell(&reviewer, found),
            Err(error) => tracing::warn!(%error, "cannot look for pods without their packages"),
        }
        tokio::time::sleep(every).await;
    }
}

/// A pod without its packages.
struct Uninjected {
    namespace: String,
    source: Source,
    owner: Option<ObjectRef>,
}

async fn look(reviewer: &Reviewer, client: &Client) -> Result<Vec<Uninjected>, kube::Error> {
    let resource = ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&());
    let all = Api::<Meta>::all_with(client.clone(), &resource);
    let mut parameters =
        ListParams::default().fields("status.phase!=Succeeded,status.phase!=Failed").limit(PAGE);
    let (mut found, mut closely) = (Vec::new(), 0);
    loop {
        let page = all.list(&parameters).await?;
        for meta in page.items {
            let Some((namespace, name, pod)) = candidate(reviewer, meta) else { continue };
            let origin = reviewer.origins.known_of(&namespace, &pod);
            let is_asked_about =
                is_annotated(&pod) || origin.namespace.as_ref().is_some_and(|known| known.is_opted_in());
            let Some(mut source) = wants(&pod, &origin).filter(|_| is_asked_about) else { continue };
            if closely < CLOSELY {
                closely += 1;
                let pods = Api::<DynamicObject>::namespaced_with(client.clone(), &namespace, &resource);
                match whole(pods.get_opt(&name).await?, reviewer, &origin) {
                    Some(real) => source = real,
                    None => continue,
                }
            }
            let owner = origin.topmost().cloned().or_else(|| controller_of(&pod));
            found.push(Uninjected { namespace, source, owner });
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok(found),
        }
    }
}

/// Namespace, name, and what metadata say of a pod that may lack something.
fn candidate(reviewer: &Reviewer, meta: Meta) -> Option<(String, String, Value)> {
    let metadata = meta.metadata;
    let has = |key: &str| metadata.annotations.as_ref().is_some_and(|all| all.contains_key(key));
    if metadata.deletion_timestamp.is_some() || has(STATUS) || has("kubernetes.io/config.mirror") {
        return None;
    }
    let (namespace, name) = (metadata.namespace?, metadata.name?);
    let pod = json!({
        "metadata": {"annotations": metadata.annotations, "ownerReferences": metadata.owner_references},
    });
    (!reviewer.excluded.contains(&namespace)).then_some((namespace, name, pod))
}

/// Whether the whole pod would get something now, and who says so.
fn whole(pod: Option<DynamicObject>, reviewer: &Reviewer, origin: &Origin) -> Option<Source> {
    let pod = serde_json::to_value(pod?).ok()?;
    match decide(&pod, origin, &reviewer.policy) {
        Ok(Decision::Inject(plan)) => Some(plan.source),
        Ok(Decision::Leave { .. }) | Err(_) => None,
    }
}

fn tell(reviewer: &Reviewer, found: Vec<Uninjected>) {
    let of = |asked| found.iter().filter(|one| Asked::of(&one.source) == asked).count();
    reviewer.metrics.uninjected(Asked::ALL.map(|asked| (asked, of(asked))));
    let mut by_owner: HashMap<ObjectRef, (String, Source, usize)> = HashMap::new();
    for Uninjected { namespace, source, owner } in found {
        let Some(owner) = owner else { continue };
        by_owner.entry(owner).or_insert((namespace, source, 0)).2 += 1;
    }
    for (about, (namespace, source, count)) in by_owner {
        let kind = about.kind.to_ascii_lowercase();
        let advice = match kind.as_str() {
            "deployment" | "statefulset" | "daemonset" => {
                format!("kubectl -n {namespace} rollout restart {kind}/{}", about.name)
            }
            _ => "delete them, so that they are made anew".to_owned(),
        };
        let message = format!("{count} of its pods run without the Nix packages of {source}: {advice}");
        reviewer.events.tell(Event { about, namespace, reason: Reason::NixUninjected, message });
    }
}
