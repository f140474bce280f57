//! The tree that an artifact's layers make when they are unpacked in order.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use weightfs_store::{Blob, Digest};

use crate::layer::OpenLayer;

/// Number of a node in its tree: a pure function of the layers that the tree was merged from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

impl NodeId {
    /// The directory at the top.
    pub const ROOT: Self = Self(0);
}

/// Modification time: seconds since the epoch (may be negative) and nanoseconds (< 10^9).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Timestamp {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub seconds: i64,
    /// Nanoseconds after that second.
    pub nanos: u32,
}

/// A device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// The driver.
    pub major: u32,
    /// The device of that driver.
    pub minor: u32,
}

/// All of a file's bytes: a range of a blob that lies inside one segment. Empty for an empty file.
#[derive(Debug, Clone)]
pub struct Content {
    /// The blob.
    pub blob: Arc<Blob>,
    /// The bytes of it.
    pub range: Range<u64>,
}

/// A file, directory, link or device.
#[derive(Debug)]
pub struct Node {
    /// The directory that it is in; for a file with several names, the directory of the first in
    /// walking order. The root is its own parent.
    pub parent: NodeId,
    /// What it is.
    pub kind: NodeKind,
    /// 12 bits: rwx for owner, group and others, setuid, setgid and sticky.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// `st_nlink`: 2 + subdirectories for a directory, else the number of names.
    pub links: u32,
    /// Extended attributes, sorted by name. Over a foreign base an opaque directory has
    /// `trusted.overlay.opaque` = `y`.
    pub xattrs: Vec<(OsString, Vec<u8>)>,
}

/// What a node is.
#[derive(Debug)]
pub enum NodeKind {
    /// A directory.
    Directory(Children),
    /// A regular file.
    File(Content),
    /// A symbolic link and its target.
    Symlink(OsString),
    /// A character device; 0:0 is a whiteout.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
}

/// The entries of a directory, sorted by name.
#[derive(Debug, Default)]
pub struct Children(Box<[(Box<OsStr>, NodeId)]>);

/// What lies below the merged layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Nothing: whiteouts are applied and gone.
    Nothing,
    /// Ordinary overlay layers: whiteouts that remain and opaque directories are shown as
    /// overlayfs wants them (kernel, Documentation/filesystems/overlayfs.rst).
    Foreign,
}

/// Why layers don't make a tree.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {}

/// A merged tree; it does not change once it is built.
#[derive(Debug)]
pub struct Tree {}

impl Tree {
    /// Layers from the lowest to the highest.
    ///
    /// # Errors
    /// A path that escapes, a hard link to nothing, layers that contradict each other.
    pub fn merge(_layers: &[Arc<OpenLayer>], _base: Base) -> Result<Self, TreeError> {
        todo!()
    }

    /// The node of that number.
    pub fn node(&self, _id: NodeId) -> Option<&Node> {
        todo!()
    }

    /// What `name` is in a directory.
    pub fn child(&self, _directory: NodeId, _name: &OsStr) -> Option<NodeId> {
        todo!()
    }

    /// The entries of a directory in name order; `None` if it is none.
    pub fn entries(
        &self,
        directory: NodeId,
    ) -> Option<impl ExactSizeIterator<Item = (&OsStr, NodeId)>> {
        self.entries_from(directory, 0)
    }

    /// The entries of a directory from the `first`-th on; as cheap as from the start.
    pub fn entries_from(
        &self,
        _directory: NodeId,
        _first: usize,
    ) -> Option<impl ExactSizeIterator<Item = (&OsStr, NodeId)>> {
        None::<std::iter::Empty<_>>
    }

    /// Number of nodes.
    #[expect(clippy::len_without_is_empty, reason = "a tree has a root")]
    pub fn len(&self) -> usize {
        todo!()
    }

    /// All names with their nodes: depth first, names in order, without the root. Paths are
    /// relative to it.
    pub fn walk(&self) -> impl Iterator<Item = (PathBuf, NodeId)> {
        std::iter::empty()
    }

    /// Number of regular files, each counted once.
    pub fn files(&self) -> u64 {
        todo!()
    }

    /// Bytes of all files, each counted once.
    pub fn content_bytes(&self) -> u64 {
        todo!()
    }

    /// The layer that a node came from; `None` for the root and for directories that no layer
    /// lists.
    pub fn layer_of(&self, _id: NodeId) -> Option<Digest> {
        todo!()
    }
}
