//! Which members are the homes of a group: those with the highest hash of group and member
//! (rendezvous hashing). A member that comes or goes changes the homes of its own groups only.
//!
//! Invariant: the ranking depends on the names alone. It must stay the same over versions, or two
//! versions in one cluster would each have homes of their own.

use crate::{Group, Node};

/// Homes of a group: one is asked, the others stand in for it.
pub const HOMES: usize = 3;

/// The homes of a group among these members, the first one first; fewer if there are not as many.
pub fn homes(group: Group, members: impl IntoIterator<Item = Node>) -> Vec<Node> {
    let mut best: Vec<(u64, Node)> = Vec::with_capacity(HOMES + 1);
    let seed = mix(group.blob ^ mix(group.number));
    for node in members {
        let score = mix(seed ^ node.0);
        if best.len() == HOMES && best.last().is_some_and(|last| score <= last.0) {
            continue;
        }
        let at = best.partition_point(|(other, _)| *other > score);
        best.insert(at, (score, node));
        best.truncate(HOMES);
    }
    best.into_iter().map(|(_, node)| node).collect()
}

/// The finalizer of SplitMix64: each bit of the input changes half of those of the output.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(number: u64) -> Group {
        Group { blob: 7, number }
    }

    fn members(count: u64) -> impl Iterator<Item = Node> + Clone {
        (0..count).map(|at| Node(mix(at)))
    }

    #[test]
    fn the_ranking_never_changes() {
        let found = homes(group(3), (1..=5).map(Node));
        assert_eq!(found, [Node(4), Node(1), Node(2)]);
    }

    #[test]
    fn groups_are_spread_evenly() {
        let mut count = std::collections::HashMap::new();
        for number in 0..10_000 {
            *count.entry(homes(group(number), members(100))[0]).or_insert(0) += 1;
        }
        assert_eq!(count.len(), 100);
        assert!(count.values().all(|count| (60..=140).contains(count)), "{count:?}");
    }

    #[test]
    fn who_leaves_takes_only_its_own_groups_along() {
        for number in 0..1000 {
            let before = homes(group(number), members(20));
            let without = homes(group(number), members(20).filter(|node| *node != before[0]));
            assert_eq!(without[..2], before[1..], "the next one steps in");
        }
    }

    #[test]
    fn few_members_are_all_homes() {
        assert!(homes(group(0), []).is_empty());
        assert_eq!(homes(group(0), [Node(1), Node(2)]).len(), 2);
    }
}
