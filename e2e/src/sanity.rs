//! A stand-in between csi-sanity and the driver, with the controller that an ephemeral driver does not have: csi-sanity
//! makes its volumes by one, kubelet by writing them into a pod. All else is the driver's own.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use nix_csi_proto::csi::controller_server::{Controller, ControllerServer};
use nix_csi_proto::csi::identity_client::IdentityClient;
use nix_csi_proto::csi::identity_server::{Identity, IdentityServer};
use nix_csi_proto::csi::node_client::NodeClient;
use nix_csi_proto::csi::node_server::{Node, NodeServer};
use nix_csi_proto::csi::plugin_capability::{self, Service, service};
use nix_csi_proto::csi::{
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, CreateVolumeRequest,
    CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse, GetPluginCapabilitiesRequest,
    GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest,
    NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
    NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, PluginCapability, ProbeRequest, ProbeResponse,
    Volume,
};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tonic::codegen::tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};

use crate::driver::channel;

/// The stand-in; it ends with the value.
pub struct StandIn(JoinHandle<()>);

impl Drop for StandIn {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Clone)]
struct Front {
    identity: IdentityClient<Channel>,
    node: NodeClient<Channel>,
    context: HashMap<String, String>,
}

impl StandIn {
    /// Stands before the driver at the socket `driver`, at the socket `at`. Each volume gets `context`.
    pub async fn start(driver: &Path, at: &Path, context: HashMap<String, String>) -> Result<Self> {
        let channel = channel(driver).await?;
        let (identity, node) = (IdentityClient::new(channel.clone()), NodeClient::new(channel));
        let front = Front { identity, node, context };
        let incoming = UnixListenerStream::new(UnixListener::bind(at)?);
        let serving = Server::builder()
            .add_service(IdentityServer::new(front.clone()))
            .add_service(ControllerServer::new(front.clone()))
            .add_service(NodeServer::new(front))
            .serve_with_incoming(incoming);
        Ok(Self(tokio::spawn(async move { drop(serving.await) })))
    }
}

#[tonic::async_trait]
impl Controller for Front {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let volume_id = format!("csi-{}", request.into_inner().name);
        let volume_context = self.context.clone();
        let volume = Some(Volume { capacity_bytes: 0, volume_id, volume_context });
        Ok(Response::new(CreateVolumeResponse { volume }))
    }

    async fn delete_volume(
        &self,
        _: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        Ok(Response::new(ControllerGetCapabilitiesResponse {}))
    }
}

#[tonic::async_trait]
impl Identity for Front {
    async fn get_plugin_info(
        &self,
        request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        self.identity.clone().get_plugin_info(request.into_inner()).await
    }

    async fn get_plugin_capabilities(
        &self,
        request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let mut said = self.identity.clone().get_plugin_capabilities(request.into_inner()).await?;
        let of = Service { r#type: service::Type::ControllerService.into() };
        let of = PluginCapability { r#type: Some(plugin_capability::Type::Service(of)) };
        said.get_mut().capabilities.push(of);
        Ok(said)
    }

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        self.identity.clone().probe(request.into_inner()).await
    }
}

#[tonic::async_trait]
impl Node for Front {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        self.node.clone().node_publish_volume(request.into_inner()).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        self.node.clone().node_unpublish_volume(request.into_inner()).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        self.node.clone().node_get_volume_stats(request.into_inner()).await
    }

    async fn node_get_capabilities(
        &self,
        request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        self.node.clone().node_get_capabilities(request.into_inner()).await
    }

    async fn node_get_info(
        &self,
        request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        self.node.clone().node_get_info(request.into_inner()).await
    }
}
