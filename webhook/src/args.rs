//! The command line, and what is started by it.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use clap::Parser;
use nix_csi_certs::{Keeper, LiveCertificate};

use crate::decide::Policy;
use crate::review::Reviewer;
use crate::server::{Serving, router};

/// How long answers may take after the end was asked for.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the API server may still open connections after that: endpoints take a while to move.
const LINGER: Duration = Duration::from_secs(5);

/// The admission webhook of nix-csi.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Args {
    /// Where to serve HTTPS.
    #[arg(long, env = "NIX_CSI_LISTEN", default_value = "0.0.0.0:8443")]
    listen: SocketAddr,
    /// The namespace this runs in.
    #[arg(long, env = "POD_NAMESPACE", default_value = "nix-csi")]
    namespace: String,
    /// The Service in front of it.
    #[arg(long, env = "NIX_CSI_SERVICE", default_value = "nix-csi-webhook")]
    service: String,
    /// The Secret with its certificates.
    #[arg(long, env = "NIX_CSI_CERTIFICATE_SECRET", default_value = "nix-csi-webhook-tls")]
    certificate_secret: String,
    /// The MutatingWebhookConfiguration whose caBundle it keeps.
    #[arg(long, env = "NIX_CSI_WEBHOOK_CONFIGURATION", default_value = "00-nix-csi")]
    configuration: String,
    /// The image without programs, for containers that may run as root.
    #[arg(
        long,
        env = "NIX_CSI_DISTROLESS_IMAGE",
        default_value = "gcr.io/distroless/static-debian12:latest"
    )]
    distroless_image: String,
    /// The same with a user that is not root.
    #[arg(
        long,
        env = "NIX_CSI_DISTROLESS_NONROOT_IMAGE",
        default_value = "gcr.io/distroless/static-debian12:nonroot"
    )]
    distroless_nonroot_image: String,
}

/// Runs the webhook until it is told to end.
pub fn run(args: Args) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("NIX_CSI_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .json()
        .flatten_event(true)
        .with_writer(std::io::stderr)
        .init();
    // One provider for everything; a second call would only say that it is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let ended = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::new)
        .and_then(|runtime| runtime.block_on(serve(args)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let client = kube::Client::try_default().await.context("cannot find the API server")?;
    let certificate = Arc::new(LiveCertificate::default());
    let keeper = Keeper::new(
        client,
        &args.namespace,
        &args.service,
        &args.certificate_secret,
        &args.configuration,
        Arc::clone(&certificate),
    );
    tokio::spawn(keeper.run());
    let reviewer = Reviewer {
        policy: Policy {
            distroless: args.distroless_image,
            distroless_nonroot: args.distroless_nonroot_image,
        },
        excluded: vec!["kube-system".to_owned(), args.namespace],
    };
    let tls = RustlsConfig::from_config(Arc::new(certificate.server_config()?));
    let app = router(Serving { reviewer: Arc::new(reviewer), certificate });
    let handle = Handle::new();
    tokio::spawn(end_gracefully(handle.clone()));
    tracing::info!(address = %args.listen, "serving");
    axum_server::bind_rustls(args.listen, tls)
        .handle(handle)
        .serve(app.into_make_service())
        .await
        .with_context(|| format!("cannot serve on {}", args.listen))
}

/// Goes on for a while after SIGTERM, since endpoints move later than the signal comes; then drains.
async fn end_gracefully(handle: Handle<SocketAddr>) {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    let Ok(mut terminate) = terminate else { return };
    tokio::select! {
        _ = terminate.recv() => tokio::time::sleep(LINGER).await,
        _ = tokio::signal::ctrl_c() => {}
    }
    tracing::info!("stopping");
    handle.graceful_shutdown(Some(DRAIN));
}
