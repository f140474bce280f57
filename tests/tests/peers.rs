//! Daemons that give blobs to each other: the registry gives each byte once, nothing wrong is
//! served, nobody learns what it may not read, and lost peers cost nothing visible.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use weightfs_tests::certificates::PeerAuthority;
use weightfs_tests::metrics::{self, Metrics};
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::wait::wait_until;
use weightfs_tests::weightfs::{Mounted, Weightfs, binary};
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
            let peers = format!(
                "[peers]\nlisten = {:?}\nmembers = {members:?}\ntrust = {trust:?}\n{transport}\n",
                members[number],
            );
            metrics::configure(&weightfs, &peers);
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

    fn bytes_of_peers(&self) -> u64 {
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
    let by_mounting = sent(&bed, &artifact);
    bed.proxy.forget();
    read_all(&source, &mounts);
    let (sent, all) = (sent(&bed, &artifact), artifact.layer_bytes());
    let per_node: Vec<_> = cluster.nodes.iter().map(Node::bytes_of_peers).collect();
    let told: Vec<_> = cluster.nodes.iter().map(Node::peers).collect();
    assert!(sent <= all + all / 10, "{sent} bytes of {all} were sent: {told:#?}");
    assert!(per_node.iter().sum::<u64>() >= 3 * all - all / 10, "{per_node:?}");
    let status = cluster.nodes[0].weightfs.run_here(&["peers"]).ok();
    assert!(status.contains("3 of 3 peers answer"), "{status}");
    // Each byte is counted with who gave it; what a cancelled request has left is not.
    let labelled = |from: &str| -> Vec<u64> {
        let name = format!("weightfs_fetched_bytes_total{{source=\"{from}\"}}");
        let metrics =
            cluster.nodes.iter().map(|node| Metrics::of(&metrics::address(&node.weightfs)));
        metrics.map(|metrics| metrics.series[&name] as u64).collect()
    };
    let [from_peers, from_registry] = ["peer", "registry"].map(labelled);
    assert!(from_peers.iter().zip(&per_node).all(|(metric, told)| metric <= told));
    assert!(from_peers.iter().sum::<u64>() >= 3 * all - all / 10, "{from_peers:?}");
    assert!(from_registry.iter().sum::<u64>() <= by_mounting + sent, "{from_registry:?}, {sent}");
}

#[test]
fn peers_that_are_killed_under_load_cost_no_read() {
    let bed = Bed::new();
    let (source, _, reference) = push(&bed, "models/killed");
    let mut cluster = Cluster::start(&bed, 1, 3, |_| plaintext("cluster"));
    let mounts = cluster.mount(&bed, &reference);
    read_all(&source, &mounts[1..]);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_all(&source, &mounts[..1]));
        wait_until("bytes come from peers", || {
            reader.is_finished() || cluster.nodes[0].bytes_of_peers() > 0
        });
        cluster.nodes[1..].iter_mut().for_each(Node::kill);
        reader.join().unwrap();
    });
    assert!(cluster.nodes[0].bytes_of_peers() > 0);
    // And what was mounted after that comes from the registry.
    let (source, artifact, reference) = push_other(&bed, "models/alone");
    let alone = cluster.nodes[0].mount(&bed, &reference);
    read_all(&source, &[alone]);
    assert!(sent(&bed, &artifact) >= artifact.layer_bytes());
    for mounted in mounts {
        // Of the daemons that were killed nothing can be unmounted by its process.
        drop(mounted);
    }
}

/// Another model than [`push`]'s.
fn push_other(bed: &Bed, repository: &str) -> (PathBuf, Artifact, String) {
    let source = bed.model(&[Part { path: "other.bin", bytes: 9 << 20, mode: 0o644 }]);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, repository);
    (source, artifact, reference)
}

#[test]
fn wrong_bytes_of_a_peer_are_refused_and_it_is_not_asked_again() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/lies");
    Weightfs::new(&bed.area).run_here(&["index", &reference]).ok();
    let cluster = Cluster::start(&bed, 2, 2, |_| plaintext("digest"));
    let (liar, honest) = (&cluster.nodes[0], &cluster.nodes[1]);
    let first = liar.mount(&bed, &reference);
    read_all(&source, std::slice::from_ref(&first));
    // Its disk goes bad after it has checked them.
    let digest = artifact.layer_digest(0).hex();
    let cached = liar.weightfs.root().join(format!("blobs/sha256/{}/{digest}", &digest[..2]));
    let file = fs::File::options().write(true).open(cached.join("segment-0")).unwrap();
    for chunk in 0..40 {
        file.write_all_at(b"wrong", (chunk << 20) + 77_777).unwrap();
    }
    let second = honest.mount(&bed, &reference);
    read_all(&source, std::slice::from_ref(&second));
    let told = honest.peers();
    assert!(told["lies"].as_u64().unwrap() > 0, "{told:#}");
    assert_eq!(told["peers"][0]["state"], "banned", "{told:#}");
}

#[test]
fn without_digests_of_chunks_peers_are_not_believed_unless_the_cluster_is_trusted() {
    let bed = Bed::new();
    let (source, _, reference) = push(&bed, "models/unindexed");
    let cluster = Cluster::start(&bed, 3, 2, |_| plaintext("digest"));
    let mounts = cluster.mount(&bed, &reference);
    read_all(&source, &mounts);
    assert!(cluster.nodes.iter().all(|node| node.bytes_of_peers() == 0));
}

/// What a peer with these certificates is answered to a request; nothing if it is not let in.
fn ask(dir: &Path, address: &str, certificate: Option<&str>, request: &str) -> String {
    let mut command = Command::new("openssl");
    command.current_dir(dir).args(["s_client", "-quiet", "-alpn", "http/1.1", "-CAfile", "ca.pem"]);
    command.args(["-servername", "weightfs-peer", "-connect", address]);
    if let Some(name) = certificate {
        let [pem, key] = [format!("{name}.pem"), format!("{name}-key.pem")];
        command.args(["-cert", &pem, "-key", &key]);
    }
    let child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // Whoever is not let in may be gone before it has said anything.
    let _ = child.stdin.as_ref().unwrap().write_all(request.as_bytes());
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout[..output.stdout.len().min(300)]).into_owned()
}

/// A request for the first bytes of a blob.
fn request(digest: &str, repository: &str) -> String {
    format!(
        "GET /v1/blobs/{digest} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         range: bytes=0-9\r\nweightfs-repository: {repository}\r\nweightfs-asker: me:1\r\n\
         weightfs-urgency: demand\r\n\r\n"
    )
}

#[test]
fn only_members_get_what_they_may_read() {
    let bed = Bed::new();
    let dir = tempfile::tempdir_in(bed.area.path()).unwrap();
    let authority = PeerAuthority::make(dir.path(), "ca");
    authority.certify("peer", 2);
    authority.certify("old", -1);
    PeerAuthority::make(dir.path(), "other-ca").certify("other", 2);
    let (source, artifact, reference) = push(&bed, "models/secret");
    let cluster = Cluster::start(&bed, 4, 2, |_| Way {
        transport: authority.config("peer"),
        trust: "cluster",
    });
    let mounts = cluster.mount(&bed, &reference);
    read_all(&source, &mounts);
    assert!(cluster.nodes.iter().any(|node| node.bytes_of_peers() > 0), "over TLS");

    let repository = reference.rsplit_once(':').unwrap().0.to_owned();
    let digest = artifact.layer_digest(0).to_string();
    let answer = |certificate: Option<&str>, request: &str| {
        ask(dir.path(), &address(4, 0), certificate, request)
    };
    let good = request(&digest, &repository);
    let given = answer(Some("peer"), &good);
    assert!(given.starts_with("HTTP/1.1 206") && given.contains("weightfs-trust: "), "{given}");
    for stranger in [None, Some("other"), Some("old")] {
        assert_eq!(answer(stranger, &good), "", "{stranger:?} was let in");
    }
    let elsewhere = answer(Some("peer"), &request(&digest, "127.0.0.1:1/models/other"));
    let unknown = format!("sha256:{}", "0".repeat(64));
    let nowhere = answer(Some("peer"), &request(&unknown, &repository));
    assert!(elsewhere.starts_with("HTTP/1.1 404"), "{elsewhere}");
    let undated = |text: &str| {
        text.lines().filter(|line| !line.starts_with("date")).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(undated(&elsewhere), undated(&nowhere), "not allowed is as not there");
    let huge = format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "x".repeat(1 << 20));
    for nonsense in ["GET /v1/blobs/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", &huge] {
        let answer = answer(Some("peer"), nonsense);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
}

#[test]
fn who_has_no_certificate_of_the_authority_gives_nothing() {
    let bed = Bed::new();
    let dir = tempfile::tempdir_in(bed.area.path()).unwrap();
    let ours = PeerAuthority::make(dir.path(), "ca");
    let other = PeerAuthority::make(dir.path(), "other-ca");
    ours.certify("peer", 2);
    other.certify("other", 2);
    let (source, _, reference) = push(&bed, "models/impostor");
    let cluster = Cluster::start(&bed, 5, 2, |number| {
        let transport = if number == 0 { ours.config("peer") } else { other.config("other") };
        Way { transport, trust: "cluster" }
    });
    let (honest, impostor) = (&cluster.nodes[0], &cluster.nodes[1]);
    read_all(&source, &[impostor.mount(&bed, &reference)]);
    read_all(&source, &[honest.mount(&bed, &reference)]);
    let told = honest.peers();
    assert_eq!(told["from_peers"], 0, "{told:#}");
    assert_eq!(told["peers"][0]["state"], "aside", "{told:#}");
    assert_eq!(impostor.peers()["to_peers"], 0);
}

#[test]
fn certificates_that_change_hold_without_a_restart() {
    let bed = Bed::new();
    let dir = tempfile::tempdir_in(bed.area.path()).unwrap();
    let authority = PeerAuthority::make(dir.path(), "ca");
    authority.certify("peer", 2);
    authority.certify("before", 2);
    let (source, artifact, reference) = push(&bed, "models/renewed");
    let cluster = Cluster::start(&bed, 6, 2, |_| Way {
        transport: authority.config("peer"),
        trust: "cluster",
    });
    let first = cluster.nodes[0].mount(&bed, &reference);
    read_all(&source, std::slice::from_ref(&first));
    // Another authority takes over.
    PeerAuthority::make(dir.path(), "next").certify("renewed", 2);
    for (from, to) in [("next", "ca"), ("renewed", "peer"), ("renewed-key", "peer-key")] {
        let file = |name: &str| dir.path().join(format!("{name}.pem"));
        fs::rename(file(from), file(to)).unwrap();
    }
    let request =
        request(&artifact.layer_digest(0).to_string(), reference.rsplit_once(':').unwrap().0);
    let answer = |name: &str| ask(dir.path(), &address(6, 0), Some(name), &request);
    wait_until("the new certificates hold", || answer("peer").starts_with("HTTP/1.1 206"));
    assert_eq!(answer("before"), "", "the old authority's still hold");
    let second = cluster.nodes[1].mount(&bed, &reference);
    read_all(&source, std::slice::from_ref(&second));
    assert!(cluster.nodes[1].bytes_of_peers() > 0, "peers don't find each other any more");
}

#[test]
fn members_are_what_a_name_resolves_to_and_follow_it() {
    let bed = Bed::new();
    let hosts = bed.area.path().join("hosts");
    let write_hosts = |nodes: &[usize]| {
        let line = |node: &usize| {
            let address = address(7, *node);
            format!("{} peers.test\n", address.rsplit_once(':').unwrap().0)
        };
        fs::write(&hosts, nodes.iter().map(line).collect::<String>()).unwrap();
    };
    write_hosts(&[0, 1, 2]);
    // The daemon sees another /etc/hosts, and nobody else does.
    let wrapper = bed.area.program(
        "weightfs-with-hosts",
        &format!(
            "#!/bin/sh\nexec unshare --mount --propagation private -- sh -c \
             'mount --bind {} /etc/hosts && exec \"$@\"' sh {} \"$@\"\n",
            hosts.display(),
            binary().display()
        ),
    );
    let weightfs = Weightfs::new(&bed.area).with_binary(&wrapper);
    weightfs.configure(&format!(
        "[peers]\nlisten = {:?}\ndns = \"peers.test:7700\"\nplaintext = true\n",
        address(7, 0)
    ));
    let _daemon = weightfs.serve(&bed.area);
    let told = || -> Value {
        serde_json::from_str(&weightfs.run_here(&["peers", "--json"]).ok()).unwrap()
    };
    let others = || -> Vec<String> {
        let told = told();
        let peers = told["peers"].as_array().unwrap();
        peers.iter().map(|peer| peer["name"].as_str().unwrap().to_owned()).collect()
    };
    let both = [address(7, 1), address(7, 2)];
    wait_until("two others are found", || {
        let mut others = others();
        others.sort();
        others == both
    });
    assert_eq!(told()["name"], address(7, 0), "it finds itself among them");
    write_hosts(&[0, 2]);
    wait_until("one has gone", || others() == both[1..]);
}
