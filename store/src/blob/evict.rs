//! Giving up what is cached of an open blob.
//!
//! The order survives a crash, and is right for those who read meanwhile: nobody holds the extent
//! and nobody can from here on; its chunks are absent; the record says so, on disk; the file gets
//! a hole; whoever waits may fetch it again.

use std::io;
use std::sync::Arc;

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
        if !self.can_be_refetched() || self.presence.bytes() == 0 {
            return vec![];
        }
        let candidate = |extent| {
            let (_, chunks) = self.table.chunks_of_extent(extent)?;
            let here = each(&chunks).filter(|chunk| self.presence.has(*chunk));
            let bytes = here.map(|chunk| self.table.len_of(chunk)).sum();
            let usable = bytes > 0 && self.extents.is_free(extent);
            usable.then(|| Candidate { rank: self.ranks.of(extent), extent, bytes })
        };
        (0..self.table.extents()).filter_map(candidate).collect()
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
                if self.presence.withdraw(chunk, len) {
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
        Ok(gone)
    }
}
