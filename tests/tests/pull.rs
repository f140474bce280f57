//! `weightfs pull`: files in the cache before anybody reads them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::SystemTime;

use serde_json::{Value, json};
use weightfs_tests::json::documented;
use weightfs_tests::model::{Part, SMALL_MODEL};
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::process::{self, Outcome, Service};
use weightfs_tests::{Artifact, Bed, Fault, Target, Weightfs, wait_until};

const FIRST: &str = "weights/model-00001-of-00003.safetensors";

const MIB: u64 = 1 << 20;

/// Two shards of 24 MiB, one layer each.
const SHARDS: &[Part] = &[
    Part { path: "a.safetensors", bytes: 24 << 20, mode: 0o644 },
    Part { path: "b.safetensors", bytes: 24 << 20, mode: 0o644 },
];

fn push_shards(bed: &Bed) -> (std::path::PathBuf, Artifact, String) {
    let source = bed.model(SHARDS);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "models/shards");
    (source, artifact, reference)
}

fn pull(bed: &Bed, reference: &str, more: &[&str]) -> Outcome {
    bed.weightfs.run_here(&[&["pull", reference, "--json"], more].concat())
}

fn pulled(bed: &Bed, reference: &str, more: &[&str]) -> Value {
    documented("pull", &pull(bed, reference, more).ok())
}

/// No registry is needed any more for what was pulled.
fn assert_read_from_the_cache(bed: &Bed, reference: &str, source: &std::path::Path) {
    let before = bed.proxy.bytes(Target::Blobs);
    let mounted = bed.mount(reference);
    for part in SMALL_MODEL {
        let found = fs::read(mounted.dir().join(part.path)).unwrap();
        assert!(found == fs::read(source.join(part.path)).unwrap(), "{}", part.path);
    }
    mounted.stop();
    // Only the config is asked for anew.
    let fetched = bed.proxy.bytes(Target::Blobs) - before;
    assert!(fetched < 4096, "{fetched} bytes");
}

#[test]
fn chosen_files_first_and_the_rest_later() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\nbackground = \"off\"\nprefetch = false");
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/pulled");
    let size = fs::metadata(source.join(FIRST)).unwrap().len();
    let first = pulled(&bed, &reference, &["--files", "weights/*-00001-*"]);
    assert_eq!(first, json!({ "files": 1, "size": size, "fetched": size }));
    let all: u64 =
        SMALL_MODEL.iter().map(|p| fs::metadata(source.join(p.path)).unwrap().len()).sum();
    let rest = pulled(&bed, &reference, &[]);
    assert_eq!(rest, json!({ "files": SMALL_MODEL.len(), "size": all, "fetched": all - size }));
    assert_eq!(pulled(&bed, &reference, &[])["fetched"], 0);
    assert_read_from_the_cache(&bed, &reference, &source);
}

#[test]
fn a_daemon_pulls_into_its_cache() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/pulled");
    let daemon = bed.weightfs.serve(&bed.area);
    let all = pulled(&bed, &reference, &["--files", "*", "--files", "**/*"]);
    assert_eq!(all["files"], SMALL_MODEL.len());
    assert_read_from_the_cache(&bed, &reference, &source);
    daemon.stop();
}

#[test]
fn what_can_not_be_pulled_is_named() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/pulled");
    let outcome = pull(&bed, &reference, &["--files", "*.gguf"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("no file of") && outcome.stderr.contains("*.gguf"));
    let outcome = pull(&bed, &reference, &["--files", "a[b"]);
    assert_eq!(outcome.code, 2, "{outcome:?}");
    let gone = bed.proxy.reference("models/gone", "v1");
    assert_eq!(pull(&bed, &gone, &[]).code, 1);
}

#[test]
fn a_pull_that_was_killed_goes_on_where_it_was() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_shards(&bed);
    let [first, second] = [0, 1].map(|at| artifact.layer_digest(at));
    let sizes = SHARDS.iter().map(|part| fs::metadata(source.join(part.path)).unwrap().len());
    let sizes: Vec<_> = sizes.collect();
    bed.proxy.fail(Target::Blob(second), Fault::Hang);
    let mut command = bed.weightfs.command(["pull", &reference, "--config"]);
    command.arg(bed.weightfs.config());
    let mut pulling = Service::start(&bed.area, "weightfs-pull", command);
    wait_until("the first shard was sent", || bed.proxy.bytes(Target::Blob(first)) >= sizes[0]);
    let sent = SystemTime::now();
    let hex = first.hex();
    let state = bed.weightfs.root().join("blobs/sha256").join(&hex[..2]).join(&hex).join("state");
    wait_until("what came is recorded", || {
        fs::metadata(&state).is_ok_and(|state| state.modified().unwrap() > sent)
    });
    pulling.kill();
    bed.proxy.heal();
    let rest = pulled(&bed, &reference, &[]);
    assert_eq!((&rest["files"], &rest["size"]), (&json!(2), &json!(sizes[0] + sizes[1])));
    // A record may have been under way when the last of it came.
    let fetched = rest["fetched"].as_u64().unwrap();
    assert!((sizes[1]..sizes[1] + 8 * MIB).contains(&fetched), "{fetched} bytes");
    let mounted = bed.mount(&reference);
    for part in SHARDS {
        let found = fs::read(mounted.dir().join(part.path)).unwrap();
        assert!(found == fs::read(source.join(part.path)).unwrap(), "{}", part.path);
    }
    mounted.stop();
}

/// Reads pages of both shards while the load is recorded into a file.
fn record(bed: &Bed, reference: &str) -> std::path::PathBuf {
    let file = bed.area.path().join("load.profile");
    let record = [format!("--record={}", file.display())];
    let elsewhere = Weightfs::new(&bed.area);
    let mounted = elsewhere.mount_with(&bed.area, reference, &bed.mount_point(), &record);
    for (shard, mib) in [("b.safetensors", 4), ("a.safetensors", 10), ("b.safetensors", 1)] {
        let shard = File::open(mounted.dir().join(shard)).unwrap();
        shard.read_exact_at(&mut [0; 4096], mib * MIB + 4096).unwrap();
    }
    mounted.stop();
    file
}

#[test]
fn what_a_recorded_load_has_read_is_fetched_and_no_more() {
    let bed = Bed::new();
    let (_, _, reference) = push_shards(&bed);
    let file = record(&bed, &reference);
    pull(&bed, &reference, &["--profile"]).assert_fails(1, &["no load of", "mount --record"]);
    let given = format!("--profile={}", file.display());
    let expected = json!({ "files": 2, "size": 3 * MIB, "fetched": 3 * MIB });
    bed.proxy.forget();
    assert_eq!(pulled(&bed, &reference, &[&given]), expected);
    // Three MiB and the config.
    let sent = bed.proxy.bytes(Target::Blobs);
    assert!((3 * MIB..3 * MIB + 4096).contains(&sent), "{sent} bytes");
    assert_eq!(pulled(&bed, &reference, &["--profile"])["fetched"], 0, "it was kept, and is here");
    pull(&bed, &reference, &["--profile", "--files", "*"]).assert_fails(2, &["--files"]);

    let elsewhere = Weightfs::new(&bed.area);
    let daemon = elsewhere.serve(&bed.area);
    let by_daemon = elsewhere.run_here(&["pull", &reference, "--json", &given]).ok();
    assert_eq!(serde_json::from_str::<Value>(&by_daemon).unwrap(), expected);
    daemon.stop();
}

#[test]
fn a_terminal_shows_each_file_and_the_total() {
    let bed = Bed::new();
    let (_, _, reference) = push_shards(&bed);
    let command = bed.weightfs.command(["pull", &reference]);
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let words: Vec<_> = words.into_iter().map(|word| word.to_str().unwrap()).collect();
    let line = format!("{} --config {}", words.join(" "), bed.weightfs.config().display());
    // util-linux's script gives it a terminal.
    let shown = process::run(Command::new("script").args(["-qec", &line, "/dev/null"])).ok();
    for text in ["a.safetensors", "b.safetensors", "of 48.0", "were fetched"] {
        assert!(shown.contains(text), "{text} in {shown:?}");
    }
}
