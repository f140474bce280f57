//! Waiting until all of a blob is here and judged: what a strict read does, and a repair.

use std::sync::Arc;

use tokio::time::{Instant, timeout};

use super::Blob;
use crate::ReadError;
use crate::fetch::Priority;
use crate::read_ahead::Access;
use crate::state::Verdict;

impl Blob {
    /// Fetches all that is missing and waits until the whole is hashed. Each chunk that is waited
    /// for, and each step of the hash, may take as long as a read (`fetch.deadline`).
    ///
    /// # Errors
    /// When no source gives a chunk in time, or refuses it; when the bytes are not those of the
    /// digest, or can't be hashed.
    pub async fn complete(self: &Arc<Self>) -> Result<(), ReadError> {
        loop {
            match self.verdict() {
                Some(Verdict::Verified) => return Ok(()),
                Some(Verdict::Poisoned { .. }) => return self.check_trust(),
                None if self.presence.is_complete() => self.judgement().await?,
                None => self.fill().await?,
            }
        }
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
            let until = Instant::now() + self.shared.fetch.deadline;
            let chunk = first..first.next();
            let tickets = self.fetcher.demand(self, &chunk, Access::Sequential, until);
            self.fetcher.wait(self, tickets, until).await?;
            all.start = first;
        }
        Ok(())
    }

    /// Waits for the judgement of a blob that is complete, as long as its hash comes forward.
    async fn judgement(self: &Arc<Self>) -> Result<(), ReadError> {
        let deadline = self.shared.fetch.deadline;
        loop {
            let judged = self.judged.notified();
            tokio::pin!(judged);
            // Before the look, so that a judgement between the two is noticed.
            judged.as_mut().enable();
            if self.verdict().is_some() {
                return Ok(());
            }
            self.hash.poke(self);
            let position = self.hash.position();
            if timeout(deadline, judged).await.is_err() && position == self.hash.position() {
                return Err(self.not_judged());
            }
        }
    }

    fn not_judged(&self) -> ReadError {
        ReadError::Deadline {
            digest: self.id.digest,
            deadline: self.shared.fetch.deadline,
            cause: "all of it is here, but its hash does not come forward".into(),
        }
    }
}
