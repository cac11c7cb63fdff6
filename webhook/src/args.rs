//! The command line, and what is started by it.

use std::future::IntoFuture as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use clap::{Parser, Subcommand};
use nix_csi_certs::{Keeper, LiveCertificate};
use tokio::net::TcpListener;

use crate::decide::Policy;
use crate::events::Events;
use crate::explain::{self, Explain};
use crate::kinds::OwnerKind;
use crate::metrics::Metrics;
use crate::origins::Origins;
use crate::review::Reviewer;
use crate::server::{Serving, observed, router};
use crate::uninjected::watch_out;

/// How long answers may take after the end was asked for.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the API server may still open connections after that: endpoints take a while to move.
const LINGER: Duration = Duration::from_secs(5);

/// The admission webhook of nix-csi.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Where to serve HTTPS.
    #[arg(long, env = "NIX_CSI_LISTEN", default_value = "0.0.0.0:8443")]
    listen: SocketAddr,
    /// Where to serve metrics and health without TLS; empty: nowhere.
    #[arg(long, env = "NIX_CSI_HTTP_ADDRESS", default_value = "[::]:9808")]
    http_address: String,
    /// Kinds besides those of Kubernetes whose objects own pods and may have annotations, as
    /// `<group>/<version>/<Kind>:<plural>`; the ServiceAccount must be allowed to read them.
    #[arg(long, env = "NIX_CSI_OWNER_KINDS", value_delimiter = ',')]
    owner_kind: Vec<OwnerKind>,
    /// How often to look for pods that exist without the packages that they are to have, in seconds; 0: never.
    #[arg(long, env = "NIX_CSI_UNINJECTED_INTERVAL", default_value_t = 600)]
    uninjected_interval: u64,
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
        global = true,
        env = "NIX_CSI_DISTROLESS_IMAGE",
        default_value = "gcr.io/distroless/static-debian12:latest"
    )]
    distroless_image: String,
    /// The same with a user that is not root.
    #[arg(
        long,
        global = true,
        env = "NIX_CSI_DISTROLESS_NONROOT_IMAGE",
        default_value = "gcr.io/distroless/static-debian12:nonroot"
    )]
    distroless_nonroot_image: String,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
enum Command {
    /// Print what would become of the pods of a manifest, without a cluster.
    Explain(Explain),
}

impl Args {
    fn policy(&self) -> Policy {
        let (distroless, distroless_nonroot) =
            (self.distroless_image.clone(), self.distroless_nonroot_image.clone());
        Policy { distroless, distroless_nonroot }
    }

    fn excluded(&self) -> Vec<String> {
        vec!["kube-system".to_owned(), self.namespace.clone()]
    }
}

/// Runs the webhook until it is told to end, or one command.
pub fn run(args: Args) -> ExitCode {
    if let Some(Command::Explain(explain)) = &args.command {
        return explain::run(explain, &args.policy(), &args.excluded()).unwrap_or_else(|error| {
            let _ = writeln!(std::io::stderr(), "nix-csi-webhook: {error:#}");
            ExitCode::from(2)
        });
    }
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
        client.clone(),
        &args.namespace,
        &args.service,
        &args.certificate_secret,
        &args.configuration,
        Arc::clone(&certificate),
    );
    tokio::spawn(keeper.run());
    let metrics = Metrics::default();
    let origins = Origins::new(client.clone(), args.owner_kind.clone(), metrics.clone());
    origins.follow();
    let reviewer = Reviewer {
        policy: args.policy(),
        excluded: args.excluded(),
        origins,
        events: Events::to(client.clone(), metrics.clone()),
        metrics,
    };
    let tls = RustlsConfig::from_config(Arc::new(certificate.server_config()?));
    let reviewer = Arc::new(reviewer);
    if args.uninjected_interval > 0 {
        let every = Duration::from_secs(args.uninjected_interval);
        tokio::spawn(watch_out(Arc::clone(&reviewer), client, every));
    }
    let serving = Serving { reviewer, certificate, since: Instant::now() };
    if !args.http_address.is_empty() {
        let listener = TcpListener::bind(&args.http_address)
            .await
            .with_context(|| format!("cannot serve on {}", args.http_address))?;
        tokio::spawn(axum::serve(listener, observed(serving.clone())).into_future());
    }
    let app = router(serving);
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
