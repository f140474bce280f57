//! Why a call on snapshots fails, in the classes that containerd tells apart.

use std::io;
use std::path::{Path, PathBuf};

use crate::filter::FilterError;
use crate::metadata::{Kind, MetadataError};
use crate::reason::Reason;

/// A call on snapshots failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot has the key or name.
    #[error("snapshot {name:?} does not exist")]
    NotFound {
        /// The key or name.
        name: String,
    },
    /// The parent of a new snapshot does not exist.
    #[error("parent snapshot {parent:?} does not exist")]
    NoParent {
        /// The parent's name.
        parent: String,
    },
    /// The key or name is in use.
    #[error("snapshot {name:?} already exists")]
    AlreadyExists {
        /// The key or name.
        name: String,
    },
    /// A parent can't be removed before its children.
    #[error("cannot remove snapshot {name:?}: {children} snapshots have it as their parent")]
    HasChildren {
        /// The name.
        name: String,
        /// How many snapshots are on top of it.
        children: usize,
    },
    /// The call needs a snapshot of another kind.
    #[error("snapshot {name:?} is {kind}, which does not allow to {action} it")]
    WrongKind {
        /// The key or name.
        name: String,
        /// Its kind.
        kind: Kind,
        /// What was asked for.
        action: &'static str,
    },
    /// Only a committed snapshot can be a parent.
    #[error("parent snapshot {parent:?} is {kind}; it must be committed first")]
    ParentNotCommitted {
        /// The parent's key.
        parent: String,
        /// Its kind.
        kind: Kind,
    },
    /// An artifact that can't be shown.
    #[error("can't show it: {reason}")]
    Refused {
        /// Why not.
        reason: Reason,
    },
    /// A field that can't be changed.
    #[error("cannot update field {field:?} of snapshot {name:?}; only labels can be changed")]
    Immutable {
        /// The snapshot.
        name: String,
        /// The path in the field mask.
        field: String,
    },
    /// A key, name or label out of bounds.
    #[error("{what} has {bytes} bytes; it must have {min} to {max}")]
    Size {
        /// Which one.
        what: &'static str,
        /// Its size in bytes.
        bytes: usize,
        /// The least allowed size in bytes.
        min: usize,
        /// The greatest allowed size in bytes.
        max: usize,
    },
    /// A filter that can't be read.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The root directory can't stand in the options of an overlay mount.
    #[error(
        "directory {} can't be used for snapshots: its path must be absolute UTF-8 without any of \
         , : \\ and quotes, which overlay mount options give a meaning", path.display()
    )]
    Path {
        /// The directory.
        path: PathBuf,
    },
    /// The disk or the file system did not do it.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The metadata database failed.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The task that did the work panicked, or the daemon is shutting down.
    #[error("the call was broken off")]
    Interrupted(#[from] tokio::task::JoinError),
}

impl SnapshotError {
    /// An I/O error with what was tried where: for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = path.to_owned();
        move |source| SnapshotError::Io { action, path, source }
    }

    /// Whether it is sure that the metadata holds nothing of what was tried.
    pub(super) fn is_clean(&self) -> bool {
        !matches!(self, SnapshotError::Metadata(MetadataError::Unknown { .. }))
    }
}
