//! What is known of a blob's bytes, and whether they may be served.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Blob;
use crate::chunk::ChunkNo;
use crate::digests::Origin;
use crate::state::Verdict;
use crate::trust::{Era, Settled};
use crate::{ReadError, Verify};

/// What is known of a blob's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// They came over a transport that the configuration trusts; the whole was not hashed yet.
    Transport,
    /// Each chunk was compared with its digest in an index.
    Indexed,
    /// The whole blob hashes to its digest.
    Verified,
    /// The whole blob does not hash to its digest.
    Poisoned,
}

impl Blob {
    /// What is known of its bytes.
    pub(super) fn trust(&self) -> Trust {
        match self.judgement.verdict() {
            None if self.checks.are_done() => match self.checks.origin() {
                Some(Origin::Whole) => Trust::Verified,
                Some(Origin::Index) | None => Trust::Indexed,
            },
            None => Trust::Transport,
            Some(Verdict::Verified) => Trust::Verified,
            Some(Verdict::Poisoned { .. }) => Trust::Poisoned,
        }
    }

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.judgement.verdict()
    }

    /// A chunk is served that is not published.
    pub(crate) fn serve_unpublished(&self, _chunk: ChunkNo) {
        if self.judgement.is_verified() && self.checks.origin() != Some(Origin::Whole) {
            // Nobody can say whether it is the one that was hashed.
            self.judgement.replaced();
        }
    }

    pub(super) fn check_trust(&self) -> Result<(), ReadError> {
        match self.judgement.verdict() {
            Some(Verdict::Poisoned { actual }) => {
                Err(ReadError::Poisoned { digest: self.id.digest, actual })
            }
            Some(Verdict::Verified) | None => Ok(()),
        }
    }

    /// Whether what is published may be served: the whole blob is verified, or each chunk was
    /// compared, or need not be.
    pub(super) fn may_serve(&self) -> bool {
        self.shared.verify == Verify::Background
            || self.judgement.is_verified()
            || self.compares_all()
    }

    /// Whether all that is published was compared with chunk digests, and will be.
    pub(super) fn compares_all(&self) -> bool {
        // Marks of published chunks come before the digests do, and new ones only with others.
        self.has_digests() && self.unchecked().iter().all(|chunk| !self.presence.has(*chunk))
    }

    /// See [`Judgement::era`](crate::trust::Judgement::era).
    pub(crate) fn era(&self) -> Era {
        self.judgement.era()
    }

    /// Settles the judgement of the whole blob, which was hashed in `era`. That it is poisoned is
    /// said once, here.
    pub(crate) fn judge(self: &Arc<Self>, verdict: Verdict, era: Era) -> Settled {
        let settled = self.judgement.settle(verdict, era);
        self.judged.notify_waiters();
        if settled != Settled::Now {
            return settled;
        }
        match verdict {
            Verdict::Verified => {
                self.epoch.store(self.shared.epochs.now, Ordering::Release);
                self.shared.verified.send_modify(|count| *count += 1);
            }
            Verdict::Poisoned { actual } => {
                self.shared.loose.forget(self.id);
                tracing::error!(
                    blob = %self.id.digest,
                    %actual,
                    sources = ?self.source_names(),
                    "blob is poisoned: its bytes do not hash to its digest; nothing of it is served any more",
                );
            }
        }
        // A store that is closed records nothing: the next one hashes the blob again.
        if let Ok(entered) = self.enter() {
            self.shared.changed(self, 0, &entered);
        }
        settled
    }
}
