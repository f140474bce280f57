//! The store owns what WeightFS knows of blobs: where their bytes come from, which of them are
//! here, and whether they can be believed. It knows nothing of files, snapshots or containerd.
//!
//! A blob is cut into *segments*, each one sparse cache file, and each segment into *chunks* of
//! [`CHUNK_BYTES`]. A chunk is absent or published; a published byte never changes.

pub mod blob;
mod chunk;
pub mod digest;
mod document;
pub mod error;
mod fetch;
#[cfg(test)]
mod fuzz;
mod hash;
mod interest;
pub mod layout;
mod presence;
mod read_ahead;
pub mod registry;
mod segment;
mod shared;
pub mod source;
mod state;
pub mod store;

pub use blob::{Blob, BlobStats, Miss, Read, Slice, Trust};
pub use digest::{Digest, DigestError};
pub use error::{OpenError, ReadError, SourceError};
pub use layout::{CHUNK_BYTES, Layout, LayoutError};
pub use oci_client::Reference;
pub use registry::{MAX_MANIFEST_BYTES, Manifest, Registries, RegistryOptions, Repository};
pub use source::{ByteStream, Source};
pub use store::{
    Background, BlobId, BlobUsage, Checked, Evicted, FetchOptions, Form, Ingest, Pruned, Store,
    StoreOptions, Usage, Verify, VerifyError,
};
