//! CSI's Node service: volumes come and go. What is asked is checked here, and done by the daemon.
//!
//! Volumes are read-only, whatever `readonly` says: Kubernetes calls an inline volume writable by
//! default. A volume can be at several targets, whatever its access mode says: all of them read.

use tonic::{Request, Response, Status};
use tracing::{info, warn};
use weightfs_proto::control::{Model, PublishRequest, VolumeRequest};
use weightfs_proto::csi::node_server::Node;
use weightfs_proto::csi::node_service_capability::{Rpc, Type as Capability, rpc};
use weightfs_proto::csi::volume_capability::access_mode::Mode;
use weightfs_proto::csi::volume_capability::{AccessType, MountVolume};
use weightfs_proto::csi::volume_usage::Unit;
use weightfs_proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest,
    NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability,
    NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, VolumeCapability, VolumeCondition,
    VolumeUsage,
};
use weightfs_store::Trust;

use super::{Attributes, Plugin};
use crate::trees::trust_name;

#[tonic::async_trait]
impl Node for Plugin {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let (volume, target) = (request.volume_id.clone(), request.target_path.clone());
        let published = self.publish(request).await;
        told("publish", &volume, &target, &published);
        published.map(|()| Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let NodeUnpublishVolumeRequest { volume_id, target_path } = request.into_inner();
        let place = place(volume_id.clone(), target_path.clone(), "target_path")?;
        let unpublished = match self.daemon().await {
            Ok(mut daemon) => daemon.unpublish(place).await.map(drop),
            Err(error) => Err(error),
        };
        told("unpublish", &volume_id, &target_path, &unpublished);
        unpublished.map(|()| Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let NodeGetVolumeStatsRequest { volume_id, volume_path } = request.into_inner();
        let place = place(volume_id, volume_path, "volume_path")?;
        let model = self.daemon().await?.volume(place).await?.into_inner();
        Ok(Response::new(stats(&model)))
    }

    async fn node_get_capabilities(
        &self,
        _request: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| NodeServiceCapability {
            r#type: Some(Capability::Rpc(Rpc { r#type: kind.into() })),
        };
        let capabilities = [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition];
        let capabilities = capabilities.map(capability).to_vec();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node_id = self.node_id.0.clone();
        Ok(Response::new(NodeGetInfoResponse { node_id, max_volumes_per_node: 0 }))
    }
}

impl Plugin {
    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let NodePublishVolumeRequest { volume_id, target_path, .. } = request;
        let VolumeRequest { volume, target } = place(volume_id, target_path, "target_path")?;
        check_capability(request.volume_capability.as_ref())?;
        let Attributes { reference, exclude } =
            Attributes::parse(&self.driver, &request.volume_context)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let request = PublishRequest { volume, target, reference: reference.whole(), exclude };
        self.daemon().await?.publish(request).await.map(drop)
    }
}

/// The two fields that each call about a volume must have.
fn place(volume: String, target: String, field: &str) -> Result<VolumeRequest, Status> {
    let missing = match (volume.as_str(), target.as_str()) {
        ("", _) => "volume_id",
        (_, "") => field,
        _ => return Ok(VolumeRequest { volume, target }),
    };
    Err(Status::invalid_argument(format!("{missing} is missing")))
}

/// Whether a read-only file system will do.
fn check_capability(capability: Option<&VolumeCapability>) -> Result<(), Status> {
    let missing = |what: &str| Status::invalid_argument(format!("{what} is missing"));
    let capability = capability.ok_or_else(|| missing("volume_capability"))?;
    match &capability.access_type {
        None => return Err(missing("volume_capability.access_type")),
        Some(AccessType::Block(_)) => {
            let text = "a model has files and is no block device: use volumeMode Filesystem";
            return Err(Status::failed_precondition(text));
        }
        Some(AccessType::Mount(MountVolume { mount_flags, .. })) => {
            if let Some(flag) = mount_flags.iter().find(|flag| *flag != "ro") {
                let text = format!("mount option {flag:?}: only \"ro\" can be had");
                return Err(Status::invalid_argument(text));
            }
        }
    }
    let mode = capability.access_mode.as_ref().map(|access| access.mode());
    match mode.unwrap_or(Mode::Unknown) {
        Mode::Unknown => Err(missing("volume_capability.access_mode")),
        // An inline volume is always this one.
        Mode::SingleNodeWriter | Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly => Ok(()),
        Mode::MultiNodeSingleWriter
        | Mode::MultiNodeMultiWriter
        | Mode::SingleNodeSingleWriter
        | Mode::SingleNodeMultiWriter => Err(Status::failed_precondition(
            "models are read-only: use the access mode ReadOnlyMany",
        )),
    }
}

/// Bytes of the model, and those of them that are on this node.
fn stats(model: &Model) -> NodeGetVolumeStatsResponse {
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let bytes = VolumeUsage {
        total: count(model.size),
        used: count(model.cached),
        available: count(model.size.saturating_sub(model.cached)),
        unit: Unit::Bytes.into(),
    };
    let files = count(model.files);
    let inodes = VolumeUsage { total: files, used: files, available: 0, unit: Unit::Inodes.into() };
    let abnormal = model.trust == trust_name(Trust::Poisoned);
    let message = match abnormal {
        true => "what came is not what its digest says: reads fail; see `weightfs status`",
        false => "served",
    };
    let condition = VolumeCondition { abnormal, message: message.to_owned() };
    NodeGetVolumeStatsResponse { usage: vec![bytes, inodes], volume_condition: Some(condition) }
}

/// One line for each volume that came, went, or did not.
fn told(what: &str, volume: &str, target: &str, result: &Result<(), Status>) {
    match result {
        Ok(()) => info!(volume, target, "{what}: done"),
        Err(status) => {
            warn!(volume, target, code = ?status.code(), "{what}: {}", status.message());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;
    use weightfs_proto::csi::volume_capability::AccessMode;

    fn code(access: Option<AccessType>, mode: Mode) -> Option<Code> {
        let access_mode = Some(AccessMode { mode: mode.into() });
        let capability = VolumeCapability { access_type: access, access_mode };
        check_capability(Some(&capability)).err().map(|status| status.code())
    }

    fn mount(flags: &[&str]) -> Option<AccessType> {
        let mount_flags = flags.iter().map(ToString::to_string).collect();
        Some(AccessType::Mount(MountVolume { fs_type: "ext4".to_owned(), mount_flags }))
    }

    #[test]
    fn only_readers_of_files_are_served() {
        for mode in [Mode::SingleNodeWriter, Mode::SingleNodeReaderOnly, Mode::MultiNodeReaderOnly]
        {
            assert_eq!(code(mount(&["ro"]), mode), None);
        }
        let block = Some(AccessType::Block(Default::default()));
        assert_eq!(code(block, Mode::SingleNodeWriter), Some(Code::FailedPrecondition));
        let writers = code(mount(&[]), Mode::MultiNodeMultiWriter);
        assert_eq!(writers, Some(Code::FailedPrecondition));
        assert_eq!(code(mount(&["rw"]), Mode::SingleNodeWriter), Some(Code::InvalidArgument));
        assert_eq!(code(None, Mode::SingleNodeWriter), Some(Code::InvalidArgument));
        assert_eq!(code(mount(&[]), Mode::Unknown), Some(Code::InvalidArgument));
        assert_eq!(check_capability(None).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn what_is_poisoned_is_abnormal() {
        let model = |trust: Trust| Model {
            size: 100,
            cached: 30,
            files: 3,
            trust: trust_name(trust).to_owned(),
            ..Model::default()
        };
        let good = stats(&model(Trust::Transport));
        assert_eq!((good.usage[0].total, good.usage[0].used), (100, 30));
        assert_eq!((good.usage[1].total, good.usage[0].available), (3, 70));
        assert!(!good.volume_condition.unwrap().abnormal);
        assert!(stats(&model(Trust::Poisoned)).volume_condition.unwrap().abnormal);
    }
}
