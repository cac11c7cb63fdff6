//! HTTP: reviews on a path for each entry, health on two, metrics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json};
use axum::routing::{get, post};
use nix_csi_certs::LiveCertificate;

use crate::entry::Entry;
use crate::review::{Reviewer, review};

/// A review holds its object once or twice, and an object is at most 1.5 MiB.
const MAX_BODY: usize = 8 << 20;

/// How long readiness waits for the owners and Namespaces of the cluster. Without them pods with annotations of
/// their own are served all the same, and for others the API server is asked.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the handlers share.
#[derive(Clone)]
pub struct Serving {
    /// How reviews are answered.
    pub reviewer: Arc<Reviewer>,
    /// Ready means: there is a certificate.
    pub certificate: Arc<LiveCertificate>,
    /// When serving began.
    pub since: Instant,
}

/// The routes: one for each [`Entry`], `/livez`, `/readyz`.
pub fn router(serving: Serving) -> Router {
    let entries = Entry::ALL.into_iter().fold(Router::new(), |routes, entry| {
        let answer = move |State(serving): State<Serving>, body: Bytes| async move {
            // Microseconds of work in memory: not worth another thread.
            Json(review(&serving.reviewer, entry, &body).await)
        };
        routes.route(entry.path(), post(answer))
    });
    entries
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(serving)
}

/// The routes without TLS: `/metrics`, `/livez`, `/readyz`. Nothing secret, and nothing that changes anything.
pub fn observed(serving: Serving) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .with_state(serving)
}

async fn ready(State(serving): State<Serving>) -> (StatusCode, &'static str) {
    if !serving.certificate.is_set() {
        (StatusCode::SERVICE_UNAVAILABLE, "no certificate yet")
    } else if !serving.reviewer.origins.is_synced() && serving.since.elapsed() < PATIENCE {
        (StatusCode::SERVICE_UNAVAILABLE, "owners and namespaces are not all known yet")
    } else {
        (StatusCode::OK, "ok")
    }
}

async fn metrics(State(serving): State<Serving>) -> impl IntoResponse {
    let Reviewer { metrics, origins, .. } = &*serving.reviewer;
    let text = metrics.text(origins.known(), serving.certificate.expires());
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
}
