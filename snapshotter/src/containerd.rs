//! containerd's snapshots service: the one file that knows crate containerd-snapshots. It reads
//! requests, calls [`Snapshots`], and writes answers.
//!
//! The crate brings its own tonic (0.9), whose types are not those of the rest of the daemon.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::iter;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use std::vec;

use containerd_snapshots::api::types;
use containerd_snapshots::tonic::transport::Server;
use containerd_snapshots::tonic::transport::server::Connected;
use containerd_snapshots::tonic::{Code, Status, async_trait};
use containerd_snapshots::{Info, Snapshotter};
use futures::Stream;
use futures::stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::metadata::{Kind, Record, SnapshotInfo};
use crate::snapshots::{Mount, Prepared, SnapshotError, Snapshots, describe};

/// How long the service waits for calls under way when it shuts down. containerd keeps its
/// connection open and ignores the request to close it, so this time always passes.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// The pause after a failed accept: time for some other file to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How much of an error's text is sent, in characters. It travels in an HTTP/2 header, and names
/// in it can have 32 KiB.
const MESSAGE_CHARS_MAX: usize = 2048;

/// The service ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("the snapshots service failed")]
pub struct ServeError(#[from] containerd_snapshots::tonic::transport::Error);

/// Serves containerd on a listening socket until `shutdown` is ready and the calls under way have
/// ended, or were cut off after a short deadline. What such a call had begun still comes to its end.
pub async fn serve(
    snapshots: Arc<Snapshots>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let (stopping, cut) = (CancellationToken::new(), CancellationToken::new());
    let service = containerd_snapshots::server(Arc::new(Service(snapshots)));
    let serving = Server::builder().add_service(service).serve_with_incoming_shutdown(
        connections(listener, cut.clone()),
        stopping.clone().cancelled_owned(),
    );
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        () = shutdown => stopping.cancel(),
    }
    match tokio::time::timeout(SHUTDOWN_DEADLINE, &mut serving).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            cut.cancel();
            Ok(serving.await?)
        }
    }
}

/// As [`serve`], on a thread of its own: containerd asks for one thing after the other, and thousands
/// of them. Handing each from thread to thread would cost more than the answer. Work that takes
/// time is done elsewhere ([`Snapshots`]).
pub fn serve_alone(
    snapshots: Arc<Snapshots>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<tokio::task::JoinHandle<Result<(), ServeError>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(tokio::task::spawn_blocking(move || runtime.block_on(serve(snapshots, listener, shutdown))))
}

/// The connections of a listener. A failed accept (no file descriptor left) is a pause, not the
/// end: tonic's server stops at the first error.
fn connections(
    listener: UnixListener,
    cut: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> {
    stream::unfold((listener, cut), |(listener, cut)| async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = Connection::new(stream, &cut);
                    return Some((Ok(connection), (listener, cut)));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection from containerd");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// A connection that can be cut from our side: the server itself has no way to end one whose
/// client does not answer its goodbye, and would go on serving it.
struct Connection {
    stream: UnixStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection {
    fn new(stream: UnixStream, cut: &CancellationToken) -> Connection {
        Connection { stream, cut: Box::pin(cut.clone().cancelled_owned()) }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

struct Service(Arc<Snapshots>);

#[async_trait]
impl Snapshotter for Service {
    type Error = SnapshotError;
    type InfoStream = stream::Iter<
        iter::Map<vec::IntoIter<Arc<Record>>, fn(Arc<Record>) -> Result<Info, SnapshotError>>,
    >;

    async fn stat(&self, key: String) -> Result<Info, SnapshotError> {
        self.0.stat(&key).map(info)
    }

    async fn update(&self, info: Info, mask: Option<Vec<String>>) -> Result<Info, SnapshotError> {
        let labels = info.labels.into_iter().collect();
        self.0.update(&info.name, labels, &mask.unwrap_or_default()).await.map(self::info)
    }

    async fn usage(&self, key: String) -> Result<containerd_snapshots::Usage, SnapshotError> {
        let usage = self.0.usage(&key).await?;
        let clamped = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        Ok(containerd_snapshots::Usage {
            inodes: clamped(usage.inodes),
            size: clamped(usage.bytes),
        })
    }

    async fn mounts(&self, key: String) -> Result<Vec<types::Mount>, SnapshotError> {
        self.0.mounts(&key).map(mounts)
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, SnapshotError> {
        match self.0.prepare(&key, parent_name(&parent), labels.into_iter().collect()).await? {
            Prepared::Active(active) => Ok(mounts(active)),
            Prepared::Committed { name } => Err(SnapshotError::AlreadyExists { name }),
        }
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, SnapshotError> {
        self.0.view(&key, parent_name(&parent), labels.into_iter().collect()).await.map(mounts)
    }

    async fn commit(
        &self,
        name: String,
        key: String,
        labels: HashMap<String, String>,
    ) -> Result<(), SnapshotError> {
        self.0.commit(&name, &key, labels.into_iter().collect()).await
    }

    async fn remove(&self, key: String) -> Result<(), SnapshotError> {
        self.0.remove(&key).await
    }

    async fn clear(&self) -> Result<(), SnapshotError> {
        self.0.cleanup().await
    }

    /// The snapshotter's name is containerd's own, not ours to check.
    async fn list(
        &self,
        _snapshotter: String,
        filters: Vec<String>,
    ) -> Result<Self::InfoStream, SnapshotError> {
        let found = self.0.list(&filters)?;
        let converted: fn(Arc<Record>) -> Result<Info, SnapshotError> =
            |record| Ok(info(record.info.clone()));
        Ok(stream::iter(found.into_iter().map(converted)))
    }
}

impl From<SnapshotError> for Status {
    /// Also the place where a failure that is not the caller's is logged.
    fn from(error: SnapshotError) -> Status {
        let text = describe(&error);
        let code = code(&error);
        if code == Code::Internal {
            tracing::error!(error = text, "a call from containerd failed");
        }
        Status::new(code, text.chars().take(MESSAGE_CHARS_MAX).collect::<String>())
    }
}

/// The one table from errors to gRPC codes, which containerd reads as its own error classes.
fn code(error: &SnapshotError) -> Code {
    match error {
        SnapshotError::NotFound { .. } | SnapshotError::NoParent { .. } => Code::NotFound,
        SnapshotError::AlreadyExists { .. } => Code::AlreadyExists,
        SnapshotError::HasChildren { .. }
        | SnapshotError::WrongKind { .. }
        | SnapshotError::Refused { .. } => Code::FailedPrecondition,
        SnapshotError::ParentNotCommitted { .. }
        | SnapshotError::Immutable { .. }
        | SnapshotError::Size { .. }
        | SnapshotError::Filter(_) => Code::InvalidArgument,
        SnapshotError::Path { .. }
        | SnapshotError::Io { .. }
        | SnapshotError::Metadata(_)
        | SnapshotError::Interrupted(_) => Code::Internal,
    }
}

/// On the wire, no parent is an empty name.
fn parent_name(parent: &str) -> Option<&str> {
    (!parent.is_empty()).then_some(parent)
}

fn info(info: SnapshotInfo) -> Info {
    Info {
        kind: match info.kind {
            Kind::Active => containerd_snapshots::Kind::Active,
            Kind::View => containerd_snapshots::Kind::View,
            Kind::Committed => containerd_snapshots::Kind::Committed,
        },
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        labels: info.labels.into_iter().collect(),
        created_at: info.created,
        updated_at: info.updated,
    }
}

fn mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let convert = |mount: Mount| types::Mount {
        r#type: mount.kind.as_str().to_owned(),
        source: mount.source,
        target: mount.target,
        options: mount.options,
    };
    mounts.into_iter().map(convert).collect()
}
