//! What a kubelet asks of a volume plugin.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use weightfs_proto::csi::identity_client::IdentityClient;
use weightfs_proto::csi::node_client::NodeClient;
use weightfs_proto::csi::volume_capability::access_mode::Mode;
use weightfs_proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use weightfs_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginInfoRequest, GetPluginInfoResponse,
    NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest,
    NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest,
    VolumeCapability,
};
use weightfs_proto::registration::registration_client::RegistrationClient;
use weightfs_proto::registration::{InfoRequest, PluginInfo, RegistrationStatus};

use crate::area::Area;
use crate::process::Service;
use crate::weightfs::Weightfs;

/// Calls of one test run side by side with others' and may be given up.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// A plugin's process, and a client of it.
#[derive(Debug)]
pub struct Plugin {
    service: Service,
    dir: PathBuf,
}

/// An inline volume as a kubelet asks for it; `attributes` are the pod's.
pub fn inline(
    volume: &str,
    target: &Path,
    attributes: &[(&str, &str)],
) -> NodePublishVolumeRequest {
    let text = |text: &&str| (*text).to_owned();
    let attributes = attributes.iter().map(|(name, value)| (text(name), text(value)));
    // What `podInfoOnMount` adds.
    let kubernetes = [("csi.storage.k8s.io/ephemeral".to_owned(), "true".to_owned())];
    NodePublishVolumeRequest {
        volume_id: volume.to_owned(),
        target_path: target.to_str().unwrap().to_owned(),
        volume_capability: Some(VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume::default())),
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        }),
        readonly: false,
        volume_context: attributes.chain(kubernetes).collect::<HashMap<_, _>>(),
    }
}

impl Plugin {
    /// Starts `weightfs csi` and waits until its socket is there.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn start(area: &Area, weightfs: &Weightfs) -> Self {
        let dir = area.dir("plugin");
        let mut command = weightfs.command(["csi", "--node-id", "node-1", "--config"]);
        command.arg(weightfs.config());
        command.arg("--endpoint").arg(format!("unix://{}/csi.sock", dir.display()));
        command.arg("--registration-dir").arg(&dir);
        let mut service = Service::start(area, "weightfs-csi", command);
        service.wait_ready(|service| service.log().contains("the kubelet is told").then_some(()));
        Self { service, dir }
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        self.service.kill();
    }

    /// What it has written.
    pub fn log(&self) -> String {
        self.service.log()
    }

    /// What it says that it is.
    pub fn info(&self) -> GetPluginInfoResponse {
        self.call(async |channel| {
            IdentityClient::new(channel).get_plugin_info(GetPluginInfoRequest {}).await
        })
        .unwrap()
    }

    /// How many capabilities it claims: of the plugin, of the node.
    pub fn capabilities(&self) -> (usize, usize) {
        let plugin = self.call(async |channel| {
            let request = GetPluginCapabilitiesRequest {};
            IdentityClient::new(channel).get_plugin_capabilities(request).await
        });
        let node = self.call(async |channel| {
            NodeClient::new(channel).node_get_capabilities(NodeGetCapabilitiesRequest {}).await
        });
        (plugin.unwrap().capabilities.len(), node.unwrap().capabilities.len())
    }

    /// Whether volumes can be had.
    pub fn is_ready(&self) -> bool {
        let probed =
            self.call(async |channel| IdentityClient::new(channel).probe(ProbeRequest {}).await);
        probed.unwrap().ready.unwrap()
    }

    /// The node that it says it is on.
    pub fn node(&self) -> NodeGetInfoResponse {
        self.call(async |channel| {
            NodeClient::new(channel).node_get_info(NodeGetInfoRequest {}).await
        })
        .unwrap()
    }

    /// Publishes a volume.
    ///
    /// # Errors
    /// What the plugin answers.
    pub fn publish(&self, request: &NodePublishVolumeRequest) -> Result<(), Status> {
        let request = request.clone();
        self.call(async |channel| NodeClient::new(channel).node_publish_volume(request).await)
            .map(drop)
    }

    /// Takes a volume away.
    ///
    /// # Errors
    /// What the plugin answers.
    pub fn unpublish(&self, volume: &str, target: &Path) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target.to_str().unwrap().to_owned(),
        };
        self.call(async |channel| NodeClient::new(channel).node_unpublish_volume(request).await)
            .map(drop)
    }

    /// Numbers of a volume.
    ///
    /// # Errors
    /// What the plugin answers.
    pub fn stats(&self, volume: &str, target: &Path) -> Result<NodeGetVolumeStatsResponse, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.to_owned(),
            volume_path: target.to_str().unwrap().to_owned(),
        };
        self.call(async |channel| NodeClient::new(channel).node_get_volume_stats(request).await)
    }

    /// What the kubelet finds out about the plugin, which is then told that it is taken.
    pub fn register(&self) -> PluginInfo {
        let path = self.dir.join("csi.weightfs.io-reg.sock");
        RUNTIME.block_on(async {
            let mut client = RegistrationClient::new(channel(path).await);
            let info = client.get_info(InfoRequest {}).await.unwrap().into_inner();
            let status = RegistrationStatus { plugin_registered: true, error: String::new() };
            client.notify_registration_status(status).await.unwrap();
            info
        })
    }

    /// Begins to publish a volume and goes away once `begun` holds, as a kubelet does whose deadline
    /// is over.
    ///
    /// # Panics
    /// When the call ends before that.
    pub fn publish_and_give_up(
        &self,
        request: &NodePublishVolumeRequest,
        mut begun: impl FnMut() -> bool,
    ) {
        let (request, path) = (request.clone(), self.dir.join("csi.sock"));
        RUNTIME.block_on(async {
            let mut client = NodeClient::new(channel(path).await);
            let call = client.node_publish_volume(request);
            tokio::pin!(call);
            // Polled between looks at the condition.
            loop {
                let looked = tokio::time::timeout(Duration::from_millis(10), &mut call).await;
                assert!(looked.is_err(), "{looked:?}");
                if begun() {
                    return;
                }
            }
        });
    }

    fn call<T>(
        &self,
        call: impl AsyncFnOnce(Channel) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, Status> {
        let path = self.dir.join("csi.sock");
        RUNTIME.block_on(async { call(channel(path).await).await }).map(tonic::Response::into_inner)
    }
}

async fn channel(path: PathBuf) -> Channel {
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is a formality: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://csi");
    endpoint.connect_with_connector(connector).await.unwrap()
}
