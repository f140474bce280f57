//! The kubelet's way to find plugins: it watches a directory for sockets, asks each what it is, and
//! says whether it has taken it.

use std::path::PathBuf;

use tonic::{Request, Response, Status};
use tracing::{error, info};
use weightfs_proto::registration::registration_server::Registration as Service;
use weightfs_proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};

use super::DriverName;

/// What the kubelet calls a volume plugin.
const PLUGIN_TYPE: &str = "CSIPlugin";

/// The version of CSI.
const CSI_VERSION: &str = "1.0.0";

/// What the kubelet is told.
#[derive(Debug)]
pub(super) struct Registration {
    pub driver: DriverName,
    /// The plugin's socket, as the kubelet sees it.
    pub endpoint: PathBuf,
}

#[tonic::async_trait]
impl Service for Registration {
    async fn get_info(
        &self,
        _request: Request<InfoRequest>,
    ) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: PLUGIN_TYPE.to_owned(),
            name: self.driver.to_string(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: vec![CSI_VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        match plugin_registered {
            true => info!(driver = %self.driver, "the kubelet has registered the plugin"),
            false => error!(driver = %self.driver, error, "the kubelet refuses the plugin"),
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
