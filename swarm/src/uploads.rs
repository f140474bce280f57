//! How much is given to others at once. What is over it is refused, not queued: who was refused
//! asks somebody else, and nobody waits behind strangers.

use std::collections::HashMap;

use crate::{Node, Urgency};

/// What may be given at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Answers in all; a quarter of them is kept free for demand.
    pub slots: usize,
    /// Answers to one peer.
    pub per_peer: usize,
}

/// Simulated: with 16 slots nodes wait for each other more than their links do.
impl Default for Limits {
    fn default() -> Self {
        Self { slots: 32, per_peer: 8 }
    }
}

/// What is being given.
#[derive(Debug)]
pub struct Uploads {
    limits: Limits,
    running: usize,
    of: HashMap<Node, usize>,
}

impl Uploads {
    /// Nothing yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, running: 0, of: HashMap::new() }
    }

    /// Whether there is room for one more.
    pub fn has_room(&self, peer: Node, urgency: Urgency) -> bool {
        let Limits { slots, per_peer } = self.limits;
        let slots = match urgency {
            Urgency::Demand => slots,
            Urgency::Ahead | Urgency::Background => slots - slots / 4,
        };
        self.running < slots && self.of.get(&peer).is_none_or(|running| *running < per_peer)
    }

    /// Takes a slot if there is room; what is taken must be [`Uploads::done`].
    pub fn admit(&mut self, peer: Node, urgency: Urgency) -> bool {
        let admitted = self.has_room(peer, urgency);
        if admitted {
            self.running += 1;
            *self.of.entry(peer).or_insert(0) += 1;
        }
        admitted
    }

    /// Gives a slot back.
    pub fn done(&mut self, peer: Node) {
        self.running = self.running.saturating_sub(1);
        if let Some(running) = self.of.get_mut(&peer) {
            *running = running.saturating_sub(1);
            if *running == 0 {
                self.of.remove(&peer);
            }
        }
    }

    /// Slots that are taken.
    pub const fn running(&self) -> usize {
        self.running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_the_limits_is_refused_and_demand_finds_room() {
        let mut uploads = Uploads::new(Limits { slots: 8, per_peer: 4 });
        let admit = |uploads: &mut Uploads, peer, urgency| {
            std::iter::from_fn(|| uploads.admit(Node(peer), urgency).then_some(())).count()
        };
        assert_eq!(admit(&mut uploads, 1, Urgency::Background), 4, "of one peer");
        assert_eq!(admit(&mut uploads, 2, Urgency::Ahead), 2, "a quarter is kept free");
        assert_eq!(admit(&mut uploads, 3, Urgency::Demand), 2, "for demand");
        assert_eq!(admit(&mut uploads, 4, Urgency::Demand), 0);
        uploads.done(Node(1));
        assert_eq!(admit(&mut uploads, 4, Urgency::Demand), 1);
        assert_eq!(uploads.running(), 8);
    }

    #[test]
    fn nothing_is_kept_of_peers_that_are_served() {
        let mut uploads = Uploads::new(Limits::default());
        for peer in 0..1000 {
            assert!(uploads.admit(Node(peer), Urgency::Demand));
            uploads.done(Node(peer));
        }
        assert!(uploads.of.is_empty() && uploads.running() == 0);
    }
}
