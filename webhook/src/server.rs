//! HTTP: reviews on one path, health on two.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json};
use axum::routing::{get, post};
use nix_csi_certs::LiveCertificate;

use crate::review::{Reviewer, review};

/// A review holds its object once or twice, and an object is at most 1.5 MiB.
const MAX_BODY: usize = 8 << 20;

/// What the handlers share.
#[derive(Clone)]
pub struct Serving {
    /// How reviews are answered.
    pub reviewer: Arc<Reviewer>,
    /// Ready means: there is a certificate.
    pub certificate: Arc<LiveCertificate>,
}

/// The routes: `/mutate`, `/livez`, `/readyz`.
pub fn router(serving: Serving) -> Router {
    Router::new()
        .route("/mutate", post(mutate))
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(serving)
}

async fn mutate(State(serving): State<Serving>, body: Bytes) -> impl IntoResponse {
    // Microseconds of work in memory: not worth another thread.
    Json(review(&serving.reviewer, &body))
}

async fn ready(State(serving): State<Serving>) -> (StatusCode, &'static str) {
    if serving.certificate.is_set() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no certificate yet")
    }
}
