//! One AdmissionReview to its answer.

use json_patch::diff;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation};
use serde_json::Value;

use crate::decide::{Decision, Policy, decide};
use crate::inject::inject;
use crate::origin::Origin;

/// Longer warnings may be cut by the API server.
const MAX_WARNING: usize = 250;

/// What a review needs besides the review itself.
#[derive(Debug, Clone)]
pub struct Reviewer {
    /// What the administrator decided.
    pub policy: Policy,
    /// Namespaces whose pods are left alone, whatever they say: excluded by selector too, but selectors can
    /// be edited.
    pub excluded: Vec<String>,
}

/// The answer to a body. What is not a review is answered too, so that the API server can say why.
pub fn review(reviewer: &Reviewer, body: &[u8]) -> AdmissionReview<DynamicObject> {
    let request = serde_json::from_slice::<AdmissionReview<DynamicObject>>(body)
        .map_err(|error| error.to_string())
        // Not `review.request`: the conversion also keeps the kind and version to answer with.
        .and_then(|review| {
            TryInto::<AdmissionRequest<_>>::try_into(review).map_err(|error| error.to_string())
        });
    match request {
        Ok(request) => answer(reviewer, &request).into_review(),
        Err(error) => {
            tracing::warn!(error, "not an AdmissionReview");
            AdmissionResponse::invalid(format!("not an AdmissionReview with a request: {error}"))
                .into_review()
        }
    }
}

fn answer(reviewer: &Reviewer, request: &AdmissionRequest<DynamicObject>) -> AdmissionResponse {
    let response = AdmissionResponse::from(request);
    let namespace = request.namespace.as_deref().unwrap_or_default();
    let is_pod = request.resource.resource == "pods" && request.sub_resource.is_none();
    let Some(object) = request.object.as_ref().filter(|_| is_pod && request.operation == Operation::Create)
    else {
        return audited(response, "not-a-new-pod");
    };
    if reviewer.excluded.iter().any(|excluded| excluded == namespace) {
        return audited(response, "excluded-namespace");
    }
    let pod = match serde_json::to_value(object) {
        Ok(pod) => pod,
        Err(error) => return AdmissionResponse::invalid(error),
    };
    let span = tracing::info_span!(
        "review",
        review.uid = request.uid,
        pod.namespace = namespace,
        pod.name = object.metadata.name.as_deref().or(object.metadata.generate_name.as_deref()),
    );
    let _entered = span.enter();
    match decide(&pod, &Origin::default(), &reviewer.policy) {
        Ok(Decision::Leave { reason, warnings }) => {
            tracing::debug!(reason, "left alone");
            with_warnings(audited(response, reason), warnings)
        }
        Ok(Decision::Inject(plan)) => {
            let injected: Value = inject(&pod, &plan);
            let patch = diff(&pod, &injected);
            tracing::info!(containers = plan.containers.len(), operations = patch.0.len(), "injected");
            let response = with_warnings(audited(response, "injected"), plan.warnings);
            if patch.0.is_empty() {
                return response;
            }
            match response.with_patch(patch) {
                Ok(response) => response,
                Err(error) => AdmissionResponse::invalid(error),
            }
        }
        Err(denial) => {
            tracing::info!(%denial, "denied");
            audited(response, "denied").deny(format!("nix-csi: {denial}"))
        }
    }
}

fn audited(mut response: AdmissionResponse, decision: &str) -> AdmissionResponse {
    response.audit_annotations.insert("decision".to_owned(), decision.to_owned());
    response
}

fn with_warnings(mut response: AdmissionResponse, warnings: Vec<String>) -> AdmissionResponse {
    if !warnings.is_empty() {
        let cut = |warning: String| warning.chars().take(MAX_WARNING).collect();
        response.warnings = Some(warnings.into_iter().map(cut).collect());
    }
    response
}
