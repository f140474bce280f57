//! Artifacts to file trees: which layers an artifact has, where each file's bytes lie in them,
//! and the tree that they make together. It knows nothing of snapshots or containerd.
//!
//! Everything that comes from a registry (manifests, annotations, tars) is foreign: it is bounded
//! and checked once, in [`artifact`], [`archive`] and [`tree`].

pub mod archive;
pub mod artifact;
mod device;
pub mod filesystem;
mod fuse;
pub mod index;
pub mod layer;
pub mod ledger;
pub mod listing;
mod loader;
mod open_files;
pub mod path;
mod profile;
pub mod session;
#[cfg(test)]
mod testing;
pub mod tree;
mod watchdog;

pub use artifact::{
    Artifact, ArtifactError, ArtifactKind, Compression, LayerContent, LayerDescriptor, Platform,
    RawFile,
};
pub use filesystem::{Filesystem, FsError, Inode, TreeNumber};
pub use layer::{
    LayerError, OpenLayer, Progress, Quiet, blob_id, open_indexed_layer, open_layer,
    open_layer_without_ranges, reopen_layer, stored_points,
};
pub use ledger::{Ledger, LedgerError};
pub use listing::Listing;
pub use profile::{MAX_PROFILE_BYTES, Profile, ProfileError, Recorder};
pub use session::{Misses, Session, SpecialFiles};
pub use tree::{
    Base, Content, DeviceNumber, Exclude, ExcludeError, Node, NodeId, NodeKind, Timestamp, Tree,
    TreeError,
};
