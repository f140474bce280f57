//! Loads while something goes wrong: whoever is well has the right bytes, and the registry is not
//! asked for much more.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use weightfs_store::CHUNK_BYTES;
use weightfs_tests::Megabits;
use weightfs_tests::figures::Figures;

use crate::cluster::{Cluster, Node, longest};
use crate::lab::Lab;

/// Nodes that are killed.
const KILLED: usize = 2;

/// Two nodes die at half time.
pub(crate) fn killed(lab: &Lab, figures: &mut Figures) {
    let nodes = lab.options.nodes;
    let cluster = Cluster::of_peers(lab, nodes);
    cluster.start(0..nodes);
    let loads = cluster.load(0..nodes, |cluster| {
        cluster.wait_read(0..nodes, nodes as u64 * lab.model_bytes() / 2);
        cluster.nodes[..KILLED].iter().for_each(|node| node.kill());
    });
    figures.add("killed_makespan_s", longest(&loads[KILLED..]));
    figures.add("killed_egress_blobs", lab.egress());
}

/// One node's link has a tenth of the rate until the others have all.
pub(crate) fn slow(lab: &Lab, figures: &mut Figures) {
    let nodes = lab.options.nodes;
    let (host, rate) = (&lab.hosts[0], lab.options.link);
    let cluster = Cluster::of_peers(lab, nodes);
    cluster.start(0..nodes);
    host.set_rate(Megabits(rate.0 / 10.0));
    let others = (nodes as u64 - 1) * lab.model_bytes();
    let loads = cluster.load(0..nodes, |cluster| {
        cluster.wait_read(1..nodes, others);
        host.set_rate(rate);
    });
    longest(&loads[..1]);
    figures.add("slow_makespan_s", longest(&loads[1..]));
    figures.add("slow_egress_blobs", lab.egress());
}

/// One node has all, and gives wrong bytes: its disk has gone bad.
pub(crate) fn lying(lab: &Lab, figures: &mut Figures) {
    let nodes = lab.options.nodes;
    let cluster = Cluster::of_peers(lab, nodes);
    cluster.start(0..1);
    longest(&cluster.load(0..1, |_| ()));
    let liar = cluster.nodes[0].weightfs.root();
    for file in &lab.model {
        let hex = file.digest.hex();
        let segment = liar.join(format!("blobs/sha256/{}/{hex}/segment-0", &hex[..2]));
        let segment = File::options().write(true).open(segment).unwrap();
        for chunk in 0..file.bytes / CHUNK_BYTES {
            segment.write_all_at(b"wrong", chunk * CHUNK_BYTES + 777).unwrap();
        }
    }
    cluster.start(1..nodes);
    let makespan = longest(&cluster.load(1..nodes, |_| ()));
    let lies: u64 =
        cluster.nodes[1..].iter().map(|node| node.peers()["lies"].as_u64().unwrap()).sum();
    assert!(lies > 0, "nobody was lied to");
    figures.add("lying_makespan_s", makespan);
    figures.add("lying_egress_blobs", lab.egress());
}

/// The registry refuses connections from when one node has every byte. What it has sent by then says
/// less: of an answer that nobody waited for, some was sent and lost.
pub(crate) fn registry_gone(lab: &Lab, figures: &mut Figures) {
    let nodes = lab.options.nodes;
    let cluster = Cluster::of_peers(lab, nodes);
    cluster.start(0..nodes);
    let loads = cluster.load(0..nodes, |cluster| {
        let has_all = |node: &Node| node.bytes_read() >= lab.model_bytes();
        cluster.wait_until("a node has all", || cluster.nodes.iter().any(has_all));
        lab.proxy.refuse();
    });
    let egress = lab.egress();
    lab.registry_host.run(|| lab.proxy.accept());
    figures.add("registry_gone_makespan_s", longest(&loads));
    figures.add("registry_gone_egress_blobs", egress);
}

/// A quarter of the nodes is started when the others have half.
pub(crate) fn late(lab: &Lab, figures: &mut Figures) {
    let nodes = lab.options.nodes;
    let early = nodes - nodes / 4;
    let cluster = Cluster::of_peers(lab, nodes);
    cluster.start(0..early);
    let mut late = Vec::new();
    let mut loads = cluster.load(0..early, |cluster| {
        cluster.wait_read(0..early, early as u64 * lab.model_bytes() / 2);
        cluster.start(early..nodes);
        late = cluster.load_more(early..nodes, |_| ());
    });
    loads.append(&mut late);
    figures.add("late_makespan_s", longest(&loads));
    figures.add("late_egress_blobs", lab.egress());
}

/// A node's peers die when it has read half: it goes on as one that never had any.
pub(crate) fn peers_lost(lab: &Lab, figures: &mut Figures) {
    let rate = |bytes: u64, seconds: f64| bytes as f64 / 1e6 / seconds;
    let alone = Cluster::without_peers(lab, 1);
    alone.start(0..1);
    let time = longest(&alone.load(0..1, |_| ()));
    figures.add("alone_mbps", rate(lab.model_bytes(), time));
    drop(alone);
    let nodes = 4;
    let cluster = Cluster::of_peers(lab, nodes);
    cluster.start(0..nodes);
    longest(&cluster.load(1..nodes, |_| ()));
    let mut killed = None;
    let loads = cluster.load(0..1, |cluster| {
        cluster.wait_read(0..1, lab.model_bytes() / 2);
        let left = lab.model_bytes() - cluster.nodes[0].bytes_read();
        cluster.nodes[1..].iter().for_each(|node| node.kill());
        killed = Some((std::time::Instant::now(), left));
    });
    longest(&loads);
    let (since, left) = killed.expect("they were killed");
    figures.add("peers_lost_mbps", rate(left, since.elapsed().as_secs_f64()));
}
