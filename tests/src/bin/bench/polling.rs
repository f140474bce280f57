//! What a full node costs while nothing happens: every ten seconds, CRI asks for the state of every
//! snapshot, and for what containers' take.

use std::thread;
use std::time::{Duration, Instant};

use weightfs_tests::Host;
use weightfs_tests::containerd::Version;
use weightfs_tests::figures::Figures;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::snapshots::{Labels, Snapshots, labels};

use crate::Bench;
use crate::usage::cpu_seconds;

/// How often CRI asks (its `stats_collect_period`).
const PERIOD: Duration = Duration::from_secs(10);

/// Periods that are measured in a round.
const PERIODS: u32 = 3;

/// Of so many snapshots one is a container's; the others are layers.
const LAYERS_PER_CONTAINER: usize = 50;

/// Snapshots are made by so many callers at once.
const CALLERS: usize = 8;

/// Where CRI's snapshots are.
const NAMESPACE: &str = "k8s.io";

/// One round.
pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    let polled = bench.polled.get_or_init(|| Polled::new(bench.quick));
    let (pid, begin) = (polled.host.daemon.pid(), Instant::now());
    let before = cpu_seconds(pid);
    thread::sleep(PERIOD * if bench.quick { 1 } else { PERIODS });
    let spent = cpu_seconds(pid) - before;
    figures.add("polling_cpu_percent", 100.0 * spent / begin.elapsed().as_secs_f64());
}

/// A containerd with CRI that has many ordinary snapshots with us.
#[derive(Debug)]
pub(crate) struct Polled {
    host: Host,
}

impl Polled {
    fn new(quick: bool) -> Self {
        let version = if Version::V21.is_here() { Version::V21 } else { Version::Installed };
        let host = Host::with_cri_on(version);
        let count = if quick { 200 } else { 10_000 };
        thread::scope(|scope| {
            for caller in 0..CALLERS {
                let host = &host;
                scope.spawn(move || {
                    let socket = host.containerd.socket();
                    let client = Snapshots::connect(&socket, SNAPSHOTTER).in_namespace(NAMESPACE);
                    (caller..count).step_by(CALLERS).for_each(|number| make(&client, number));
                });
            }
        });
        // Of a new snapshot it asks once what it takes.
        thread::sleep(PERIOD * if quick { 1 } else { 2 });
        Self { host }
    }
}

/// Makes one as it would be there after a pull, or under a container; kept from the garbage collector.
fn make(client: &Snapshots, number: usize) {
    let kept = |more: &[(&str, &str)]| -> Labels {
        labels(&[&[("containerd.io/gc.root", "yes")], more].concat())
    };
    let active = format!("container-{number:064x}");
    client.prepare_with(&active, "", kept(&[])).expect("a snapshot");
    if !number.is_multiple_of(LAYERS_PER_CONTAINER) {
        let name = format!("sha256:{number:064x}");
        let labels = kept(&[("containerd.io/snapshot.ref", &name)]);
        client.commit_with(&name, &active, labels).expect("a layer");
    }
}
