//! The same on every containerd: 1.6, 1.7 and 2.1, by CRI and, where it can be lazy, by `ctr`.
//! A version that can't be had here is left out, and said so.

use weightfs_tests::containerd::Version;
use weightfs_tests::cri::Cri;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::layer::Layer;
use weightfs_tests::model::write_safetensors;
use weightfs_tests::{Host, digest, wait_until};

const MIB: u64 = 1 << 20;

fn is_here(version: Version) -> bool {
    let here = version.is_here();
    if !here {
        eprintln!(
            "left out: containerd {version:?} can't be had here (packaging/containerd-package)"
        );
    }
    here
}

/// An image with weights below; the sum of the weights.
fn push(host: &Host, repository: &str) -> (String, Layer, String) {
    let source = host.bed.area.path().join("weights");
    write_safetensors(&source, 32 * MIB, 1).unwrap();
    let layer = host.weights_layer(&source, "weights");
    let (reference, _) = host.push_image_below(repository, std::slice::from_ref(&layer));
    (reference, layer, digest::of_file(&source).unwrap().hex())
}

fn assert_lazy(host: &Host, layer: &Layer, namespace: &str) {
    let fetched = host.fetched(layer);
    assert!(fetched <= 4 * MIB, "{fetched} bytes of a lazy layer");
    let content = host.containerd.content(namespace);
    assert!(!content.contains(&layer.blob.digest.to_string()), "the layer was downloaded");
}

/// As a kubelet does it: pull, run, restart of both, run again, remove.
fn by_cri(version: Version) {
    if !is_here(version) {
        return;
    }
    let mut host = Host::with_keeper_and_cri_on(version);
    let (reference, layer, sum) = push(&host, "images/cri");
    let logs = host.bed.area.dir("pods");
    let cri = Cri::connect(&host.containerd, &logs);
    cri.pull(&reference).unwrap();
    assert_lazy(&host, &layer, "k8s.io");
    let words = ["/bin/sh", "-c", "sha256sum /models/weights && echo x > /models/new"];
    let ended = cri.run(&reference, "first", &words).unwrap();
    assert!(ended.code == 0 && ended.output.starts_with(&sum), "{ended:?}");

    host.daemon.kill_kept().unwrap();
    host.containerd.restart(&host.bed.area);
    host.daemon.wait_starts(2);
    let cri = Cri::connect(&host.containerd, &logs);
    wait_until("CRI knows its images", || cri.tags().is_ok_and(|tags| tags.contains(&reference)));
    let ended = cri.run(&reference, "again", &words).unwrap();
    assert!(ended.code == 0 && ended.output.starts_with(&sum), "{ended:?}");

    cri.remove(&reference).unwrap();
    cri.remove(&host.bed.proxy.reference("small", "v1")).unwrap();
    wait_until("the snapshots are gone", || {
        let arguments = ["snapshot", "--snapshotter", SNAPSHOTTER, "ls"];
        host.containerd.ctr_in("k8s.io", &arguments).ok().lines().count() == 1
    });
}

#[test]
fn containerd_1_6_by_cri() {
    by_cri(Version::Installed);
}

#[test]
fn containerd_1_7_by_cri() {
    by_cri(Version::V17);
}

#[test]
fn containerd_2_1_by_cri() {
    by_cri(Version::V21);
}

#[test]
fn containerd_2_1_by_ctr() {
    if !is_here(Version::V21) {
        return;
    }
    let host = Host::on(Version::V21);
    let (reference, layer, sum) = push(&host, "images/ctr");
    let words = ["image", "pull", "--plain-http", "--snapshotter", SNAPSHOTTER, &reference];
    host.containerd.ctr(&words).ok();
    assert_lazy(&host, &layer, "default");
    let words = ["/bin/sha256sum", "/models/weights"];
    let ran = host.containerd.run(SNAPSHOTTER, &reference, "ctr", &words).ok();
    assert!(ran.starts_with(&sum), "{ran}");
    host.containerd.remove_image(&reference);
    host.assert_nothing_left();
}

/// containerd changes the owners of all files in a copy of the image: their attributes are copied, and
/// not their bytes.
fn in_a_user_namespace(version: Version) {
    if !is_here(version) {
        return;
    }
    let host = Host::on(version);
    let (reference, layer, sum) = push(&host, "images/userns");
    host.rpull(&reference);
    let run = |id: &str, script: &str| {
        // runc keeps all of them in one place.
        let id = format!("{id}-{version:?}-{}", std::process::id());
        let maps = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
        let run = ["run", "--rm", "--snapshotter", SNAPSHOTTER];
        let what = [reference.as_str(), &id, "/bin/sh", "-c", script];
        host.containerd.ctr(&[&run[..], &maps[..], &what[..]].concat()).ok()
    };
    let owners = run("userns-owners", "cat /proc/self/uid_map; stat -c %u /models/weights");
    let (map, owner) = owners.trim().split_once('\n').unwrap();
    assert!(map.contains("100000") && owner == "0", "{owners}");
    let fetched = host.fetched(&layer);
    assert!(fetched <= 4 * MIB, "{fetched} bytes of a layer of which nothing was read");
    let ran = run("userns-sums", "sha256sum /models/weights; echo x > /models/new && ls /models");
    assert!(ran.starts_with(&sum) && ran.ends_with("new\nweights\n"), "{ran}");
}

#[test]
fn containerd_1_6_in_a_user_namespace() {
    in_a_user_namespace(Version::Installed);
}

#[test]
fn containerd_1_7_in_a_user_namespace() {
    in_a_user_namespace(Version::V17);
}

#[test]
fn containerd_2_1_in_a_user_namespace() {
    in_a_user_namespace(Version::V21);
}
