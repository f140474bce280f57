//! Pulls that fail, pulls at once, and pulls without an end: nothing is left of any of them.
//! `WEIGHTFS_PULLS` sets how many.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::layer::{Attributes, Compression, Layer, LayerBuilder};
use weightfs_tests::model::noise;
use weightfs_tests::process::Service;
use weightfs_tests::snapshots::{Labels, Snapshots, labels};
use weightfs_tests::{Bed, Containerd, ContainerdOptions, Fault, Host, Target, digest, wait_until};

const MIB: u64 = 1 << 20;

/// Pulls and removals one after the other, and at once, if nothing else is asked for.
const PULLS: usize = 20;
const AT_ONCE: usize = 8;

fn pulls(default: usize) -> usize {
    std::env::var("WEIGHTFS_PULLS").map_or(default, |pulls| pulls.parse().unwrap())
}

/// A layer that is lazy, of its own bytes.
fn layer(host: &Host, seed: u64) -> Layer {
    LayerBuilder::new(host.bed.area.path())
        .file(&format!("weights-{seed}"), &noise(9 * MIB, seed), &Attributes::mode(0o644))
        .finish(Compression::Plain)
}

fn status(host: &Host) -> Value {
    serde_json::from_str(&host.bed.weightfs.run_here(&["status", "--json"]).ok()).unwrap()
}

/// What containerd says of a layer.
fn named(reference: &str, manifest: &str, layer: &str) -> Labels {
    labels(&[
        ("containerd.io/snapshot.ref", "sha256:chain"),
        ("containerd.io/snapshot/cri.image-ref", reference),
        ("containerd.io/snapshot/cri.manifest-digest", manifest),
        ("containerd.io/snapshot/cri.layer-digest", layer),
    ])
}

#[test]
fn whatever_fails_a_lazy_prepare_an_ordinary_one_is_made() {
    let host = Host::new();
    host.bed.weightfs.configure("[fetch]\ndeadline = \"1s\"");
    let Host { containerd, daemon, bed } = host;
    daemon.stop();
    let daemon = bed.weightfs.serve(&bed.area);
    let host = Host { containerd, daemon, bed };
    let (reference, image) = host.push_image_below("images/failing", &[layer(&host, 1)]);
    let manifest = digest::of_reader(image.manifest.to_string().as_bytes()).unwrap().to_string();
    let layer = image.manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
    let other = format!("sha256:{}", "0".repeat(64));
    let snapshots = Snapshots::connect(&host.bed.weightfs.snapshotter_socket(), SNAPSHOTTER);
    let right = || named(&reference, &manifest, &layer);
    let without = |label: &str| {
        let mut labels = right();
        labels.remove(&format!("containerd.io/snapshot/cri.{label}"));
        labels
    };
    let fault = |target, fault| Some((target, fault));
    let steps = [
        ("no-annotations", without("image-ref"), None),
        ("no-annotations", without("manifest-digest"), None),
        ("no-annotations", without("layer-digest"), None),
        ("bad-labels", named("no reference!", &manifest, &layer), None),
        ("bad-labels", named(&reference, "no digest", &layer), None),
        ("unreachable", named(&reference, &other, &layer), None),
        ("refused", right(), fault(Target::Manifests, Fault::Status(401))),
        ("unreachable", right(), fault(Target::Manifests, Fault::Status(500))),
        ("unreachable", right(), fault(Target::Manifests, Fault::Hang)),
        // From here on the manifest is known.
        ("bad-labels", named(&reference, &manifest, &other), None),
        ("refused", right(), fault(Target::Blobs, Fault::Status(403))),
        ("unreachable", right(), fault(Target::Blobs, Fault::Status(404))),
        ("unreachable", right(), fault(Target::Blobs, Fault::Hang)),
    ];
    for (number, (kind, labels, fault)) in steps.into_iter().enumerate() {
        if let Some((target, fault)) = fault {
            host.bed.proxy.fail(target, fault);
        }
        let key = format!("step {number}");
        snapshots.prepare_with(&key, "", labels).unwrap_or_else(|error| panic!("{key}: {error}"));
        host.bed.proxy.heal();
        let status = status(&host);
        assert_eq!(status["layers"][0]["mode"], kind, "{key}: {status}");
        let mount = host.bed.weightfs.root().join("mnt");
        assert_eq!(fs::read_dir(mount).unwrap().count(), 0, "{key} left a tree");
        snapshots.remove(&key).unwrap();
    }
    // And now it is lazy.
    assert!(snapshots.prepare_with("healed", "", right()).is_err());
    assert_eq!(status(&host)["layers"][0]["mode"], "lazy");
    assert_eq!(status(&host)["decisions"]["no-annotations"], 3);
}

/// What a node has of all that could grow.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    /// Files below the state directory by what they are in.
    files: BTreeMap<String, usize>,
    mounts: usize,
    shims: usize,
}

impl Traces {
    fn of(host: &Host) -> Self {
        let root = host.bed.weightfs.root();
        let mut files = BTreeMap::new();
        for part in ["snapshots", "mnt", "removed", "blobs", "pins"] {
            files.insert(part.to_owned(), count_files(&root.join(part)));
        }
        let area = host.bed.area.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mounts = mounts.lines().filter(|line| line.contains(area)).count();
        Self { files, mounts, shims: shims(area) }
    }
}

fn count_files(dir: &Path) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let count = |path: &Path| if path.is_dir() { count_files(path) } else { 1 };
    entries.map(|entry| count(&entry.unwrap().path())).sum()
}

/// Shims of the containerd whose directories are there.
fn shims(area: &str) -> usize {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let command = |path: &Path| fs::read_to_string(path.join("cmdline")).unwrap_or_default();
    let commands = processes.map(|entry| command(&entry.path()));
    commands.filter(|line| line.contains("containerd-shim") && line.contains(area)).count()
}

/// Files of the state directory that the daemon has open. (Connections to the registry stay a while.)
fn open_files(host: &Host) -> usize {
    let root = host.bed.weightfs.root();
    let open = fs::read_dir(format!("/proc/{}/fd", host.daemon.pid())).unwrap().flatten();
    open.filter(|open| fs::read_link(open.path()).is_ok_and(|path| path.starts_with(&root))).count()
}

fn pull_run_and_remove(host: &Host, reference: &str, id: &str) {
    host.rpull(reference);
    let ended = host.containerd.run(SNAPSHOTTER, reference, id, &["/bin/sh", "-c", "cat /w* >/x"]);
    assert_eq!(ended.code, 0, "{ended}");
    host.containerd.remove_image(reference);
}

#[test]
fn pulls_and_removals_leave_the_disk_and_the_process_table_as_they_were() {
    let host = Host::new();
    let images: Vec<_> = (0..4)
        .map(|seed| host.push_image_below(&format!("images/{seed}"), &[layer(&host, seed)]).0)
        .collect();
    let snapshots = Snapshots::connect(&host.bed.weightfs.snapshotter_socket(), SNAPSHOTTER);
    let emptied = || {
        wait_until("the snapshots are gone", || host.containerd.snapshots(SNAPSHOTTER).is_empty());
        // The kernel forgets what it knew of removed trees when it pleases; then their blobs go.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        snapshots.cleanup().unwrap();
        host.bed.weightfs.run_here(&["cache", "prune"]).ok();
        Traces::of(&host)
    };
    pull_run_and_remove(&host, &images[0], "first");
    let before = emptied();
    let open = open_files(&host);
    for round in 0..pulls(PULLS) {
        let image = &images[round % images.len()];
        if round % 5 == 0 {
            pull_run_and_remove(&host, image, "again");
        } else {
            host.rpull(image);
            host.containerd.remove_image(image);
        }
    }
    wait_until("everything is as before", || emptied() == before);
    wait_until("the daemon's files are closed", || open_files(&host) <= open);
    host.assert_nothing_left();
}

#[test]
fn pulls_and_removals_at_once_leave_nothing() {
    let host = Host::new();
    let count = pulls(AT_ONCE).min(50);
    // Each layer is in several images, and each image is pulled and removed by itself.
    let layers: Vec<_> = (0..count.div_ceil(2)).map(|seed| layer(&host, seed as u64)).collect();
    let push = |number: usize| {
        let layers = [0, 1].map(|more| layers[(number + more) % layers.len()].clone());
        host.push_image_below(&format!("images/{number}"), &layers).0
    };
    let images: Vec<_> = (0..count).map(push).collect();
    std::thread::scope(|scope| {
        for (number, image) in images.iter().enumerate() {
            let host = &host;
            scope.spawn(move || pull_run_and_remove(host, image, &format!("at-once-{number}")));
        }
    });
    assert!(status(&host)["decisions"]["lazy"].as_u64().unwrap() > 0);
    host.assert_nothing_left();
}

#[test]
fn a_containerd_that_was_there_first_finds_the_daemon() {
    let bed = Bed::new();
    let options = ContainerdOptions {
        weightfs: Some(bed.weightfs.snapshotter_socket()),
        ..ContainerdOptions::default()
    };
    let containerd = Containerd::start(&bed.area, &options);
    let daemon = bed.weightfs.serve(&bed.area);
    wait_until("containerd finds it", || {
        containerd.ctr(&["snapshot", "--snapshotter", SNAPSHOTTER, "ls"]).code == 0
    });
    let host = Host { containerd, daemon, bed };
    let (reference, _) = host.push_image_below("images/first", &[layer(&host, 1)]);
    pull_run_and_remove(&host, &reference, "first");
    host.assert_nothing_left();
}

#[test]
fn only_root_reads_what_the_daemon_writes_and_talks_to_it() {
    let host = Host::with_keeper();
    // The harness has made the state directory; the daemon makes what is in it.
    let (reference, _) = host.push_image_below("images/modes", &[layer(&host, 1)]);
    host.rpull(&reference);
    let others = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o077;
    let root = host.bed.weightfs.root();
    for name in ["s.sock", "ctl.sock"] {
        assert_eq!(others(&root.with_file_name(name)), 0, "{name}");
    }
    for entry in fs::read_dir(&root).unwrap() {
        let path = entry.unwrap().path();
        // The mount shows what the artifacts say.
        if !path.ends_with("mnt") {
            assert_eq!(others(&path), 0, "{}", path.display());
        }
    }
}

#[test]
fn a_daemon_ends_while_the_source_stalls() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let bed = Bed::new();
        bed.weightfs.configure("[fetch]\ndeadline = \"1h\"");
        let daemon = bed.weightfs.serve(&bed.area);
        let mut host = Host::beside(bed, daemon);
        let (reference, _) = host.push_image_below("images/stalled", &[layer(&host, 1)]);
        host.rpull(&reference);
        let root = host.containerd.start_container(SNAPSHOTTER, &reference, "stalled").root();
        host.bed.proxy.forget();
        host.bed.proxy.fail(Target::Blobs, Fault::Hang);
        let mut command = std::process::Command::new("cat");
        command.arg(root.join("weights-1")).stdout(std::process::Stdio::null());
        let mut reader = Service::start(&host.bed.area, "cat", command).quiet();
        wait_until("somebody reads", || !host.bed.proxy.seen().is_empty());
        host.daemon.signal(signal);
        // Within the patience of the harness: its own deadlines add up to less than ten seconds.
        host.daemon.assert_ends_well();
        assert!(!reader.wait().success(), "it read what nobody sent");
    }
}
