//! Artifacts as they were pushed, in containers of stock containerd.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use weightfs_tests::containerd::Version;
use weightfs_tests::host::SNAPSHOTTER;
use weightfs_tests::json::documented;
use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::process::Outcome;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::{
    Artifact, Bed, Containerd, ContainerdOptions, Fault, Host, Target, digest, wait_until,
};

const WEIGHTS: &str = "weights/model-00001-of-00003.safetensors";

/// The small model as raw layers and a compressed tar, which no image could have below weights.
fn push_model(bed: &Bed) -> (PathBuf, Artifact, String) {
    let source = bed.model(SMALL_MODEL);
    let paths = SMALL_MODEL.iter().map(|part| part.path.to_owned());
    let (docs, raw): (Vec<_>, Vec<_>) = paths.partition(|path| path.starts_with("docs"));
    let mut plans = vec![Plan::Tar(Compression::Gzip, docs)];
    plans.extend(raw.into_iter().map(Plan::Raw));
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    let reference = bed.push(&artifact, "models/untouched");
    (source, artifact, reference)
}

/// Bytes sent of the weights.
fn weights_sent(bed: &Bed, source: &Path) -> u64 {
    bed.proxy.bytes(Target::Blob(digest::of_file(&source.join(WEIGHTS)).unwrap()))
}

fn run(host: &Host, command: &str, reference: &str, more: &[&str]) -> Outcome {
    let socket = host.containerd.socket();
    let fixed = [command, reference, "--address", socket.to_str().unwrap()];
    host.bed.weightfs.run_here(&[&fixed[..], more].concat())
}

fn json_of(host: &Host, command: &str, reference: &str, more: &[&str]) -> Value {
    let outcome = run(host, command, reference, &[&["--json"], more].concat());
    documented(command, &outcome.ok())
}

/// What a new container sums the weights to, with the model mounted as we say.
fn sum_in_a_container(host: &Host, busybox: &str, prepared: &Value, id: &str) -> String {
    let mount = prepared["mount"].as_str().unwrap();
    let file = format!("/models/{WEIGHTS}");
    let id = format!("{id}-{}", std::process::id());
    let arguments = ["run", "--rm", "--snapshotter", SNAPSHOTTER, "--mount", mount, busybox, &id];
    host.containerd.ctr(&[&arguments[..], &["/bin/sha256sum", &file]].concat()).ok()
}

fn a_container_reads_an_untouched_artifact(version: Version) {
    if !version.is_here() {
        println!("not run: containerd {version:?} can't be had here");
        return;
    }
    let host = Host::on(version);
    let (source, _, reference) = push_model(&host.bed);
    let (busybox, _) = host.push_image("images/plain", &[]);
    host.rpull(&busybox);
    host.bed.proxy.forget();
    let prepared = json_of(&host, "prepare", &reference, &[]);
    let dir = PathBuf::from(prepared["source"].as_str().unwrap());
    assert_eq!(fs::metadata(dir.join(WEIGHTS)).unwrap().len(), size(&source.join(WEIGHTS)));
    assert_eq!(weights_sent(&host.bed, &source), 0, "weights were fetched before they were read");

    let sum = digest::of_file(&source.join(WEIGHTS)).unwrap().hex();
    let id = format!("untouched-{version:?}").to_lowercase();
    assert!(sum_in_a_container(&host, &busybox, &prepared, &id).starts_with(&sum));
    assert!(weights_sent(&host.bed, &source) > 0);
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    assert_eq!(json_of(&host, "prepare", &reference, &[]), prepared, "twice is once");
    let layers = host.bed.weightfs.run_here(&["status", &reference, "--json"]).ok();
    let layers: Value = serde_json::from_str(&layers).unwrap();
    assert_eq!(layers["layers"][0]["digest"], prepared["manifest"]);
    assert_eq!(layers["layers"].as_array().unwrap().len(), 1, "{layers}");

    // Removing an image this way collects garbage.
    host.containerd.remove_image(&busybox);
    assert_eq!(host.containerd.snapshots(SNAPSHOTTER).len(), 2, "a view, and what it is of");
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    let released = json_of(&host, "release", &reference, &[]);
    assert_eq!(released, json!({ "released": [prepared["snapshot"]] }));
    assert!(!dir.exists(), "{} is shown still", dir.display());
    assert_eq!(json_of(&host, "release", &reference, &[]), json!({ "released": [] }));
    host.assert_nothing_left();
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

#[test]
fn containerd_1_6_has_an_untouched_artifact() {
    a_container_reads_an_untouched_artifact(Version::Installed);
}

#[test]
fn containerd_1_7_has_an_untouched_artifact() {
    a_container_reads_an_untouched_artifact(Version::V17);
}

#[test]
fn containerd_2_1_has_an_untouched_artifact() {
    a_container_reads_an_untouched_artifact(Version::V21);
}

#[test]
fn what_is_prepared_outlives_the_daemon_and_containerd() {
    let mut host = Host::with_keeper();
    let (source, _, reference) = push_model(&host.bed);
    let (busybox, _) = host.push_image("images/plain", &[]);
    host.rpull(&busybox);
    let prepared = json_of(&host, "prepare", &reference, &[]);
    host.daemon.kill_kept().unwrap();
    host.containerd.restart(&host.bed.area);
    host.daemon.wait_starts(2);
    let sum = digest::of_file(&source.join(WEIGHTS)).unwrap().hex();
    assert!(sum_in_a_container(&host, &busybox, &prepared, "outlives").starts_with(&sum));
    assert_eq!(json_of(&host, "prepare", &reference, &[]), prepared);
    json_of(&host, "release", &reference, &[]);
    assert!(!Path::new(prepared["source"].as_str().unwrap()).exists());
}

#[test]
fn each_namespace_and_each_name_has_its_own() {
    let host = Host::new();
    let (source, artifact, first) = push_model(&host.bed);
    let second = host.bed.push(&artifact, "models/other-name");
    let here = json_of(&host, "prepare", &first, &[]);
    let there = json_of(&host, "prepare", &first, &["--namespace", "other"]);
    let renamed = json_of(&host, "prepare", &second, &[]);
    assert_eq!((&here["source"], &here["source"]), (&there["source"], &renamed["source"]));
    json_of(&host, "release", &first, &[]);
    json_of(&host, "release", &second, &[]);
    let dir = Path::new(there["source"].as_str().unwrap());
    tree::assert_same(&source, dir, Scope::ModelFiles);
    json_of(&host, "release", &first, &["--namespace", "other"]);
    assert!(!dir.exists());
    host.assert_nothing_left();
}

#[test]
fn what_the_daemon_has_lost_is_prepared_anew() {
    let host = Host::new();
    let (source, _, reference) = push_model(&host.bed);
    json_of(&host, "prepare", &reference, &[]);
    let Host { containerd, daemon, bed } = host;
    daemon.stop();
    fs::remove_dir_all(bed.weightfs.root()).unwrap();
    fs::create_dir(bed.weightfs.root()).unwrap();
    let daemon = bed.weightfs.serve(&bed.area);
    let host = Host { containerd, daemon, bed };
    wait_until("containerd is connected again", || {
        let arguments = ["snapshot", "--snapshotter", SNAPSHOTTER, "ls"];
        host.containerd.ctr(&arguments).code == 0
    });
    let prepared = json_of(&host, "prepare", &reference, &[]);
    let dir = Path::new(prepared["source"].as_str().unwrap());
    tree::assert_same(&source, dir, Scope::ModelFiles);
}

#[test]
fn what_is_missing_is_named() {
    let host = Host::new();
    let (_, artifact, reference) = push_model(&host.bed);
    let gone = host.bed.proxy.reference("models/gone", "v1");
    run(&host, "prepare", &gone, &[]).assert_fails(1, &["models/gone", "is not there"]);
    run(&host, "prepare", &reference, &["--snapshotter", "overlayfs"])
        .assert_fails(1, &["\"overlayfs\" is not WeightFS's", "--snapshotter"]);
    for command in ["prepare", "release"] {
        run(&host, command, &reference, &["--snapshotter", "none"])
            .assert_fails(1, &["no snapshotter \"none\"", "weightfs node install"]);
    }
    let elsewhere = ["prepare", &reference, "--address", "/nonexistent/containerd.sock"];
    host.bed.weightfs.run_here(&elsewhere).assert_fails(1, &["is it running?", "--address"]);
    assert!(host.containerd.snapshots("overlayfs").is_empty());
    // Its compressed layer has to be had before anything of it can be shown.
    host.bed.proxy.fail(Target::Blob(artifact.layer_digest(0)), Fault::Status(404));
    let layer = artifact.layer_digest(0).to_string();
    run(&host, "prepare", &reference, &[]).assert_fails(1, &["can't show it", &layer]);
    host.bed.proxy.heal();
    assert!(host.containerd.snapshots(SNAPSHOTTER).is_empty());
    let Host { containerd, daemon, bed } = host;
    daemon.stop();
    let socket = containerd.socket();
    let socket = ["--address", socket.to_str().unwrap()];
    let down = bed.weightfs.run_here(&[&["prepare", reference.as_str()], &socket[..]].concat());
    down.assert_fails(1, &["does not answer", "weightfs serve"]);
    drop(containerd);
    let containerd = Containerd::start(&bed.area, &ContainerdOptions::default());
    let socket = containerd.socket();
    let socket = ["--address", socket.to_str().unwrap()];
    let other = bed.weightfs.run_here(&[&["prepare", reference.as_str()], &socket[..]].concat());
    other.assert_fails(1, &["no snapshotter \"weightfs\"", "weightfs node install"]);
}
