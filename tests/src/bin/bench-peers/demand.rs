//! What a reader loses while others pull from its node: the time of reads that the registry has to
//! serve, with and without them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Instant;

use weightfs_store::CHUNK_BYTES;
use weightfs_tests::figures::Figures;

use crate::cluster::{self, Cluster, longest};
use crate::lab::Lab;

/// Nodes that pull.
const PULLERS: usize = 8;

/// Reads of each kind.
const READS: usize = 60;
const QUICK_READS: usize = 6;

pub(crate) fn measure(lab: &Lab, figures: &mut Figures) {
    let nodes = lab.options.nodes.min(PULLERS + 1);
    // Those who pull know that node only, and it fetches nothing unasked.
    let cluster = Cluster::new(lab, nodes, |number| match number {
        0 => {
            let all: Vec<_> = (0..nodes).collect();
            let fetch = "[fetch]\nbackground = \"off\"\nprefetch = false\n";
            fetch.to_owned() + &cluster::peers(lab, 0, &all)
        }
        number => cluster::peers(lab, number, &[0, number]),
    });
    let reads = if lab.options.quick { QUICK_READS } else { READS };
    let (names, reference) = lab.push_small_files(2 * reads);
    cluster.start(0..nodes);
    longest(&cluster.load(0..1, |_| ()));
    let dir = cluster.nodes[0].mount(lab, &reference);
    let alone = median_ms(&dir, &names[..reads]);
    let given = || cluster.nodes[0].peers()["to_peers"].as_u64().unwrap();
    let mut pulled = None;
    let all = (nodes as u64 - 1) * lab.model_bytes();
    let loads = cluster.load(1..nodes, |cluster| {
        cluster.wait_until("bytes are pulled", || given() > all / 50);
        pulled = Some(median_ms(&dir, &names[reads..]));
        assert!(given() < all, "they had all before it was measured");
        cluster.nodes[1..].iter().for_each(|node| node.kill());
    });
    assert!(loads.iter().all(Result::is_err), "they had all before it was measured");
    let pulled = pulled.expect("it was measured");
    figures.add("demand_alone_ms", alone);
    figures.add("demand_pulled_ms", pulled);
    figures.add("demand_delay_ratio", pulled / alone);
}

/// A page of each file is read, one after the other; the median time.
fn median_ms(dir: &Path, names: &[String]) -> f64 {
    let mut times: Vec<_> = names.iter().map(|name| read_ms(&dir.join(name))).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn read_ms(path: &Path) -> f64 {
    let file = File::open(path).unwrap();
    let mut page = [0; 4096];
    let start = Instant::now();
    file.read_exact_at(&mut page, CHUNK_BYTES / 2).unwrap();
    start.elapsed().as_secs_f64() * 1e3
}
