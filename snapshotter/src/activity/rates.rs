//! How fast things grow: between two looks at totals that only grow, and second by second.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Seconds of history.
const HISTORY: usize = 120;

/// Rates over less than this are chance.
const SHORTEST: Duration = Duration::from_millis(200);

/// What was seen longer ago says nothing of now.
const LONGEST: Duration = Duration::from_secs(5);

/// Bytes that only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Bytes {
    pub(super) read: u64,
    pub(super) fetched: u64,
}

impl Bytes {
    /// What a second brought.
    fn rate(self, before: Self, time: Duration) -> Self {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
        let rate = |now: u64, then: u64| now.saturating_sub(then).saturating_mul(1000) / millis;
        Self { read: rate(self.read, before.read), fetched: rate(self.fetched, before.fetched) }
    }
}

/// The last look, and what changed till then.
#[derive(Debug)]
pub(super) struct Rates<K> {
    at: Option<Instant>,
    totals: HashMap<K, Bytes>,
    rates: HashMap<K, Bytes>,
}

impl<K> Default for Rates<K> {
    fn default() -> Self {
        Self { at: None, totals: HashMap::new(), rates: HashMap::new() }
    }
}

impl<K: Clone + Eq + Hash> Rates<K> {
    /// Whether nobody has looked lately.
    pub(super) fn are_old(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| now.duration_since(at) > LONGEST)
    }

    /// Notes what there is in all, and what it grew by.
    pub(super) fn look(&mut self, totals: HashMap<K, Bytes>, now: Instant) {
        let time = self.at.map(|at| now.duration_since(at));
        if time.is_some_and(|time| time < SHORTEST) {
            return;
        }
        let time = time.filter(|time| *time <= LONGEST);
        let rate = |(key, bytes): (&K, &Bytes)| {
            Some((key.clone(), bytes.rate(*self.totals.get(key)?, time?)))
        };
        self.rates = totals.iter().filter_map(rate).collect();
        self.totals = totals;
        self.at = Some(now);
    }

    /// Bytes a second; none of what was not seen before.
    pub(super) fn of(&self, key: &K) -> Bytes {
        self.rates.get(key).copied().unwrap_or_default()
    }
}

/// The last seconds, the oldest first.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    last: Option<(Bytes, Instant)>,
    seconds: VecDeque<Bytes>,
}

impl History {
    /// Notes a second.
    pub(super) fn note(&mut self, total: Bytes, now: Instant) {
        let Some((before, at)) = self.last.replace((total, now)) else { return };
        if self.seconds.len() == HISTORY {
            self.seconds.pop_front();
        }
        self.seconds.push_back(total.rate(before, now.duration_since(at)));
    }

    /// Whether nothing was read or fetched in the last second, or since.
    pub(super) fn is_still(&self, total: Bytes) -> bool {
        let since = self.last.is_none_or(|(last, _)| last == total);
        since && self.seconds.back().is_none_or(|second| *second == Bytes::default())
    }

    pub(super) fn seconds(&self) -> impl Iterator<Item = Bytes> {
        self.seconds.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn bytes(read: u64, fetched: u64) -> Bytes {
        Bytes { read, fetched }
    }

    #[test]
    fn rates_are_of_a_second() {
        let rate = bytes(1100, 40).rate(bytes(100, 50), Duration::from_millis(500));
        assert_eq!(rate, bytes(2000, 0), "what shrinks was begun anew");
        assert_eq!(bytes(5, 0).rate(bytes(0, 0), Duration::ZERO).read, 5000, "not infinitely fast");
        assert_eq!(bytes(u64::MAX, 0).rate(bytes(0, 0), Duration::ZERO).read, u64::MAX);
    }

    #[test]
    fn a_look_too_soon_changes_nothing() {
        let begin = Instant::now();
        let total = |read| HashMap::from([("a", bytes(read, 0))]);
        let mut rates = Rates::default();
        assert!(rates.are_old(begin));
        rates.look(total(100), begin);
        assert_eq!(rates.of(&"a"), bytes(0, 0), "nothing to compare with");
        rates.look(total(300), begin + Duration::from_secs(2));
        rates.look(total(900), begin + Duration::from_millis(2100));
        assert_eq!(rates.of(&"a"), bytes(100, 0));
        rates.look(total(1300), begin + Duration::from_secs(3));
        assert_eq!((rates.of(&"a"), rates.of(&"b")), (bytes(1000, 0), bytes(0, 0)));
        assert!(!rates.are_old(begin + Duration::from_secs(4)));
        assert!(rates.are_old(begin + Duration::from_secs(9)));
        rates.look(total(9_000_000), begin + Duration::from_secs(9));
        assert_eq!(rates.of(&"a"), bytes(0, 0), "what grew some time ago does not grow now");
    }

    #[test]
    fn it_is_still_when_nothing_grew_for_a_second() {
        let (begin, mut history) = (Instant::now(), History::default());
        let second = |number| begin + Duration::from_secs(number);
        assert!(history.is_still(bytes(7, 7)));
        history.note(bytes(7, 7), begin);
        assert!(history.is_still(bytes(7, 7)) && !history.is_still(bytes(7, 8)));
        history.note(bytes(7, 8), second(1));
        assert!(!history.is_still(bytes(7, 8)), "it grew a moment ago");
        history.note(bytes(7, 8), second(2));
        assert!(history.is_still(bytes(7, 8)));
    }

    #[test]
    fn the_history_is_bounded() {
        let (begin, mut history) = (Instant::now(), History::default());
        for second in 0..500 {
            history.note(bytes(second * second, 0), begin + Duration::from_secs(second));
        }
        let seconds: Vec<_> = history.seconds().map(|second| second.read).collect();
        assert_eq!((seconds.len(), seconds.last()), (HISTORY, Some(&(2 * 499 - 1))));
    }
}
