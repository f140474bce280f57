//! What others are given of a blob: published bytes, also of one that is not whole, and what comes
//! while they wait. It is no read: nothing is read ahead for it, and it keeps nothing in the cache
//! for longer than it takes.

use std::ops::Range;
use std::sync::Arc;

use tokio::time::{Instant, timeout_at};
use weightfs_swarm::Scatter;

use super::{Blob, Slice, Trust};
use crate::chunk::ChunkNo;
use crate::fetch::Priority;
use crate::read_ahead::Access;
use crate::{ReadError, Urgency};

impl Blob {
    /// Others fetch it, too: what nobody waits for is fetched in an order that the seed says, so
    /// that they have something for each other.
    pub fn scatter(&self, seed: u64) {
        self.fetcher.scatter(Scatter::new(seed));
    }

    /// The first byte of a range that is not published.
    pub fn first_missing(&self, range: &Range<u64>) -> Option<u64> {
        let mut at = range.start;
        while at < range.end {
            let (chunk, bytes) = self.chunk_at(at)?;
            if !self.presence.has(chunk) {
                return Some(at);
            }
            at = bytes.end;
        }
        None
    }

    /// Published bytes from `at` on, up to `end` or the end of their chunk; `None` if they are not
    /// published, or the blob serves nothing.
    ///
    /// # Errors
    /// When the cache file can't be read, or the blob is poisoned.
    pub fn published(self: &Arc<Self>, at: u64, end: u64) -> Result<Option<Slice>, ReadError> {
        self.check_trust()?;
        let Some((chunk, bytes)) = self.chunk_at(at) else { return Ok(None) };
        let range = at..bytes.end.min(end);
        let Some(place) = self.table.locate(&range) else { return Ok(None) };
        match self.try_hold(&place.extents) {
            Some(hold) if self.may_serve() && self.presence.has(chunk) => {
                self.slice(&range, &place, hold).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// As [`Blob::published`], and waits for the bytes until then, if somebody fetches them.
    ///
    /// # Errors
    /// As [`Blob::published`].
    pub async fn published_by(
        self: &Arc<Self>,
        at: u64,
        end: u64,
        until: Instant,
    ) -> Result<Option<Slice>, ReadError> {
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            // Before the look, so that what comes after it is not missed.
            arrived.as_mut().enable();
            if let Some(slice) = self.published(at, end)? {
                return Ok(Some(slice));
            }
            if timeout_at(until, arrived).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// Somebody else wants bytes that are not here: they are fetched, beside what this node needs,
    /// and never before what its own readers wait for. Does not wait.
    pub fn pull(self: &Arc<Self>, range: &Range<u64>, urgency: Urgency) {
        let mut at = range.start;
        while at < range.end {
            let Some((_, bytes)) = self.chunk_at(at) else { return };
            let segment = self.layout().segment_at(at).and_then(|at| self.layout().segment(at));
            let end = segment.map_or(bytes.end, |segment| segment.end).min(range.end);
            let Some(place) = self.table.locate(&(at..end)) else { return };
            match urgency {
                Urgency::Demand => {
                    let until = Instant::now() + self.shared.fetch.deadline;
                    // Nobody waits here: whoever wants them sees them arrive.
                    drop(self.fetcher.demand(self, &place.chunks, Access::Random, until));
                }
                Urgency::Ahead => self.fetcher.read_ahead(self, &place.chunks, end - at),
                Urgency::Background => self.fetcher.plan(self, Priority::Profile, place.chunks),
            }
            at = end;
        }
    }

    /// Whether what is published was compared with digests, of the whole or of each chunk.
    pub fn is_checked(&self) -> bool {
        match self.trust() {
            Trust::Verified | Trust::Indexed => true,
            Trust::Transport | Trust::Poisoned => false,
        }
    }

    fn chunk_at(&self, at: u64) -> Option<(ChunkNo, Range<u64>)> {
        let place = self.table.locate(&(at..at.checked_add(1)?))?;
        let chunk = place.chunks.start;
        self.table.bytes_of(chunk).map(|(_, bytes)| (chunk, bytes))
    }
}
