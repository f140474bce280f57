//! containerd's own services as commands need them: each call carries the namespace and a lease,
//! and what containerd answers becomes a [`ClientError`] that says which call it was.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info as SnapshotInfo, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest,
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

/// Work that takes longer than this loses its lease; containerd then may collect what it has.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Bytes of content in one message; containerd refuses messages over 16 MiB.
const MESSAGE_BYTES: usize = 1 << 20;

/// Why containerd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at containerd's socket.
    #[error("containerd at {}: {message}; is it running? --address names its socket", address.display())]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// What the transport said.
        message: String,
    },
    /// containerd knows no snapshotter of that name.
    #[error(
        "containerd has no snapshotter {0:?}; put it in place with `weightfs node install` and \
         restart containerd, or name it with --snapshotter"
    )]
    NoSnapshotter(String),
    /// The snapshotter is known, but nobody answers for it.
    #[error("the snapshotter {name:?} does not answer; is `weightfs serve` running? ({message})")]
    SilentSnapshotter {
        /// containerd's name for it.
        name: String,
        /// What containerd said.
        message: String,
    },
    /// containerd refused a call.
    #[error("containerd: {call}: {message} ({code:?})")]
    Containerd {
        /// Service and method.
        call: &'static str,
        /// The gRPC status code.
        code: Code,
        /// What containerd said.
        message: String,
    },
    /// A name that can't be sent.
    #[error("{what} {name:?} has characters that containerd does not allow")]
    BadName {
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A size that no containerd can hold.
    #[error("blob {digest}: {size} bytes are more than containerd can hold")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size, in bytes.
        size: u64,
    },
    /// What was to be written could not be had.
    #[error(transparent)]
    Source(#[from] SourceError),
}

impl ClientError {
    /// Whether the thing that was asked for is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Containerd { code: Code::NotFound, .. })
    }
}

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
pub(crate) struct Containerd {
    channel: Channel,
    headers: Headers,
    snapshotter: String,
    lease: String,
}

/// What Prepare or View answered.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The snapshot is there already, or was mounted lazily.
    Exists,
    /// It was made, and is to be mounted so.
    Made(Vec<Mount>),
}

/// When what no image, container or snapshot refers to is collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Collect {
    /// Now; waited for.
    Now,
    /// When containerd sees fit.
    Later,
}

fn failed(call: &'static str) -> impl FnOnce(Status) -> ClientError {
    move |status| ClientError::Containerd {
        call,
        code: status.code(),
        message: status.message().to_owned(),
    }
}

/// Success also if the thing was there already.
fn or_exists<T>(call: &'static str, result: Result<T, Status>) -> Result<(), ClientError> {
    match result {
        Err(status) if status.code() != Code::AlreadyExists => Err(failed(call)(status)),
        _ => Ok(()),
    }
}

impl Containerd {
    /// Connects and takes a lease. [`Containerd::release`] gives it back; containerd does so by
    /// itself after [`LEASE_LIFE`].
    pub(crate) async fn connect(
        address: &Path,
        namespace: &str,
        snapshotter: &str,
    ) -> Result<Self, ClientError> {
        let unreachable =
            |message: String| ClientError::Unreachable { address: address.to_owned(), message };
        let channel = containerd_client::connect(address).await.map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            unreachable(cause.unwrap_or_else(|| error.to_string()))
        })?;
        let namespace = namespace
            .parse()
            .map_err(|_| ClientError::BadName { what: "namespace", name: namespace.to_owned() })?;
        let now = SystemTime::now();
        let nanos = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mut containerd = Self {
            channel,
            headers: Headers { namespace, lease: None },
            snapshotter: snapshotter.to_owned(),
            lease: format!("weightfs-{}-{nanos}", std::process::id()),
        };
        let expire = jiff::Timestamp::try_from(now + LEASE_LIFE).unwrap_or(jiff::Timestamp::MAX);
        let labels = HashMap::from([("containerd.io/gc.expire".into(), expire.to_string())]);
        let request = CreateRequest { id: containerd.lease.clone(), labels };
        containerd.leases().create(request).await.map_err(failed("Leases.Create"))?;
        containerd.headers.lease = containerd.lease.parse().ok();
        Ok(containerd)
    }

    /// Gives the lease back. What nothing else refers to may be collected from now on.
    pub(crate) async fn release(self, collect: Collect) -> Result<(), ClientError> {
        let request = DeleteRequest { id: self.lease.clone(), sync: collect == Collect::Now };
        self.leases().delete(request).await.map_err(failed("Leases.Delete"))?;
        Ok(())
    }

    /// The lease's id: no other work has it.
    pub(crate) fn lease(&self) -> &str {
        &self.lease
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
    pub(crate) async fn has_content(&self, digest: Digest) -> Result<bool, ClientError> {
        match self.content().info(InfoRequest { digest: digest.to_string() }).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(failed("Content.Info")(status)),
        }
    }

    /// Writes content whose bytes are at hand.
    pub(crate) async fn write_bytes(
        &self,
        digest: Digest,
        bytes: bytes::Bytes,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let size = bytes.len() as u64;
        self.write(digest, size, stream::iter([Ok(bytes)]), labels).await
    }

    /// Writes content from a stream; containerd checks its digest and size.
    pub(crate) async fn write(
        &self,
        digest: Digest,
        size: u64,
        bytes: impl Stream<Item = Result<bytes::Bytes, SourceError>> + Send + 'static,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let total = i64::try_from(size).map_err(|_| ClientError::TooLarge { digest, size })?;
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
            return Err(error.into());
        }
        or_exists("Content.Write", result)
    }

    /// Adds labels to content.
    pub(crate) async fn label_content(
        &self,
        digest: Digest,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Info::default() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        self.content().update(request).await.map_err(failed("Content.Update"))?;
        Ok(())
    }

    /// Makes the name stand for the target.
    pub(crate) async fn put_image(
        &self,
        name: &str,
        target: Descriptor,
    ) -> Result<(), ClientError> {
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
    pub(crate) async fn has_snapshot(&self, name: &str) -> Result<bool, ClientError> {
        let (snapshotter, key) = (self.snapshotter.clone(), name.to_owned());
        match self.snapshots().stat(StatSnapshotRequest { snapshotter, key }).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(self.refused("Snapshots.Stat", &status)),
        }
    }

    /// The snapshots that have a label of that value.
    pub(crate) async fn labelled(
        &self,
        label: &str,
        value: &str,
    ) -> Result<Vec<SnapshotInfo>, ClientError> {
        let request = ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: vec![format!("labels.{label:?}=={value:?}")],
        };
        let refused = |status: Status| self.refused("Snapshots.List", &status);
        let mut replies = self.snapshots().list(request).await.map_err(refused)?.into_inner();
        let mut found = vec![];
        while let Some(reply) = replies.message().await.map_err(refused)? {
            found.extend(reply.info);
        }
        Ok(found)
    }

    /// Asks the snapshotter for a writable snapshot, or for the one that the labels name.
    pub(crate) async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Answer, ClientError> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let reply = self.snapshots().prepare(request).await;
        self.answer("Snapshots.Prepare", reply.map(|reply| reply.into_inner().mounts))
    }

    /// Asks the snapshotter for a read-only snapshot.
    pub(crate) async fn view(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Answer, ClientError> {
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let reply = self.snapshots().view(request).await;
        self.answer("Snapshots.View", reply.map(|reply| reply.into_inner().mounts))
    }

    /// How a snapshot is to be mounted.
    pub(crate) async fn mounts(&self, key: &str) -> Result<Vec<Mount>, ClientError> {
        let (snapshotter, key) = (self.snapshotter.clone(), key.to_owned());
        let reply = self.snapshots().mounts(MountsRequest { snapshotter, key }).await;
        let refused = |status| self.refused("Snapshots.Mounts", &status);
        Ok(reply.map_err(refused)?.into_inner().mounts)
    }

    fn answer(
        &self,
        call: &'static str,
        reply: Result<Vec<Mount>, Status>,
    ) -> Result<Answer, ClientError> {
        match reply {
            Ok(mounts) => Ok(Answer::Made(mounts)),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Answer::Exists),
            Err(status) => Err(self.refused(call, &status)),
        }
    }

    /// What a call of the snapshots service ended with. That there is no such snapshotter, and that
    /// nobody answers for it, are told by code and text alike (containerd, services/snapshots).
    fn refused(&self, call: &'static str, status: &Status) -> ClientError {
        let (name, message) = (self.snapshotter.clone(), status.message().to_owned());
        match status.code() {
            Code::InvalidArgument if message.contains("snapshotter not loaded") => {
                ClientError::NoSnapshotter(name)
            }
            Code::Unavailable => ClientError::SilentSnapshotter { name, message },
            code => ClientError::Containerd { call, code, message },
        }
    }

    /// Unpacks a layer that the content store has; returns the digest of the plain tar.
    pub(crate) async fn apply(
        &self,
        layer: Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<String, ClientError> {
        let request = ApplyRequest { diff: Some(layer), mounts, ..Default::default() };
        let reply = DiffClient::new(self.service()).apply(request).await;
        let applied = reply.map_err(failed("Diff.Apply"))?.into_inner().applied;
        Ok(applied.map(|applied| applied.digest).unwrap_or_default())
    }

    /// Makes a prepared snapshot a committed one.
    pub(crate) async fn commit(
        &self,
        key: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let request = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
        };
        let result = self.snapshots().commit(request).await;
        or_exists("Snapshots.Commit", result)
    }

    /// Removes a snapshot.
    pub(crate) async fn remove(&self, key: &str) -> Result<(), ClientError> {
        let (snapshotter, key) = (self.snapshotter.clone(), key.to_owned());
        let reply = self.snapshots().remove(RemoveSnapshotRequest { snapshotter, key }).await;
        reply.map(drop).map_err(|status| self.refused("Snapshots.Remove", &status))
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
