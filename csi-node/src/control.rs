//! How a command asks the driver that holds a node store: gRPC on a socket in the store's own directory.
//!
//! Only root can enter that directory. Whoever can has the store anyway, so nothing is asked of a caller.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::Context as _;
use nix_csi_proto::control::control_client::ControlClient;
use nix_csi_proto::control::control_server::Control;
use nix_csi_proto::control::{VerifyEvent, VerifyRequest, verify_event};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Endpoint;
use tonic::{Request, Response, Status};

use crate::driver::Driver;
use crate::verify::{Repairer, verify};

/// How much is kept for a command that reads slowly.
const AHEAD: usize = 16;

#[tonic::async_trait]
impl Control for Driver {
    type VerifyStream = Pin<Box<dyn Stream<Item = Result<VerifyEvent, Status>> + Send>>;

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let busy = || Status::aborted("the store is being verified already; wait for that to end");
        let one_at_a_time = Arc::clone(&self.verifying).try_lock_owned().map_err(|_| busy())?;
        let repairer = request.get_ref().repair.then(|| Repairer {
            substituter: self.fetches.substituter(None),
            building: Arc::clone(&self.building),
            kubernetes: self.options.kubernetes.clone(),
        });
        let store = Arc::clone(&self.store);
        let (findings, found) = mpsc::channel(AHEAD);
        let (failed, failure) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(error) = verify(&store, repairer.as_ref(), &findings).await {
                tracing::error!("cannot verify the store: {error:#}");
                let _ = failed.send(Status::internal(format!("{error:#}"))).await;
            }
            drop(one_at_a_time);
        });
        let found = ReceiverStream::new(found).map(|event| Ok(VerifyEvent { event: Some(event) }));
        Ok(Response::new(Box::pin(found.chain(ReceiverStream::new(failure).map(Err)))))
    }
}

/// Lets the driver behind `socket` verify its store, and passes on what it finds.
pub(crate) async fn ask_to_verify(
    socket: &Path,
    repair: bool,
    findings: mpsc::Sender<verify_event::Event>,
) -> anyhow::Result<()> {
    let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
    let channel = endpoint
        .connect()
        .await
        .with_context(|| format!("whoever holds the store does not answer at {}", socket.display()))?;
    let mut found = ControlClient::new(channel)
        .verify(VerifyRequest { repair })
        .await
        .map_err(|status| said(&status))?
        .into_inner();
    while let Some(VerifyEvent { event }) = found.message().await.map_err(|status| said(&status))? {
        // One of a newer driver that this program does not know has none.
        let Some(event) = event else { continue };
        let _ = findings.send(event).await;
    }
    Ok(())
}

/// What the driver said, without the words of its protocol.
fn said(status: &Status) -> anyhow::Error {
    anyhow::Error::msg(status.message().to_owned()).context("the driver")
}
