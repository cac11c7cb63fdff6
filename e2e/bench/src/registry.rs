//! A registry of the images in a directory of [`crate::images`], as much of one as pulling needs.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use crate::images::MANIFEST;

/// Serves until the process is ended.
pub(crate) fn serve(dir: PathBuf, address: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let router = Router::new()
            .route("/v2/", get(|| async { "{}" }))
            .route("/v2/{name}/manifests/{reference}", get(manifest))
            .route("/v2/{name}/blobs/{digest}", get(blob))
            .with_state(dir);
        let listener = tokio::net::TcpListener::bind(address).await?;
        Ok(axum::serve(listener, router).await?)
    })
}

/// A manifest by its digest; by a tag, whatever the tag, it is that of the name.
async fn manifest(
    State(dir): State<PathBuf>,
    Path((name, reference)): Path<(String, String)>,
) -> Result<Response, StatusCode> {
    let digest = if reference.starts_with("sha256:") {
        reference
    } else {
        fs::read_to_string(dir.join("manifests").join(name)).map_err(|_| StatusCode::NOT_FOUND)?
    };
    let bytes = fs::read(dir.join("blobs").join(&digest)).map_err(|_| StatusCode::NOT_FOUND)?;
    let headers = [(CONTENT_TYPE.as_str(), MANIFEST.to_owned()), ("docker-content-digest", digest)];
    Ok((headers, bytes).into_response())
}

async fn blob(
    State(dir): State<PathBuf>,
    Path((_, digest)): Path<(String, String)>,
) -> Result<Vec<u8>, StatusCode> {
    // From the page cache, and for one client.
    fs::read(dir.join("blobs").join(digest)).map_err(|_| StatusCode::NOT_FOUND)
}
