//! One AdmissionReview to its answer.

use std::time::Instant;

use json_patch::diff;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation};
use serde_json::Value;

use crate::debug::debug;
use crate::decide::{Decision, Denial, Policy, decide};
use crate::entry::Entry;
use crate::events::{Event, Events, Reason};
use crate::inject::inject;
use crate::metrics::Metrics;
use crate::origin::ObjectRef;
use crate::origins::{OriginError, Origins, controller_of};
use crate::plan::Plan;
use crate::source::Source;

/// Longer warnings may be cut by the API server.
const MAX_WARNING: usize = 250;

/// What reviews need besides themselves.
pub struct Reviewer {
    /// What the administrator decided.
    pub policy: Policy,
    /// Namespaces whose pods are left alone, whatever they say: excluded by selector too, but selectors can
    /// be edited.
    pub excluded: Vec<String>,
    /// Where pods come from.
    pub origins: Origins,
    /// Where it is said to whoever annotated an owner.
    pub events: Events,
    /// What is counted.
    pub metrics: Metrics,
}

/// An answer, and what is said and counted besides.
struct Answered {
    response: AdmissionResponse,
    decision: &'static str,
    event: Option<Event>,
}

/// The answer to a body. What is not a review is answered too, so that the API server can say why.
pub async fn review(reviewer: &Reviewer, entry: Entry, body: &[u8]) -> AdmissionReview<DynamicObject> {
    let began = Instant::now();
    let request = serde_json::from_slice::<AdmissionReview<DynamicObject>>(body)
        .map_err(|error| error.to_string())
        // Not `review.request`: the conversion also keeps the kind and version to answer with.
        .and_then(|review| {
            TryInto::<AdmissionRequest<_>>::try_into(review).map_err(|error| error.to_string())
        });
    let (answered, dry_run) = match request {
        Ok(request) => (answer(reviewer, entry, &request).await, request.dry_run),
        Err(error) => {
            tracing::warn!(error, "not an AdmissionReview");
            let message = format!("not an AdmissionReview with a request: {error}");
            (Answered::quietly(AdmissionResponse::invalid(message), "invalid"), true)
        }
    };
    reviewer.metrics.reviewed(entry, answered.decision, began.elapsed());
    if let Some(event) = answered.event.filter(|_| !dry_run) {
        reviewer.events.tell(event);
    }
    answered.response.into_review()
}

async fn answer(reviewer: &Reviewer, entry: Entry, request: &AdmissionRequest<DynamicObject>) -> Answered {
    let leave = |decision| {
        let response = audited(AdmissionResponse::from(request), "decision", decision);
        Answered::quietly(response, decision)
    };
    let namespace = request.namespace.as_deref().unwrap_or_default();
    if entry == Entry::Debug {
        return answer_debug(reviewer, request);
    }
    let is_pod = request.resource.resource == "pods" && request.sub_resource.is_none();
    let Some(object) = request.object.as_ref().filter(|_| is_pod && request.operation == Operation::Create)
    else {
        return leave("not-a-new-pod");
    };
    if reviewer.excluded.iter().any(|excluded| excluded == namespace) {
        return leave("excluded-namespace");
    }
    let pod = match serde_json::to_value(object) {
        Ok(pod) => pod,
        Err(error) => return Answered::quietly(AdmissionResponse::invalid(error), "invalid"),
    };
    let said = Said {
        review: &request.uid,
        namespace,
        pod: object.metadata.name.as_deref().or(object.metadata.generate_name.as_deref()).unwrap_or_default(),
    };
    let origin = match reviewer.origins.of(namespace, &pod, entry).await {
        Ok(origin) => origin,
        Err(error) => return said.unknown(leave("owner-unknown"), controller_of(&pod), &error),
    };
    let about = origin.topmost().cloned().or_else(|| controller_of(&pod));
    match decide(&pod, &origin, &reviewer.policy) {
        Ok(Decision::Leave { reason, warnings }) => {
            let mut answered = leave(reason);
            answered.response = with_warnings(answered.response, warnings);
            answered
        }
        Ok(Decision::Inject(plan)) => {
            let maps = plan.containers.iter().filter_map(|container| container.image_map.as_deref());
            maps.for_each(|map| reviewer.metrics.mapped(map));
            said.injected(AdmissionResponse::from(request), &pod, plan, about)
        }
        Err(denial) => said.denied(AdmissionResponse::from(request), &denial, about),
    }
}

/// Ephemeral containers get what their pod has.
fn answer_debug(reviewer: &Reviewer, request: &AdmissionRequest<DynamicObject>) -> Answered {
    let response = AdmissionResponse::from(request);
    let is_debug = request.resource.resource == "pods"
        && request.sub_resource.as_deref() == Some("ephemeralcontainers")
        && request.operation == Operation::Update;
    let is_excluded = reviewer.excluded.iter().any(|one| Some(one) == request.namespace.as_ref());
    let pods = (serde_json::to_value(&request.old_object), serde_json::to_value(&request.object));
    let (true, false, (Ok(before), Ok(pod))) = (is_debug, is_excluded, pods) else {
        return Answered::quietly(audited(response, "decision", "not-a-new-pod"), "not-a-new-pod");
    };
    let patch = diff(&pod, &debug(&before, &pod));
    if patch.0.is_empty() {
        return Answered::quietly(audited(response, "decision", "nothing-to-mount"), "nothing-to-mount");
    }
    match audited(response, "decision", "injected").with_patch(patch) {
        Ok(response) => Answered::quietly(response, "injected"),
        Err(error) => Answered::quietly(AdmissionResponse::invalid(error), "invalid"),
    }
}

/// Whose review it is.
struct Said<'a> {
    review: &'a str,
    namespace: &'a str,
    pod: &'a str,
}

impl Said<'_> {
    fn injected(
        &self,
        response: AdmissionResponse,
        pod: &Value,
        plan: Plan,
        about: Option<ObjectRef>,
    ) -> Answered {
        let patch = diff(pod, &inject(pod, &plan));
        let Self { review, namespace, pod } = self;
        let source = plan.source.to_string();
        let (containers, operations) = (plan.containers.len(), patch.0.len());
        tracing::info!(review, namespace, pod, source, containers, operations, "injected");
        let names: Vec<_> = plan.containers.iter().map(|container| container.name.as_str()).collect();
        let says = match plan.source {
            Source::Pod => "their own annotations say".to_owned(),
            Source::Owner { .. } | Source::Namespace { .. } => format!("{source} says"),
        };
        let message = format!("new pods get Nix packages in {}, as {says}", names.join(", "));
        let response = with_warnings(audited(response, "decision", "injected"), plan.warnings);
        let response = audited(audited(response, "source", &source), "wish", &plan.wish);
        if patch.0.is_empty() {
            return Answered::quietly(response, "injected");
        }
        match response.with_patch(patch) {
            Ok(response) => self.with_event(response, "injected", about, Reason::NixInjected, message),
            Err(error) => Answered::quietly(AdmissionResponse::invalid(error), "invalid"),
        }
    }

    fn denied(&self, response: AdmissionResponse, denial: &Denial, about: Option<ObjectRef>) -> Answered {
        let Self { review, namespace, pod } = self;
        tracing::info!(review, namespace, pod, %denial, "denied");
        let message = format!("nix-csi: {denial}");
        let response = audited(audited(response, "decision", "denied"), "reason", denial.reason());
        let response = response.deny(&message);
        self.with_event(response, "denied", about, Reason::NixRefused, message)
    }

    /// Nobody knows what the pod is to get. It must not wait for that.
    fn unknown(&self, answered: Answered, about: Option<ObjectRef>, error: &OriginError) -> Answered {
        let Self { review, namespace, pod } = self;
        tracing::warn!(review, namespace, pod, error = error as &dyn std::error::Error, "left alone");
        let message = format!(
            "a pod got no Nix packages, since it is not known whether it is to get some: {error}; \
             delete the pod if it needs them",
            error = chain(error),
        );
        let response = with_warnings(answered.response, vec![message.clone()]);
        self.with_event(response, answered.decision, about, Reason::NixOwnerUnknown, message)
    }

    fn with_event(
        &self,
        response: AdmissionResponse,
        decision: &'static str,
        about: Option<ObjectRef>,
        reason: Reason,
        message: String,
    ) -> Answered {
        // A Node owns its mirror pods, and has no namespace to put events into.
        let about = about.filter(|object| object.kind != "Node");
        let namespace = self.namespace.to_owned();
        let event = about.map(|about| Event { about, namespace, reason, message });
        Answered { response, decision, event }
    }
}

impl Answered {
    fn quietly(response: AdmissionResponse, decision: &'static str) -> Self {
        Self { response, decision, event: None }
    }
}

/// An error and what led to it.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn audited(mut response: AdmissionResponse, key: &str, value: &str) -> AdmissionResponse {
    response.audit_annotations.insert(key.to_owned(), value.to_owned());
    response
}

fn with_warnings(mut response: AdmissionResponse, warnings: Vec<String>) -> AdmissionResponse {
    if !warnings.is_empty() {
        let cut = |warning: String| warning.chars().take(MAX_WARNING).collect();
        response.warnings = Some(warnings.into_iter().map(cut).collect());
    }
    response
}
