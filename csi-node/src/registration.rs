//! Makes the driver known to kubelet, which finds the socket in its directory and asks.

use nix_csi_proto::DRIVER_NAME;
use nix_csi_proto::registration::registration_server::Registration;
use nix_csi_proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// Answers kubelet's questions.
pub(crate) struct Registrar {
    /// The CSI socket, as the host sees it.
    pub(crate) endpoint: String,
    /// Set to what kubelet says of the registration.
    pub(crate) registered: watch::Sender<Option<Result<(), String>>>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER_NAME.to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = status.into_inner();
        self.registered.send_replace(Some(if plugin_registered { Ok(()) } else { Err(error) }));
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
