//! What is known of a whole blob, and whether what was hashed is still what is here.
//!
//! Invariants: a verdict is about bytes that were all published when they were hashed. When a
//! chunk of those is fetched again after it was evicted, nobody knows that it is the same: the
//! *era* ends, "verified" falls back to nothing, and a hash that began in an earlier era settles
//! nothing. Not so where what comes again is compared with digests that were made of the bytes
//! that were hashed (`digests.rs`). "Poisoned" is for good.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use crate::Digest;
use crate::shared::lock;
use crate::state::Verdict;

/// Counts the changes of what is here; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Era(u64);

/// What came of a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It holds from now on.
    Now,
    /// There was one already.
    Before,
    /// What was hashed is not what is here.
    Outdated,
}

const UNKNOWN: u64 = 0;
const VERIFIED: u64 = 1;
const POISONED: u64 = 2;

/// The judgement of a blob. Reading it takes no lock.
#[derive(Debug, Default)]
pub(crate) struct Judgement {
    state: AtomicU64,
    /// The digest of a poisoned blob.
    actual: OnceLock<Digest>,
    era: AtomicU64,
    /// Held while the others change.
    changing: Mutex<()>,
}

impl Judgement {
    pub(crate) fn new(verdict: Option<Verdict>) -> Self {
        let judgement = Self::default();
        if let Some(verdict) = verdict {
            judgement.settle(verdict, Era::default());
        }
        judgement
    }

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        match self.state.load(Ordering::Acquire) {
            POISONED => self.actual.get().map(|actual| Verdict::Poisoned { actual: *actual }),
            VERIFIED => Some(Verdict::Verified),
            _ => None,
        }
    }

    pub(crate) fn is_verified(&self) -> bool {
        self.state.load(Ordering::Acquire) == VERIFIED
    }

    pub(crate) fn era(&self) -> Era {
        Era(self.era.load(Ordering::Acquire))
    }

    /// The verdict on what was hashed in `era`.
    pub(crate) fn settle(&self, verdict: Verdict, era: Era) -> Settled {
        let _changing = lock(&self.changing);
        match (self.state.load(Ordering::Acquire), verdict) {
            // What was good can be found bad: files change on disk.
            (UNKNOWN, _) | (VERIFIED, Verdict::Poisoned { .. }) => {}
            _ => return Settled::Before,
        }
        if self.era() != era {
            return Settled::Outdated;
        }
        let state = match verdict {
            Verdict::Verified => VERIFIED,
            Verdict::Poisoned { actual } => {
                let _ = self.actual.set(actual);
                POISONED
            }
        };
        self.state.store(state, Ordering::Release);
        Settled::Now
    }

    /// A chunk that was hashed, or is covered by a verdict, is about to be published again. To be
    /// called before that.
    pub(crate) fn replaced(&self) {
        let _changing = lock(&self.changing);
        self.era.fetch_add(1, Ordering::AcqRel);
        let _ = self.state.compare_exchange(VERIFIED, UNKNOWN, Ordering::AcqRel, Ordering::Acquire);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fetched_again_is_no_longer_verified_and_old_hashes_settle_nothing() {
        let judgement = Judgement::new(None);
        let first = judgement.era();
        assert_eq!(judgement.settle(Verdict::Verified, first), Settled::Now);
        assert_eq!(judgement.settle(Verdict::Verified, first), Settled::Before);
        judgement.replaced();
        assert_eq!(judgement.verdict(), None);
        assert_eq!(judgement.settle(Verdict::Verified, first), Settled::Outdated);
        assert_eq!(judgement.settle(Verdict::Verified, judgement.era()), Settled::Now);
        assert!(judgement.is_verified());
    }

    #[test]
    fn what_was_verified_can_be_found_bad_but_not_the_other_way_round() {
        let judgement = Judgement::new(Some(Verdict::Verified));
        let poisoned = Verdict::Poisoned { actual: Digest::of(b"other") };
        assert_eq!(judgement.settle(poisoned, judgement.era()), Settled::Now);
        assert_eq!(judgement.settle(Verdict::Verified, judgement.era()), Settled::Before);
        assert_eq!(judgement.verdict(), Some(poisoned));
    }

    #[test]
    fn poisoned_is_for_good() {
        let poisoned = Verdict::Poisoned { actual: Digest::of(b"other") };
        let judgement = Judgement::new(Some(poisoned));
        judgement.replaced();
        assert_eq!(judgement.settle(Verdict::Verified, judgement.era()), Settled::Before);
        assert_eq!(judgement.verdict(), Some(poisoned));
    }
}
