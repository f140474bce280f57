//! What a full node costs: containerd's polling of 10,000 snapshots, and a start of the daemon
//! with 1,000 lazy snapshots and 200 models.

use std::thread;

use weightfs_tests::readers::Pulse;
use weightfs_tests::snapshots::Snapshots;
use weightfs_tests::{Bed, Daemon, Host, Many};

use crate::Bench;
use crate::figures::Figures;
use crate::usage::{cpu_seconds, wait_quiet};

/// CRI asks for each snapshot once in this time (its `stats_collect_period`), in seconds.
const POLL_SECONDS: f64 = 10.0;

/// Of so many snapshots one is a container's; the others are layers.
const LAYERS_PER_CONTAINER: usize = 50;

/// Snapshots are made by so many callers at once.
const CALLERS: usize = 8;

/// Name of the snapshotter, which our own service ignores.
const SNAPSHOTTER: &str = "weightfs";

/// One round.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    bench.polled.get_or_init(|| Polled::new(bench.quick)).measure(figures);
    restart(bench.quick, figures);
}

/// A daemon with many ordinary snapshots.
#[derive(Debug)]
pub(crate) struct Polled {
    keys: Vec<String>,
    containers: Vec<String>,
    daemon: Daemon,
    bed: Bed,
}

impl Polled {
    fn new(quick: bool) -> Self {
        let count = if quick { 200 } else { 10_000 };
        let bed = Bed::new();
        let daemon = bed.weightfs.serve(&bed.area);
        let (keys, containers) = names(count);
        thread::scope(|scope| {
            for caller in 0..CALLERS {
                let (bed, keys, containers) = (&bed, &keys, &containers);
                scope.spawn(move || make(bed, caller, keys, containers));
            }
        });
        Self { keys, containers, daemon, bed }
    }

    /// What CRI does in one period, on the daemon's side.
    fn measure(&self, figures: &mut Figures) {
        let client = Snapshots::connect(&self.bed.weightfs.snapshotter_socket(), SNAPSHOTTER);
        let pid = self.daemon.pid();
        wait_quiet(pid);
        let before = cpu_seconds(pid);
        for key in &self.keys {
            client.stat(key).expect("it is there");
        }
        for key in &self.containers {
            client.usage(key).expect("it is there");
        }
        let spent = cpu_seconds(pid) - before;
        figures.add("polling_cpu_percent", 100.0 * spent / POLL_SECONDS);
    }
}

/// Keys of all snapshots, and of those among them that are containers'.
fn names(count: usize) -> (Vec<String>, Vec<String>) {
    let name = |number: usize| match number % LAYERS_PER_CONTAINER {
        0 => format!("k8s.io/{number}/container-{number}"),
        _ => format!("k8s.io/{number}/sha256:{number:064x}"),
    };
    let keys: Vec<_> = (0..count).map(name).collect();
    let containers = keys.iter().filter(|key| key.contains("container")).cloned().collect();
    (keys, containers)
}

fn make(bed: &Bed, caller: usize, keys: &[String], containers: &[String]) {
    let client = Snapshots::connect(&bed.weightfs.snapshotter_socket(), SNAPSHOTTER);
    for key in keys.iter().skip(caller).step_by(CALLERS) {
        if containers.contains(key) {
            client.prepare(key, "").expect("a container's snapshot");
        } else {
            let active = format!("extract {key}");
            client.prepare(&active, "").expect("a layer's snapshot");
            client.commit(key, &active).expect("a layer");
        }
    }
}

/// How long the mount does not answer while a daemon is killed and the next one takes over.
fn restart(quick: bool, figures: &mut Figures) {
    let (snapshots, models) = if quick { (20, 4) } else { (1_000, 200) };
    let host = Host::with_keeper();
    let many = Many::new(&host, snapshots, models);
    host.bed.proxy.refuse();
    let pulse = Pulse::start(host.bed.weightfs.root().join("mnt"));
    host.daemon.kill_kept().expect("a daemon runs");
    host.daemon.wait_starts(2);
    figures.add("restart_ms", pulse.finish().as_secs_f64() * 1e3);
    assert_eq!(many.snapshots.list(&[]).expect("it answers").len(), snapshots);
}
