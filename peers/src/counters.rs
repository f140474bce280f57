//! What came from where, and went to whom: how much so far, and how much now.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use weightfs_swarm::{Node, Standing};

use crate::lock;
use crate::table::Table;

/// Peers whose bytes are counted; what others give counts in the sum only.
const MAX_COUNTED: usize = 8192;

/// What "now" means: bytes count less the longer ago they came.
const NOW: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct Counters {
    epoch: Instant,
    from_registry: Mutex<Flow>,
    from_peers: Mutex<Flow>,
    to_peers: Mutex<Flow>,
    lies: AtomicU64,
    fallbacks: AtomicU64,
    peers: Mutex<BTreeMap<Node, Traffic>>,
}

/// What a peer gave and got.
#[derive(Debug, Default, Clone, Copy)]
struct Traffic {
    from: Flow,
    to: Flow,
}

/// Bytes that flow one way.
#[derive(Debug, Default, Clone, Copy)]
struct Flow {
    bytes: u64,
    /// Those of late, each worth less with time, as of `at`.
    recent: f64,
    at: Duration,
}

impl Flow {
    fn add(&mut self, bytes: u64, now: Duration) {
        self.bytes += bytes;
        self.recent = self.recent_at(now) + bytes as f64;
        self.at = now;
    }

    fn recent_at(&self, now: Duration) -> f64 {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.recent * (-passed / NOW.as_secs_f64()).exp()
    }

    fn amount(&self, now: Duration) -> Amount {
        let rate = self.recent_at(now) / NOW.as_secs_f64();
        // Less than a byte a second is nothing.
        Amount { bytes: self.bytes, rate: rate as u64 }
    }
}

/// Bytes so far, and bytes a second now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// So far.
    pub bytes: u64,
    /// A second, over the last few.
    pub rate: u64,
}

/// What is known of the other nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeersStatus {
    /// This node's name among the members; empty if it is none of them.
    pub name: String,
    /// Of blobs that peers could have, from their registries.
    pub from_registry: Amount,
    /// From peers.
    pub from_peers: Amount,
    /// To peers.
    pub to_peers: Amount,
    /// Chunks of peers that were not what their digest promises.
    pub lies: u64,
    /// Requests to registries because peers did not answer or were busy.
    pub fallbacks: u64,
    /// Each other member.
    pub peers: Vec<PeerStatus>,
}

/// What is known of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// `host:port`.
    pub name: String,
    /// One of ok, aside (it does not answer), banned (it lied).
    pub state: &'static str,
    /// What it gave.
    pub from: Amount,
    /// What it got.
    pub to: Amount,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            from_registry: Mutex::default(),
            from_peers: Mutex::default(),
            to_peers: Mutex::default(),
            lies: AtomicU64::new(0),
            fallbacks: AtomicU64::new(0),
            peers: Mutex::default(),
        }
    }
}

impl Counters {
    pub(crate) fn came_from_registry(&self, bytes: u64) {
        lock(&self.from_registry).add(bytes, self.epoch.elapsed());
    }

    pub(crate) fn came_from(&self, peer: Node, bytes: u64) {
        let now = self.epoch.elapsed();
        lock(&self.from_peers).add(bytes, now);
        self.with(peer, |traffic| traffic.from.add(bytes, now));
    }

    pub(crate) fn went_to(&self, peer: Node, bytes: u64) {
        let now = self.epoch.elapsed();
        lock(&self.to_peers).add(bytes, now);
        self.with(peer, |traffic| traffic.to.add(bytes, now));
    }

    pub(crate) fn lied(&self) {
        self.lies.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn fell_back(&self) {
        self.fallbacks.fetch_add(1, Ordering::Relaxed);
    }

    fn with(&self, peer: Node, count: impl FnOnce(&mut Traffic)) {
        let mut peers = lock(&self.peers);
        if peers.len() < MAX_COUNTED || peers.contains_key(&peer) {
            count(peers.entry(peer).or_default());
        }
    }

    pub(crate) fn status(&self, table: &Table) -> PeersStatus {
        let now = self.epoch.elapsed();
        let traffic = lock(&self.peers).clone();
        let peers = table.others().into_iter().map(|(node, name, standing)| {
            let Traffic { from, to } = traffic.get(&node).copied().unwrap_or_default();
            let state = match standing {
                Standing::Well => "ok",
                Standing::Aside { .. } => "aside",
                Standing::Banned { .. } => "banned",
            };
            let (from, to) = (from.amount(now), to.amount(now));
            PeerStatus { name: name.to_string(), state, from, to }
        });
        PeersStatus {
            name: table.my_name().map_or_else(String::new, |name| name.to_string()),
            from_registry: lock(&self.from_registry).amount(now),
            from_peers: lock(&self.from_peers).amount(now),
            to_peers: lock(&self.to_peers).amount(now),
            lies: self.lies.load(Ordering::Relaxed),
            fallbacks: self.fallbacks.load(Ordering::Relaxed),
            peers: peers.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_late_and_fades() {
        let mut flow = Flow::default();
        let mut now = Duration::ZERO;
        for _ in 0..200 {
            now += Duration::from_millis(100);
            flow.add(1_000_000, now);
        }
        let Amount { bytes, rate } = flow.amount(now);
        assert_eq!(bytes, 200_000_000);
        assert!((9_500_000..10_500_000).contains(&rate), "{rate}");
        let later = flow.amount(now + 10 * NOW);
        assert!(later.rate < 1000 && later.bytes == bytes, "{later:?}");
    }
}
