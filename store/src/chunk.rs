//! Chunks: their numbers, where they lie, and the proof that one may be published.
//!
//! Chunks are numbered through the whole blob, segment after segment. Each segment's chunks are
//! counted from the segment's start, so a chunk never straddles a cut and the last one of a
//! segment may be short.

//!
//! Extents are numbered alike: [`EXTENT_CHUNKS`] chunks in sequence, counted from each segment's
//! start.

use std::io;
use std::ops::Range;

use crate::Digest;
use crate::digests::ChunkDigests;
use crate::layout::{CHUNK_BYTES, Layout};

/// Bytes of the largest blob that is accepted (16 TiB). The size comes from foreign manifests and
/// decides how much memory the presence bitmap takes: 2 MiB at this size.
pub const MAX_BLOB_BYTES: u64 = 1 << 44;

/// Chunks of an extent, the unit of eviction (16 MiB): large enough that recording and punching
/// cost little for each byte, small enough to keep to a small budget.
pub(crate) const EXTENT_CHUNKS: u32 = 16;

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
    /// The extents that these lie in.
    pub(crate) extents: Range<u32>,
}

/// A layout with its chunks numbered.
#[derive(Debug)]
pub(crate) struct ChunkTable {
    layout: Layout,
    /// The first chunk of each segment.
    first: Box<[u32]>,
    /// The first extent of each segment.
    first_extent: Box<[u32]>,
    total: u32,
    extents: u32,
}

impl ChunkTable {
    /// Numbers the chunks of a layout; `None` if the blob is larger than [`MAX_BLOB_BYTES`].
    pub(crate) fn new(layout: Layout) -> Option<Self> {
        if layout.size() > MAX_BLOB_BYTES {
            return None;
        }
        let (mut total, mut extents) = (0u32, 0u32);
        let mut first = Vec::with_capacity(layout.segments());
        let mut first_extent = Vec::with_capacity(layout.segments());
        for index in 0..layout.segments() {
            let covers = layout.segment(index)?;
            first.push(total);
            first_extent.push(extents);
            let chunks = u32::try_from((covers.end - covers.start).div_ceil(CHUNK_BYTES)).ok()?;
            total = total.checked_add(chunks)?;
            extents = extents.checked_add(chunks.div_ceil(EXTENT_CHUNKS))?;
        }
        let (first, first_extent) = (first.into(), first_extent.into());
        Some(Self { layout, first, first_extent, total, extents })
    }

    /// Number of extents.
    pub(crate) fn extents(&self) -> u32 {
        self.extents
    }

    /// The extents of chunks that lie in one segment.
    pub(crate) fn extents_of(&self, chunks: &Range<ChunkNo>) -> Range<u32> {
        let Some(segment) = self.segment_of(chunks.start) else { return 0..0 };
        if chunks.is_empty() {
            return 0..0;
        }
        self.extents_within(segment, chunks)
    }

    fn extents_within(&self, segment: usize, chunks: &Range<ChunkNo>) -> Range<u32> {
        let chunk = self.first.get(segment).copied().unwrap_or(0);
        let extent = self.first_extent.get(segment).copied().unwrap_or(0);
        let number = |at: u32| extent + at.saturating_sub(chunk) / EXTENT_CHUNKS;
        number(chunks.start.0)..number(chunks.end.0.saturating_sub(1)) + 1
    }

    /// The segment of an extent, and its chunks.
    pub(crate) fn chunks_of_extent(&self, extent: u32) -> Option<(usize, Range<ChunkNo>)> {
        if extent >= self.extents {
            return None;
        }
        let after = self.first_extent.partition_point(|first| *first <= extent);
        let segment = after.checked_sub(1)?;
        let within = extent - self.first_extent.get(segment)?;
        let whole = self.of_segment(segment);
        let start = whole.start.0 + within * EXTENT_CHUNKS;
        Some((segment, ChunkNo(start)..whole.end.min(ChunkNo(start + EXTENT_CHUNKS))))
    }

    /// Bytes of a chunk; 0 if there is no such chunk.
    pub(crate) fn len_of(&self, chunk: ChunkNo) -> u64 {
        self.bytes_of(chunk).map_or(0, |(_, bytes)| bytes.end - bytes.start)
    }

    /// The bytes of chunks of one segment, counted from its start.
    pub(crate) fn within_segment(&self, chunks: &Range<ChunkNo>) -> Option<Range<u64>> {
        let (segment, first) = self.bytes_of(chunks.start)?;
        let (_, last) = self.bytes_of(ChunkNo(chunks.end.0.checked_sub(1)?))?;
        let origin = self.layout.segment(segment)?.start;
        Some(first.start - origin..last.end - origin)
    }

    fn segment_of(&self, chunk: ChunkNo) -> Option<usize> {
        self.first.partition_point(|first| *first <= chunk.0).checked_sub(1)
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
        let chunks = chunks.start..chunks.end.next();
        let extents = self.extents_within(segment, &chunks);
        Some(Place { segment, covers, chunks, extents })
    }

    /// The segment that a chunk lies in, and the bytes of the blob that it covers.
    pub(crate) fn bytes_of(&self, chunk: ChunkNo) -> Option<(usize, Range<u64>)> {
        if chunk.0 >= self.total {
            return None;
        }
        let segment = self.segment_of(chunk)?;
        let covers = self.layout.segment(segment)?;
        let before = u64::from(chunk.0 - self.first.get(segment)?) * CHUNK_BYTES;
        let start = covers.start + before;
        Some((segment, start..covers.end.min(start + CHUNK_BYTES)))
    }
}

/// Why bytes are not the chunk that they should be.
#[derive(Debug)]
pub(crate) enum Unfit {
    /// They are not exactly its bytes.
    NotWhole,
    /// They hash to something else.
    Wrong {
        /// The chunk.
        chunk: ChunkNo,
        /// What they hash to.
        actual: Digest,
    },
    /// They can't be written, or read back.
    Cache(io::Error),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        Self::Cache(error)
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
    /// file in one sequence, must be exactly the chunk; and where there are chunk digests, they
    /// must hash to the chunk's. `hash` gives what they hash to.
    pub(crate) fn check(
        table: &ChunkTable,
        chunk: ChunkNo,
        written: &Range<u64>,
        digests: Option<&ChunkDigests>,
        hash: impl FnOnce() -> io::Result<Digest>,
    ) -> Result<Self, Unfit> {
        let (_, bytes) = table.bytes_of(chunk).ok_or(Unfit::NotWhole)?;
        if bytes != *written {
            return Err(Unfit::NotWhole);
        }
        if let Some(digests) = digests {
            let actual = hash()?;
            if digests.get(chunk) != Some(actual) {
                return Err(Unfit::Wrong { chunk, actual });
            }
        }
        Ok(Self { chunk, len: bytes.end - bytes.start })
    }

    /// One that an earlier check let pass, as its record says; there is nothing to compare it
    /// with, or it was compared with the same.
    pub(crate) fn recorded(table: &ChunkTable, chunk: ChunkNo) -> Option<Self> {
        let (_, bytes) = table.bytes_of(chunk)?;
        Some(Self { chunk, len: bytes.end - bytes.start })
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
    use crate::digests::Origin;
    use crate::disk::LocalDisk;

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
    fn extents_cover_every_chunk_once_and_stop_at_cuts() {
        let table = table(100 * MIB, &[5, 40 * MIB + 5, 41 * MIB]);
        let mut next = ChunkNo(0);
        for extent in 0..table.extents() {
            let (segment, chunks) = table.chunks_of_extent(extent).unwrap();
            assert_eq!(chunks.start, next);
            assert!(!chunks.is_empty() && chunks.end.0 - chunks.start.0 <= EXTENT_CHUNKS);
            for chunk in each(&chunks) {
                let (of_chunk, bytes) = table.bytes_of(chunk).unwrap();
                assert_eq!(of_chunk, segment);
                assert_eq!(table.locate(&bytes).unwrap().extents, extent..extent + 1);
            }
            assert_eq!(table.extents_of(&chunks), extent..extent + 1);
            next = chunks.end;
        }
        assert_eq!(next, table.all().end);
        assert_eq!(table.chunks_of_extent(table.extents()), None);
        // 5 bytes; 40 MiB; most of a MiB; 59 MiB.
        assert_eq!(table.extents(), 1 + 3 + 1 + 4);
        assert_eq!(table.extents_of(&table.of_segment(1)), 1..4);
    }

    #[test]
    fn only_an_exact_chunk_is_verified() {
        let table = table(2 * MIB + 5, &[]);
        let check = |chunk, written: &Range<u64>| {
            VerifiedChunk::check(&table, chunk, written, None, || {
                unreachable!("nothing to compare")
            })
        };
        assert!(check(ChunkNo(2), &(2 * MIB..2 * MIB + 5)).is_ok());
        for (chunk, written) in [(0, 0..MIB - 1), (1, 0..MIB), (2, 2 * MIB..2 * MIB + 4), (3, 0..0)]
        {
            assert!(matches!(check(ChunkNo(chunk), &written), Err(Unfit::NotWhole)));
        }
    }

    #[test]
    fn where_there_are_digests_only_what_hashes_to_them_is_verified() {
        let dir = tempfile::tempdir().unwrap();
        let table = table(MIB + 5, &[]);
        let of = |chunk: &[u8]| *Digest::of(chunk).as_raw();
        let digests = [of(b"first"), of(b"second")].concat();
        let digests =
            ChunkDigests::write(&LocalDisk, dir.path(), &table, &digests, Origin::Index).unwrap();
        let check = |chunk, written: Range<u64>, bytes: &[u8]| {
            VerifiedChunk::check(&table, ChunkNo(chunk), &written, Some(&digests), || {
                Ok(Digest::of(bytes))
            })
        };
        assert!(check(0, 0..MIB, b"first").is_ok() && check(1, MIB..MIB + 5, b"second").is_ok());
        let wrong = check(1, MIB..MIB + 5, b"first").unwrap_err();
        assert!(
            matches!(wrong, Unfit::Wrong { chunk: ChunkNo(1), actual } if actual == Digest::of(b"first"))
        );
        assert!(matches!(check(0, 0..5, b"first"), Err(Unfit::NotWhole)));
    }

    #[test]
    fn a_blob_over_the_limit_is_refused() {
        assert!(ChunkTable::new(Layout::whole(MAX_BLOB_BYTES)).is_some());
        assert!(ChunkTable::new(Layout::whole(MAX_BLOB_BYTES + 1)).is_none());
        assert!(ChunkTable::new(Layout::whole(u64::MAX)).is_none());
    }
}
