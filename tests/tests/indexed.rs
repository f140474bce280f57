//! Mounts by an index: nothing is walked, nothing wrong is served, and a bad index changes nothing.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use weightfs_fusefs::Listing;
use weightfs_fusefs::index::{Index, LayerIndex};
use weightfs_store::Digest;
use weightfs_tests::image::image;
use weightfs_tests::layer::{Attributes, Compression, LayerBuilder};
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::process::{Outcome, run};
use weightfs_tests::remote::{OCI_INDEX, OCI_MANIFEST};
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::weightfs::{Mounted, Weightfs};
use weightfs_tests::{Artifact, Bed, Blob, Fault, Target};

const MIB: u64 = 1 << 20;
const WEIGHTS: &str = "w/a.safetensors";
const MODEL: &[Part] = &[
    Part { path: WEIGHTS, bytes: 12 << 20, mode: 0o644 },
    Part { path: "w/b.safetensors", bytes: 3 << 20, mode: 0o644 },
    Part { path: "w/config.json", bytes: 517, mode: 0o644 },
];

const STRICT: &str = "[cache]\nverify = \"strict\"";

/// Tries to mount what is refused.
fn mount_fails(bed: &Bed, weightfs: &Weightfs, reference: &str, more: &[String]) -> Outcome {
    let mut command = weightfs.command(["mount", "--foreground", reference]);
    command.args(more).arg(bed.mount_point()).arg("--config").arg(weightfs.config());
    run(&mut command)
}

/// A model in one plain tar, with an index in the registry. It is made in a state directory of
/// its own.
fn push_indexed(bed: &Bed, name: &str) -> (PathBuf, Artifact, String) {
    let (source, artifact, reference) = push(bed, name);
    Weightfs::new(&bed.area).run_here(&["index", &reference]).ok();
    bed.proxy.forget();
    (source, artifact, reference)
}

fn push(bed: &Bed, name: &str) -> (PathBuf, Artifact, String) {
    let source = bed.model(MODEL);
    let plans = [Plan::Tar(Compression::Plain, vec!["w".to_owned()])];
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    let reference = bed.push(&artifact, name);
    (source, artifact, reference)
}

fn layer(artifact: &Artifact) -> Target {
    Target::Blob(artifact.layer_digest(0))
}

fn read_at(path: &Path, offset: u64, count: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    File::open(path)?.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Where the bytes of the large file lie in its tar.
fn offset_in_tar(bed: &Bed, artifact: &Artifact, source: &Path) -> u64 {
    let tar = fs::read(bed.registry.stored(&artifact.layer_digest(0).hex())).unwrap();
    let head = read_at(&source.join(WEIGHTS), 0, 512).unwrap();
    tar.windows(512).position(|window| window == head).unwrap() as u64
}

/// Chunks that the daemon has refused, as it says itself.
fn rejected(bed: &Bed) -> u64 {
    let status: serde_json::Value =
        serde_json::from_str(&bed.weightfs.run_here(&["status", "--json"]).ok()).unwrap();
    status["models"][0]["rejected"].as_u64().unwrap()
}

/// The chunk at 5 MiB of the large file can't be read, the others can.
fn assert_that_one_chunk_fails(mounted: &Mounted, source: &Path) {
    let (there, here) = (mounted.dir().join(WEIGHTS), source.join(WEIGHTS));
    assert!(read_at(&there, 5 * MIB + 100, 10).is_err(), "a wrong byte was served");
    for at in [0, 4 * MIB, 6 * MIB, 11 * MIB] {
        assert_eq!(read_at(&there, at, 1000).unwrap(), read_at(&here, at, 1000).unwrap());
    }
}

#[test]
fn an_indexed_model_is_mounted_without_a_look_at_its_tar() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_indexed(&bed, "models/indexed");
    let mounted = bed.mount(&reference);
    let size = |dir: &Path| fs::metadata(dir.join(WEIGHTS)).unwrap().len();
    assert_eq!(size(mounted.dir()), size(&source));
    // The first windows of a walk are asked for at the same time as the index.
    let fetched = bed.proxy.bytes(layer(&artifact));
    assert!(fetched <= MIB / 4, "{fetched} bytes, but the index says it all");
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    let listed = bed.weightfs.run_here(&["cache", "ls", "--json"]).ok();
    assert!(listed.contains("\"indexed\""), "{listed}");
    bed.proxy.forget();
    bed.mount(&reference).stop();
    let asked: Vec<_> = bed.proxy.seen().into_iter().map(|seen| seen.path).collect();
    assert!(!asked.iter().any(|path| path.contains("referrers")), "known already: {asked:?}");
}

#[test]
fn a_byte_that_is_flipped_on_the_way_is_never_served() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_indexed(&bed, "models/flipped");
    let at = offset_in_tar(&bed, &artifact, &source) + 5 * MIB + 105;
    bed.proxy.fail(layer(&artifact), Fault::Corrupt { at });
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    assert_that_one_chunk_fails(&mounted, &source);
    bed.proxy.heal();
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    assert!(daemon.log().contains("wrong chunk"), "{}", daemon.log());
    assert!(rejected(&bed) > 0);
    assert!(bed.weightfs.run_here(&["status"]).ok().contains("wrong chunk"));
    mounted.stop();
    daemon.stop();
}

#[test]
fn a_byte_that_is_flipped_in_the_registrys_storage_is_never_served() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_indexed(&bed, "models/stored");
    let hex = artifact.layer_digest(0).hex();
    let at = offset_in_tar(&bed, &artifact, &source) + 5 * MIB + 105;
    let blob = bed.registry.stored(&hex);
    let file = File::options().read(true).write(true).open(blob).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    assert_that_one_chunk_fails(&mounted, &source);
    assert!(rejected(&bed) > 0);
    mounted.stop();
    daemon.stop();
}

#[test]
fn a_byte_that_is_flipped_in_the_cache_is_fetched_again() {
    let bed = Bed::new();
    bed.weightfs.configure("[cache]\nrecheck = \"always\"");
    let (source, artifact, reference) = push_indexed(&bed, "models/rot");
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    let hex = artifact.layer_digest(0).hex();
    let dir = bed.weightfs.root().join("blobs/sha256").join(&hex[..2]).join(&hex);
    // The large file is the second segment: its header comes first.
    let segment = dir.join("segment-1");
    let byte = read_at(&segment, 5 * MIB + 105, 1).unwrap();
    let file = File::options().write(true).open(segment).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 5 * MIB + 105).unwrap();
    bed.proxy.forget();
    let daemon = bed.weightfs.serve(&bed.area);
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    assert_eq!(bed.proxy.bytes(layer(&artifact)), MIB, "that chunk and no other");
    assert_eq!(rejected(&bed), 1);
    mounted.stop();
    daemon.stop();
}

#[test]
fn strict_reads_of_an_indexed_model_do_not_wait_for_the_whole() {
    let bed = Bed::new();
    bed.weightfs.configure("[cache]\nverify = \"strict\"\n[fetch]\nbackground = \"off\"");
    let (source, artifact, reference) = push_indexed(&bed, "models/strict");
    let mounted = bed.mount(&reference);
    let there = read_at(&mounted.dir().join(WEIGHTS), 7 * MIB, 10).unwrap();
    assert_eq!(there, read_at(&source.join(WEIGHTS), 7 * MIB, 10).unwrap());
    let fetched = bed.proxy.bytes(layer(&artifact));
    assert!(fetched <= 2 * MIB, "{fetched} bytes for 10");
    mounted.stop();
}

#[test]
fn a_bad_index_is_refused_with_its_reason_and_the_mount_works() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/bad");
    let path = bed.area.path().join("good");
    let arguments = ["index", &reference, "-o", path.to_str().unwrap()];
    Weightfs::new(&bed.area).run_here(&arguments).ok();
    let good = fs::read(&path).unwrap();
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    // A digit of the manifest's digest; the first thing in the directory.
    let digit = good.windows(7).position(|window| window == b"sha256:").unwrap() + 7;
    let other = if good[digit] == b'0' { b'1' } else { b'0' };
    let bad = [
        (good[..good.len() - 1].to_vec(), "chunk digests are cut"),
        (good[..100].to_vec(), "directory is cut"),
        (changed(8, 9), "version 9"),
        (changed(0, b'X'), "WFSINDEX"),
        (changed(digit, other), "it is the index of"),
        ([&good[..], b"x"].concat(), "too many"),
        (vec![], "it is cut"),
    ];
    for (bytes, reason) in bad {
        let file = bed.area.path().join("bad");
        fs::write(&file, bytes).unwrap();
        let fresh = Weightfs::new(&bed.area);
        let more = ["--index".to_owned(), file.display().to_string()];
        let mounted = fresh.mount_with(&bed.area, &reference, &bed.mount_point(), &more);
        let log = mounted.log();
        assert!(log.contains("index is ignored") && log.contains(reason), "{reason}: {log}");
        let there = read_at(&mounted.dir().join(WEIGHTS), MIB, 10).unwrap();
        assert_eq!(there, read_at(&source.join(WEIGHTS), MIB, 10).unwrap());
        mounted.stop();
        let strict = Weightfs::new(&bed.area);
        strict.configure(STRICT);
        let outcome = mount_fails(&bed, &strict, &reference, &more);
        bed.assert_clean_failure(&outcome, &["cache.verify = \"strict\"", reason]);
    }
    bed.proxy.forget();
    let fresh = Weightfs::new(&bed.area);
    let more = ["--index".to_owned(), path.display().to_string()];
    let mounted = fresh.mount_with(&bed.area, &reference, &bed.mount_point(), &more);
    assert_eq!(bed.proxy.bytes(layer(&artifact)), 0, "the good one is used");
    mounted.stop();
}

/// Pushes bytes as the only index of a manifest, under the tag of its referrers.
fn push_as_index(bed: &Bed, artifact: &Artifact, name: &str, bytes: &[u8], size: Option<u64>) {
    let subject = serde_json::to_vec(&artifact.manifest).unwrap();
    let (config, index) = (Blob::from_bytes("{}"), Blob::from_bytes(bytes.to_vec()));
    let kind = "application/vnd.weightfs.index.v1";
    let carrier = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": kind,
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": config.digest.to_string(),
            "size": config.size,
        },
        "layers": [{
            "mediaType": kind,
            "digest": index.digest.to_string(),
            "size": size.unwrap_or(index.size),
        }],
    });
    let text = serde_json::to_vec(&carrier).unwrap();
    let listed = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{
            "mediaType": OCI_MANIFEST,
            "digest": Digest::of(&text).to_string(),
            "size": text.len(),
            "artifactType": kind,
        }],
    });
    let remote = bed.registry.remote();
    let tag = format!("sha256-{}", Digest::of(&subject).hex());
    Artifact { blobs: vec![config, index], manifest: carrier }.push(remote, name, "carrier");
    Artifact { blobs: vec![], manifest: listed }.push(remote, name, &tag);
}

/// The same index with its last file twice, which then overlap.
fn with_overlapping_files(index: &Index, manifest: Digest) -> Vec<u8> {
    let layers = index.layers().iter().map(|layer| {
        let mut entries = layer.listing.entries().to_vec();
        entries.push(entries.last().unwrap().clone());
        let listing = Listing::new(entries, layer.size).unwrap();
        LayerIndex { listing, ..layer.clone() }
    });
    Index::new(manifest, layers.collect()).to_bytes().unwrap().to_vec()
}

#[test]
fn bad_indexes_in_the_registry_are_refused_each_with_its_reason() {
    let bed = Bed::new();
    let (source, artifact, reference) = push(&bed, "models/referred");
    let file = bed.area.path().join("index");
    let arguments = ["index", &reference, "-o", file.to_str().unwrap()];
    Weightfs::new(&bed.area).run_here(&arguments).ok();
    let good = fs::read(&file).unwrap();
    let manifest = Digest::of(&serde_json::to_vec(&artifact.manifest).unwrap());
    let index = Index::parse(&good.clone().into(), manifest).unwrap();
    let other = Index::new(Digest::of(b"other"), index.layers().to_vec()).to_bytes().unwrap();
    let mut newer = good.clone();
    newer[8] = 9;
    let overlapping = with_overlapping_files(&index, manifest);
    let cut = good[..good.len() / 2].to_vec();
    for (what, bytes, size, reason) in [
        ("bound to another manifest", other.to_vec(), None, "it is the index of"),
        ("truncated", cut, None, "is cut"),
        ("of an unknown version", newer, None, "it has version 9"),
        ("larger than its bound", good.clone(), Some(2 << 30), "is over the limit"),
        ("larger than it says", good.clone(), Some(100), "over the limit of 100 bytes"),
        ("with overlapping extents", overlapping, None, "its files overlap"),
    ] {
        push_as_index(&bed, &artifact, "models/referred", &bytes, size);
        let fresh = Weightfs::new(&bed.area);
        bed.proxy.forget();
        let mounted = fresh.mount(&bed.area, &reference, &bed.mount_point());
        let log = mounted.log();
        assert!(log.contains("index ignored") && log.contains(reason), "{what}: {log}");
        assert!(bed.proxy.bytes(layer(&artifact)) > 0, "{what}: the tar is walked");
        let there = read_at(&mounted.dir().join(WEIGHTS), MIB, 10).unwrap();
        assert_eq!(there, read_at(&source.join(WEIGHTS), MIB, 10).unwrap());
        mounted.stop();
        let strict = Weightfs::new(&bed.area);
        strict.configure(STRICT);
        let outcome = mount_fails(&bed, &strict, &reference, &[]);
        bed.assert_clean_failure(&outcome, &["cache.verify = \"strict\"", reason]);
    }
    push_as_index(&bed, &artifact, "models/referred", &good, None);
    let strict = Weightfs::new(&bed.area);
    strict.configure(STRICT);
    strict.mount(&bed.area, &reference, &bed.mount_point()).stop();
}

#[test]
fn an_index_that_was_changed_in_the_registry_is_refused() {
    let bed = Bed::new();
    let (source, artifact, reference) = push_indexed(&bed, "models/changed");
    let file = bed.area.path().join("index");
    let arguments = ["index", &reference, "--json", "-o", file.to_str().unwrap()];
    Weightfs::new(&bed.area).run_here(&arguments).ok();
    let index = Digest::of(&fs::read(&file).unwrap());
    bed.proxy.forget();
    bed.proxy.fail(Target::Blob(index), Fault::Corrupt { at: 9 });
    let mounted = bed.mount(&reference);
    assert!(mounted.log().contains("index ignored"), "{}", mounted.log());
    assert!(bed.proxy.bytes(layer(&artifact)) > 0, "the tar is walked");
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
}

#[test]
fn what_policy_does_not_allow_is_not_looked_for() {
    let bed = Bed::new();
    let (_, artifact, reference) = push_indexed(&bed, "models/off");
    bed.weightfs.configure("[verify]\nreferrers = \"off\"");
    let mounted = bed.mount(&reference);
    assert!(bed.proxy.bytes(layer(&artifact)) > 0, "the tar is walked");
    let asked: Vec<_> = bed.proxy.seen().into_iter().map(|seen| seen.path).collect();
    assert!(!asked.iter().any(|path| path.contains("referrers")), "{asked:?}");
    mounted.stop();
}

#[test]
fn a_compressed_layer_is_read_in_part() {
    let bed = Bed::new();
    bed.weightfs.configure("[fetch]\nbackground = \"off\"\nprefetch = false");
    let source = bed.model(MODEL);
    let plans = [Plan::Tar(Compression::Gzip, vec!["w".to_owned()])];
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    let reference = bed.push(&artifact, "models/gzip");
    Weightfs::new(&bed.area).run_here(&["index", &reference]).ok();
    bed.proxy.forget();
    let size = artifact.layers()[0]["size"].as_u64().unwrap();
    let mounted = bed.mount(&reference);
    assert_eq!(bed.proxy.bytes(layer(&artifact)), 0, "nothing is downloaded for the mount");
    let there = read_at(&mounted.dir().join(WEIGHTS), 7 * MIB + 5, 4096).unwrap();
    assert_eq!(there, read_at(&source.join(WEIGHTS), 7 * MIB + 5, 4096).unwrap());
    let fetched = bed.proxy.bytes(layer(&artifact));
    assert!(fetched * 3 < size, "{fetched} of {size} bytes for 4096");
    mounted.stop();
    // What is here of it is believed after a restart, and the rest still comes lazily.
    let mounted = bed.mount(&reference);
    tree::assert_same(&source, mounted.dir(), Scope::ModelFiles);
    mounted.stop();
    bed.proxy.fail(layer(&artifact), Fault::Corrupt { at: size / 2 });
    let fresh = Weightfs::new(&bed.area);
    let mounted = fresh.mount(&bed.area, &reference, &bed.mount_point());
    let whole = fs::read(mounted.dir().join(WEIGHTS));
    assert!(whole.is_err(), "a byte was inflated from a wrong one");
    mounted.stop();
}

#[test]
fn ten_thousand_files_are_mounted_by_their_index_alone() {
    let bed = Bed::new();
    let mode = Attributes::mode(0o644);
    let mut builder = LayerBuilder::new(bed.area.path());
    for at in 0..10_000 {
        builder = builder.file(&format!("d{}/f{at}", at / 100), b"content", &mode);
    }
    let artifact = image(&[builder.finish(Compression::Gzip)]);
    let reference = bed.push(&artifact, "images/many");
    Weightfs::new(&bed.area).run_here(&["index", &reference]).ok();
    bed.proxy.forget();
    let began = Instant::now();
    let mounted = bed.mount(&reference);
    println!("10,000 files are mounted after {:?}", began.elapsed());
    assert_eq!(bed.proxy.bytes(layer(&artifact)), 0);
    assert_eq!(fs::read_dir(mounted.dir().join("d7")).unwrap().count(), 100);
    assert_eq!(fs::read(mounted.dir().join("d99/f9999")).unwrap(), b"content");
    mounted.stop();
}
