//! Where the bytes of a request go: to the disk, or, if that has no room, to those who wait.
//!
//! A full disk is never a reader's error. What somebody waits for is fetched chunk by chunk into
//! memory and handed over; what nobody waits for is not fetched.

use std::ops::Range;
use std::sync::Arc;

use super::line::Priority;
use super::queue::Request;
use crate::budget::{Claim, Reservation};
use crate::chunk::{ChunkNo, Unfit, VerifiedChunk};
use crate::loose::Berth;
use crate::{Blob, Digest};

/// Where chunks of a request go.
pub(super) enum Room<'a> {
    /// Into the cache, so many bytes.
    Disk(Reservation<'a>),
    /// To those who wait for this chunk.
    Memory(ChunkNo, Berth),
    /// Nowhere: nobody waits for them.
    Nowhere,
}

/// Finds room for the chunks of `request` from `first` on. `disk` is false if it was found full
/// just now, after the evictor had its chance. `None` if memory is full until the request's time
/// is over.
pub(super) async fn find<'a>(
    blob: &'a Arc<Blob>,
    request: &Request,
    first: ChunkNo,
    disk: bool,
) -> Option<Room<'a>> {
    let until = request.patience.until();
    let claim = match request.priority {
        Priority::Demand | Priority::ReadAhead | Priority::Profile => Claim::Anything,
        Priority::Background => Claim::Unused,
    };
    let table = blob.table();
    let want =
        table.within_segment(&(first..request.end())).map_or(0, |range| range.end - range.start);
    if disk {
        let reserved = blob.budget().reserve(want, table.len_of(first), claim, until);
        if let Some(reservation) = reserved.await {
            return Some(Room::Disk(reservation));
        }
    }
    match blob.fetcher().first_waited_for(&(first..request.end())) {
        None => Some(Room::Nowhere),
        Some(chunk) => Some(Room::Memory(chunk, blob.loose().berth(until).await?)),
    }
}

/// The chunks from `first` on that `bytes` are enough for; at least one.
pub(super) fn affordable(blob: &Blob, first: ChunkNo, end: ChunkNo, bytes: u64) -> Range<ChunkNo> {
    let mut left = bytes;
    let mut last = first.next();
    while last < end {
        left = left.saturating_sub(blob.table().len_of(ChunkNo(last.0 - 1)));
        if left < blob.table().len_of(last) {
            break;
        }
        last = last.next();
    }
    first..last
}

/// Gathers one chunk in memory.
pub(super) struct Gatherer {
    chunk: ChunkNo,
    covers: Range<u64>,
    bytes: Vec<u8>,
    berth: Berth,
}

impl Gatherer {
    pub(super) fn new(blob: &Blob, chunk: ChunkNo, berth: Berth) -> Option<Self> {
        let (_, covers) = blob.table().bytes_of(chunk)?;
        let len = usize::try_from(covers.end - covers.start).ok()?;
        Some(Self { chunk, covers, bytes: Vec::with_capacity(len), berth })
    }

    pub(super) fn wanted(&self) -> Range<u64> {
        self.covers.clone()
    }

    pub(super) fn missing(&self) -> u64 {
        (self.covers.end - self.covers.start).saturating_sub(self.bytes.len() as u64)
    }

    /// Takes the next bytes; what is more than was asked for is not used.
    pub(super) fn take(&mut self, piece: &[u8]) {
        let room = usize::try_from(self.missing()).unwrap_or(usize::MAX);
        self.bytes.extend_from_slice(piece.get(..room).unwrap_or(piece));
    }

    /// Hands the whole chunk over, after the same check that stands before publishing.
    pub(super) fn finish(self, blob: &Arc<Blob>) -> Result<(), Unfit> {
        let written = self.covers.start..self.covers.start + self.bytes.len() as u64;
        let promises = blob.promises();
        let hash = || Ok(Digest::of(&self.bytes));
        VerifiedChunk::check(blob.table(), self.chunk, &written, promises.digests(), hash)?;
        drop(promises);
        blob.serve_unpublished(self.chunk);
        let loose = blob.loose().keep(blob.id(), self.chunk, self.bytes, self.berth);
        blob.counters().loose_chunks.increment();
        blob.fetcher().hand_over(self.chunk, &loose);
        Ok(())
    }
}
