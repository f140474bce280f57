//! Which chunks are published: a bitmap that readers look at without a lock.
//!
//! Invariant: a bit is set (Release) only after the chunk's last byte is in the cache file; a
//! reader that sees it (Acquire) sees the bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::chunk::{ChunkNo, VerifiedChunk, each};

/// A bitmap of fixed length that many threads change.
#[derive(Debug)]
pub(crate) struct Bits {
    words: Box<[AtomicU64]>,
    len: u32,
}

impl Bits {
    pub(crate) fn new(len: u32) -> Self {
        let words = (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, len }
    }

    /// Sets a bit; whether it was clear.
    pub(crate) fn set(&self, bit: u32) -> bool {
        let Some(word) = self.word(bit) else { return false };
        let mask = 1 << (bit % 64);
        word.fetch_or(mask, Ordering::AcqRel) & mask == 0
    }

    pub(crate) fn get(&self, bit: u32) -> bool {
        self.word(bit).is_some_and(|word| word.load(Ordering::Acquire) >> (bit % 64) & 1 == 1)
    }

    /// Clears all bits and gives those that were set.
    pub(crate) fn take(&self) -> Vec<u32> {
        let words = self.words.iter().map(|word| word.swap(0, Ordering::AcqRel));
        ones(words).collect()
    }

    /// The words as they are now.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    fn word(&self, bit: u32) -> Option<&AtomicU64> {
        if bit >= self.len {
            return None;
        }
        self.words.get(usize::try_from(bit / 64).ok()?)
    }
}

/// The numbers of the bits that are set in `words`.
pub(crate) fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
    (0u32..).step_by(64).zip(words).flat_map(|(base, word)| {
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| base + bit)
    })
}

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
        self.chunks.load(Ordering::Acquire) == self.bits.len
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
        let verified = |chunk| {
            let chunk = ChunkNo(chunk);
            VerifiedChunk::check(&table, chunk, &table.bytes_of(chunk).unwrap().1).unwrap()
        };
        assert!(presence.publish(&verified(2)));
        assert!(!presence.publish(&verified(2)));
        assert_eq!((presence.bytes(), presence.is_complete()), (9, false));
        assert_eq!(presence.first_absent(&table.all()), Some(ChunkNo(0)));
        assert!(presence.publish(&verified(0)) && presence.publish(&verified(1)));
        assert!(presence.is_complete() && presence.has_all(&table.all()));
        assert_eq!(presence.bytes(), 2 * CHUNK_BYTES + 9);
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
