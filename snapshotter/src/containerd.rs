//! containerd's snapshots service: the one place that knows crate containerd-snapshots. It reads
//! requests, calls [`Snapshots`], and writes answers. What is below the messages is in `server.rs`.
//!
//! The crate brings its own tonic (0.9), whose types are not those of the rest of the daemon.

mod server;
mod wire;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::iter;
use std::sync::Arc;
use std::time::Instant;
use std::vec;

use containerd_snapshots::api::types;
use containerd_snapshots::tonic::{Code, Status, async_trait};
use containerd_snapshots::{Info, Snapshotter};
use futures::stream;
use tokio::net::UnixListener;

use crate::metadata::{Kind, Record, SnapshotInfo};
use crate::metrics::{CallCode, Method};
use crate::snapshots::{Mount, Prepared, SnapshotError, Snapshots, describe};

/// How much of an error's text is sent, in characters. It travels in an HTTP/2 header, and names
/// in it can have 32 KiB.
const MESSAGE_CHARS_MAX: usize = 2048;

/// Serves containerd on a listening socket until `shutdown` is ready and the calls under way have
/// ended, or were cut off after a short deadline. What such a call had begun still comes to its end.
pub async fn serve(
    snapshots: Arc<Snapshots>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()>,
) {
    let service = containerd_snapshots::server(Arc::new(Service(snapshots)));
    server::serve(service, listener, shutdown).await;
}

/// As [`serve`], on a thread of its own: containerd asks for one thing after the other, and thousands
/// of them. Handing each from thread to thread would cost more than the answer. Work that takes
/// time is done elsewhere ([`Snapshots`]).
pub fn serve_alone(
    snapshots: Arc<Snapshots>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<tokio::task::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(tokio::task::spawn_blocking(move || runtime.block_on(serve(snapshots, listener, shutdown))))
}

struct Service(Arc<Snapshots>);

impl Service {
    /// Counts a call by how it ends.
    async fn counted<T>(
        &self,
        method: Method,
        call: impl Future<Output = Result<T, SnapshotError>>,
    ) -> Result<T, SnapshotError> {
        let began = Instant::now();
        let ended = call.await;
        let code = ended.as_ref().err().map_or(CallCode::Ok, code);
        self.0.calls().count(method, code, began.elapsed());
        ended
    }
}

#[async_trait]
impl Snapshotter for Service {
    type Error = SnapshotError;
    type InfoStream = stream::Iter<
        iter::Map<vec::IntoIter<Arc<Record>>, fn(Arc<Record>) -> Result<Info, SnapshotError>>,
    >;

    async fn stat(&self, key: String) -> Result<Info, SnapshotError> {
        self.counted(Method::Stat, async { self.0.stat(&key).map(info) }).await
    }

    async fn update(&self, info: Info, mask: Option<Vec<String>>) -> Result<Info, SnapshotError> {
        let labels = info.labels.into_iter().collect();
        let mask = mask.unwrap_or_default();
        let updated = self.0.update(&info.name, labels, &mask);
        self.counted(Method::Update, updated).await.map(self::info)
    }

    async fn usage(&self, key: String) -> Result<containerd_snapshots::Usage, SnapshotError> {
        let usage = self.counted(Method::Usage, self.0.usage(&key)).await?;
        let clamped = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        Ok(containerd_snapshots::Usage {
            inodes: clamped(usage.inodes),
            size: clamped(usage.bytes),
        })
    }

    async fn mounts(&self, key: String) -> Result<Vec<types::Mount>, SnapshotError> {
        self.counted(Method::Mounts, async { self.0.mounts(&key).map(mounts) }).await
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, SnapshotError> {
        let prepared = async {
            let labels = labels.into_iter().collect();
            match self.0.prepare(&key, parent_name(&parent), labels).await? {
                Prepared::Active(active) => Ok(mounts(active)),
                Prepared::Committed { name } => Err(SnapshotError::AlreadyExists { name }),
            }
        };
        self.counted(Method::Prepare, prepared).await
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, SnapshotError> {
        let view = self.0.view(&key, parent_name(&parent), labels.into_iter().collect());
        self.counted(Method::View, view).await.map(mounts)
    }

    async fn commit(
        &self,
        name: String,
        key: String,
        labels: HashMap<String, String>,
    ) -> Result<(), SnapshotError> {
        let commit = self.0.commit(&name, &key, labels.into_iter().collect());
        self.counted(Method::Commit, commit).await
    }

    async fn remove(&self, key: String) -> Result<(), SnapshotError> {
        self.counted(Method::Remove, self.0.remove(&key)).await
    }

    async fn clear(&self) -> Result<(), SnapshotError> {
        self.counted(Method::Cleanup, self.0.cleanup()).await
    }

    /// The snapshotter's name is containerd's own, not ours to check.
    async fn list(
        &self,
        _snapshotter: String,
        filters: Vec<String>,
    ) -> Result<Self::InfoStream, SnapshotError> {
        let found = self.counted(Method::List, async { self.0.list(&filters) }).await?;
        let converted: fn(Arc<Record>) -> Result<Info, SnapshotError> =
            |record| Ok(info(record.info.clone()));
        Ok(stream::iter(found.into_iter().map(converted)))
    }
}

impl From<SnapshotError> for Status {
    /// Also the place where a failure that is not the caller's is logged.
    fn from(error: SnapshotError) -> Status {
        let text = describe(&error);
        let code = grpc(code(&error));
        if code == Code::Internal {
            tracing::error!(error = text, "a call from containerd failed");
        }
        Status::new(code, text.chars().take(MESSAGE_CHARS_MAX).collect::<String>())
    }
}

/// The one table from errors to gRPC codes, which containerd reads as its own error classes.
fn code(error: &SnapshotError) -> CallCode {
    match error {
        SnapshotError::NotFound { .. } | SnapshotError::NoParent { .. } => CallCode::NotFound,
        SnapshotError::AlreadyExists { .. } => CallCode::AlreadyExists,
        SnapshotError::HasChildren { .. }
        | SnapshotError::WrongKind { .. }
        | SnapshotError::Refused { .. } => CallCode::FailedPrecondition,
        SnapshotError::ParentNotCommitted { .. }
        | SnapshotError::Immutable { .. }
        | SnapshotError::Size { .. }
        | SnapshotError::Filter(_) => CallCode::InvalidArgument,
        SnapshotError::Path { .. }
        | SnapshotError::Io { .. }
        | SnapshotError::Metadata(_)
        | SnapshotError::Interrupted(_) => CallCode::Internal,
    }
}

const fn grpc(code: CallCode) -> Code {
    match code {
        CallCode::Ok => Code::Ok,
        CallCode::NotFound => Code::NotFound,
        CallCode::AlreadyExists => Code::AlreadyExists,
        CallCode::FailedPrecondition => Code::FailedPrecondition,
        CallCode::InvalidArgument => Code::InvalidArgument,
        CallCode::Internal => Code::Internal,
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
