//! Containers that other injectors put in: theirs to choose the image of.

use std::collections::BTreeSet;

use serde_json::Value;

/// Annotations by which an injector says that it was here, and the containers it always adds.
const INJECTORS: [(&str, &[&str]); 3] = [
    ("linkerd.io/proxy-version", &["linkerd-proxy", "linkerd-init"]),
    ("vault.hashicorp.com/agent-inject-status", &["vault-agent", "vault-agent-init"]),
    ("sidecar.opentelemetry.io/injected", &["otc-container"]),
];
/// Istio lists what it added.
const ISTIO: &str = "sidecar.istio.io/status";

/// The names of those containers of `pod`.
pub(crate) fn of(pod: &Value) -> BTreeSet<String> {
    let Some(annotations) = pod.pointer("/metadata/annotations") else { return BTreeSet::new() };
    let known = INJECTORS.iter().filter(|(annotation, _)| annotations.get(annotation).is_some());
    let known = known.flat_map(|(_, names)| names.iter().map(ToString::to_string));
    let istio = annotations.get(ISTIO).and_then(Value::as_str);
    let istio = istio.and_then(|status| serde_json::from_str::<Value>(status).ok()).unwrap_or_default();
    let listed =
        ["containers", "initContainers"].map(|field| istio[field].as_array().cloned().unwrap_or_default());
    let listed = listed.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned));
    known.chain(listed).collect()
}
