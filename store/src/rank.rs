//! In which order extents are evicted.
//!
//! Each has a rank, a moment: the lowest goes first. It is when the extent was read last, with two
//! corrections. What was fetched in the background and never read counts as older than it is, so
//! that it makes room before anything that somebody wanted. What was read again after a while
//! counts as younger, so that one long sequential load does not push out what is in daily use.
//!
//! Lock-free: a read pays for a clock and, at most once in [`GRAIN`], one write.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// By how much unread background data counts as older, and ranks begin.
const COLD: Duration = Duration::from_secs(24 * 3600);

/// By how much what was read again counts as younger.
const WARM: Duration = Duration::from_secs(3600);

/// Two reads of an extent that are further apart than this are two uses. One pass over 16 MiB
/// takes less, even over a slow network.
const REUSE: Duration = Duration::from_secs(30);

/// Ranks are not refined below this.
const GRAIN: Duration = Duration::from_millis(1);

/// The lowest bit of a rank: somebody has read the extent since it was filled.
const READ: u64 = 1;

/// The clock of a store.
#[derive(Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// Nanoseconds since a day before the start.
    fn now(&self) -> u64 {
        nanos(self.0.elapsed() + COLD)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The ranks of a blob's extents. 0 is one that nothing is known of.
#[derive(Debug)]
pub(crate) struct Ranks(Box<[AtomicU64]>);

impl Ranks {
    pub(crate) fn new(extents: u32) -> Self {
        Self((0..extents).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn of(&self, extent: u32) -> u64 {
        self.word(extent).map_or(0, |rank| rank.load(Ordering::Relaxed))
    }

    /// Somebody reads bytes of the extent.
    pub(crate) fn read(&self, extent: u32, clock: &Clock) {
        let Some(word) = self.word(extent) else { return };
        let (old, now) = (word.load(Ordering::Relaxed), clock.now());
        let new = after_read(old, now);
        if new.saturating_sub(old) > nanos(GRAIN) || old & READ == 0 {
            // Races only lose one of two readings that are a moment apart.
            word.store(new, Ordering::Relaxed);
        }
    }

    /// Whether the extent was read within that time.
    pub(crate) fn is_hot(&self, extent: u32, within: Duration, clock: &Clock) -> bool {
        // A warm one lies in the future: when it was read is told by how far.
        let (rank, now) = (self.of(extent), clock.now());
        let read = if rank > now { rank.saturating_sub(nanos(WARM)) } else { rank };
        rank & READ != 0 && now.saturating_sub(read) <= nanos(within)
    }

    /// Bytes of the extent were fetched for somebody who reads, or soon will.
    pub(crate) fn wanted(&self, extent: u32, clock: &Clock) {
        if let Some(word) = self.word(extent) {
            word.fetch_max(clock.now() & !READ, Ordering::Relaxed);
        }
    }

    /// Bytes of the extent were fetched in the background.
    pub(crate) fn unasked(&self, extent: u32, clock: &Clock) {
        if let Some(word) = self.word(extent) {
            let cold = clock.now().saturating_sub(nanos(COLD));
            word.fetch_max(cold & !READ, Ordering::Relaxed);
        }
    }

    fn word(&self, extent: u32) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(extent).ok()?)
    }
}

fn after_read(old: u64, now: u64) -> u64 {
    // A warm one lies in the future, and stays warm however it is read.
    let again = old & READ != 0 && (old > now || now - old > nanos(REUSE));
    let rank = if again { now + nanos(WARM) } else { now };
    rank | READ
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const DAY: u64 = 24 * 3600 * SECOND;

    #[test]
    fn what_nobody_asked_for_goes_first_and_what_is_used_again_last() {
        let (clock, ranks) = (Clock::start(), Ranks::new(3));
        ranks.wanted(0, &clock);
        ranks.unasked(1, &clock);
        ranks.read(2, &clock);
        assert!(ranks.of(1) < ranks.of(0) && ranks.of(0) < ranks.of(2) + SECOND);
        ranks.unasked(2, &clock);
        assert!(ranks.of(2) > ranks.of(1), "what more is fetched does not make it colder");
        ranks.read(1, &clock);
        assert!(ranks.of(1) >= ranks.of(0), "once read, it counts");
        ranks.read(9, &clock);
        assert_eq!(ranks.of(9), 0, "no such extent");
    }

    #[test]
    fn what_was_read_a_moment_ago_is_hot() {
        let (clock, ranks) = (Clock::start(), Ranks::new(3));
        let within = Duration::from_secs(10);
        ranks.wanted(0, &clock);
        assert!(!ranks.is_hot(0, within, &clock), "nobody has read it");
        ranks.read(0, &clock);
        assert!(ranks.is_hot(0, within, &clock) && !ranks.is_hot(1, within, &clock));
        let past = clock.now() - nanos(Duration::from_secs(11));
        for (extent, rank) in [(1, past | READ), (2, (past + nanos(WARM)) | READ)] {
            ranks.word(extent).unwrap().store(rank, Ordering::Relaxed);
            assert!(!ranks.is_hot(extent, within, &clock), "long ago");
        }
        ranks.word(2).unwrap().store((clock.now() + nanos(WARM)) | READ, Ordering::Relaxed);
        assert!(ranks.is_hot(2, within, &clock), "a warm one, just now");
    }

    #[test]
    fn a_second_use_warms_and_one_pass_does_not() {
        let first = after_read(0, DAY);
        let pass = after_read(first, DAY + 5 * SECOND);
        assert!(pass < DAY + 6 * SECOND);
        let warm = after_read(pass, DAY + 100 * SECOND);
        assert!(warm > DAY + 3600 * SECOND);
        assert!(after_read(warm, DAY + 200 * SECOND) > warm, "still warm");
        let unread = DAY & !READ;
        assert!(after_read(unread, DAY + 100 * SECOND) < DAY + 101 * SECOND, "fetched long before");
    }
}
