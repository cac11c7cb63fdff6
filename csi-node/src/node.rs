//! CSI Node: check, do, answer. The doing is in [`crate::publish`].

use nix_csi_proto::csi::node_server::Node;
use nix_csi_proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodePublishVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
};
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use crate::driver::Driver;
use crate::publish::PublishError;
use crate::request::{PublishRequest, UnpublishRequest};

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = PublishRequest::parse(request.get_ref(), self.options.system, &self.options.pods_dir)
            .map_err(|error| status(&error.into()))?;
        let span = tracing::info_span!(
            "publish",
            volume.id = %request.volume,
            pod.namespace = request.pod.namespace,
            pod.name = request.pod.name,
        );
        async {
            self.publish(request).await.map_err(|error| status(&error))?;
            tracing::info!("published");
            Ok(Response::new(NodePublishVolumeResponse {}))
        }
        .instrument(span)
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = UnpublishRequest::parse(request.get_ref(), &self.options.pods_dir)
            .map_err(|error| status(&error.into()))?;
        let span = tracing::info_span!("unpublish", volume.id = %request.volume);
        async {
            self.unpublish(request).await.map_err(|error| status(&error))?;
            tracing::info!("unpublished");
            Ok(Response::new(NodeUnpublishVolumeResponse {}))
        }
        .instrument(span)
        .await
    }

    async fn node_get_volume_stats(
        &self,
        _: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        // Not among the capabilities, so nobody who reads them asks.
        Err(Status::unimplemented("this driver does not report volume statistics"))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: Vec::new() }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.options.node_name.clone(),
            max_volumes_per_node: 0,
        }))
    }
}

/// The whole chain of causes: it becomes the text of the pod's event. Logged here and nowhere else.
fn status(error: &PublishError) -> Status {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        // Transparent errors and libraries repeat what is inside them.
        if !message.ends_with(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
    let code = error.code();
    if matches!(code, Code::Aborted) {
        tracing::info!(?code, message, "not yet");
    } else {
        tracing::warn!(?code, message, "refused");
    }
    Status::new(code, message)
}
