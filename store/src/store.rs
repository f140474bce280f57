//! The state directory: who owns it, and which blobs are open.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Blob, Digest, Layout, OpenError};

/// In which form the store keeps a blob's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As the registry has them.
    AsStored,
    /// What a compressed blob inflates to; made here, by [`Store::ingest`].
    Decompressed,
}

/// Names bytes in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobId {
    /// The digest of the blob in the registry (of the compressed bytes for a decompressed form).
    pub digest: Digest,
    /// The form.
    pub form: Form,
}

/// How misses are filled. Defaults are in the configuration's one place, the snapshotter.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// A read that could not be served within this time fails.
    pub deadline: Duration,
    /// Requests in flight to one blob at the most.
    pub connections: usize,
    /// Bytes of one ranged request at the most.
    pub request_bytes: u64,
    /// First read-ahead window of a sequential stream, in bytes.
    pub read_ahead_min: u64,
    /// Largest read-ahead window, in bytes.
    pub read_ahead_max: u64,
}

/// What a store needs to know.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// How misses are filled.
    pub fetch: FetchOptions,
}

/// The owner of a state directory's blobs.
#[derive(Debug)]
pub struct Store {}

impl Store {
    /// Takes the directory (created if it is not there; one owner at a time, `flock`).
    ///
    /// # Errors
    /// Another owner, an unsuitable file system (tmpfs, overlay, network, FUSE), no permission.
    pub fn open(_root: &Path, _options: StoreOptions) -> Result<Arc<Self>, OpenError> {
        todo!()
    }

    /// The layout of a blob that this store has on disk.
    pub fn layout(&self, _id: BlobId) -> Option<Layout> {
        todo!()
    }

    /// Opens a blob, or creates an empty one. All openers share one [`Blob`].
    ///
    /// # Errors
    /// When it is there with another layout, or the directory can't be used.
    pub fn blob(self: &Arc<Self>, _id: BlobId, _layout: &Layout) -> Result<Arc<Blob>, OpenError> {
        todo!()
    }

    /// Begins to write a blob in sequence whose cuts become known on the way. Nothing of it is
    /// visible before [`Ingest::finish`].
    pub fn ingest(self: &Arc<Self>, _id: BlobId) -> Result<Ingest, OpenError> {
        todo!()
    }

    /// Keeps a small document beside a blob (a listing, an index). Replaces an older one.
    pub fn attach(&self, _id: BlobId, _name: &str, _bytes: &[u8]) -> Result<(), OpenError> {
        todo!()
    }

    /// A document kept beside a blob; `None` if there is none or it is damaged.
    pub fn attachment(&self, _id: BlobId, _name: &str) -> Option<Vec<u8>> {
        todo!()
    }

    /// Makes what is published survive a restart: syncs data, then writes the records.
    /// Also done every few seconds in the background and when the store is dropped.
    pub fn checkpoint(&self) -> Result<(), OpenError> {
        todo!()
    }

    /// The blobs that are open now.
    pub fn open_blobs(&self) -> Vec<Arc<Blob>> {
        todo!()
    }
}

/// A blob that is being written in sequence.
#[derive(Debug)]
pub struct Ingest {}

impl Ingest {
    /// The bytes that follow begin a new segment.
    pub fn cut(&mut self) -> Result<(), OpenError> {
        todo!()
    }

    /// Appends bytes. Blocking I/O.
    pub fn write(&mut self, _bytes: &[u8]) -> Result<(), OpenError> {
        todo!()
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        todo!()
    }

    /// Syncs and publishes the blob, complete and verified. The caller has checked the digest of
    /// what the bytes were made from.
    pub fn finish(self) -> Result<Arc<Blob>, OpenError> {
        todo!()
    }
}
