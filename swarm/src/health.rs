//! Which peers are worth asking: not those that do not answer, for a while; and not those that gave
//! bytes that are not what their digest promises, for long.

use std::collections::HashMap;
use std::time::Duration;

use crate::{Node, Now};

/// How long a peer is set aside that did not answer; each more time in a row doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long a peer is not asked that gave wrong bytes: its disk, its memory or its owner is bad,
/// and none of these mends itself soon.
const BAN: Duration = Duration::from_secs(3600);

/// Peers of which something bad is remembered; beyond it the oldest knowledge goes.
const MAX_KNOWN: usize = 8192;

/// What is thought of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is asked.
    Well,
    /// It did not answer, and is asked again then.
    Aside {
        /// Times in a row.
        failures: u32,
        /// Until when.
        until: Now,
    },
    /// It lied.
    Banned {
        /// Until when.
        until: Now,
    },
}

/// What is thought of all peers.
#[derive(Debug, Default)]
pub struct Health {
    bad: HashMap<Node, Standing>,
}

impl Health {
    /// Whether to ask it.
    pub fn is_usable(&self, node: Node, now: Now) -> bool {
        match self.bad.get(&node) {
            None | Some(Standing::Well) => true,
            Some(Standing::Aside { until, .. } | Standing::Banned { until }) => now >= *until,
        }
    }

    /// What is thought of it.
    pub fn standing(&self, node: Node, now: Now) -> Standing {
        match self.bad.get(&node) {
            Some(standing) if !self.is_usable(node, now) => *standing,
            _ => Standing::Well,
        }
    }

    /// It answered as it should.
    pub fn well(&mut self, node: Node, now: Now) {
        if matches!(self.bad.get(&node), Some(Standing::Banned { until }) if now < *until) {
            return;
        }
        self.bad.remove(&node);
    }

    /// It did not answer. What fails together counts once.
    pub fn failed(&mut self, node: Node, now: Now) {
        let failures = match self.bad.get(&node) {
            Some(Standing::Banned { until }) if now < *until => return,
            Some(Standing::Aside { until, .. }) if now < *until => return,
            Some(Standing::Aside { failures, .. }) => *failures,
            _ => 0,
        };
        let pause = doubled(FIRST_PAUSE, failures, LONGEST_PAUSE);
        self.note(node, Standing::Aside { failures: failures + 1, until: now + pause }, now);
    }

    /// It gave bytes that are not what they should be.
    pub fn lied(&mut self, node: Node, now: Now) {
        self.note(node, Standing::Banned { until: now + BAN }, now);
    }

    fn note(&mut self, node: Node, standing: Standing, now: Now) {
        if self.bad.len() >= MAX_KNOWN && !self.bad.contains_key(&node) {
            self.bad.retain(|_, known| match known {
                Standing::Well => false,
                Standing::Aside { until, .. } | Standing::Banned { until } => now < *until,
            });
            if self.bad.len() >= MAX_KNOWN {
                return;
            }
        }
        self.bad.insert(node, standing);
    }
}

fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(1 << times.min(16)).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PEER: Node = Node(7);

    #[test]
    fn who_does_not_answer_is_set_aside_for_growing_times() {
        let (mut health, mut now) = (Health::default(), Now::ZERO);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            health.failed(PEER, now);
            health.failed(PEER, now);
            now += pause * SECOND;
            assert!(!health.is_usable(PEER, now - SECOND / 2), "{pause}");
            assert!(health.is_usable(PEER, now), "{pause}");
        }
        health.well(PEER, now);
        health.failed(PEER, now);
        assert!(health.is_usable(PEER, now + SECOND), "it begins anew");
    }

    #[test]
    fn who_lies_is_not_asked_for_an_hour_whatever_else_it_does() {
        let mut health = Health::default();
        health.lied(PEER, Now::ZERO);
        health.well(PEER, SECOND);
        health.failed(PEER, SECOND);
        assert!(!health.is_usable(PEER, 3599 * SECOND));
        assert!(matches!(health.standing(PEER, SECOND), Standing::Banned { .. }));
        assert!(health.is_usable(PEER, 3600 * SECOND) && health.is_usable(Node(8), Now::ZERO));
    }

    #[test]
    fn what_is_known_is_bounded() {
        let mut health = Health::default();
        for peer in 0..10_000 {
            health.failed(Node(peer), Now::ZERO);
        }
        assert!(health.bad.len() <= MAX_KNOWN);
    }
}
