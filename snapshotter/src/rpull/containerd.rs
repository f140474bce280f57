//! containerd's own services as `weightfs rpull` needs them: each call carries the namespace and
//! the lease, and what containerd answers becomes an [`RpullError`] that says which call it was.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    ApplyRequest, CreateImageRequest, CreateRequest, DeleteRequest, Image, Info, InfoRequest,
    UpdateImageRequest, UpdateRequest, WriteAction, WriteContentRequest,
    content_client::ContentClient, diff_client::DiffClient, images_client::ImagesClient,
    leases_client::LeasesClient,
};
use containerd_client::types::{Descriptor, Mount};
use futures::{Stream, StreamExt as _, stream};
use prost_types::FieldMask;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use weightfs_store::{Digest, SourceError};

use super::RpullError;

/// A pull that takes longer than this loses its lease; containerd then may collect what it has.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Bytes of content in one message; containerd refuses messages over 16 MiB.
const MESSAGE_BYTES: usize = 1 << 20;

/// Adds the headers that containerd wants to each call.
#[derive(Debug, Clone)]
struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

type Service = InterceptedService<Channel, Headers>;

/// A connection to containerd in one namespace, under a lease of its own.
#[derive(Debug, Clone)]
pub(super) struct Containerd {
    channel: Channel,
    headers: Headers,
    snapshotter: String,
    lease: String,
}

/// What Prepare answered.
#[derive(Debug)]
pub(super) enum Prepared {
    /// The snapshot is there already, or was mounted lazily.
    Exists,
    /// The layer must be unpacked here.
    Unpack(Vec<Mount>),
}

fn failed(call: &'static str) -> impl FnOnce(Status) -> RpullError {
    move |status| RpullError::Containerd {
        call,
        code: status.code(),
        message: status.message().to_owned(),
    }
}

/// Success also if the thing was there already.
fn or_exists<T>(call: &'static str, result: Result<T, Status>) -> Result<(), RpullError> {
    match result {
        Err(status) if status.code() != Code::AlreadyExists => Err(failed(call)(status)),
        _ => Ok(()),
    }
}

impl Containerd {
    /// Connects and takes a lease. [`Containerd::release`] gives it back; containerd does so by
    /// itself after [`LEASE_LIFE`].
    pub(super) async fn connect(
        address: &Path,
        namespace: &str,
        snapshotter: &str,
    ) -> Result<Self, RpullError> {
        let unreachable =
            |message: String| RpullError::Unreachable { address: address.to_owned(), message };
        let channel = containerd_client::connect(address).await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            unreachable(cause.unwrap_or_else(|| error.to_string()))
        })?;
        let namespace = namespace
            .parse()
            .map_err(|_| RpullError::BadName { what: "namespace", name: namespace.to_owned() })?;
        let now = SystemTime::now();
        let nanos = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mut containerd = Self {
            channel,
            headers: Headers { namespace, lease: None },
            snapshotter: snapshotter.to_owned(),
            lease: format!("weightfs-rpull-{}-{nanos}", std::process::id()),
        };
        let expire = jiff::Timestamp::try_from(now + LEASE_LIFE).unwrap_or(jiff::Timestamp::MAX);
        let labels = HashMap::from([("containerd.io/gc.expire".into(), expire.to_string())]);
        let request = CreateRequest { id: containerd.lease.clone(), labels };
        containerd.leases().create(request).await.map_err(failed("Leases.Create"))?;
        containerd.headers.lease = containerd.lease.parse().ok();
        Ok(containerd)
    }

    /// Gives the lease back. What no image refers to may be collected from now on.
    pub(super) async fn release(self) -> Result<(), RpullError> {
        let request = DeleteRequest { id: self.lease.clone(), sync: false };
        self.leases().delete(request).await.map_err(failed("Leases.Delete"))?;
        Ok(())
    }

    fn service(&self) -> Service {
        InterceptedService::new(self.channel.clone(), self.headers.clone())
    }

    fn leases(&self) -> LeasesClient<Service> {
        LeasesClient::new(self.service())
    }

    fn content(&self) -> ContentClient<Service> {
        ContentClient::new(self.service())
    }

    fn images(&self) -> ImagesClient<Service> {
        ImagesClient::new(self.service())
    }

    fn snapshots(&self) -> SnapshotsClient<Service> {
        SnapshotsClient::new(self.service())
    }

    /// Whether containerd has that content.
    pub(super) async fn has_content(&self, digest: Digest) -> Result<bool, RpullError> {
        match self.content().info(InfoRequest { digest: digest.to_string() }).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(failed("Content.Info")(status)),
        }
    }

    /// Writes content whose bytes are at hand.
    pub(super) async fn write_bytes(
        &self,
        digest: Digest,
        bytes: bytes::Bytes,
        labels: HashMap<String, String>,
    ) -> Result<(), RpullError> {
        let size = bytes.len() as u64;
        self.write(digest, size, stream::iter([Ok(bytes)]), labels).await
    }

    /// Writes content from a stream; containerd checks its digest and size.
    pub(super) async fn write(
        &self,
        digest: Digest,
        size: u64,
        bytes: impl Stream<Item = Result<bytes::Bytes, SourceError>> + Send + 'static,
        labels: HashMap<String, String>,
    ) -> Result<(), RpullError> {
        let total = i64::try_from(size).map_err(|_| RpullError::TooLarge { digest, size })?;
        // Of this pull alone: containerd locks it, and refuses a second writer.
        let reference = format!("{}-{digest}", self.lease);
        let (failure, mut failed_source) = tokio::sync::oneshot::channel();
        let messages = messages(reference, digest, total, bytes, labels, failure);
        let reply = self.content().write(messages).await;
        let result = match reply {
            Ok(reply) => drain(reply.into_inner()).await,
            Err(status) => Err(status),
        };
        // The source's own failure says more than the stream that broke off because of it.
        if let Ok(error) = failed_source.try_recv() {
            return Err(RpullError::Source(error));
        }
        or_exists("Content.Write", result)
    }

    /// Adds labels to content.
    pub(super) async fn label_content(
        &self,
        digest: Digest,
        labels: HashMap<String, String>,
    ) -> Result<(), RpullError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        self.content().update(request).await.map_err(failed("Content.Update"))?;
        Ok(())
    }

    /// Makes the name stand for the target.
    pub(super) async fn put_image(&self, name: &str, target: Descriptor) -> Result<(), RpullError> {
        let image = Image { name: name.to_owned(), target: Some(target), ..Image::default() };
        let create = CreateImageRequest { image: Some(image.clone()), ..Default::default() };
        match self.images().create(create).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(failed("Images.Create")(status)),
        }
        let update = UpdateImageRequest { image: Some(image), ..Default::default() };
        self.images().update(update).await.map_err(failed("Images.Update"))?;
        Ok(())
    }

    /// Whether there is a snapshot of that name.
    pub(super) async fn has_snapshot(&self, name: &str) -> Result<bool, RpullError> {
        let request =
            StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        match self.snapshots().stat(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(failed("Snapshots.Stat")(status)),
        }
    }

    /// Asks the snapshotter for a place to unpack a layer.
    pub(super) async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Prepared, RpullError> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        match self.snapshots().prepare(request).await {
            Ok(reply) => Ok(Prepared::Unpack(reply.into_inner().mounts)),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Prepared::Exists),
            Err(status) => Err(failed("Snapshots.Prepare")(status)),
        }
    }

    /// Unpacks a layer that the content store has; returns the digest of the plain tar.
    pub(super) async fn apply(
        &self,
        layer: Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<String, RpullError> {
        let request = ApplyRequest { diff: Some(layer), mounts, ..Default::default() };
        let reply = DiffClient::new(self.service()).apply(request).await;
        let applied = reply.map_err(failed("Diff.Apply"))?.into_inner().applied;
        Ok(applied.map(|applied| applied.digest).unwrap_or_default())
    }

    /// Makes a prepared snapshot a committed one.
    pub(super) async fn commit(
        &self,
        key: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), RpullError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
        };
        let result = self.snapshots().commit(request).await;
        or_exists("Snapshots.Commit", result)
    }

    /// Removes a snapshot that did not get finished.
    pub(super) async fn remove(&self, key: &str) -> Result<(), RpullError> {
        let request =
            RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        self.snapshots().remove(request).await.map_err(failed("Snapshots.Remove"))?;
        Ok(())
    }
}

/// The messages of one Content.Write: the bytes in pieces, then the commit.
fn messages(
    reference: String,
    digest: Digest,
    total: i64,
    bytes: impl Stream<Item = Result<bytes::Bytes, SourceError>> + Send + 'static,
    labels: HashMap<String, String>,
    failure: tokio::sync::oneshot::Sender<SourceError>,
) -> impl Stream<Item = WriteContentRequest> + Send + 'static {
    let expected = digest.to_string();
    let commit = WriteContentRequest {
        action: WriteAction::Commit as i32,
        r#ref: reference.clone(),
        total,
        expected: expected.clone(),
        offset: total,
        labels,
        ..Default::default()
    };
    let mut offset = 0;
    let mut failure = Some(failure);
    let pieces = bytes
        .flat_map(|piece| {
            stream::iter(match piece {
                Ok(mut rest) => {
                    let mut pieces = Vec::new();
                    while !rest.is_empty() {
                        let piece = rest.split_to(rest.len().min(MESSAGE_BYTES));
                        pieces.push(Ok(piece));
                    }
                    pieces
                }
                Err(error) => vec![Err(error)],
            })
        })
        .map(Some)
        .chain(stream::iter([None]));
    pieces
        .map(move |piece| match piece {
            Some(Ok(data)) => {
                let message = WriteContentRequest {
                    action: WriteAction::Write as i32,
                    r#ref: reference.clone(),
                    total,
                    expected: expected.clone(),
                    offset,
                    data: data.to_vec(),
                    ..Default::default()
                };
                offset += message.data.len() as i64;
                Some(message)
            }
            Some(Err(error)) => {
                if let Some(failure) = failure.take() {
                    // Nobody listens only if the write has already failed.
                    let _ = failure.send(error);
                }
                None
            }
            None => Some(commit.clone()),
        })
        // A failed source ends the stream before the commit.
        .take_while(|message| std::future::ready(message.is_some()))
        .filter_map(std::future::ready)
}

async fn drain<T>(mut replies: tonic::Streaming<T>) -> Result<(), Status> {
    while replies.message().await?.is_some() {}
    Ok(())
}
