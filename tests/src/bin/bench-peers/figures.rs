//! Every figure that is measured, and what is to be reached.

use weightfs_tests::figures::{Bound, Kind, Reach, Unit, kind, value};

/// Every figure, in the order of the table.
pub(crate) const CATALOGUE: &[Kind] = &[
    kind("egress_blobs", Unit::Blobs, "all at once: what the registry sent"),
    kind("makespan_s", Unit::Seconds, "  until the last node had all"),
    kind("makespan_ideal_s", Unit::Seconds, "  ideal: the model over a node's own link"),
    kind("makespan_of_ideal", Unit::Times, "  of the ideal"),
    kind("makespan_no_peers_s", Unit::Seconds, "  without peers"),
    kind("no_peers_egress_blobs", Unit::Blobs, "  what the registry sent then"),
    kind("killed_egress_blobs", Unit::Blobs, "two killed at half time: registry"),
    kind("killed_makespan_s", Unit::Seconds, "  until the last other one had all"),
    kind("slow_egress_blobs", Unit::Blobs, "one slower by ten: registry"),
    kind("slow_makespan_s", Unit::Seconds, "  until the last other one had all"),
    kind("lying_egress_blobs", Unit::Blobs, "one that lies: registry"),
    kind("lying_makespan_s", Unit::Seconds, "  until the last other one had all"),
    kind("registry_gone_egress_blobs", Unit::Blobs, "registry gone once a node has all: registry"),
    kind("registry_gone_makespan_s", Unit::Seconds, "  until the last one had all"),
    kind("late_egress_blobs", Unit::Blobs, "a quarter joins at half time: registry"),
    kind("late_makespan_s", Unit::Seconds, "  the longest load of any of them"),
    kind("alone_mbps", Unit::Rate, "a node alone, from the registry"),
    kind("peers_lost_mbps", Unit::Rate, "  after all its peers were killed"),
    kind("demand_alone_ms", Unit::Milliseconds, "a read that the registry serves, median"),
    kind("demand_pulled_ms", Unit::Milliseconds, "  while 8 peers pull from that node"),
    kind("demand_delay_ratio", Unit::Times, "  of that without them"),
];

fn egress(
    figures: &weightfs_tests::figures::Figures,
    name: &str,
) -> Option<weightfs_tests::figures::Judgement> {
    value(figures, name, Bound::AtMost(1.3))
}

/// What is to be reached.
pub(crate) const REACHES: &[Reach] = &[
    Reach {
        title: "all at once, blobs from the registry",
        judge: |f| value(f, "egress_blobs", Bound::AtMost(1.05)),
    },
    Reach { title: "two killed, blobs", judge: |f| egress(f, "killed_egress_blobs") },
    Reach { title: "one slow, blobs", judge: |f| egress(f, "slow_egress_blobs") },
    Reach { title: "one lies, blobs", judge: |f| egress(f, "lying_egress_blobs") },
    Reach { title: "registry gone, blobs", judge: |f| egress(f, "registry_gone_egress_blobs") },
    Reach { title: "some late, blobs", judge: |f| egress(f, "late_egress_blobs") },
    Reach {
        title: "a demand read while 8 peers pull, of one alone",
        judge: |f| value(f, "demand_delay_ratio", Bound::AtMost(1.1)),
    },
];
