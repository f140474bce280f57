//! Giving up what is cached of an open blob.
//!
//! The order survives a crash, and is right for those who read meanwhile: nobody holds the extent
//! and nobody can from here on; its chunks are absent; the record says so, on disk; the file gets
//! a hole; whoever waits may fetch it again.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Blob;
use crate::chunk::{ChunkNo, each};

/// An extent that could be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    /// See [`crate::rank`]. First, so that candidates sort by it.
    pub(crate) rank: u64,
    pub(crate) extent: u32,
    /// Bytes of it that are published.
    pub(crate) bytes: u64,
}

/// What became of a chunk that was to be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Withdrawn {
    /// It is gone.
    Gone,
    /// Nothing is wrong with it, or it was gone before.
    Stays,
    /// Somebody has its extent in use.
    InUse,
}

/// Extents that are being evicted. Whatever happens, they can be held again afterwards.
struct Evicting<'a> {
    blob: &'a Blob,
    extents: Vec<u32>,
}

impl Drop for Evicting<'_> {
    fn drop(&mut self) {
        for extent in &self.extents {
            self.blob.extents.end_eviction(*extent);
        }
        self.blob.shared.evicted.notify_waiters();
    }
}

impl Blob {
    /// Whether what is evicted could be had again.
    fn can_be_refetched(&self) -> bool {
        !self.sources().is_empty()
    }

    /// The extents of which something is here and that nobody uses at this moment. None, if what
    /// is gone could not be had again.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        if !self.can_be_refetched() || self.presence.bytes() == 0 && !self.has_unchecked() {
            return vec![];
        }
        let candidate = |extent| {
            let (_, chunks) = self.table.chunks_of_extent(extent)?;
            let here =
                each(&chunks).filter(|chunk| self.presence.has(*chunk) || self.checks.has(*chunk));
            let bytes = here.map(|chunk| self.table.len_of(chunk)).sum();
            let usable = bytes > 0 && self.extents.is_free(extent);
            usable.then(|| Candidate { rank: self.ranks.of(extent), extent, bytes })
        };
        (0..self.table.extents()).filter_map(candidate).collect()
    }

    /// Frees blocks of chunks that are absent: what an earlier process had fetched and was killed
    /// before it was recorded, or what a lost record spoke of. Once for each time the blob is
    /// open: later ones are of fetches that go on. Gives the bytes freed. Blocking I/O.
    pub(crate) fn sweep(&self) -> io::Result<u64> {
        if self.swept.swap(true, Ordering::AcqRel) {
            return Ok(0);
        }
        let _entered = self.shared.enter()?;
        let mut freed = 0;
        let mut last: Option<(usize, Vec<Range<u64>>)> = None;
        for extent in 0..self.table.extents() {
            let Some((segment, chunks)) = self.table.chunks_of_extent(extent) else { continue };
            let filled = match last.take() {
                Some((known, filled)) if known == segment => filled,
                _ => self.segments.filled(segment, self.layout()),
            };
            freed += self.sweep_extent(extent, segment, &chunks, &filled)?;
            last = Some((segment, filled));
        }
        Ok(freed)
    }

    fn sweep_extent(
        &self,
        extent: u32,
        segment: usize,
        chunks: &Range<ChunkNo>,
        filled: &[Range<u64>],
    ) -> io::Result<u64> {
        let overlap = |bytes: &Range<u64>| -> u64 {
            let first = filled.partition_point(|range| range.end <= bytes.start);
            let ranges = filled.iter().skip(first).take_while(|range| range.start < bytes.end);
            ranges.map(|range| range.end.min(bytes.end) - range.start.max(bytes.start)).sum()
        };
        let orphan = |chunk: ChunkNo| {
            let bytes = self.table.within_segment(&(chunk..chunk.next()))?;
            let blocks = overlap(&bytes);
            (!self.is_here(chunk) && blocks > 0).then_some((bytes, blocks))
        };
        // A look without holding: most extents have none.
        if !each(chunks).any(|chunk| orphan(chunk).is_some())
            || !self.extents.begin_eviction(extent)
        {
            return Ok(0);
        }
        let _evicting = Evicting { blob: self, extents: vec![extent] };
        let mut freed = 0;
        for (bytes, blocks) in each(chunks).filter_map(orphan) {
            self.segments.punch(segment, bytes)?;
            freed += blocks;
        }
        Ok(freed)
    }

    /// Evicts those of `extents` that nobody holds. Gives the published bytes that are gone.
    /// Blocking I/O.
    pub(crate) fn evict(self: &Arc<Self>, extents: &[u32]) -> io::Result<u64> {
        let entered = self.shared.enter()?;
        let free = |extent: &&u32| self.extents.begin_eviction(**extent);
        let evicting =
            Evicting { blob: self, extents: extents.iter().filter(free).copied().collect() };
        let mut gone = 0;
        let mut withdrawn: Vec<ChunkNo> = vec![];
        for (_, chunks) in evicting.extents.iter().filter_map(|at| self.table.chunks_of_extent(*at))
        {
            for chunk in each(&chunks) {
                let len = self.table.len_of(chunk);
                let unchecked = self.checks.clear(chunk);
                if self.presence.withdraw(chunk, len) || unchecked {
                    gone += len;
                    withdrawn.push(chunk);
                }
            }
        }
        // The commit point: until here a crash changes nothing.
        self.record_absence(&withdrawn, &entered)?;
        for (segment, chunks) in
            evicting.extents.iter().filter_map(|at| self.table.chunks_of_extent(*at))
        {
            let Some(range) = self.table.within_segment(&chunks) else { continue };
            self.segments.punch(segment, range)?;
        }
        self.counters().evicted_extents.add(evicting.extents.len() as u64);
        self.counters().evicted_extent_bytes.add(gone);
        Ok(gone)
    }

    /// Takes one chunk away, if it is wrong when nobody else has it in use. Blocking I/O.
    pub(super) fn withdraw_if(
        self: &Arc<Self>,
        chunk: ChunkNo,
        is_wrong: impl FnOnce() -> bool,
    ) -> io::Result<Withdrawn> {
        let entered = self.shared.enter()?;
        let only = chunk..chunk.next();
        let extent = self.table.extents_of(&only).start;
        if !self.extents.begin_eviction(extent) {
            return Ok(Withdrawn::InUse);
        }
        let _evicting = Evicting { blob: self, extents: vec![extent] };
        if !self.presence.has(chunk) || !is_wrong() {
            return Ok(Withdrawn::Stays);
        }
        self.checks.clear(chunk);
        self.presence.withdraw(chunk, self.table.len_of(chunk));
        // The commit point, as above.
        self.record_absence(&[chunk], &entered)?;
        let segment = self.table.bytes_of(chunk).map(|(segment, _)| segment);
        if let Some((segment, range)) = segment.zip(self.table.within_segment(&only)) {
            self.segments.punch(segment, range)?;
        }
        Ok(Withdrawn::Gone)
    }
}
