//! Daemons that give blobs to each other: the registry gives each byte once, nothing wrong is
//! served, nobody learns what it may not read, and lost peers cost nothing visible.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::run;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::weightfs::{Mounted, Weightfs};
use weightfs_tests::{Artifact, Bed, Daemon, Target};

const MODEL: &[Part] = &[
    Part { path: "a.safetensors", bytes: 40 << 20, mode: 0o644 },
    Part { path: "config.json", bytes: 517, mode: 0o644 },
];

/// Daemons on addresses of their own, all members of one cluster.
struct Cluster {
    nodes: Vec<Node>,
}

struct Node {
    weightfs: Weightfs,
    daemon: Option<Daemon>,
}

/// How a node takes part.
struct Way {
    transport: String,
    trust: &'static str,
}

/// Each test's nodes have addresses that no other process uses.
fn address(test: u8, node: usize) -> String {
    let pid = std::process::id();
    format!("127.{}.{}.{}:7700", 1 + pid / 256 % 250, pid % 256, usize::from(test) * 8 + node + 1)
}

impl Cluster {
    fn start(bed: &Bed, test: u8, count: usize, part: impl Fn(usize) -> Way) -> Self {
        let members: Vec<_> = (0..count).map(|node| address(test, node)).collect();
        let nodes = (0..count).map(|number| {
            let weightfs = Weightfs::new(&bed.area);
            let Way { transport, trust } = part(number);
            weightfs.configure(&format!(
                "[peers]\nlisten = {:?}\nmembers = {members:?}\ntrust = {trust:?}\n{transport}\n",
                members[number],
            ));
            let daemon = Some(weightfs.serve(&bed.area));
            Node { weightfs, daemon }
        });
        Self { nodes: nodes.collect() }
    }

    fn mount(&self, bed: &Bed, reference: &str) -> Vec<Mounted> {
        std::thread::scope(|scope| {
            let mounts: Vec<_> =
                self.nodes.iter().map(|node| scope.spawn(|| node.mount(bed, reference))).collect();
            mounts.into_iter().map(|mount| mount.join().unwrap()).collect()
        })
    }
}

impl Node {
    fn mount(&self, bed: &Bed, reference: &str) -> Mounted {
        self.weightfs.mount(&bed.area, reference, &bed.mount_point())
    }

    fn peers(&self) -> Value {
        serde_json::from_str(&self.weightfs.run_here(&["peers", "--json"]).ok()).unwrap()
    }

    fn from_peers(&self) -> u64 {
        self.peers()["from_peers"].as_u64().unwrap()
    }

    fn kill(&mut self) {
        self.daemon.take().unwrap().kill();
    }
}

fn plaintext(trust: &'static str) -> Way {
    Way { transport: "plaintext = true".into(), trust }
}

fn push(bed: &Bed, repository: &str) -> (PathBuf, Artifact, String) {
    let source = bed.model(MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, repository);
    (source, artifact, reference)
}

fn sent(bed: &Bed, artifact: &Artifact) -> u64 {
    (0..artifact.layers().len())
        .map(|layer| bed.proxy.bytes(Target::Blob(artifact.layer_digest(layer))))
        .sum()
}

/// All nodes read all at the same time, and see what was pushed.
fn read_all(source: &Path, mounts: &[Mounted]) {
    std::thread::scope(|scope| {
        for mounted in mounts {
            scope.spawn(|| tree::assert_same(source, mounted.dir(), Scope::ModelFiles));
        }
    });
}

#[test]
fn the_registry_gives_a_model_once_whatever_the_number_of_nodes() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/once");
    let cluster = Cluster::start(&bed, 0, 4, |_| plaintext("cluster"));
    let mounts = cluster.mount(&bed, &reference);
    bed.proxy.forget();
    read_all(&source, &mounts);
    let (sent, all) = (sent(&bed, &artifact), artifact.layer_bytes());
    let per_node: Vec<_> = cluster.nodes.iter().map(Node::from_peers).collect();
    assert!(sent <= all + all / 10, "{sent} bytes of {all} were sent; from peers: {per_node:?}");
    assert!(per_node.iter().sum::<u64>() >= 3 * all - all / 10, "{per_node:?}");
    let status = cluster.nodes[0].weightfs.run_here(&["peers"]).ok();
    assert!(status.contains("3 of 3 peers answer"), "{status}");
}
