//! The store owns what WeightFS knows of blobs: where their bytes come from, which of them are
//! here, and whether they can be believed. It knows nothing of files, snapshots or containerd.
//!
//! A blob is cut into *segments*, each one sparse cache file, and each segment into *chunks* of
//! [`CHUNK_BYTES`]. A chunk is absent or published; a published byte never changes. What nobody
//! uses can be evicted and is absent again.

pub mod blob;
mod budget;
mod chunk;
pub mod counters;
pub mod digest;
mod digests;
mod disk;
mod document;
pub mod error;
mod extents;
mod fetch;
#[cfg(test)]
mod fuzz;
mod hash;
mod interest;
pub mod layout;
mod loose;
mod presence;
mod rank;
mod read_ahead;
pub mod registry;
mod segment;
mod shared;
pub mod source;
mod state;
pub mod store;
mod trust;

/// Atomics by a name of our own: the test of what threads do to each other puts those of loom in
/// their place.
mod atomic {
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}

pub use blob::{
    Blob, BlobStats, ChunkState, InFlight, MapCell, Miss, Read, SegmentHold, Slice, Trust,
};
pub use counters::{BySource, Counter, Counters, Histogram, HistogramValues, TIME_BOUNDS};
pub use digest::{Digest, DigestError};
pub use error::{OpenError, ReadError, SourceError};
pub use fetch::Traffic;
pub use hash::give_way;
pub use layout::{CHUNK_BYTES, Layout, LayoutError};
pub use oci_spec::distribution::{ParseError, Reference};
pub use registry::{
    AccessOptions, CredentialOptions, CredentialSource, Credentials, Dragonfly, MAX_MANIFEST_BYTES,
    Manifest, Noted, PluginOptions, PullSecrets, Registries, RegistryOptions, Repository, Secret,
    install_crypto, parse_reference,
};
pub use source::{ByteStream, Piece, Source, SourceKind, in_order};
pub use store::{
    Amount, Background, BlobId, BlobUsage, CacheOptions, Checked, Evicted, FetchOptions, Form,
    Ingest, KeepDigests, Others, Pruned, Recheck, Store, StoreOptions, Usage, Verify, VerifyError,
};
pub use weightfs_swarm::Urgency;
