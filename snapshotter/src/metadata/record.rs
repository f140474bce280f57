//! What is known of one snapshot: its public face ([`SnapshotInfo`]) and what stands behind it
//! ([`Backing`]). A [`Record`] is immutable; a change replaces it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use weightfs_fusefs::TreeNumber;

use crate::reason::Reason;

/// The label by which containerd names the layer that it is about to unpack (its chain ID).
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

/// The kinds of snapshots that containerd knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Writable; a container's or an unpack's.
    Active,
    /// Mounted read-only and never committed.
    View,
    /// Immutable; the only kind that can be a parent.
    Committed,
}

impl Kind {
    /// The name that containerd's filters use.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Active => "active",
            Kind::View => "view",
            Kind::Committed => "committed",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// What containerd sees of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// The key (active, view) or the name (committed). Opaque: never a path of ours.
    pub name: String,
    /// The name of the parent, a committed snapshot.
    pub parent: Option<String>,
    /// What may be done with it.
    pub kind: Kind,
    /// Labels, none with an empty value.
    pub labels: BTreeMap<String, String>,
    /// When it was prepared or committed.
    pub created: SystemTime,
    /// When it was last changed.
    pub updated: SystemTime,
}

impl SnapshotInfo {
    /// The layer that this snapshot holds or is made for, if its labels say so.
    pub fn target(&self) -> Option<&str> {
        self.labels.get(SNAPSHOT_REF).map(String::as_str)
    }
}

/// What a snapshot takes on the disk, without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// The number of an ordinary snapshot's directory, `snapshots/<id>`. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DirectoryId(pub u64);

impl fmt::Display for DirectoryId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// What of a file lies in an upper directory once its owner or mode was changed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Copies {
    /// All of it: overlayfs's default.
    #[default]
    Whole,
    /// Its attributes only (overlayfs's `metacopy`): its bytes are still those of the layers below.
    Attributes,
}

impl Copies {
    fn are_whole(&self) -> bool {
        *self == Self::Whole
    }
}

/// Where a snapshot's files are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// In a directory of its own, as with containerd's overlay snapshotter.
    Directory {
        /// The directory's number.
        id: DirectoryId,
        /// Measured at the commit; zero before it.
        usage: Usage,
        /// Why the layer is not lazy. `None` for what is no layer: containers and views.
        reason: Option<Reason>,
        /// Which files it has.
        #[serde(default, skip_serializing_if = "Copies::are_whole")]
        copies: Copies,
    },
    /// In the FUSE mount, merged with the lazy layers below it.
    Lazy {
        /// The tree that shows it.
        tree: TreeNumber,
        /// What the mounter needs to show it again after a restart.
        record: serde_json::Value,
    },
}

/// A snapshot as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What containerd sees.
    pub info: SnapshotInfo,
    /// Where its files are.
    pub backing: Backing,
}

/// A lazy snapshot as the mounter gets it back after a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LazySnapshot {
    /// The snapshot's name.
    pub name: String,
    /// The parent's name, lazy or not.
    pub parent: Option<String>,
    /// The parent's tree, if the parent is lazy.
    pub parent_tree: Option<TreeNumber>,
    /// The tree to show it as.
    pub tree: TreeNumber,
    /// What the mounter gave at the first mount.
    pub record: serde_json::Value,
}
