//! Over HTTP: metrics, and whether the driver works. Nothing secret, and nothing that changes anything.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use nix_csi_proto::csi::ProbeRequest;
use nix_csi_proto::csi::identity_client::IdentityClient;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tonic::transport::Endpoint;

use crate::driver::Driver;

/// How long the driver may take to answer itself.
const ANSWERED: Duration = Duration::from_secs(5);

/// What the answers are about.
#[derive(Clone)]
pub(crate) struct Observed {
    pub(crate) driver: Driver,
    /// The socket that kubelet calls.
    pub(crate) csi: PathBuf,
    /// Whether kubelet knows the driver; none where it is not to.
    pub(crate) registered: Option<watch::Receiver<bool>>,
    /// How many may ask for metrics at the same time.
    pub(crate) asked: Arc<Semaphore>,
}

/// Answers on `address`, until it is dropped.
pub(crate) async fn serve(address: SocketAddr, observed: Observed) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(observed);
    axum::serve(TcpListener::bind(address).await?, routes).await
}

async fn metrics(Shared(observed): Shared<Observed>) -> impl IntoResponse {
    // Each takes a thread and reads every record: whoever asks too often keeps no volume waiting.
    let Ok(_slot) = Arc::clone(&observed.asked).try_acquire_owned() else {
        return StatusCode::TOO_MANY_REQUESTS.into_response();
    };
    let text = tokio::task::spawn_blocking(move || observed.driver.metrics_text()).await;
    match text {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn livez(Shared(observed): Shared<Observed>) -> (StatusCode, String) {
    match observed.probe().await {
        Ok(()) => (StatusCode::OK, "ok\n".into()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    }
}

async fn readyz(Shared(observed): Shared<Observed>) -> (StatusCode, String) {
    if observed.registered.as_ref().is_some_and(|registered| !*registered.borrow()) {
        return (StatusCode::SERVICE_UNAVAILABLE, "kubelet has not registered the driver yet\n".into());
    }
    livez(Shared(observed)).await
}

impl Observed {
    /// The way that kubelet takes: through the socket.
    async fn probe(&self) -> Result<(), String> {
        let probe = async {
            let endpoint = Endpoint::try_from(format!("unix://{}", self.csi.display()))
                .map_err(|error| error.to_string())?;
            let channel = endpoint.connect().await.map_err(|error| format!("the CSI socket: {error}"))?;
            IdentityClient::new(channel).probe(ProbeRequest {}).await.map_err(|error| error.to_string())
        };
        match tokio::time::timeout(ANSWERED, probe).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(format!("no answer from the CSI socket within {} s", ANSWERED.as_secs())),
        }
    }
}
