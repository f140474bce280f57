//! The policy of peers: who asks whom for what, who serves, who refers, who goes to the registry.
//!
//! A blob is divided into *groups* of [`GROUP_BYTES`]. For each group a rendezvous hash ranks the
//! members; the first few are its *homes*. Whoever wants bytes of a group asks a home, which has
//! them, pulls them from the registry, or refers to others that have them or are about to. So a
//! group leaves the registry once, and no node uploads much more than it downloads.
//!
//! Invariants: no I/O, no clock, no randomness of its own: what time it is ([`Now`]), and a
//! generator, are passed in. The daemon and the simulation run the same code. Nothing here is
//! secret, and nothing is trusted: a wrong answer of a peer costs time, never bytes.

mod desk;
mod fallback;
mod health;
mod homes;
mod quest;
mod scatter;
mod uploads;

use std::time::Duration;

pub use self::desk::{Answer, Desk, Here, Inquiry, Role};
pub use self::fallback::Fallback;
pub use self::health::{Health, Standing};
pub use self::homes::{HOMES, homes};
pub use self::quest::{Quest, Step, View, Way};
pub use self::scatter::Scatter;
pub use self::uploads::{Limits, Uploads};

/// Bytes of a group: small enough that a model of 256 MiB has many to spread, large enough that a
/// question for each costs little. At 10 Gbit/s these are 300 questions a second for each node.
pub const GROUP_BYTES: u64 = 4 << 20;

/// Time since some moment of the caller's choice.
pub type Now = Duration;

/// A member, by a hash of its name that all members agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node(pub u64);

/// Bytes of a blob that are asked for together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group {
    /// A hash of the blob's name.
    pub blob: u64,
    /// Its first byte, in [`GROUP_BYTES`].
    pub number: u64,
}

impl Group {
    /// The group that a byte of a blob lies in.
    pub const fn at(blob: u64, byte: u64) -> Self {
        Self { blob, number: byte / GROUP_BYTES }
    }

    /// The byte after its last one.
    pub const fn end(self) -> u64 {
        (self.number + 1).saturating_mul(GROUP_BYTES)
    }
}

/// How urgent something is; it travels with each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// A reader waits.
    Demand,
    /// A reader will come.
    Ahead,
    /// Nobody has asked.
    Background,
}
