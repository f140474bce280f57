//! Loads that are recorded, and mounts that go by what was recorded.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::wait::wait_until;
use weightfs_tests::{Artifact, Bed, Target, Weightfs};

const MIB: u64 = 1 << 20;
const MODEL: &[Part] = &[
    Part { path: "a.safetensors", bytes: 24 << 20, mode: 0o644 },
    Part { path: "b.safetensors", bytes: 24 << 20, mode: 0o644 },
];

/// What the load reads, in its order: a page at each of these MiB.
const LOAD: [(&str, u64); 3] = [("b.safetensors", 4), ("a.safetensors", 10), ("b.safetensors", 1)];

/// One request at a time, so that their order is what they were asked for in.
const ONE_BY_ONE: &str = "[fetch]\nconnections_per_host = 1";

fn load(dir: &Path) {
    for (name, mib) in LOAD {
        let file = File::open(dir.join(name)).unwrap();
        file.read_exact_at(&mut [0; 4096], mib * MIB + 4096).unwrap();
    }
}

/// Mounts with these arguments, loads, and ends the mount.
fn load_with(bed: &Bed, weightfs: &Weightfs, reference: &str, arguments: &[String]) {
    let mounted = weightfs.mount_with(&bed.area, reference, &bed.mount_point(), arguments);
    load(mounted.dir());
    mounted.stop();
}

/// The artifact's two layers, named as their files.
fn layer(artifact: &Artifact, name: &str) -> Target {
    Target::Blob(artifact.layer_digest(usize::from(name.starts_with('b'))))
}

fn blob_bytes(bed: &Bed, artifact: &Artifact) -> u64 {
    ["a", "b"].map(|name| bed.proxy.bytes(layer(artifact, name))).iter().sum()
}

/// Asserts that what the load reads is fetched, in its order, and nothing else.
fn assert_load_is_fetched(bed: &Bed, artifact: &Artifact) {
    let expected = LOAD.len() as u64 * MIB;
    wait_until("the recorded load is fetched", || blob_bytes(bed, artifact) >= expected);
    let asked: Vec<_> =
        bed.proxy.seen().into_iter().filter_map(|seen| Some((seen.path, seen.range?))).collect();
    assert_eq!(asked.len(), LOAD.len(), "{asked:?}");
    for ((name, mib), (path, range)) in LOAD.into_iter().zip(asked) {
        let digest = artifact.layer_digest(usize::from(name.starts_with('b')));
        assert!(path.ends_with(&digest.to_string()), "{path} is not of {name}");
        assert_eq!(range, format!("bytes={}-{}", mib * MIB, (mib + 1) * MIB - 1));
    }
    assert_eq!(blob_bytes(bed, artifact), expected);
}

fn fresh(bed: &Bed) -> Weightfs {
    let weightfs = Weightfs::new(&bed.area);
    weightfs.configure(ONE_BY_ONE);
    weightfs
}

#[test]
fn a_recorded_load_is_fetched_in_its_order_elsewhere() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    let file = bed.area.path().join("load.profile");
    let record = [format!("--record={}", file.display())];
    load_with(&bed, &bed.weightfs, &reference, &record);

    let elsewhere = fresh(&bed);
    let profile = ["--profile".to_owned(), file.display().to_string()];
    bed.proxy.forget();
    let dir = bed.mount_point();
    let mounted = elsewhere.mount_with(&bed.area, &reference, &dir, &profile);
    assert_load_is_fetched(&bed, &artifact);
    // Nothing is fetched for it any more.
    bed.proxy.forget();
    load(mounted.dir());
    assert_eq!(blob_bytes(&bed, &artifact), 0);
    mounted.stop();
}

#[test]
fn a_recorded_load_is_known_at_the_next_mount() {
    let bed = Bed::new();
    bed.weightfs.configure(ONE_BY_ONE);
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    load_with(&bed, &bed.weightfs, &reference, &["--record".to_owned()]);
    let blobs = bed.weightfs.root().join("blobs/sha256");
    for number in 0..2 {
        let hex = artifact.layer_digest(number).hex();
        fs::remove_dir_all(blobs.join(&hex[..2]).join(&hex)).unwrap();
    }
    bed.proxy.forget();
    let mounted = bed.mount(&reference);
    assert_load_is_fetched(&bed, &artifact);
    mounted.stop();
}

#[test]
fn a_recorded_load_travels_in_the_index() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    let index = |arguments: &[&str]| -> serde_json::Value {
        let arguments = [&["index", &reference, "--json"], arguments].concat();
        serde_json::from_str(&bed.weightfs.run_here(&arguments).ok()).unwrap()
    };
    let without = index(&[]);
    assert_eq!(without["profiled"], 0);
    load_with(&bed, &bed.weightfs, &reference, &["--record".to_owned()]);
    let with = index(&[]);
    assert_eq!(with["profiled"], LOAD.len() as u64 * MIB);
    assert_ne!(with["index"], without["index"]);
    assert_eq!(index(&[]), with, "nothing has changed since");

    // There are two indexes now, one of them without a profile.
    let elsewhere = fresh(&bed);
    bed.proxy.forget();
    let mounted = elsewhere.mount(&bed.area, &reference, &bed.mount_point());
    assert_load_is_fetched(&bed, &artifact);
    mounted.stop();
}

#[test]
fn a_recorded_load_is_put_into_an_index_from_a_file() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    let (profile, index) = (bed.area.path().join("profile"), bed.area.path().join("index"));
    let record = [format!("--record={}", profile.display())];
    load_with(&bed, &bed.weightfs, &reference, &record);
    let elsewhere = fresh(&bed);
    let [profile, file] = [&profile, &index].map(|path| path.to_str().unwrap());
    elsewhere.run_here(&["index", &reference, "--profile", profile, "-o", file]).ok();
    bed.proxy.forget();
    let arguments = ["--index".to_owned(), file.to_owned()];
    let mounted = elsewhere.mount_with(&bed.area, &reference, &bed.mount_point(), &arguments);
    assert_load_is_fetched(&bed, &artifact);
    mounted.stop();
    let other = bed.push(&bed.pack_raw(&bed.model(&MODEL[..1]), Dialect::Cncf), "models/other");
    let refused = elsewhere.run_here(&["index", &other, "--profile", profile, "-o", file]);
    refused.assert_fails(1, &["was recorded of manifest"]);
}

#[test]
fn a_recorded_load_is_not_fetched_where_prefetch_is_off() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    let file = bed.area.path().join("load.profile");
    let record = [format!("--record={}", file.display())];
    load_with(&bed, &bed.weightfs, &reference, &record);

    let elsewhere = fresh(&bed);
    elsewhere.configure(&format!("{ONE_BY_ONE}\nprefetch = false"));
    let profile = ["--profile".to_owned(), file.display().to_string()];
    bed.proxy.forget();
    let dir = bed.mount_point();
    let mounted = elsewhere.mount_with(&bed.area, &reference, &dir, &profile);
    // The last one of the load: with one request at a time, the others would have come before.
    let shard = File::open(mounted.dir().join("b.safetensors")).unwrap();
    shard.read_exact_at(&mut [0; 4096], MIB + 4096).unwrap();
    assert_eq!(blob_bytes(&bed, &artifact), MIB);
    drop(shard);
    mounted.stop();
}

#[test]
fn a_foreign_profile_is_refused_with_its_reason() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    let other = bed.pack_raw(&bed.model(&MODEL[..1]), Dialect::Cncf);
    let other = bed.push(&other, "models/other");
    let garbage = bed.area.file("garbage", "no profile at all");
    let theirs = bed.area.path().join("theirs");
    load_of_other(&bed, &other, &theirs);
    for (file, text) in [
        (garbage.as_path(), "no profile of this version"),
        (theirs.as_path(), "was recorded of manifest"),
        (Path::new("/nonexistent"), "No such file"),
    ] {
        let dir = bed.mount_point();
        let mut command = bed.weightfs.command(["mount", &reference]);
        command.arg(&dir).arg("--config").arg(bed.weightfs.config()).arg("--profile").arg(file);
        let outcome = weightfs_tests::process::run(&mut command);
        bed.assert_clean_failure(&outcome, &[text]);
    }
}

fn load_of_other(bed: &Bed, reference: &str, file: &Path) {
    let record = [format!("--record={}", file.display())];
    let mounted = bed.weightfs.mount_with(&bed.area, reference, &bed.mount_point(), &record);
    let shard = File::open(mounted.dir().join("a.safetensors")).unwrap();
    shard.read_exact_at(&mut [0; 4096], 4 * MIB).unwrap();
    drop(shard);
    mounted.stop();
}

#[test]
fn a_daemon_goes_by_a_profile_too_and_records_none() {
    let bed = Bed::new();
    let artifact = bed.pack_raw(&bed.model(MODEL), Dialect::Cncf);
    let reference = bed.push(&artifact, "models/recorded");
    let file = bed.area.path().join("load.profile");
    let record = [format!("--record={}", file.display())];
    load_with(&bed, &bed.weightfs, &reference, &record);

    let elsewhere = fresh(&bed);
    let daemon = elsewhere.serve(&bed.area);
    let profile = ["--profile".to_owned(), file.display().to_string()];
    bed.proxy.forget();
    let dir = bed.mount_point();
    let mounted = elsewhere.mount_with(&bed.area, &reference, &dir, &profile);
    assert_load_is_fetched(&bed, &artifact);
    mounted.stop();
    let mut command = elsewhere.command(["mount", "--record", &reference]);
    command.arg(bed.mount_point()).arg("--config").arg(elsewhere.config());
    let outcome = weightfs_tests::process::run(&mut command);
    outcome.assert_fails(1, &["only a mount of its own is recorded"]);
    daemon.stop();
}
