//! The daemon: one owner of a state directory, mounts through it, its status and configuration.

use std::fs;
use std::path::PathBuf;

use weightfs_tests::area::is_mount_point;
use weightfs_tests::model::SMALL_MODEL;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::run;
use weightfs_tests::snapshots::Snapshots;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::weightfs::umount;
use weightfs_tests::{Bed, Blob, Daemon, Target};

#[test]
fn a_second_daemon_on_the_same_directory_is_refused() {
    let bed = Bed::new();
    let first = bed.weightfs.serve(&bed.area);
    let second = run(&mut bed.weightfs.serve_command());
    let pid = first.pid().to_string();
    second.assert_fails(1, &["weightfs: ", bed.weightfs.root().to_str().unwrap(), &pid]);
    // The first one is none the worse for it.
    let snapshots = Snapshots::connect(&bed.weightfs.snapshotter_socket(), "weightfs");
    snapshots.prepare("key", "").unwrap();
    first.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn a_daemon_whose_predecessor_was_killed_starts() {
    let bed = Bed::new();
    bed.weightfs.serve(&bed.area).kill();
    let daemon = bed.weightfs.serve(&bed.area);
    let snapshots = Snapshots::connect(&bed.weightfs.snapshotter_socket(), "weightfs");
    assert!(snapshots.list(&[]).unwrap().is_empty());
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn a_mount_beside_a_daemon_is_served_by_it() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "models/shared");
    let daemon = bed.weightfs.serve(&bed.area);
    let first = bed.mount(&reference);
    tree::assert_same(&source, first.dir(), Scope::ModelFiles);
    bed.proxy.forget();
    let second = bed.mount(&reference);
    tree::assert_same(&source, second.dir(), Scope::ModelFiles);
    let fetched: u64 = (0..artifact.layers().len())
        .map(|n| bed.proxy.bytes(Target::Blob(artifact.layer_digest(n))))
        .sum();
    assert_eq!(fetched, 0, "the two don't share a cache");
    first.stop();
    assert_eq!(fs::read_dir(second.dir()).unwrap().count(), fs::read_dir(&source).unwrap().count());
    second.stop();
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn a_second_mount_without_a_daemon_names_the_owner() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/owned");
    let first = bed.mount(&reference);
    let dir = bed.mount_point();
    let second = bed.weightfs.mount_fails(&reference, &dir);
    let pid = first.pid().to_string();
    second.assert_fails(1, &["weightfs: ", bed.weightfs.root().to_str().unwrap(), &pid]);
    assert!(!is_mount_point(&dir));
    tree::assert_same(&source, first.dir(), Scope::ModelFiles);
    first.stop();
    bed.area.assert_no_mounts();
}

/// Mounts through the daemon, in the background.
fn mount_in_background(bed: &Bed, reference: &str) -> PathBuf {
    let dir = bed.mount_point();
    let mut command = bed.weightfs.command(["mount", "--daemon", reference]);
    command.arg(&dir).arg("--root").arg(bed.weightfs.root());
    run(command.arg("--config").arg(bed.weightfs.config())).ok();
    assert!(is_mount_point(&dir));
    dir
}

/// The models that the daemon says it has.
fn models(bed: &Bed) -> usize {
    let root = bed.weightfs.root();
    let status = bed.weightfs.run(["status", "--json", "--root", root.to_str().unwrap()]).ok();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["models"].as_array().unwrap().len()
}

#[test]
fn a_background_mount_of_a_daemon_ends_by_umount() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/background");
    let daemon = bed.weightfs.serve(&bed.area);
    let dir = mount_in_background(&bed, &reference);
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    umount(&bed.weightfs, &dir);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    assert_eq!(models(&bed), 0);
    daemon.stop();
    bed.area.assert_no_mounts();
}

/// Mounts by a daemon that then ends, and sees its successor show the model where it was.
fn a_background_mount_outlives(end: impl FnOnce(Daemon)) {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/lasting");
    let daemon = bed.weightfs.serve(&bed.area);
    let dir = mount_in_background(&bed, &reference);
    end(daemon);
    assert!(fs::read_dir(&dir).is_err(), "nobody serves it");
    // The registry is not asked for what is known.
    bed.proxy.refuse();
    let daemon = bed.weightfs.serve(&bed.area);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), fs::read_dir(&source).unwrap().count());
    bed.proxy.accept();
    tree::assert_same(&source, &dir, Scope::ModelFiles);
    umount(&bed.weightfs, &dir);
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn a_background_mount_outlives_a_restart_of_its_daemon() {
    a_background_mount_outlives(Daemon::stop);
}

#[test]
fn a_background_mount_outlives_the_death_of_its_daemon() {
    a_background_mount_outlives(Daemon::kill);
}

#[test]
fn a_mount_that_went_while_no_daemon_ran_is_forgotten() {
    let bed = Bed::new();
    let reference = bed.push(&bed.pack_raw(&bed.model(SMALL_MODEL), Dialect::Cncf), "models/gone");
    let daemon = bed.weightfs.serve(&bed.area);
    let dir = mount_in_background(&bed, &reference);
    daemon.kill();
    umount(&bed.weightfs, &dir);
    let daemon = bed.weightfs.serve(&bed.area);
    assert_eq!(models(&bed), 0);
    daemon.stop();
    bed.area.assert_no_mounts();
}

#[test]
fn the_status_names_mounts_and_bytes() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let digest = artifact.push(bed.registry.remote(), "models/status", "v1");
    let reference = bed.proxy.reference("models/status", "v1");
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    fs::read(mounted.dir().join("tokenizer.json")).unwrap();
    let root = bed.weightfs.root();
    let root = root.to_str().unwrap();
    let text = bed.weightfs.run(["status", "--root", root]).ok();
    assert!(text.contains("models/status"), "{text}");
    let json = bed.weightfs.run(["status", "--json", "--root", root]).ok();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let model = &json["models"][0];
    assert_eq!(model["reference"], reference, "{json}");
    assert_eq!(model["manifest_digest"], digest.to_string(), "{json}");
    assert_eq!(model["size"], artifact.layer_bytes(), "{json}");
    let read = Blob::from_file(&source.join("tokenizer.json"));
    assert_eq!(bed.proxy.bytes(Target::Blob(read.digest)), read.size);
    assert_eq!(model["fetched"], read.size, "{json}");
    mounted.stop();
    daemon.stop();
}

#[test]
fn an_unknown_key_of_the_configuration_is_refused_with_the_nearest_known_one() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\ndeadlin = \"5s\"");
    let outcome = run(&mut bed.weightfs.serve_command());
    bed.assert_clean_failure(&outcome, &["deadlin`", "fetch.deadline", "config.toml"]);
}

#[test]
fn the_effective_configuration_is_printed_with_comments() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\ndeadline = \"44s\"");
    let mut command = bed.weightfs.command(["config", "--config"]);
    let text = run(command.arg(bed.weightfs.config())).ok();
    for part in ["root = ", "[snapshotter]", "min_layer_size", "[control]", "[fetch]", "44s", "# "]
    {
        assert!(text.contains(part), "no {part} in {text}");
    }
    // What is printed is a configuration again.
    let printed = bed.area.file("printed.toml", &text);
    let again = run(bed.weightfs.command(["config", "--config"]).arg(printed)).ok();
    assert_eq!(again, text);
}

#[test]
fn a_configuration_that_was_named_must_be_there() {
    let bed = Bed::new();
    let missing = bed.area.path().join("missing.toml");
    let outcome = run(bed.weightfs.command(["serve", "--config"]).arg(&missing));
    bed.assert_clean_failure(&outcome, &["missing.toml"]);
}
