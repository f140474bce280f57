//! `[index] publish`: an artifact gets its index from the first node that loaded it.

use std::fs;
use std::path::Path;

use weightfs_tests::layer::Compression;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::wait::wait_until;
use weightfs_tests::{Artifact, Bed, Fault, Mounted, Target, Weightfs};

const PUBLISH: &str = "[index]\npublish = true";

/// Every kind of layer.
fn pack(bed: &Bed, source: &Path) -> Artifact {
    let tar = |compression, path: &str| Plan::Tar(compression, vec![path.to_owned()]);
    let plans = [
        Plan::Raw("config.json".into()),
        Plan::Raw("weights/model-00001-of-00003.safetensors".into()),
        tar(Compression::Plain, "weights/model-00003-of-00003.safetensors"),
        tar(Compression::Gzip, "docs"),
    ];
    bed.pack(source, Dialect::Cncf, &plans)
}

fn read_all(dir: &Path) {
    for path in weightfs_tests::modelpack::files_of(dir) {
        fs::read(dir.join(path)).unwrap();
    }
}

fn mount(bed: &Bed, weightfs: &Weightfs, reference: &str) -> Mounted {
    weightfs.mount(&bed.area, reference, &bed.mount_point())
}

/// Tries to push that the registry has seen.
fn pushes(bed: &Bed) -> usize {
    bed.proxy.requests(Target::Uploads)
}

fn bytes_of_layers(bed: &Bed, artifact: &Artifact) -> u64 {
    (0..artifact.layers().len())
        .map(|at| bed.proxy.bytes(Target::Blob(artifact.layer_digest(at))))
        .sum()
}

fn summary(weightfs: &Weightfs, reference: &str, more: &[&str]) -> serde_json::Value {
    let arguments = [&["index", reference, "--json"], more].concat();
    serde_json::from_str(&weightfs.run_here(&arguments).ok()).unwrap()
}

#[test]
fn an_artifact_gets_its_index_from_the_first_node_that_loaded_it() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = pack(&bed, &source);
    let reference = bed.push(&artifact, "models/first");
    bed.weightfs.configure(PUBLISH);
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    assert_eq!(pushes(&bed), 0, "nothing was verified yet");
    read_all(mounted.dir());
    wait_until("the index is published", || daemon.log().contains("index published"));
    let fetched = bytes_of_layers(&bed, &artifact);
    assert!(fetched <= artifact.layer_bytes() + (1 << 20), "{fetched} bytes: some came twice");
    mounted.stop();
    daemon.stop();

    let elsewhere = Weightfs::new(&bed.area);
    let published = summary(&elsewhere, &reference, &[]);
    let file = bed.area.path().join("index");
    let made = summary(&elsewhere, &reference, &["-o", file.to_str().unwrap()]);
    assert_eq!(published["index"], made["index"], "the same bytes, whoever makes them");
    bed.proxy.forget();
    let fresh = Weightfs::new(&bed.area);
    fresh.configure(PUBLISH);
    let second = mount(&bed, &fresh, &reference);
    assert_eq!(bed.proxy.bytes(Target::Blob(artifact.layer_digest(1))), 0, "nothing but the index");
    tree::assert_same(&source.join("docs"), &second.dir().join("docs"), Scope::ModelFiles);
    second.stop();
    assert_eq!(pushes(&bed), 0, "it has an index");
}

#[test]
fn nodes_that_publish_at_the_same_time_push_the_same() {
    let beds = [Bed::new(), Bed::new()];
    let source = beds[0].model(SMALL_MODEL);
    let published = beds.each_ref().map(|bed| {
        let reference = bed.push(&pack(bed, &source), "models/both");
        bed.weightfs.configure(PUBLISH);
        let mounted = bed.mount(&reference);
        read_all(mounted.dir());
        (mounted, reference)
    });
    let [one, other] = published.map(|(mounted, reference)| {
        wait_until("the index is published", || mounted.log().contains("index published"));
        mounted.stop();
        reference
    });
    let [one, other] = [(&beds[0], one), (&beds[1], other)]
        .map(|(bed, reference)| summary(&Weightfs::new(&bed.area), &reference, &[]));
    assert_eq!(one, other, "one index, carried by one manifest");
}

#[test]
fn what_can_not_be_pushed_is_said_once_for_a_repository_and_disturbs_nothing() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = pack(&bed, &source);
    let repositories = ["models/here", "models/there"];
    let [here, there] = repositories.map(|repository| bed.push(&artifact, repository));
    bed.weightfs.configure(PUBLISH);
    bed.proxy.fail(Target::Uploads, Fault::Status(405));
    let daemon = bed.weightfs.serve(&bed.area);
    let failures = |repository: &str| {
        let log = daemon.log();
        let lines = log.lines().filter(|line| line.contains("can't be published"));
        lines.filter(|line| line.contains(repository)).count()
    };
    let first = bed.mount(&here);
    read_all(first.dir());
    wait_until("the first failure", || failures(repositories[0]) == 1);
    // All of it is here already. Both are looked at when this one is remembered.
    let second = bed.mount(&there);
    tree::assert_same(&source.join("docs"), &second.dir().join("docs"), Scope::ModelFiles);
    wait_until("the second failure", || failures(repositories[1]) == 1);
    assert_eq!(failures(repositories[0]), 1, "{}", daemon.log());
    assert_eq!(pushes(&bed), 2, "not tried again so soon");
    second.stop();
    first.stop();
    daemon.stop();
}
