//! The cache by name: listing, evicting, pinning, hashing again and repairing it, with a daemon
//! and without one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use serde_json::Value;
use weightfs_store::Digest;
use weightfs_tests::json::{assert_documented, documented};
use weightfs_tests::model::{Part, SMALL_MODEL};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::Outcome;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{Artifact, Bed, Target, wait_until};

const WEIGHTS: &str = "model.bin";
const MODEL: &[Part] = &[
    Part { path: WEIGHTS, bytes: 5 << 20, mode: 0o644 },
    Part { path: "config.json", bytes: 517, mode: 0o600 },
];

fn run(bed: &Bed, arguments: &[&str]) -> Outcome {
    let root = bed.weightfs.root();
    let own =
        ["--root", root.to_str().unwrap(), "--config", bed.weightfs.config().to_str().unwrap()]
            .map(str::to_owned);
    bed.weightfs.run(arguments.iter().map(|&argument| argument.to_owned()).chain(own))
}

fn json(bed: &Bed, arguments: &[&str]) -> Value {
    let text = run(bed, &[arguments, &["--json"]].concat()).ok();
    let command = match arguments {
        ["cache", what, ..] => format!("cache {what}"),
        ["unpin", ..] => "pin".to_owned(),
        [command, ..] => (*command).to_owned(),
        [] => unreachable!("a command"),
    };
    documented(&command, &text)
}

fn listed(bed: &Bed) -> Value {
    let listed = json(bed, &["cache", "ls"]);
    if listed["blobs"].as_array().is_some_and(|blobs| !blobs.is_empty()) {
        assert_documented("a blob of the cache", &listed["blobs"]);
    }
    listed
}

fn blob(listed: &Value, digest: Digest) -> &Value {
    let blobs = listed["blobs"].as_array().unwrap();
    let found = blobs.iter().find(|blob| blob["digest"] == digest.to_string());
    found.unwrap_or_else(|| panic!("no {digest} in {listed:#}"))
}

/// Mounts a model, reads all of it, waits until it is verified, and unmounts it.
fn load(bed: &Bed, source: &std::path::Path, reference: &str) {
    let mounted = bed.mount(reference);
    tree::assert_same(source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

fn push(bed: &Bed, name: &str, parts: &[Part]) -> (PathBuf, Artifact, String) {
    let source = bed.model(parts);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, name);
    (source, artifact, reference)
}

/// The layer with the weights.
fn weights(artifact: &Artifact) -> Digest {
    let layers = artifact.layers();
    let at = layers.iter().position(|layer| layer["size"] == 5 << 20).unwrap();
    artifact.layer_digest(at)
}

/// Changes a byte of a blob on disk, as a bad disk would.
fn rot(bed: &Bed, digest: Digest) {
    let hex = digest.hex();
    let dir = bed.weightfs.root().join("blobs/sha256").join(&hex[..2]).join(&hex);
    let file = File::options().write(true).read(true).open(dir.join("segment-0")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3 << 20).unwrap();
    file.write_all_at(&[!byte[0]], 3 << 20).unwrap();
}

/// A limit makes the cache keep the digests of chunks that it has verified.
const KEEPS_DIGESTS: &str = "[cache]\nlimit = \"1GiB\"\n";

#[test]
fn the_cache_is_listed_evicted_and_pruned_without_a_network() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/one", MODEL);
    let (other_source, _, other) = push(&bed, "models/two", &SMALL_MODEL[..2]);
    load(&bed, &source, &reference);
    load(&bed, &other_source, &other);
    bed.proxy.refuse();
    let cache = listed(&bed);
    assert_eq!(cache["references"].as_array().unwrap().len(), 2, "{cache:#}");
    let weights_blob = blob(&cache, weights(&artifact));
    assert_eq!(weights_blob["cached"], 5 << 20, "{cache:#}");
    assert_eq!((&weights_blob["in_use"], &weights_blob["pinned"]), (&false.into(), &false.into()));
    assert_eq!(weights_blob["references"][0], reference, "{cache:#}");
    let text = run(&bed, &["cache", "ls"]).ok();
    assert!(text.contains(&reference) && text.contains("5.0 MiB"), "{text}");
    assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    let space = json(&bed, &["cache", "df"]);
    assert!(space["used"].as_u64().unwrap() >= 5 << 20, "{space:#}");
    assert_eq!(space["evictable"], space["used"], "{space:#}");
    run(&bed, &["cache", "df"]).ok();

    let evicted = json(&bed, &["cache", "evict", &reference]);
    assert!(evicted["freed"].as_u64().unwrap() >= 5 << 20, "{evicted:#}");
    let left = listed(&bed);
    assert_eq!(left["references"].as_array().unwrap().len(), 1, "{left:#}");
    assert_eq!(left["references"][0]["reference"], other, "{left:#}");
    run(&bed, &["cache", "evict", &reference]).assert_fails(1, &[&reference, "weightfs cache ls"]);
    assert!(json(&bed, &["cache", "prune"])["freed"].as_u64().unwrap() > 0);
    assert!(listed(&bed)["blobs"].as_array().unwrap().is_empty());
    assert!(run(&bed, &["cache", "ls"]).ok().contains("empty"));

    bed.proxy.accept();
    bed.proxy.forget();
    load(&bed, &source, &reference);
    assert!(bed.proxy.bytes(Target::Blobs) >= 5 << 20, "what was evicted is fetched again");
}

#[test]
fn a_daemon_evicts_nothing_that_is_in_use() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/used", MODEL);
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    assert_eq!(blob(&listed(&bed), weights(&artifact))["in_use"], true);
    let digest = weights(&artifact).to_string();
    json(&bed, &["cache", "evict", &digest]);
    json(&bed, &["cache", "prune"]);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    // The daemon forgets it when the kernel does.
    wait_until("nothing of it is left", || {
        json(&bed, &["cache", "prune"]);
        listed(&bed)["blobs"].as_array().unwrap().is_empty()
    });
    daemon.stop();
}

#[test]
fn a_pinned_model_stays_until_it_is_unpinned() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/pinned", MODEL);
    // Before it was ever mounted: its registry knows what it has.
    let pinned = json(&bed, &["pin", &reference]);
    assert_eq!(pinned["blobs"], artifact.layers().len(), "{pinned:#}");
    load(&bed, &source, &reference);
    bed.proxy.refuse();
    json(&bed, &["cache", "prune"]);
    let evicted = json(&bed, &["cache", "evict", &reference]);
    assert_eq!((&evicted["freed"], &evicted["blobs"][0]["outcome"]), (&0.into(), &"pinned".into()));
    let kept = listed(&bed);
    assert_eq!(blob(&kept, weights(&artifact))["cached"], 5 << 20, "{kept:#}");
    assert_eq!(kept["references"][0]["pinned"], true, "{kept:#}");
    run(&bed, &["unpin", &reference]).ok();
    json(&bed, &["cache", "prune"]);
    assert!(listed(&bed)["blobs"].as_array().unwrap().is_empty());
    run(&bed, &["unpin", &reference]).assert_fails(1, &[&reference]);
}

#[test]
fn what_went_bad_on_disk_is_found_and_repaired() {
    let bed = Bed::new();
    bed.weightfs.configure(KEEPS_DIGESTS);
    let (source, artifact, reference) = push(&bed, "models/rot", MODEL);
    load(&bed, &source, &reference);
    let verified = json(&bed, &["verify"]);
    let results: Vec<_> = verified["blobs"].as_array().unwrap().iter().collect();
    assert_eq!(results.len(), 2);
    assert!(results.iter().all(|blob| blob["result"] == "good"), "{verified:#}");
    rot(&bed, weights(&artifact));
    let digest = weights(&artifact).to_string();
    let found = run(&bed, &["verify", &reference]);
    assert_eq!(found.code, 3, "{found}");
    assert!(found.stdout.contains(&digest) && found.stdout.contains("1 bad"), "{found}");
    assert!(found.stdout.contains(&reference), "{found}");
    assert_eq!(blob(&listed(&bed), weights(&artifact))["cached"], 4 << 20, "the chunk is gone");
    load(&bed, &source, &reference);
    rot(&bed, weights(&artifact));
    bed.proxy.forget();
    let repaired = run(&bed, &["verify", "--repair"]);
    assert_eq!(repaired.code, 0, "{repaired}");
    assert!(repaired.stdout.contains("1 repaired"), "{repaired}");
    assert_eq!(bed.proxy.bytes(Target::Blob(weights(&artifact))), 1 << 20, "that chunk only");
    bed.proxy.refuse();
    assert_eq!(run(&bed, &["verify", &digest]).code, 0);
    assert_eq!(blob(&listed(&bed), weights(&artifact))["trust"], "verified");
    run(&bed, &["verify", "localhost:1/never:seen"]).assert_fails(1, &["never:seen"]);
}

#[test]
fn what_went_bad_below_a_mount_is_fetched_again() {
    let bed = Bed::new();
    bed.weightfs.configure(KEEPS_DIGESTS);
    let (source, artifact, reference) = push(&bed, "models/daemon-rot", MODEL);
    load(&bed, &source, &reference);
    // The load may have ended before all of it was hashed.
    assert_eq!(run(&bed, &["verify"]).code, 0);
    rot(&bed, weights(&artifact));
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    bed.proxy.forget();
    assert_eq!(run(&bed, &["verify"]).code, 3);
    assert!(daemon.log().contains("wrong chunk"), "{}", daemon.log());
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    assert_eq!(bed.proxy.bytes(Target::Blob(weights(&artifact))), 1 << 20, "that chunk only");
    assert_eq!(run(&bed, &["verify"]).code, 0);
    mounted.stop();
    daemon.stop();
}

#[test]
fn a_daemon_poisons_what_went_bad_and_its_readers_see_an_error() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/daemon-rot", MODEL);
    load(&bed, &source, &reference);
    rot(&bed, weights(&artifact));
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    assert_eq!(run(&bed, &["verify"]).code, 3);
    assert!(fs::read(mounted.dir().join(WEIGHTS)).is_err(), "a poisoned blob is served");
    assert!(fs::read(mounted.dir().join("config.json")).is_ok(), "the other is none the worse");
    let status = run(&bed, &["status"]).ok();
    assert!(status.contains("poisoned"), "{status}");
    assert!(daemon.log().contains("blob is poisoned"), "{}", daemon.log());
    let in_use = run(&bed, &["verify", "--repair"]);
    assert_eq!(in_use.code, 3, "{in_use}");
    assert!(in_use.stdout.contains("in use"), "{in_use}");
    mounted.stop();
    wait_until("it is repaired", || run(&bed, &["verify", "--repair"]).code == 0);
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    daemon.stop();
}

#[test]
fn a_foreground_mount_is_named_as_the_owner() {
    let bed = Bed::new();
    let (_, _, reference) = push(&bed, "models/foreground", MODEL);
    let mounted = bed.mount(&reference);
    let pid = mounted.pid().to_string();
    run(&bed, &["cache", "ls"]).assert_fails(1, &[&pid, "unmount it"]);
    mounted.stop();
}

#[test]
fn strict_reads_are_right_and_never_of_a_wrong_blob() {
    let bed = Bed::new();
    bed.weightfs.configure("[cache]\nverify = \"strict\"");
    let (source, artifact, reference) = push(&bed, "models/strict", MODEL);
    let mounted = bed.mount(&reference);
    let file = File::open(mounted.dir().join(WEIGHTS)).unwrap();
    file.read_exact_at(&mut [0; 10], 0).unwrap();
    assert_eq!(bed.proxy.bytes(Target::Blob(weights(&artifact))), 5 << 20, "all of it came first");
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    let (_, artifact, reference) = push(&bed, "models/strict-lie", &[MODEL[0]]);
    json(&bed, &["cache", "prune"]);
    let at = (5 << 20) - 1;
    bed.proxy.fail(Target::Blob(weights(&artifact)), weightfs_tests::Fault::Corrupt { at });
    let mounted = bed.mount(&reference);
    let file = File::open(mounted.dir().join(WEIGHTS)).unwrap();
    assert!(file.read_exact_at(&mut [0; 10], 0).is_err(), "a byte of a wrong blob was served");
    mounted.stop();
}
