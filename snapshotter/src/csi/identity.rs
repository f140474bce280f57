//! CSI's Identity service: what the plugin is, and whether the daemon answers.

use std::time::Duration;

use tonic::{Code, Request, Response, Status};
use weightfs_proto::control::VolumeRequest;
use weightfs_proto::csi::identity_server::Identity;
use weightfs_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, ProbeRequest, ProbeResponse,
};

use super::Plugin;

/// How long the daemon may take to answer: while it is replaced its socket waits.
const PROBE_PATIENCE: Duration = Duration::from_secs(3);

#[tonic::async_trait]
impl Identity for Plugin {
    async fn get_plugin_info(
        &self,
        _request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.driver.to_string(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities: Vec::new() }))
    }

    async fn probe(
        &self,
        _request: Request<ProbeRequest>,
    ) -> Result<Response<ProbeResponse>, Status> {
        let answered = tokio::time::timeout(PROBE_PATIENCE, self.answers()).await;
        Ok(Response::new(ProbeResponse { ready: Some(answered.unwrap_or(false)) }))
    }
}

impl Plugin {
    /// Whether the daemon answers: a question about nothing, with a refusal.
    async fn answers(&self) -> bool {
        let Ok(mut daemon) = self.daemon().await else { return false };
        let answer = daemon.volume(VolumeRequest::default()).await;
        matches!(answer, Err(status) if status.code() == Code::InvalidArgument)
    }
}
