//! Pod, owners, Namespace and policy to what is to be done. Pure.

use nix_csi_proto::annotations;
use serde_json::Value;

use crate::farm::is_marker;
use crate::needs::Farming;
use crate::origin::Origin;
use crate::plan::Plan;
use crate::planner::Planner;
use crate::source::{Source, nothing_offered, resolve};
use crate::status::Status;
use crate::wish::WishError;

/// Pods of these priorities keep a node or the cluster alive: what is meant for a whole Namespace does not reach them.
const CRITICAL: [&str; 2] = ["system-node-critical", "system-cluster-critical"];

/// What the administrator decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The image without programs, for containers that may run as root.
    pub distroless: String,
    /// The same with a user that is not root.
    pub distroless_nonroot: String,
}

impl Policy {
    /// Whether an image holds nothing that `/nix` could hide: one of ours, or one that is known for it.
    pub(crate) fn is_marker(&self, image: &str) -> bool {
        is_marker(image, &[&self.distroless, &self.distroless_nonroot])
    }
}

/// Why a pod is refused. The message is all that its author sees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The annotations cannot be understood.
    #[error("{}{error}", .at.prefix())]
    Wish {
        /// Where they stand.
        at: Source,
        /// What is wrong with them.
        error: Box<WishError>,
    },
    /// Annotations and label of one object that cannot both be meant.
    #[error(
        "{}label {key} says enabled and annotation {key} says disabled; remove one of them",
        .at.prefix(), key = annotations::INJECT
    )]
    Contradiction {
        /// Where they stand.
        at: Source,
    },
    /// A container that is not there.
    #[error("{}annotation {key} names container {container:?}, which the pod does not have (it has {})", .at.prefix(), .present.join(", "))]
    NoContainer {
        /// Where the annotation stands.
        at: Source,
        /// The annotation.
        key: String,
        /// The container.
        container: String,
        /// The containers there are.
        present: Vec<String>,
    },
    /// A container that was chosen, but for which there is nothing.
    #[error(
        "container {container} is chosen by {} but has no packages; set {} or {}.{container}",
        annotations::CONTAINERS,
        annotations::PACKAGES,
        annotations::PACKAGES
    )]
    NoPackages {
        /// The container.
        container: String,
    },
    /// Something else is where the packages must be.
    #[error(
        "container {container} already mounts volume {volume:?} at {at}; remove that mount or the annotation"
    )]
    Occupied {
        /// The container.
        container: String,
        /// What it mounts there.
        volume: String,
        /// Where.
        at: String,
    },
    /// An overlay cannot be mapped to a user namespace.
    #[error(
        "{}: rw does not work with hostUsers: false, since the kernel cannot id-map an overlay; use ro",
        annotations::MODE
    )]
    HostUsers,
    /// Another system than the programs are for.
    #[error("Nix packages run on Linux, and spec.os.name says otherwise; remove {}", annotations::PACKAGES)]
    NotLinux,
    /// A limit of nothing.
    #[error(
        "annotation {} limits what a pod may write, so it needs {}: rw; remove it, or say that",
        annotations::SIZE_LIMIT,
        annotations::MODE
    )]
    LimitOfReadOnly,
    /// Not a pod.
    #[error("the object is not a pod with containers")]
    NotAPod,
}

impl Denial {
    /// One word for the audit log.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Wish { .. } => "annotation",
            Self::Contradiction { .. } => "contradiction",
            Self::NoContainer { .. } => "no-container",
            Self::NoPackages { .. } => "no-packages",
            Self::Occupied { .. } => "occupied",
            Self::HostUsers => "host-users",
            Self::NotLinux => "not-linux",
            Self::LimitOfReadOnly => "limit-of-read-only",
            Self::NotAPod => "not-a-pod",
        }
    }
}

/// What is to be done with a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing, and why.
    Leave {
        /// For the audit log: one word.
        reason: &'static str,
        /// For the person, if it is something to act on.
        warnings: Vec<String>,
    },
    /// This.
    Inject(Plan),
}

/// What becomes of `pod`, which comes from `origin`.
pub fn decide(pod: &Value, origin: &Origin, policy: &Policy) -> Result<Decision, Denial> {
    let leave = |reason, warnings| Ok(Decision::Leave { reason, warnings });
    if is_mirror(pod) {
        return leave("mirror-pod", Vec::new());
    }
    if origin.namespace.as_ref().is_some_and(|namespace| namespace.is_excluded()) {
        return leave("excluded-namespace", Vec::new());
    }
    let present: Vec<_> = list(pod, "initContainers").iter().chain(list(pod, "containers")).collect();
    let names: Vec<_> = present.iter().copied().map(name_of).collect();
    let Some(wished) = resolve(pod, origin, Some(&names))? else { return leave("disabled", Vec::new()) };
    let wish = &wished.wish;
    let mut warnings = Vec::new();
    let opted_in = origin.namespace.as_deref().filter(|namespace| namespace.is_opted_in());
    let farming = Farming::of(wish.farm, opted_in.is_some());
    let has_own = wished.source.as_ref().is_some_and(Source::is_for_this_pod);
    let maps = opted_in.filter(|_| !has_own).map(|_| &*origin.image_maps).filter(|maps| !maps.is_empty());
    // Without packages there may be an image that is some, or a text that names some.
    let is_looked_at = maps.is_some() || farming != Farming::Off;
    let farmer = || wished.farmer.clone().filter(|_| farming == Farming::Everywhere);
    let offered = || opted_in.map(|namespace| Source::Namespace { name: namespace.name.clone() });
    let source = wished.source.clone().or_else(|| farmer().or_else(offered).filter(|_| is_looked_at));
    let Some(source) = source else {
        // What only a Namespace says is not worth a word to each of its pods.
        if is_annotated(pod) && Status::of(pod).is_none() {
            warnings.push(nothing_offered());
        }
        return leave("no-packages", warnings);
    };
    let is_for_this_pod = source.is_for_this_pod();
    if !is_for_this_pod && wish.inject != Some(true) && is_critical(pod) {
        return leave("critical", warnings);
    }
    if pod.pointer("/spec/os/name").and_then(Value::as_str).is_some_and(|os| os != "linux") {
        return if is_for_this_pod { Err(Denial::NotLinux) } else { leave("not-linux", warnings) };
    }
    if wish.read_write() && pod.pointer("/spec/hostUsers") == Some(&Value::Bool(false)) {
        return if is_for_this_pod { Err(Denial::HostUsers) } else { leave("host-users", warnings) };
    }
    let planner = Planner::new(pod, policy, wish, Plan::empty(source, wished.digest.clone(), warnings));
    let mut plan = planner.finding(maps, farming).plan()?;
    if plan.containers.is_empty() {
        if wished.source.is_some() {
            return leave("no-container", plan.warnings);
        }
        if is_annotated(pod) && Status::of(pod).is_none() {
            plan.warnings.push(nothing_offered());
        }
        return leave("no-packages", plan.warnings);
    }
    if wish.size_limit.is_some() && !wish.read_write() && is_for_this_pod {
        return Err(Denial::LimitOfReadOnly);
    }
    Ok(Decision::Inject(plan))
}

fn is_mirror(pod: &Value) -> bool {
    pod.pointer("/metadata/annotations").is_some_and(|all| all.get("kubernetes.io/config.mirror").is_some())
}

fn is_critical(pod: &Value) -> bool {
    let class = pod.pointer("/spec/priorityClassName").and_then(Value::as_str);
    class.is_some_and(|class| CRITICAL.contains(&class))
}

/// Whether the pod itself says anything to us.
pub(crate) fn is_annotated(pod: &Value) -> bool {
    let all = pod.pointer("/metadata/annotations").and_then(Value::as_object).into_iter().flatten();
    all.map(|(key, _)| key).any(|key| key.starts_with(annotations::PREFIX) && key != annotations::STATUS)
}

/// A list of the pod's spec.
pub(crate) fn list<'a>(pod: &'a Value, field: &str) -> &'a [Value] {
    pod.get("spec").and_then(|spec| spec.get(field)).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The name of a container.
pub(crate) fn name_of(container: &Value) -> &str {
    container.get("name").and_then(Value::as_str).unwrap_or_default()
}
