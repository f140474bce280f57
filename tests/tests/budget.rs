//! A cache that is smaller than what is read through it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::Dialect;
use weightfs_tests::{Bed, wait_until};

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 64 * MIB;
const SMALL: &[Part] = &[Part { path: "model.safetensors", bytes: 24 << 20, mode: 0o644 }];
const LARGE: &[Part] = &[
    Part { path: "model-1.safetensors", bytes: 90 << 20, mode: 0o644 },
    Part { path: "model-2.safetensors", bytes: 70 << 20, mode: 0o644 },
];

fn bed() -> Bed {
    let bed = Bed::new();
    bed.weightfs.configure("[cache]\nlimit = \"64MiB\"\nmin_free = \"1MiB\"");
    bed
}

/// Bytes that all files below take on disk.
fn on_disk(root: &Path) -> u64 {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => on_disk(&entry.path()),
        Ok(found) => found.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn a_model_larger_than_the_cache_loads_completely_within_the_limit() {
    let bed = bed();
    let source = bed.model(LARGE);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/large");
    let mounted = bed.mount(&reference);
    for part in LARGE {
        let file = File::open(mounted.dir().join(part.path)).unwrap();
        let expected = fs::read(source.join(part.path)).unwrap();
        for (number, expected) in expected.chunks(MIB as usize).enumerate() {
            let mut piece = vec![0; expected.len()];
            file.read_exact_at(&mut piece, number as u64 * MIB).unwrap();
            assert!(piece == expected, "MiB {number} of {}", part.path);
            let used = on_disk(&bed.weightfs.root().join("blobs"));
            assert!(used <= LIMIT + LIMIT / 100, "{used} bytes");
        }
    }
}

#[test]
fn a_reader_that_outlived_its_server_sees_no_hole_when_the_next_one_needs_the_room() {
    let bed = bed();
    let source = bed.model(SMALL);
    let reference = bed.push(&bed.pack_raw(&source, Dialect::Cncf), "models/small");
    let mounted = bed.mount(&reference);
    let path = mounted.dir().join(SMALL[0].path);
    let expected = fs::read(source.join(SMALL[0].path)).unwrap();
    assert!(fs::read(&path).unwrap() == expected);
    let mut reader = None;
    let reads = |file: &File| {
        let mut bytes = vec![0; expected.len()];
        file.read_exact_at(&mut bytes, 0).is_ok_and(|()| bytes == expected)
    };
    // The kernel tells of the last close a moment later.
    wait_until("a new open reads", || {
        reader = File::open(&path).ok().filter(reads);
        reader.is_some()
    });
    drop(reader);
    let reader = File::open(&path).unwrap();
    kill(mounted.pid(), Signal::SIGKILL).unwrap();
    wait_until("the mount is dead", || fs::read_dir(mounted.dir()).is_err());
    let large = bed.model(LARGE);
    let reference = bed.push(&bed.pack_raw(&large, Dialect::Cncf), "models/large");
    let next = bed.mount(&reference);
    for part in LARGE {
        assert!(
            fs::read(next.dir().join(part.path)).unwrap()
                == fs::read(large.join(part.path)).unwrap()
        );
    }
    assert!(reads(&reader));
}
