//! One blob: its segments, what of them is published, and reads.

use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::{BlobId, Layout, ReadError, Source};

/// What is known of a blob's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// They came over a transport that the configuration trusts; the whole was not hashed yet.
    Transport,
    /// The whole blob hashes to its digest.
    Verified,
    /// The whole blob does not hash to its digest.
    Poisoned,
}

/// Numbers of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobStats {
    /// Bytes of the blob.
    pub size: u64,
    /// Bytes of it that are published.
    pub cached: u64,
    /// Bytes fetched from sources since it was opened.
    pub fetched: u64,
    /// What is known of its bytes.
    pub trust: Trust,
}

/// An open blob.
#[derive(Debug)]
pub struct Blob {}

/// What a read finds.
#[derive(Debug)]
pub enum Read {
    /// All is here.
    Ready(Slice),
    /// Something must be fetched.
    Missing(Miss),
}

/// Published bytes, straight from the cache file's mapping; they stay as long as this is held.
#[derive(Debug)]
pub struct Slice {}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        todo!()
    }
}

/// A read that waits for its bytes.
#[derive(Debug)]
pub struct Miss {}

impl Miss {
    /// Fetches what is missing, or waits for whoever does. Ends within the deadline.
    pub async fn wait(self) -> Result<Slice, ReadError> {
        todo!()
    }
}

impl Blob {
    /// Its name in the store.
    pub fn id(&self) -> BlobId {
        todo!()
    }

    /// Its cuts.
    pub fn layout(&self) -> &Layout {
        todo!()
    }

    /// Adds a place to fetch from; one of the same name is replaced.
    pub fn add_source(&self, _source: Arc<dyn Source>) {
        todo!()
    }

    /// Bytes `range` of the blob, all inside one segment. Never waits, neither for the network
    /// nor for a lock that a fetch can hold. An empty range is ready. Starts read-ahead (it may
    /// spawn on the tokio runtime that the store was opened in).
    pub fn read(self: &Arc<Self>, _range: Range<u64>) -> Result<Read, ReadError> {
        todo!()
    }

    /// Whether every chunk that `range` touches is published.
    pub fn is_cached(&self, _range: Range<u64>) -> bool {
        todo!()
    }

    /// Its numbers, without touching the disk.
    pub fn stats(&self) -> BlobStats {
        todo!()
    }

    /// Bytes that the cache files take on disk (`st_blocks`).
    pub fn disk_bytes(&self) -> u64 {
        todo!()
    }
}
