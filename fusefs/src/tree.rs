//! The tree that an artifact's layers make when they are unpacked in order.
//!
//! A tree is immutable, and its node numbers are a pure function of the layers and the base:
//! depth first, names in byte order. So inode numbers mean the same after a restart.
//!
//! Layers are merged as containerd unpacks them (archive.Apply): later layers replace, whiteouts
//! and opaque markers hide what lower layers brought, parents that no layer lists are made. In
//! model layers (ModelPack, ORAS) whiteouts mean nothing, owners are root, set-id bits, devices
//! and privileged attributes are left out, and a file and a directory can't have one path.

mod exclude;
mod fingerprint;
mod finish;
mod merge;

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use weightfs_store::{Blob, Digest};

use crate::layer::OpenLayer;
use crate::path::PathError;
use crate::tree::merge::{Input, Merger};

pub use exclude::{Exclude, ExcludeError, MAX_PATTERN_BYTES, MAX_PATTERNS};

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
    ///
    /// The foreign layers can't be seen from here. So a directory that a layer uses but doesn't
    /// list is shown as root's, 0755, over what a foreign layer says of it
    /// ([`Tree::layer_of`] is `None` for it), and a symbolic link in a foreign layer is not
    /// followed. Tars list their directories as a rule.
    Foreign,
}

/// Layers don't make a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("layer {layer}, {path:?}: {problem}")]
pub struct TreeError {
    /// The layer that can't be unpacked on those below it.
    pub layer: Digest,
    /// The path in it, printable.
    pub path: String,
    /// What is wrong.
    pub problem: TreeProblem,
}

/// What is wrong with a path of a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeProblem {
    /// The name can't be a path in a tree.
    #[error("the path can't be used: {0}")]
    Path(#[from] PathError),
    /// It needs a directory where there is something else.
    #[error("it needs a directory where layer {lower} has something else")]
    NeedsDirectory {
        /// The layer that has the other thing.
        lower: Digest,
    },
    /// In a model, a file where there is a directory already.
    #[error(
        "it is a file here and a directory in layer {lower}; pack the model again with one of them"
    )]
    FileOverDirectory {
        /// The layer that has the directory.
        lower: Digest,
    },
    /// In a model, a directory where there is a file already.
    #[error(
        "it is a directory here and a file in layer {lower}; pack the model again with one of them"
    )]
    DirectoryOverFile {
        /// The layer that has the file.
        lower: Digest,
    },
    /// A hard link to nothing, or to a directory.
    #[error(
        "it is a hard link to {target:?}, which is no file in this layer or those merged below it"
    )]
    HardLink {
        /// The target, printable.
        target: String,
    },
    /// Symbolic links that lead in a circle, or too far.
    #[error("more than {} symbolic links lead to it", merge::MAX_LINKS)]
    Links,
    /// Directories in directories in directories.
    #[error("it is more than {} directories deep", merge::MAX_DEPTH)]
    Depth,
    /// A whiteout that names nothing.
    #[error("the whiteout names nothing")]
    Whiteout,
    /// An opaque marker at the top, which overlayfs has no way to say.
    #[error("it hides all layers below, which can't be shown over layers that are not merged")]
    OpaqueRoot,
    /// More nodes than [`MAX_NODES`].
    #[error("the layers have more than {MAX_NODES} files and directories")]
    TooMany,
}

/// Nodes of a tree at the most, counting what upper layers hide; they take about half a GiB.
pub const MAX_NODES: usize = 1 << 21;

/// A merged tree; it does not change once it is built.
#[derive(Debug)]
pub struct Tree {
    /// By number. The first is the root.
    nodes: Vec<Node>,
    /// By number: the position of the layer that it came from.
    origins: Vec<Option<usize>>,
    /// From the lowest to the highest.
    layers: Vec<Digest>,
    content_bytes: u64,
}

impl Tree {
    /// Layers from the lowest to the highest.
    ///
    /// # Errors
    /// A path that escapes, a hard link to nothing, layers that contradict each other.
    pub fn merge(layers: &[Arc<OpenLayer>], base: Base) -> Result<Self, TreeError> {
        Self::merge_without(layers, base, &Exclude::nothing())
    }

    /// As [`Tree::merge`], without some of the files. Node numbers then depend on these, too.
    ///
    /// # Errors
    /// See [`Tree::merge`].
    pub fn merge_without(
        layers: &[Arc<OpenLayer>],
        base: Base,
        exclude: &Exclude,
    ) -> Result<Self, TreeError> {
        let inputs = layers.iter().map(|layer| Input {
            digest: layer.descriptor.digest,
            size: layer.descriptor.size,
            content: &layer.descriptor.content,
            entries: layer.listing.entries(),
        });
        let mut merger = Merger::run(inputs.collect(), base)?;
        merger.leave_out(exclude);
        Ok(finish::finish(merger, layers))
    }

    /// The node of that number.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(usize::try_from(id.0).ok()?)
    }

    /// What `name` is in a directory.
    pub fn child(&self, directory: NodeId, name: &OsStr) -> Option<NodeId> {
        let children = self.children(directory)?;
        let at = children.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
        children.get(at).map(|(_, id)| *id)
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
        directory: NodeId,
        first: usize,
    ) -> Option<impl ExactSizeIterator<Item = (&OsStr, NodeId)>> {
        let rest = self.children(directory)?.get(first..).unwrap_or_default();
        Some(rest.iter().map(|(name, id)| (&**name, *id)))
    }

    /// Number of nodes.
    #[expect(clippy::len_without_is_empty, reason = "a tree has a root")]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// All names with their nodes: depth first, names in order, without the root. Paths are
    /// relative to it.
    pub fn walk(&self) -> impl Iterator<Item = (PathBuf, NodeId)> {
        Walk { tree: self, open: vec![(NodeId::ROOT, 0)], path: PathBuf::new() }
    }

    /// The bytes of its regular files, each once, in no order.
    pub fn contents(&self) -> impl Iterator<Item = &Content> {
        self.nodes.iter().filter_map(|node| match &node.kind {
            NodeKind::File(content) => Some(content),
            _ => None,
        })
    }

    /// Number of regular files, each counted once.
    pub fn files(&self) -> u64 {
        self.contents().count() as u64
    }

    /// Bytes of all files, each counted once.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// The blobs that its files are in, each once.
    pub fn blobs(&self) -> impl Iterator<Item = &Arc<Blob>> {
        let mut seen = HashSet::new();
        self.nodes.iter().filter_map(move |node| match &node.kind {
            NodeKind::File(content) => seen.insert(content.blob.id()).then_some(&content.blob),
            _ => None,
        })
    }

    /// The layer that a node came from; `None` for the root and for directories that no layer
    /// lists.
    pub fn layer_of(&self, id: NodeId) -> Option<Digest> {
        let origin = *self.origins.get(usize::try_from(id.0).ok()?)?;
        self.layers.get(origin?).copied()
    }

    fn children(&self, directory: NodeId) -> Option<&[(Box<OsStr>, NodeId)]> {
        match &self.node(directory)?.kind {
            NodeKind::Directory(children) => Some(&children.0),
            _ => None,
        }
    }
}

struct Walk<'a> {
    tree: &'a Tree,
    /// The directories that are open, each with the position of its next entry.
    open: Vec<(NodeId, usize)>,
    /// Path of the innermost.
    path: PathBuf,
}

impl Iterator for Walk<'_> {
    type Item = (PathBuf, NodeId);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (directory, next) = self.open.last_mut()?;
            let children = self.tree.children(*directory).unwrap_or_default();
            let Some((name, id)) = children.get(*next) else {
                self.open.pop();
                self.path.pop();
                continue;
            };
            *next += 1;
            let path = self.path.join(&**name);
            if self.tree.children(*id).is_some() {
                self.open.push((*id, 0));
                self.path.push(&**name);
            }
            return Some((path, *id));
        }
    }
}

#[cfg(test)]
mod tests;
