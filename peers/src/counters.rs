//! What came from where, and went to whom: plain counters.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use weightfs_swarm::{Node, Standing};

use crate::lock;
use crate::table::Table;

/// Peers whose bytes are counted; what others give counts in the sum only.
const MAX_COUNTED: usize = 8192;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    from_registry: AtomicU64,
    from_peers: AtomicU64,
    to_peers: AtomicU64,
    lies: AtomicU64,
    fallbacks: AtomicU64,
    peers: Mutex<BTreeMap<Node, Traffic>>,
}

/// Bytes that a peer gave and got.
#[derive(Debug, Default, Clone, Copy)]
struct Traffic {
    from: u64,
    to: u64,
}

/// What is known of the other nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeersStatus {
    /// This node's name among the members; empty if it is none of them.
    pub name: String,
    /// Bytes of blobs that peers could have, from their registries.
    pub from_registry: u64,
    /// Bytes from peers.
    pub from_peers: u64,
    /// Bytes to peers.
    pub to_peers: u64,
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
    /// Bytes that it gave.
    pub from: u64,
    /// Bytes that it got.
    pub to: u64,
}

impl Counters {
    pub(crate) fn came_from_registry(&self, bytes: u64) {
        self.from_registry.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn came_from(&self, peer: Node, bytes: u64) {
        self.from_peers.fetch_add(bytes, Ordering::Relaxed);
        self.with(peer, |traffic| traffic.from += bytes);
    }

    pub(crate) fn went_to(&self, peer: Node, bytes: u64) {
        self.to_peers.fetch_add(bytes, Ordering::Relaxed);
        self.with(peer, |traffic| traffic.to += bytes);
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
        let traffic = lock(&self.peers).clone();
        let peers = table.others().into_iter().map(|(node, name, standing)| {
            let Traffic { from, to } = traffic.get(&node).copied().unwrap_or_default();
            let state = match standing {
                Standing::Well => "ok",
                Standing::Aside { .. } => "aside",
                Standing::Banned { .. } => "banned",
            };
            PeerStatus { name: name.to_string(), state, from, to }
        });
        PeersStatus {
            name: table.my_name().map_or_else(String::new, |name| name.to_string()),
            from_registry: self.from_registry.load(Ordering::Relaxed),
            from_peers: self.from_peers.load(Ordering::Relaxed),
            to_peers: self.to_peers.load(Ordering::Relaxed),
            lies: self.lies.load(Ordering::Relaxed),
            fallbacks: self.fallbacks.load(Ordering::Relaxed),
            peers: peers.collect(),
        }
    }
}
