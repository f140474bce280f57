//! What a mount fetches, counted at the registry's side.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;

use weightfs_tests::layer::Compression;
use weightfs_tests::model::{Part, SMALL_MODEL};
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::process::run;
use weightfs_tests::tree::{self, Scope};
use weightfs_tests::wait::wait_until;
use weightfs_tests::{Artifact, Bed, Fault, Target};

const MIB: u64 = 1 << 20;
const LARGE: &[Part] = &[Part { path: "model.safetensors", bytes: 256 << 20, mode: 0o644 }];
const MEDIUM: &[Part] = &[Part { path: "model.safetensors", bytes: 40 << 20, mode: 0o644 }];

/// Bytes sent of the artifact's layers; the config is not one.
fn layer_bytes(bed: &Bed, artifact: &Artifact) -> u64 {
    let mut digests: Vec<_> =
        (0..artifact.layers().len()).map(|n| artifact.layer_digest(n)).collect();
    digests.sort();
    digests.dedup();
    digests.into_iter().map(|digest| bed.proxy.bytes(Target::Blob(digest))).sum()
}

fn read_at(path: &Path, offset: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Reads 4 KiB in the middle of a 256 MiB file and asserts that at most 2 MiB came for it.
fn assert_a_small_read_is_small(plans: Option<Vec<Plan>>) {
    let bed = Bed::new();
    let source = bed.model(LARGE);
    let artifact = match plans {
        None => bed.pack_raw(&source, Dialect::Cncf),
        Some(plans) => bed.pack(&source, Dialect::Cncf, &plans),
    };
    let mounted = bed.mount(&bed.push(&artifact, "models/large"));
    let middle = 128 * MIB + 12_345;
    let expected = read_at(&source.join("model.safetensors"), middle, 4096);
    bed.proxy.forget();
    assert!(read_at(&mounted.dir().join("model.safetensors"), middle, 4096) == expected);
    let fetched = layer_bytes(&bed, &artifact);
    assert!((4096..=2 * MIB).contains(&fetched), "{fetched} bytes for 4096");
    bed.proxy.forget();
    assert!(read_at(&mounted.dir().join("model.safetensors"), middle, 4096) == expected);
    assert_eq!(layer_bytes(&bed, &artifact), 0, "the same bytes again");
    mounted.stop();
}

#[test]
fn a_small_read_in_a_raw_layer_fetches_little() {
    assert_a_small_read_is_small(None);
}

#[test]
fn a_small_read_in_a_tar_layer_fetches_little() {
    let tar = Plan::Tar(Compression::Plain, vec!["model.safetensors".to_owned()]);
    assert_a_small_read_is_small(Some(vec![tar]));
}

#[test]
fn listing_raw_layers_fetches_no_layer_bytes() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let mounted = bed.mount(&bed.push(&artifact, "models/listed"));
    let list = run(Command::new("ls").arg("-lR").arg(mounted.dir())).ok();
    assert!(list.contains("model-00001-of-00003.safetensors"), "{list}");
    assert_eq!(layer_bytes(&bed, &artifact), 0);
    mounted.stop();
}

#[test]
fn a_tar_is_listed_without_downloading_it() {
    let bed = Bed::new();
    let source = bed.model(&[
        Part { path: "w/a.safetensors", bytes: 20 << 20, mode: 0o644 },
        Part { path: "w/b.safetensors", bytes: 30 << 20, mode: 0o644 },
        Part { path: "w/c.safetensors", bytes: 10 << 20, mode: 0o644 },
    ]);
    let plans = [Plan::Tar(Compression::Plain, vec!["w".to_owned()])];
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    let mounted = bed.mount(&bed.push(&artifact, "models/tar"));
    assert_eq!(
        fs::metadata(mounted.dir().join("w/c.safetensors")).unwrap().len(),
        fs::metadata(source.join("w/c.safetensors")).unwrap().len()
    );
    let fetched = layer_bytes(&bed, &artifact);
    assert!(fetched <= MIB, "{fetched} bytes to list 4 members");
    mounted.stop();
}

#[test]
fn a_full_read_fetches_every_byte_once() {
    let bed = Bed::new();
    let source = bed.model(MEDIUM);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let mounted = bed.mount(&bed.push(&artifact, "models/full"));
    let readers = 8;
    std::thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| tree::assert_same(&source, mounted.dir(), Scope::ModelFiles));
        }
    });
    assert_eq!(layer_bytes(&bed, &artifact), artifact.layer_bytes());
    mounted.stop();
}

#[test]
fn readers_at_many_places_fetch_every_byte_once() {
    let bed = Bed::new();
    let source = bed.model(MEDIUM);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let mounted = bed.mount(&bed.push(&artifact, "models/places"));
    let path = mounted.dir().join("model.safetensors");
    let expected = fs::read(source.join("model.safetensors")).unwrap();
    let part = expected.len() / 8;
    std::thread::scope(|scope| {
        for number in (0..8).rev() {
            let (path, expected) = (&path, &expected);
            scope.spawn(move || {
                let start = number * part;
                let found = read_at(path, start as u64, expected.len() - start);
                assert!(found == expected[start..], "from {start}");
            });
        }
    });
    assert_eq!(layer_bytes(&bed, &artifact), artifact.layer_bytes());
    mounted.stop();
}

#[test]
fn what_was_fetched_stays_for_the_next_mount() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let plans = [
        Plan::Tar(Compression::Plain, vec!["weights".to_owned()]),
        Plan::Tar(Compression::Gzip, vec!["docs".to_owned()]),
        Plan::Raw("tokenizer.json".to_owned()),
    ];
    let artifact = bed.pack(&source, Dialect::Cncf, &plans);
    let reference = bed.push(&artifact, "models/kept");
    let first = bed.mount(&reference);
    let seen = tree::read(first.dir());
    first.stop();
    bed.proxy.forget();
    let second = bed.mount(&reference);
    tree::assert_same_trees(&seen, &tree::read(second.dir()), Scope::Everything);
    assert_eq!(layer_bytes(&bed, &artifact), 0, "fetched again after a clean restart");
    second.stop();
}

#[test]
fn a_part_that_was_fetched_stays_for_the_next_mount() {
    let bed = Bed::new();
    let source = bed.model(MEDIUM);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let reference = bed.push(&artifact, "models/part");
    let read = |dir: &Path| read_at(&dir.join("model.safetensors"), 20 * MIB, 10_000);
    let expected = read(&source);
    for kept in [false, true] {
        bed.proxy.forget();
        let mounted = bed.mount(&reference);
        assert!(read(mounted.dir()) == expected);
        assert_eq!(layer_bytes(&bed, &artifact) == 0, kept);
        mounted.stop();
    }
}

#[test]
fn two_artifacts_with_one_blob_share_its_bytes() {
    let bed = Bed::new();
    let source = bed.model(SMALL_MODEL);
    let artifact = bed.pack_raw(&source, Dialect::Cncf);
    let first = bed.mount(&bed.push(&artifact, "models/one"));
    tree::assert_same(&source, first.dir(), Scope::ModelFiles);
    first.stop();
    bed.proxy.forget();
    let other = bed.pack_raw(&source, Dialect::Docker);
    let second = bed.mount(&bed.push(&other, "models/two"));
    tree::assert_same(&source, second.dir(), Scope::ModelFiles);
    assert_eq!(layer_bytes(&bed, &other), 0);
    second.stop();
}

#[test]
fn what_is_cached_is_read_on_while_every_fetch_hangs() {
    let bed = Bed::new();
    let source = bed.model(MEDIUM);
    let mounted = bed.mount(&bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/medium"));
    let path = mounted.dir().join("model.safetensors");
    let expected = fs::read(source.join("model.safetensors")).unwrap();
    let expected_at = |offset: u64| &expected[offset as usize..][..4096];
    assert!(read_at(&path, 0, 4096) == expected_at(0));
    bed.proxy.fail(Target::All, Fault::Hang);
    let misses: Vec<_> = (8..24)
        .map(|at| {
            let path = path.clone();
            std::thread::spawn(move || read_at(&path, at * MIB, 4096))
        })
        .collect();
    wait_until("the misses are asked for", || bed.proxy.requests(Target::Blobs) >= 12);
    // Past the page cache: each of them is the daemon's to answer.
    let direct = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&path).unwrap();
    let mut page = vec![0; 4096];
    for number in 0..1000 {
        let offset = number % 256 * 4096;
        direct.read_exact_at(&mut page, offset).unwrap();
        assert!(page == expected_at(offset), "wrong bytes at {offset}");
    }
    assert!(misses.iter().all(|miss| !miss.is_finished()), "a fetch came to an end meanwhile");
    bed.proxy.heal();
    for (at, miss) in (8..24).zip(misses) {
        assert!(miss.join().unwrap() == expected_at(at * MIB), "wrong bytes at {at} MiB");
    }
    drop(direct);
    mounted.stop();
}
