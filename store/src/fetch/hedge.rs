//! When a slow request is sent a second time: what hosts usually need, and how often it may be.
//! No I/O and no clock of its own.
//!
//! A request is slow when it has waited longer for its first byte, or takes longer in all, than 19
//! of 20 of its kind did lately: of the same host and of about the same size. Then what is missing
//! of it is asked for again, on another connection.
//!
//! Invariant: of 20 requests to a host one is sent twice at the most, and none to a host that has
//! just complained.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::layout::CHUNK_BYTES;
use crate::shared::lock;

/// Of so many requests, one may be sent twice.
const REQUESTS_PER_HEDGE: u32 = 20;

/// Hedges that can be saved up: what a moment of trouble may cost at once.
const MAX_SAVED: u32 = 8;

/// Times that are remembered of a class: enough for its 95th percentile to mean something, few
/// enough to follow a host that changes.
const REMEMBERED: usize = 64;

/// Times of a class before anything is concluded from them.
const MIN_KNOWN: usize = 20;

/// Nothing is slow before this time: a second request costs a connection and a round trip, too.
const MIN_WAIT: Duration = Duration::from_millis(50);

/// Size classes: one chunk, up to 4, 16, 64 chunks and more.
const CLASSES: usize = 5;

/// Hosts that are remembered; beyond it the oldest knowledge is worth the least, and all goes.
const MAX_HOSTS: usize = 256;

/// How long requests to a host may take before they are slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Usual {
    /// Until the first byte.
    pub(super) first: Duration,
    /// In all.
    pub(super) whole: Duration,
}

/// What is known of all hosts.
#[derive(Debug, Default)]
pub(crate) struct Hedging {
    hosts: Mutex<HashMap<Arc<str>, Times>>,
}

#[derive(Debug, Default)]
struct Times {
    first: Recent,
    whole: [Recent; CLASSES],
    /// In parts of a hedge: each request adds one of [`REQUESTS_PER_HEDGE`].
    saved: u32,
}

/// The last times of a class.
#[derive(Debug, Default)]
struct Recent(VecDeque<Duration>);

impl Recent {
    fn add(&mut self, time: Duration) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(time);
    }

    /// What 19 of 20 stayed below.
    fn usual(&self) -> Option<Duration> {
        if self.0.len() < MIN_KNOWN {
            return None;
        }
        let mut sorted: Vec<_> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() * 19 / 20).map(|time| (*time).max(MIN_WAIT))
    }
}

impl Hedging {
    /// A request for `bytes` is sent: when it is slow, if that can be told.
    pub(super) fn sent(&self, host: &str, bytes: u64) -> Option<Usual> {
        self.with(host, |times| {
            times.saved = (times.saved + 1).min(MAX_SAVED * REQUESTS_PER_HEDGE);
            let whole = times.whole.get(class(bytes)).and_then(Recent::usual)?;
            Some(Usual { first: times.first.usual()?, whole })
        })
    }

    /// A request got its first byte after that time.
    pub(super) fn began(&self, host: &str, time: Duration) {
        self.with(host, |times| times.first.add(time));
    }

    /// A request got all of its `bytes` in that time.
    pub(super) fn ended(&self, host: &str, bytes: u64, time: Duration) {
        self.with(host, |times| {
            if let Some(recent) = times.whole.get_mut(class(bytes)) {
                recent.add(time);
            }
        });
    }

    /// Whether a request may be sent again now; it is if this says so.
    pub(super) fn may_hedge(&self, host: &str) -> bool {
        self.with(host, |times| match times.saved.checked_sub(REQUESTS_PER_HEDGE) {
            Some(left) => {
                times.saved = left;
                true
            }
            None => false,
        })
    }

    /// The host says that it is asked too much: what was saved up is gone.
    pub(super) fn refused(&self, host: &str) {
        self.with(host, |times| times.saved = 0);
    }

    fn with<T>(&self, host: &str, change: impl FnOnce(&mut Times) -> T) -> T {
        let mut hosts = lock(&self.hosts);
        if let Some(times) = hosts.get_mut(host) {
            return change(times);
        }
        if hosts.len() >= MAX_HOSTS {
            hosts.clear();
        }
        change(hosts.entry(host.into()).or_default())
    }
}

/// The size class of a request.
fn class(bytes: u64) -> usize {
    let chunks = bytes.div_ceil(CHUNK_BYTES).max(1);
    let quarters = chunks.next_power_of_two().trailing_zeros().div_ceil(2);
    usize::try_from(quarters).unwrap_or(CLASSES).min(CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = CHUNK_BYTES;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// A host of which `count` requests for a chunk took 100 ms, 110 ms, … to 290 ms in turn.
    fn known(count: u64) -> Hedging {
        let hedging = Hedging::default();
        for number in 0..count {
            hedging.sent("host", MIB);
            hedging.began("host", millis(60));
            hedging.ended("host", MIB, millis(100 + 10 * (number % 20)));
        }
        hedging
    }

    #[test]
    fn nothing_is_slow_before_enough_is_known() {
        assert_eq!(known(19).sent("host", MIB), None);
        let usual = known(20).sent("host", MIB).unwrap();
        assert_eq!(usual, Usual { first: millis(60), whole: millis(290) });
        assert_eq!(known(20).sent("another", MIB), None);
        assert_eq!(known(20).sent("host", 16 * MIB), None, "another size");
    }

    #[test]
    fn what_is_usual_follows_the_host() {
        let hedging = known(64);
        for _ in 0..64 {
            hedging.ended("host", MIB, millis(1));
        }
        assert_eq!(hedging.sent("host", MIB).unwrap().whole, MIN_WAIT, "and is never too little");
    }

    #[test]
    fn one_of_twenty_may_be_sent_twice() {
        let hedging = known(19);
        assert!(!hedging.may_hedge("host"));
        hedging.sent("host", MIB);
        assert!(hedging.may_hedge("host") && !hedging.may_hedge("host"));
        let hedging = known(10_000);
        let saved = std::iter::from_fn(|| hedging.may_hedge("host").then_some(())).count();
        assert_eq!(saved, MAX_SAVED as usize);
    }

    #[test]
    fn a_host_that_complains_is_sent_nothing_twice() {
        let hedging = known(1000);
        hedging.refused("host");
        assert!(!hedging.may_hedge("host"));
    }

    #[test]
    fn sizes_have_classes() {
        let classes =
            [0, 1, MIB, MIB + 1, 4 * MIB, 5 * MIB, 16 * MIB, 64 * MIB, 65 * MIB, u64::MAX / 2];
        assert_eq!(classes.map(class), [0, 0, 0, 1, 1, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn hosts_are_bounded() {
        let hedging = Hedging::default();
        for number in 0..10_000 {
            hedging.sent(&number.to_string(), MIB);
        }
        assert!(lock(&hedging.hosts).len() <= MAX_HOSTS);
    }
}
