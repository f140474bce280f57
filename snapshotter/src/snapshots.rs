//! The snapshots that containerd sees, without its protocol.
//!
//! An ordinary snapshot is a directory and behaves as in containerd's overlay snapshotter. A
//! committed snapshot can also be lazy: a tree in the daemon's mount, which a [`LayerMounter`]
//! shows. The choice is made in [`Snapshots::prepare`], for layers that containerd names by the
//! label `containerd.io/snapshot.ref`.
//!
//! Invariants:
//! - A snapshot exists if and only if its record does; the metadata transaction is the commit
//!   point. Directories and trees are made before it and taken away after it.
//! - A call that fails leaves nothing. (Should the database fail in mid-write and not be readable
//!   either, what was made stays for [`Snapshots::cleanup`] or the next start to judge.)
//! - Work that changes something goes on in a task of its own when its caller hangs up.
//! - Reads (stat, list, mounts) are answered from memory and never wait for a change.

mod changes;
mod decisions;
mod directories;
mod error;
mod flights;
mod handshake;
pub(crate) mod layer;
mod mounts;
mod usage;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::runtime::Handle;

pub use self::decisions::Decisions;
pub use self::error::SnapshotError;
pub use self::handshake::Prepared;
pub use self::layer::{LayerMounter, LayerRequest, LazyLayer, LazyParent, Subject, Verdict};
pub use self::mounts::{Mount, MountKind};
pub use crate::metadata::{
    Backing, Kind, LazySnapshot, Metadata, MetadataError, Record, SnapshotInfo, TreeNumber, Usage,
};

use self::directories::Directories;
use self::flights::Flights;
use self::mounts::OverlayOptions;
use crate::filter::Filters;
use crate::metadata::Index;

/// Labels by name.
pub type Labels = BTreeMap<String, String>;

/// A key or a name, in bytes: the bound of containerd's own store (a key in bbolt).
pub const KEY_BYTES_MAX: usize = 32 << 10;

/// All labels of a snapshot together, names and values, in bytes. containerd bounds one label by
/// 4 KiB; this bounds what a record can grow to.
pub const LABELS_BYTES_MAX: usize = 512 << 10;

/// The snapshots of one root directory.
pub struct Snapshots {
    metadata: Arc<Metadata>,
    mounter: Arc<dyn LayerMounter>,
    directories: Directories,
    flights: Flights,
    overlay: OverlayOptions,
    decisions: Arc<Decisions>,
    /// Where work goes on: calls come in on a thread that has no time for it.
    runtime: Handle,
}

impl std::fmt::Debug for Snapshots {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Snapshots").field("directories", &self.directories).finish()
    }
}

impl Snapshots {
    /// Opens the snapshots below `root` and removes what an earlier process left unfinished.
    /// The mounter already shows all of [`Metadata::lazy_snapshots`]. Blocks on the disk. To be called
    /// within a tokio runtime: what changes something is done there.
    pub fn open(
        root: &Path,
        metadata: Arc<Metadata>,
        mounter: Arc<dyn LayerMounter>,
    ) -> Result<Arc<Snapshots>, SnapshotError> {
        let directories = Directories::open(root, metadata.clone())?;
        let flights = Flights::default();
        let overlay = OverlayOptions::detect();
        let (decisions, runtime) = (Arc::default(), Handle::current());
        let snapshots =
            Snapshots { metadata, mounter, directories, flights, overlay, decisions, runtime };
        snapshots.remove_orphans()?;
        Ok(Arc::new(snapshots))
    }

    /// How many layers were lazy or not since this process began.
    pub const fn decisions(&self) -> &Arc<Decisions> {
        &self.decisions
    }

    /// What is known of a snapshot.
    pub fn stat(&self, name: &str) -> Result<SnapshotInfo, SnapshotError> {
        existing(&self.metadata.index(), name).map(|record| record.info.clone())
    }

    /// The snapshots that any of the filters matches, in the order of their names; all without a
    /// filter. A moment's picture: later changes don't show, nor does it hold them up.
    pub fn list(&self, filters: &[String]) -> Result<Vec<Arc<Record>>, SnapshotError> {
        Ok(Filters::parse(filters)?.select(self.metadata.index()))
    }

    /// The mounts of an active snapshot or a view, once more.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotError> {
        let (record, ancestors) = {
            let index = self.metadata.index();
            let record = existing(&index, key)?.clone();
            let ancestors = index.ancestors(&record);
            (record, ancestors)
        };
        match record.info.kind {
            Kind::Active | Kind::View => Ok(self.mounts_of(&record, &ancestors)),
            kind => Err(SnapshotError::WrongKind { name: key.to_owned(), kind, action: "mount" }),
        }
    }

    /// What a snapshot takes on the disk without its parents. Measured for active ones, in time
    /// that grows with their number of files; known for all others.
    pub async fn usage(self: &Arc<Self>, name: &str) -> Result<Usage, SnapshotError> {
        let record = existing(&self.metadata.index(), name)?.clone();
        match (&record.backing, record.info.kind) {
            (Backing::Lazy { tree, .. }, _) => Ok(self.mounter.usage(*tree)),
            (Backing::Directory { id, .. }, Kind::Active) => {
                let files = self.directories.files(*id);
                self.blocking(move || usage::measure(&files)).await
            }
            (Backing::Directory { usage, .. }, Kind::View | Kind::Committed) => Ok(*usage),
        }
    }

    /// Removes what removals and broken-off calls left on the disk.
    pub async fn cleanup(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let this = self.clone();
        self.blocking(move || {
            this.mounter.clean_up();
            this.metadata.settle()?;
            this.remove_orphans()
        })
        .await
    }

    fn remove_orphans(&self) -> Result<(), SnapshotError> {
        for id in self.directories.orphans()? {
            tracing::info!(directory = %id, "removing a directory that no snapshot has");
            self.remove_directory(id);
        }
        Ok(())
    }

    /// Removes a directory whose record is gone; the next cleanup tries again if it can't.
    fn remove_directory(&self, id: crate::metadata::DirectoryId) {
        if let Err(error) = self.directories.remove(id) {
            let error = describe(&error);
            tracing::warn!(directory = %id, error, "a directory is left for the next cleanup");
        }
    }

    /// Runs work to its end, also when the caller's future is dropped: a client that hangs up leaves
    /// no half a snapshot.
    async fn finish<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, SnapshotError>> + Send + 'static,
    ) -> Result<T, SnapshotError> {
        self.runtime.spawn(work).await?
    }

    /// Runs work that waits on the disk. It, too, ends whatever its caller does.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, SnapshotError> {
        self.runtime.spawn_blocking(work).await?
    }

    fn mounts_of(&self, record: &Record, ancestors: &[Arc<Record>]) -> Vec<Mount> {
        let lower = mounts::lower_directories(ancestors, &self.directories, &*self.mounter);
        mounts::mounts(record, ancestors, &lower, &self.directories, &self.overlay)
    }
}

/// What a new active snapshot or view is asked to be.
#[derive(Debug, Clone)]
struct NewSnapshot {
    key: String,
    parent: Option<String>,
    labels: Labels,
}

impl NewSnapshot {
    fn new(key: &str, parent: Option<&str>, labels: Labels) -> Result<Self, SnapshotError> {
        check_size("the key", key.len(), 1, KEY_BYTES_MAX)?;
        let labels = stored_labels(labels)?;
        Ok(NewSnapshot { key: key.to_owned(), parent: parent.map(str::to_owned), labels })
    }

    /// Whether it can be made on top of what is there.
    fn check(&self, index: &Index) -> Result<(), SnapshotError> {
        if let Some(parent) = &self.parent {
            let record = index
                .get(parent)
                .ok_or_else(|| SnapshotError::NoParent { parent: parent.clone() })?;
            let kind = record.info.kind;
            if kind != Kind::Committed {
                return Err(SnapshotError::ParentNotCommitted { parent: parent.clone(), kind });
            }
        }
        check_free(index, &self.key)
    }

    fn into_info(self, kind: Kind) -> SnapshotInfo {
        let created = SystemTime::now();
        SnapshotInfo {
            name: self.key,
            parent: self.parent,
            kind,
            labels: self.labels,
            created,
            updated: created,
        }
    }
}

fn existing<'a>(index: &'a Index, name: &str) -> Result<&'a Arc<Record>, SnapshotError> {
    index.get(name).ok_or_else(|| SnapshotError::NotFound { name: name.to_owned() })
}

fn check_free(index: &Index, name: &str) -> Result<(), SnapshotError> {
    match index.get(name) {
        None => Ok(()),
        Some(_) => Err(SnapshotError::AlreadyExists { name: name.to_owned() }),
    }
}

fn check_size(
    what: &'static str,
    bytes: usize,
    min: usize,
    max: usize,
) -> Result<(), SnapshotError> {
    if (min..=max).contains(&bytes) {
        return Ok(());
    }
    Err(SnapshotError::Size { what, bytes, min, max })
}

/// Labels as they are kept. An empty value means that there is no such label, as in containerd's
/// own store (`boltutil.WriteLabels`).
fn stored_labels(mut labels: Labels) -> Result<Labels, SnapshotError> {
    labels.retain(|_, value| !value.is_empty());
    let bytes = labels.iter().map(|(name, value)| name.len() + value.len()).sum();
    check_size("the labels together", bytes, 0, LABELS_BYTES_MAX)?;
    Ok(labels)
}

/// An error with all its causes, in one line.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
