//! A start of the daemon with 1,000 lazy snapshots and 200 models.

use weightfs_tests::figures::Figures;
use weightfs_tests::readers::Pulse;
use weightfs_tests::{Host, Many};

use crate::Bench;

/// How long the mount does not answer while a daemon is killed and the next one takes over.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    let (snapshots, models) = if bench.quick { (20, 4) } else { (1_000, 200) };
    let host = Host::with_keeper();
    let many = Many::new(&host, snapshots, models);
    host.bed.proxy.refuse();
    let pulse = Pulse::start(host.bed.weightfs.root().join("mnt"));
    host.daemon.kill_kept().expect("a daemon runs");
    host.daemon.wait_starts(2);
    figures.add("restart_ms", pulse.finish().as_secs_f64() * 1e3);
    assert_eq!(many.snapshots.list(&[]).expect("it answers").len(), snapshots);
}
