//! Which chunks are published: a bitmap that readers look at without a lock.
//!
//! Invariants: a bit is set (Release) only after the chunk's last byte is in the cache file; a
//! reader that sees it (Acquire) sees the bytes. It is cleared only while the chunk's extent is
//! being evicted, so who holds the extent can rely on a bit that he has seen.

mod bits;

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub(crate) use self::bits::{Bits, ones};

use crate::chunk::{ChunkNo, VerifiedChunk, each};

/// The published chunks of a blob.
#[derive(Debug)]
pub(crate) struct Presence {
    bits: Bits,
    chunks: AtomicU32,
    bytes: AtomicU64,
}

impl Presence {
    pub(crate) fn new(chunks: u32) -> Self {
        Self { bits: Bits::new(chunks), chunks: AtomicU32::new(0), bytes: AtomicU64::new(0) }
    }

    /// Publishes a chunk; whether it was absent.
    pub(crate) fn publish(&self, chunk: &VerifiedChunk) -> bool {
        let new = self.bits.set(chunk.chunk().0);
        if new {
            self.bytes.fetch_add(chunk.len(), Ordering::AcqRel);
            self.chunks.fetch_add(1, Ordering::AcqRel);
        }
        new
    }

    /// Takes a chunk of `len` bytes away; whether it was published. Its extent is being evicted.
    pub(crate) fn withdraw(&self, chunk: ChunkNo, len: u64) -> bool {
        let known = self.bits.clear(chunk.0);
        if known {
            self.bytes.fetch_sub(len, Ordering::AcqRel);
            self.chunks.fetch_sub(1, Ordering::AcqRel);
        }
        known
    }

    pub(crate) fn has(&self, chunk: ChunkNo) -> bool {
        self.bits.get(chunk.0)
    }

    pub(crate) fn has_all(&self, chunks: &Range<ChunkNo>) -> bool {
        each(chunks).all(|chunk| self.has(chunk))
    }

    /// The first absent chunk of `chunks`.
    pub(crate) fn first_absent(&self, chunks: &Range<ChunkNo>) -> Option<ChunkNo> {
        each(chunks).find(|chunk| !self.has(*chunk))
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.chunks.load(Ordering::Acquire) == self.bits.len()
    }

    /// Bytes published.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.bits.snapshot()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::ChunkTable;
    use crate::layout::{CHUNK_BYTES, Layout};

    #[test]
    fn a_chunk_counts_once() {
        let table = ChunkTable::new(Layout::whole(2 * CHUNK_BYTES + 9)).unwrap();
        let presence = Presence::new(3);
        let verified = |chunk| VerifiedChunk::recorded(&table, ChunkNo(chunk)).unwrap();
        assert!(presence.publish(&verified(2)));
        assert!(!presence.publish(&verified(2)));
        assert_eq!((presence.bytes(), presence.is_complete()), (9, false));
        assert_eq!(presence.first_absent(&table.all()), Some(ChunkNo(0)));
        assert!(presence.publish(&verified(0)) && presence.publish(&verified(1)));
        assert!(presence.is_complete() && presence.has_all(&table.all()));
        assert_eq!(presence.bytes(), 2 * CHUNK_BYTES + 9);
    }

    #[test]
    fn a_chunk_that_was_withdrawn_is_absent_until_it_is_published_again() {
        let table = ChunkTable::new(Layout::whole(CHUNK_BYTES)).unwrap();
        let chunk = VerifiedChunk::recorded(&table, ChunkNo(0)).unwrap();
        let presence = Presence::new(1);
        assert!(!presence.withdraw(ChunkNo(0), CHUNK_BYTES));
        presence.publish(&chunk);
        assert!(presence.withdraw(ChunkNo(0), CHUNK_BYTES));
        assert_eq!((presence.bytes(), presence.is_complete()), (0, false));
        assert!(!presence.has(ChunkNo(0)) && presence.publish(&chunk) && presence.is_complete());
    }

    #[test]
    fn bits_outside_are_never_set() {
        let bits = Bits::new(65);
        assert!(bits.set(64) && bits.get(64));
        assert!(!bits.set(65) && !bits.get(65));
        assert!(!bits.set(u32::MAX));
        assert_eq!(bits.snapshot(), [0, 1]);
        assert_eq!(bits.take(), [64]);
        assert_eq!(bits.snapshot(), [0, 0]);
    }
}
