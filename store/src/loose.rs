//! Chunks for which the disk has no room: kept in memory for those who wait for them, and a few
//! for those who come next.
//!
//! Invariant: at most [`MAX_LOOSE`] of them exist, with those that a reader still holds.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::BlobId;
use crate::chunk::ChunkNo;
use crate::shared::lock;

/// Chunks in memory at the most, over all blobs (64 MiB).
const MAX_LOOSE: usize = 64;

/// For how long a chunk is kept for those who come next: long enough for a sequential reader, and
/// by then there may be room on the disk.
const KEPT_FOR: Duration = Duration::from_secs(10);

/// A chunk in memory.
#[derive(Debug)]
pub(crate) struct LooseChunk {
    bytes: Vec<u8>,
    until: Instant,
    _permit: OwnedSemaphorePermit,
}

impl LooseChunk {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Leave to keep one chunk in memory.
#[derive(Debug)]
pub(crate) struct Berth(OwnedSemaphorePermit);

/// A chunk in memory by its name.
type Kept = ((BlobId, ChunkNo), Arc<LooseChunk>);

/// The chunks in memory, the oldest first.
#[derive(Debug)]
pub(crate) struct LooseChunks {
    permits: Arc<Semaphore>,
    kept: Mutex<VecDeque<Kept>>,
}

impl Default for LooseChunks {
    fn default() -> Self {
        Self { permits: Arc::new(Semaphore::new(MAX_LOOSE)), kept: Mutex::default() }
    }
}

impl LooseChunks {
    /// A place for one more, when an older one has gone; `None` if all are held until `until`.
    pub(crate) async fn berth(&self, until: Instant) -> Option<Berth> {
        // One that a reader holds does not go by that.
        while self.permits.available_permits() == 0 && lock(&self.kept).pop_front().is_some() {}
        let permit = Arc::clone(&self.permits).acquire_owned();
        timeout_at(until, permit).await.ok()?.ok().map(Berth)
    }

    /// Keeps a chunk for those who come next.
    pub(crate) fn keep(
        &self,
        blob: BlobId,
        chunk: ChunkNo,
        bytes: Vec<u8>,
        Berth(permit): Berth,
    ) -> Arc<LooseChunk> {
        let loose =
            Arc::new(LooseChunk { bytes, until: Instant::now() + KEPT_FOR, _permit: permit });
        lock(&self.kept).push_back(((blob, chunk), Arc::clone(&loose)));
        loose
    }

    pub(crate) fn get(&self, blob: BlobId, chunk: ChunkNo) -> Option<Arc<LooseChunk>> {
        let kept = lock(&self.kept);
        let found = kept.iter().find(|(name, _)| *name == (blob, chunk));
        found.map(|(_, loose)| Arc::clone(loose)).filter(|loose| Instant::now() < loose.until)
    }

    /// Drops what was kept for long enough.
    pub(crate) fn expire(&self) {
        if !self.is_empty() {
            lock(&self.kept).retain(|(_, loose)| Instant::now() < loose.until);
        }
    }

    /// Whether there may be one.
    pub(crate) fn is_empty(&self) -> bool {
        self.permits.available_permits() == MAX_LOOSE
    }

    /// Drops what is kept of a blob that nobody reads any more, or that is poisoned.
    pub(crate) fn forget(&self, blob: BlobId) {
        if !self.is_empty() {
            lock(&self.kept).retain(|((of, _), _)| *of != blob);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digest, Form};

    #[tokio::test(start_paused = true)]
    async fn chunks_in_memory_are_bounded_with_those_that_are_held() {
        let chunks = LooseChunks::default();
        let blob = BlobId { digest: Digest::of(b""), form: Form::AsStored };
        let soon = || Instant::now() + Duration::from_secs(1);
        let mut held = vec![];
        for number in 0..2 * MAX_LOOSE as u32 {
            let berth = chunks.berth(soon()).await.unwrap();
            let loose = chunks.keep(blob, ChunkNo(number), vec![1], berth);
            if number < 10 {
                held.push(loose);
            }
            if number + 1 == MAX_LOOSE as u32 {
                held.clear();
            }
        }
        assert_eq!(lock(&chunks.kept).len(), MAX_LOOSE);
        assert!(chunks.get(blob, ChunkNo(0)).is_none());
        held.extend((0..2 * MAX_LOOSE as u32).filter_map(|at| chunks.get(blob, ChunkNo(at))));
        assert!(chunks.berth(soon()).await.is_none(), "all are held");
        held.clear();
        tokio::time::advance(KEPT_FOR).await;
        chunks.expire();
        assert!(chunks.is_empty() && chunks.berth(soon()).await.is_some());
    }
}
