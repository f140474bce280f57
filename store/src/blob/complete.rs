//! Waiting until all of a blob is here and judged, as a whole or chunk by chunk: what a strict
//! read does, and a repair. Waiting until a part is here, of which nobody is a reader yet.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Blob;
use crate::ReadError;
use crate::chunk::ChunkNo;
use crate::fetch::{Failure, Priority};
use crate::read_ahead::Access;
use crate::state::Verdict;

/// Pauses between looks for room, each of which costs fetching a chunk.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

impl Blob {
    /// Fetches all that is missing and waits until the whole is hashed, or each chunk was compared. Each chunk that is waited
    /// for, and each step of the hash, may take as long as a read (`fetch.deadline`). Nothing of
    /// the blob is evicted meanwhile.
    ///
    /// # Errors
    /// When no source gives a chunk in time, or refuses it; when the cache has no room for all of
    /// the blob; when the bytes are not those of the digest, or can't be hashed.
    pub async fn complete(self: &Arc<Self>) -> Result<(), ReadError> {
        let until = Instant::now() + self.shared.fetch.deadline;
        let all = 0..self.table.extents();
        let _hold = self.hold(&all, until).await.ok_or_else(|| self.too_late())?;
        loop {
            match self.verdict() {
                Some(Verdict::Poisoned { .. }) => return self.check_trust(),
                _ if !self.presence.is_complete() => {
                    // What is left of the plan would only push others out.
                    self.fill()
                        .await
                        .inspect_err(|_| self.fetcher.drop_plans(&self.table.all()))?;
                }
                Some(Verdict::Verified) => return Ok(()),
                None if self.checks.are_done() => return Ok(()),
                None => self.judgement().await?,
            }
        }
    }

    /// Fetches what is missing of `range`, which lies inside one segment, and nothing beyond: nobody
    /// reads it yet. Each chunk may take as long as a read.
    ///
    /// # Errors
    /// When no source gives a chunk in time, or refuses it, or the cache has no room for it; when
    /// the range is not inside one segment.
    pub async fn fetch(self: &Arc<Self>, range: &Range<u64>) -> Result<(), ReadError> {
        let place = self.table.locate(range).ok_or(ReadError::OutOfRange {
            digest: self.id.digest,
            start: range.start,
            end: range.end,
        })?;
        self.ask(range);
        let mut chunks = place.chunks;
        while let Some(first) = self.presence.first_absent(&chunks) {
            self.fetch_one(first).await?;
            chunks.start = first;
        }
        Ok(())
    }

    /// Fetches what is missing, the first chunk as a reader would who waits for it: its failure
    /// is this one's. The others follow as a plan, which is made anew where it was given up.
    async fn fill(self: &Arc<Self>) -> Result<(), ReadError> {
        let mut all = self.table.all();
        while let Some(first) = self.presence.first_absent(&all) {
            // One plan at a time: it shrinks as it is carried out.
            if self.fetcher.is_calm() {
                self.fetcher.plan(self, Priority::Background, first..all.end);
            }
            self.fetch_one(first).await?;
            all.start = first;
        }
        Ok(())
    }

    /// Waits for one chunk.
    async fn fetch_one(self: &Arc<Self>, chunk: ChunkNo) -> Result<(), ReadError> {
        let until = Instant::now() + self.shared.fetch.deadline;
        let mut pause = FIRST_PAUSE;
        loop {
            let chunks = chunk..chunk.next();
            let tickets = self.fetcher.demand(self, &chunks, Access::Sequential, until);
            match self.fetcher.wait(tickets, until).await {
                Ok(loose) if loose.is_empty() => return Ok(()),
                // It came, but not into the cache: perhaps something else can go soon.
                Ok(_) if Instant::now() + pause < until => {
                    sleep(pause).await;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
                Ok(_) => return Err(self.unfinished("the cache has no room for all of it")),
                // It had joined a request that nobody else waited for.
                Err(Failure::NoRoom) => {}
                Err(failure) => return Err(failure.into_read_error(self)),
            }
        }
    }

    /// Waits for the judgement of a blob that is complete, as long as its hash comes forward.
    async fn judgement(self: &Arc<Self>) -> Result<(), ReadError> {
        let deadline = self.shared.fetch.deadline;
        loop {
            let judged = self.judged.notified();
            tokio::pin!(judged);
            // Before the look, so that a judgement between the two is noticed.
            judged.as_mut().enable();
            if self.verdict().is_some() || self.checks.are_done() {
                return Ok(());
            }
            self.hash.poke(self);
            let position = (self.hash.position(), self.unchecked().len());
            let came_forward = || position != (self.hash.position(), self.unchecked().len());
            if timeout(deadline, judged).await.is_err() && !came_forward() {
                return Err(
                    self.unfinished("all of it is here, but its hash does not come forward")
                );
            }
        }
    }

    fn unfinished(&self, cause: &str) -> ReadError {
        let deadline = self.shared.fetch.deadline;
        ReadError::Deadline { digest: self.id.digest, deadline, cause: cause.into() }
    }
}
