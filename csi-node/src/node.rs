//! CSI Node: check, do, answer. The doing is in [`crate::publish`].

use std::time::Duration;

use nix_csi_proto::csi::node_server::Node;
use nix_csi_proto::csi::node_service_capability::{self, Rpc, rpc};
use nix_csi_proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodePublishVolumeResponse, NodeServiceCapability, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse,
};
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use crate::driver::Driver;
use crate::publish::{PublishError, chain};
use crate::request::{PublishRequest, StatsRequest, UnpublishRequest};
use crate::stats::StatsError;

#[tonic::async_trait]
impl Node for Driver {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let patience = patience(self.options.patience, request.metadata());
        let request = PublishRequest::parse(request.get_ref(), self.options.system, &self.options.pods_dir)
            .map_err(|error| status(&error.into()))?;
        let span = tracing::info_span!(
            "publish",
            volume.id = %request.volume,
            pod.namespace = request.pod.namespace,
            pod.name = request.pod.name,
        );
        let pod = request.pod.clone();
        async {
            let published = self.publish(request, patience).await;
            self.metrics.ended("publish", published.as_ref().err().map_or(Code::Ok, PublishError::code));
            published.map_err(|error| {
                self.make_room_for(&error);
                let status = status(&error);
                self.tell_failure(&pod, status.code(), status.message());
                status
            })?;
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
            let unpublished = self.unpublish(request).await;
            self.metrics.ended("unpublish", unpublished.as_ref().err().map_or(Code::Ok, PublishError::code));
            unpublished.map_err(|error| status(&error))?;
            tracing::info!("unpublished");
            Ok(Response::new(NodeUnpublishVolumeResponse {}))
        }
        .instrument(span)
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = StatsRequest::parse(request.get_ref()).map_err(|error| status(&error.into()))?;
        let this = self.clone();
        let measured = tokio::task::spawn_blocking(move || this.stats(&request)).await;
        let stats = measured.unwrap_or(Err(StatsError::Stopping));
        self.metrics.ended("stats", stats.as_ref().err().map_or(Code::Ok, StatsError::code));
        // Kubelet asks each minute: what is not there any more is no news.
        stats.map(Response::new).map_err(|error| Status::new(error.code(), chain(&error)))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capabilities = [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition].map(|of| {
            let of = node_service_capability::Type::Rpc(Rpc { r#type: of.into() });
            NodeServiceCapability { r#type: Some(of) }
        });
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
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

/// How long a call may take: as long as it is told, and less if its caller does not wait so long.
fn patience(most: Duration, metadata: &MetadataMap) -> Duration {
    const ANSWER: Duration = Duration::from_secs(5);
    let deadline = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(timeout);
    deadline.map_or(most, |deadline| most.min(deadline.saturating_sub(ANSWER)))
}

/// A number of up to eight digits and a unit, as gRPC writes it.
fn timeout(value: &str) -> Option<Duration> {
    let (number, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let number = number.parse().ok().filter(|_| number.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_hours(number)),
        "M" => Some(Duration::from_mins(number)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// The whole chain of causes: it becomes the text of the pod's event. Logged here and nowhere else.
fn status(error: &PublishError) -> Status {
    let message = chain(error);
    let code = error.code();
    if matches!(code, Code::Aborted) {
        tracing::info!(?code, message, "not yet");
    } else {
        tracing::warn!(?code, message, "refused");
    }
    Status::new(code, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::kubelet("119999m", 110)]
    #[case::less("60S", 55)]
    #[case::hardly_any("3S", 0)]
    #[case::more("1H", 110)]
    #[case::nonsense("soon", 110)]
    #[case::empty("", 110)]
    #[case::too_long("123456789S", 110)]
    fn a_call_ends_before_its_deadline(#[case] header: &str, #[case] seconds: u64) {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", header.parse().unwrap());
        assert_eq!(patience(Duration::from_secs(110), &metadata).as_secs(), seconds);
    }
}
