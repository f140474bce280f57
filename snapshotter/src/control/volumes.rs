//! The calls of the control socket that are about volumes, and their errors as gRPC has them.

use std::path::Path;
use std::sync::Arc;

use tonic::{Code, Status};
use weightfs_fusefs::{ArtifactError, LayerError};
use weightfs_proto::control::{Model, PublishReply, PublishRequest, UnpublishReply, VolumeRequest};
use weightfs_store::SourceError;

use super::{model_message, reference};
use crate::models::ModelError;
use crate::trees::TreesError;
use crate::volumes::{Target, VolumeError, VolumeId, Volumes, Wanted};

pub(super) async fn publish(
    volumes: &Arc<Volumes>,
    request: PublishRequest,
) -> Result<PublishReply, Status> {
    let PublishRequest { volume, target, reference: text, exclude } = request;
    let (volume, target) = place(volume, target).await?;
    let wanted = Wanted { volume, reference: reference(&text)?, exclude };
    let published = volumes.publish(target, wanted).await;
    published.map(|()| PublishReply {}).map_err(|error| refusal(&error))
}

pub(super) async fn unpublish(
    volumes: &Arc<Volumes>,
    request: VolumeRequest,
) -> Result<UnpublishReply, Status> {
    let (volume, target) = place(request.volume, request.target).await?;
    let unpublished = volumes.unpublish(target, volume).await;
    unpublished.map(|()| UnpublishReply {}).map_err(|error| refusal(&error))
}

pub(super) async fn find(volumes: &Arc<Volumes>, request: VolumeRequest) -> Result<Model, Status> {
    let (volume, target) = place(request.volume, request.target).await?;
    let volumes = Arc::clone(volumes);
    let found = tokio::task::spawn_blocking(move || volumes.find(&target, &volume)).await;
    let found = found.map_err(|error| Status::internal(error.to_string()))?;
    found.map(model_message).map_err(|error| refusal(&error))
}

async fn place(volume: String, target: String) -> Result<(VolumeId, Target), Status> {
    let place = tokio::task::spawn_blocking(move || {
        Ok((VolumeId::new(volume)?, Target::new(Path::new(&target))?))
    });
    let place = place.await.map_err(|error| Status::internal(error.to_string()))?;
    place.map_err(|error: VolumeError| refusal(&error))
}

/// The one table of errors of volumes.
fn refusal(error: &VolumeError) -> Status {
    let code = match error {
        VolumeError::Name | VolumeError::Path(_) => Code::InvalidArgument,
        VolumeError::Model(ModelError::Trees(error)) => code_of(error),
        VolumeError::Model(
            ModelError::Profile(_)
            | ModelError::Metadata(_)
            | ModelError::Bind { .. }
            | ModelError::Record(_),
        )
        | VolumeError::Metadata(_)
        | VolumeError::Io { .. }
        | VolumeError::Stopped(_) => Code::Internal,
        VolumeError::Busy(_) | VolumeError::Cancelled(_) => Code::Aborted,
        VolumeError::Taken { .. } => Code::AlreadyExists,
        VolumeError::NotPublished { .. } => Code::NotFound,
    };
    Status::new(code, error.to_string())
}

fn code_of(error: &TreesError) -> Code {
    match error {
        TreesError::Exclude(_) => Code::InvalidArgument,
        TreesError::Artifact(ArtifactError::Source { source, .. })
        | TreesError::Layer(LayerError::Source { source, .. }) => code_of_source(source),
        TreesError::Layer(LayerError::Deadline { .. }) => Code::Unavailable,
        TreesError::Layer(LayerError::Store(_) | LayerError::Stopped { .. })
        | TreesError::Forgotten(_)
        | TreesError::OtherNumbers(_) => Code::Internal,
        // It is there, and no model, or one that is not to be believed.
        TreesError::Artifact(_)
        | TreesError::Layer(_)
        | TreesError::Tree(_)
        | TreesError::Index(_) => Code::FailedPrecondition,
    }
}

fn code_of_source(source: &SourceError) -> Code {
    match source {
        SourceError::NotFound { .. } => Code::NotFound,
        SourceError::Unauthorized { .. } => Code::Unauthenticated,
        SourceError::Status { status: 403, .. } => Code::PermissionDenied,
        SourceError::Unreachable { .. }
        | SourceError::Status { .. }
        | SourceError::NoRanges { .. }
        | SourceError::BadAnswer { .. } => Code::Unavailable,
    }
}
