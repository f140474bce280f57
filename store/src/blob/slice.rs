//! What keeps bytes in place, and the bytes themselves.

use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::Blob;
use crate::ReadError;
use crate::chunk::{ChunkNo, Place, each};
use crate::fetch::Ticket;
use crate::loose::LooseChunk;
use crate::read_ahead::Access;

/// A chunk that is only in memory.
pub(super) type Loose = (ChunkNo, Arc<LooseChunk>);

/// Extents that can't be evicted while this is there.
#[derive(Debug)]
pub(crate) struct Hold {
    blob: Arc<Blob>,
    extents: Range<u32>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.blob.extents.release(&self.extents);
    }
}

impl Blob {
    /// Holds extents; `None` if one of them is being evicted at this moment.
    pub(crate) fn try_hold(self: &Arc<Self>, extents: &Range<u32>) -> Option<Hold> {
        let held = self.extents.hold(extents);
        held.then(|| Hold { blob: Arc::clone(self), extents: extents.clone() })
    }

    /// Holds extents, after the eviction of one of them if need be; `None` if that takes until
    /// `until`.
    pub(crate) async fn hold(
        self: &Arc<Self>,
        extents: &Range<u32>,
        until: Instant,
    ) -> Option<Hold> {
        loop {
            let mut evicted = std::pin::pin!(self.shared.evicted.notified());
            // Before the attempt, so that an eviction that ends after it is not missed.
            evicted.as_mut().enable();
            if let Some(hold) = self.try_hold(extents) {
                return Some(hold);
            }
            timeout_at(until, evicted).await.ok()?;
        }
    }
}

/// For reads of which a part is only in memory.
impl Blob {
    /// What is only in memory of a place, if that and what is published is all of it.
    pub(super) fn loose_chunks(&self, place: &Place) -> Option<Vec<Loose>> {
        if self.loose().is_empty() {
            return None;
        }
        let absent = each(&place.chunks).filter(|chunk| !self.presence.has(*chunk));
        absent.map(|chunk| self.loose_chunk(chunk)).collect()
    }

    fn loose_chunk(&self, chunk: ChunkNo) -> Option<Loose> {
        Some((chunk, self.loose().get(self.id, chunk)?))
    }

    /// Asks for what is neither published nor in memory; gives what is in memory.
    pub(super) fn demand(
        self: &Arc<Self>,
        place: &Place,
        access: Access,
        until: Instant,
    ) -> (Vec<Loose>, Vec<Ticket>) {
        if self.loose().is_empty() {
            return (vec![], self.fetcher.demand(self, &place.chunks, access, until));
        }
        let (mut loose, mut tickets) = (vec![], vec![]);
        for chunk in each(&place.chunks).filter(|chunk| !self.presence.has(*chunk)) {
            match self.loose_chunk(chunk) {
                Some(found) => loose.push(found),
                None => {
                    let only = chunk..chunk.next();
                    tickets.extend(self.fetcher.demand(self, &only, access, until));
                }
            }
        }
        (loose, tickets)
    }

    /// The bytes `range`, some of them from `loose` chunks, the others published and held.
    pub(super) fn assembled(
        &self,
        range: &Range<u64>,
        place: &Place,
        hold: Hold,
        loose: &[Loose],
    ) -> Result<Slice, ReadError> {
        let mut bytes = Vec::new();
        for chunk in each(&place.chunks) {
            let Some((_, covers)) = self.table.bytes_of(chunk) else { continue };
            let part = covers.start.max(range.start)..covers.end.min(range.end);
            let cut = |whole: &[u8]| {
                let at = |offset: u64| usize::try_from(offset - covers.start).ok();
                Some(whole.get(at(part.start)?..at(part.end)?)?.to_vec())
            };
            let piece = match loose.iter().find(|(number, _)| *number == chunk) {
                Some((_, loose)) => cut(loose.bytes()),
                None => {
                    let view = self.view(&part, place)?;
                    Some(view.bytes(self).to_vec())
                }
            };
            bytes.extend(piece.unwrap_or_default());
        }
        if bytes.len() as u64 != range.end - range.start {
            let cause = Arc::new(io::Error::other("a chunk in memory is not whole"));
            return Err(ReadError::Cache { digest: self.id.digest, cause });
        }
        Ok(Slice { hold, bytes: SliceBytes::Copied(bytes) })
    }
}

/// Published bytes, straight from the cache file's mapping; they stay as long as this is held.
#[derive(Debug)]
pub struct Slice {
    pub(super) hold: Hold,
    pub(super) bytes: SliceBytes,
}

#[derive(Debug)]
pub(super) enum SliceBytes {
    Empty,
    /// In the mapping of a segment, counted from its start.
    Mapped {
        segment: usize,
        range: Range<usize>,
    },
    Copied(Vec<u8>),
}

impl SliceBytes {
    /// Where they are; the blob's extents are held.
    fn bytes<'a>(&'a self, blob: &'a Blob) -> &'a [u8] {
        match self {
            Self::Empty => &[],
            Self::Mapped { segment, range } => blob.segments.mapped(*segment, range),
            Self::Copied(bytes) => bytes,
        }
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.bytes(&self.hold.blob)
    }
}
