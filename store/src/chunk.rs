//! Chunks: their numbers, where they lie, and the proof that one may be published.
//!
//! Chunks are numbered through the whole blob, segment after segment. Each segment's chunks are
//! counted from the segment's start, so a chunk never straddles a cut and the last one of a
//! segment may be short.

use std::ops::Range;

use crate::layout::{CHUNK_BYTES, Layout};

/// Bytes of the largest blob that is accepted (16 TiB). The size comes from foreign manifests and
/// decides how much memory the presence bitmap takes: 2 MiB at this size.
pub const MAX_BLOB_BYTES: u64 = 1 << 44;

/// The number of a chunk in its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChunkNo(pub(crate) u32);

impl ChunkNo {
    pub(crate) fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// The chunks of a range, in order.
pub(crate) fn each(chunks: &Range<ChunkNo>) -> impl Iterator<Item = ChunkNo> + use<> {
    (chunks.start.0..chunks.end.0).map(ChunkNo)
}

/// Where bytes lie that are all inside one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The segment's index.
    pub(crate) segment: usize,
    /// The bytes of the blob that the segment covers.
    pub(crate) covers: Range<u64>,
    /// The chunks that the bytes touch.
    pub(crate) chunks: Range<ChunkNo>,
}

/// A layout with its chunks numbered.
#[derive(Debug)]
pub(crate) struct ChunkTable {
    layout: Layout,
    /// The first chunk of each segment.
    first: Box<[u32]>,
    total: u32,
}

impl ChunkTable {
    /// Numbers the chunks of a layout; `None` if the blob is larger than [`MAX_BLOB_BYTES`].
    pub(crate) fn new(layout: Layout) -> Option<Self> {
        if layout.size() > MAX_BLOB_BYTES {
            return None;
        }
        let mut total = 0u32;
        let mut first = Vec::with_capacity(layout.segments());
        for index in 0..layout.segments() {
            let covers = layout.segment(index)?;
            first.push(total);
            let chunks = (covers.end - covers.start).div_ceil(CHUNK_BYTES);
            total = total.checked_add(u32::try_from(chunks).ok()?)?;
        }
        Some(Self { layout, first: first.into(), total })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All chunks of the blob.
    pub(crate) fn all(&self) -> Range<ChunkNo> {
        ChunkNo(0)..ChunkNo(self.total)
    }

    /// The chunks of a segment; none if there is no such segment.
    pub(crate) fn of_segment(&self, segment: usize) -> Range<ChunkNo> {
        let start = self.first.get(segment).copied().unwrap_or(self.total);
        let end = self.first.get(segment.saturating_add(1)).copied().unwrap_or(self.total);
        ChunkNo(start)..ChunkNo(end)
    }

    /// Where `range` lies, if it is not empty and inside one segment.
    pub(crate) fn locate(&self, range: &Range<u64>) -> Option<Place> {
        let segment = self.layout.segment_at(range.start)?;
        let covers = self.layout.segment(segment)?;
        if range.is_empty() || range.end > covers.end {
            return None;
        }
        let first = *self.first.get(segment)?;
        let number = |at: u64| u32::try_from((at - covers.start) / CHUNK_BYTES).ok();
        let chunks = ChunkNo(first + number(range.start)?)..ChunkNo(first + number(range.end - 1)?);
        Some(Place { segment, covers, chunks: chunks.start..chunks.end.next() })
    }

    /// The segment that a chunk lies in, and the bytes of the blob that it covers.
    pub(crate) fn bytes_of(&self, chunk: ChunkNo) -> Option<(usize, Range<u64>)> {
        if chunk.0 >= self.total {
            return None;
        }
        let segment = self.first.partition_point(|first| *first <= chunk.0).checked_sub(1)?;
        let covers = self.layout.segment(segment)?;
        let before = u64::from(chunk.0 - self.first.get(segment)?) * CHUNK_BYTES;
        let start = covers.start + before;
        Some((segment, start..covers.end.min(start + CHUNK_BYTES)))
    }
}

/// A chunk whose bytes are in its cache file and have passed every check there is for them.
/// Only this can be published.
#[derive(Debug)]
pub(crate) struct VerifiedChunk {
    chunk: ChunkNo,
    len: u64,
}

impl VerifiedChunk {
    /// The one way to make one: `written`, the bytes of the blob that were written to the cache
    /// file in one sequence, must be exactly the chunk.
    pub(crate) fn check(table: &ChunkTable, chunk: ChunkNo, written: &Range<u64>) -> Option<Self> {
        let (_, bytes) = table.bytes_of(chunk)?;
        (bytes == *written).then_some(Self { chunk, len: bytes.end - bytes.start })
    }

    pub(crate) fn chunk(&self) -> ChunkNo {
        self.chunk
    }

    /// Its bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn table(size: u64, cuts: &[u64]) -> ChunkTable {
        ChunkTable::new(Layout::new(size, cuts.iter().copied()).unwrap()).unwrap()
    }

    #[test]
    fn chunks_cover_every_byte_once_and_stop_at_cuts() {
        let table = table(5 * MIB + 7, &[100, MIB + 100, 3 * MIB + 101]);
        let mut at = 0;
        for chunk in each(&table.all()) {
            let (segment, bytes) = table.bytes_of(chunk).unwrap();
            assert_eq!(bytes.start, at);
            assert!(bytes.end - bytes.start <= MIB);
            let place = table.locate(&bytes).unwrap();
            assert_eq!((place.segment, place.chunks), (segment, chunk..chunk.next()));
            at = bytes.end;
        }
        assert_eq!(at, 5 * MIB + 7);
        // 100 bytes; 1 MiB; 2 MiB and a byte; 2 MiB less 94 bytes.
        assert_eq!(table.all(), ChunkNo(0)..ChunkNo(7));
        assert_eq!(table.of_segment(2), ChunkNo(2)..ChunkNo(5));
    }

    #[test]
    fn a_range_across_a_cut_or_outside_has_no_place() {
        let table = table(3 * MIB, &[MIB]);
        for range in [0..MIB + 1, 3 * MIB - 1..3 * MIB + 1, 3 * MIB..3 * MIB + 1, 5..5] {
            assert_eq!(table.locate(&range), None, "{range:?}");
        }
        assert_eq!(table.locate(&(MIB + 1..3 * MIB)).unwrap().chunks, ChunkNo(1)..ChunkNo(3));
    }

    #[test]
    fn only_an_exact_chunk_is_verified() {
        let table = table(2 * MIB + 5, &[]);
        assert!(VerifiedChunk::check(&table, ChunkNo(2), &(2 * MIB..2 * MIB + 5)).is_some());
        for (chunk, written) in [(0, 0..MIB - 1), (1, 0..MIB), (2, 2 * MIB..2 * MIB + 4), (3, 0..0)]
        {
            assert!(VerifiedChunk::check(&table, ChunkNo(chunk), &written).is_none());
        }
    }

    #[test]
    fn a_blob_over_the_limit_is_refused() {
        assert!(ChunkTable::new(Layout::whole(MAX_BLOB_BYTES)).is_some());
        assert!(ChunkTable::new(Layout::whole(MAX_BLOB_BYTES + 1)).is_none());
        assert!(ChunkTable::new(Layout::whole(u64::MAX)).is_none());
    }
}
