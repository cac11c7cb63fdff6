//! The sockets: CSI, kubelet's registration, and the one for commands.

use std::fs;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix_csi_proto::control::control_server::ControlServer;
use nix_csi_proto::csi::identity_server::IdentityServer;
use nix_csi_proto::csi::node_server::NodeServer;
use nix_csi_proto::registration::registration_server::RegistrationServer;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::authority::AnyAuthority;
use crate::driver::Driver;
use crate::http::{self, Observed};
use crate::registration::Registrar;

/// Where the sockets are.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// The CSI socket.
    pub csi: PathBuf,
    /// The CSI socket, as kubelet on the host sees it.
    pub csi_on_host: PathBuf,
    /// The registration socket, in the directory that kubelet watches; none for use without kubelet.
    pub registration: Option<PathBuf>,
    /// Where metrics and the driver's own state are told, over HTTP.
    pub http: Option<SocketAddr>,
}

/// Why the driver does not serve (any more).
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The address for metrics is taken, or is none of this machine.
    #[error("serving HTTP on {address}")]
    Http {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A server ended.
    #[error("serving {}", path.display())]
    Serve {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// Kubelet does not want this driver.
    #[error("kubelet refused to register the driver: {0}")]
    Refused(String),
}

/// Serves until `stop`. Calls under way are answered; the registration socket is gone first.
pub async fn serve(
    driver: Driver,
    sockets: &Sockets,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (stopping, stopped) = watch::channel(false);
    let until = |mut stopped: watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let (registered, mut status) = watch::channel(None);

    let (known, is_known) = watch::channel(false);
    let observed = Observed {
        driver: driver.clone(),
        csi: sockets.csi.clone(),
        registered: sockets.registration.as_ref().map(|_| is_known),
        asked: Arc::new(Semaphore::new(2)),
    };
    let registered_driver = driver.clone();
    let http = async {
        let Some(address) = sockets.http else { return std::future::pending().await };
        match http::serve(address, observed).await {
            Ok(()) => std::future::pending().await,
            Err(source) => ServeError::Http { address, source },
        }
    };

    let control_at = driver.store.layout().control();
    let control = Box::pin(
        Server::builder()
            .add_service(ControlServer::new(driver.clone()))
            .serve_with_incoming_shutdown(listen(&control_at)?, until(stopped.clone())),
    );
    // First the socket that kubelet will call, then the one by which it learns of it.
    let csi = Server::builder()
        .add_service(IdentityServer::new(driver.clone()))
        .add_service(NodeServer::new(driver))
        .serve_with_incoming_shutdown(listen(&sockets.csi)?, until(stopped.clone()));
    let registration = async {
        let Some(path) = &sockets.registration else {
            until(stopped.clone()).await;
            return Ok(());
        };
        let incoming = listen(path)?.map(|connection| connection.map(AnyAuthority::new));
        let registrar = Registrar { endpoint: sockets.csi_on_host.display().to_string(), registered };
        Server::builder()
            .add_service(RegistrationServer::new(registrar))
            .serve_with_incoming_shutdown(incoming, until(stopped.clone()))
            .await
            .map_err(|source| ServeError::Serve { path: path.clone(), source })
    };
    let refused = async {
        loop {
            if status.changed().await.is_err() {
                return std::future::pending().await;
            }
            match status.borrow_and_update().clone() {
                Some(Ok(())) => {
                    known.send_replace(true);
                    registered_driver.registered();
                    tracing::info!("registered with kubelet");
                }
                // Ending is how the next try comes about: it makes a new socket for kubelet to find.
                Some(Err(error)) => return ServeError::Refused(error),
                None => {}
            }
        }
    };
    let serving = async {
        tokio::try_join!(
            async { csi.await.map_err(|source| ServeError::Serve { path: sockets.csi.clone(), source }) },
            async { control.await.map_err(|source| ServeError::Serve { path: control_at.clone(), source }) },
            registration,
        )
    };
    tracing::info!(socket = %sockets.csi.display(), "serving");
    // On the heap: three servers are more than a stack should carry around.
    let mut serving = Box::pin(serving);
    let ended = tokio::select! {
        ended = &mut serving => ended.map(drop),
        refused = refused => Err(refused),
        failed = http => Err(failed),
        () = stop => {
            tracing::info!("stopping");
            if let Some(path) = &sockets.registration {
                let _ = fs::remove_file(path);
            }
            stopping.send_replace(true);
            serving.await.map(drop)
        }
    };
    for path in sockets.registration.iter().chain([&sockets.csi, &control_at]) {
        let _ = fs::remove_file(path);
    }
    ended
}

/// A socket that only its owner may use, in place of one that an earlier process left.
fn listen(path: &Path) -> Result<UnixListenerStream, ServeError> {
    let make = || {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(UnixListenerStream::new(listener))
    };
    make().map_err(|source| ServeError::Listen { path: path.into(), source })
}
