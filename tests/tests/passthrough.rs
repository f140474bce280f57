//! Complete files are served by the kernel from the cache files. That shows when the process
//! that mounted them is killed: what is passed through reads on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use weightfs_tests::layer::Compression;
use weightfs_tests::model::Part;
use weightfs_tests::modelpack::{Dialect, Plan};
use weightfs_tests::weightfs::Mounted;
use weightfs_tests::{Bed, wait_until};

const MIB: u64 = 1 << 20;
const PARTS: &[Part] = &[
    Part { path: "config.json", bytes: 700, mode: 0o644 },
    Part { path: "weights/model.safetensors", bytes: 24 << 20, mode: 0o644 },
];
const WEIGHTS: &str = "weights/model.safetensors";

/// A model in one layer of that kind, mounted, and where its files come from.
fn mounted(bed: &Bed, compression: Option<Compression>) -> (Mounted, PathBuf) {
    let source = bed.model(PARTS);
    let artifact = match compression {
        None => bed.pack_raw(&source, Dialect::Cncf),
        Some(compression) => {
            let names = vec!["config.json".to_owned(), "weights".to_owned()];
            bed.pack(&source, Dialect::Cncf, &[Plan::Tar(compression, names)])
        }
    };
    (bed.mount(&bed.push(&artifact, "models/passed")), source)
}

/// Kills the process that serves a mount and waits until nobody serves it.
fn kill_server(mounted: &Mounted) {
    kill(mounted.pid(), Signal::SIGKILL).unwrap();
    wait_until("the mount is dead", || fs::read_dir(mounted.dir()).is_err());
}

/// Whether all of an open file still reads as `expected`.
fn reads_on(file: &File, expected: &[u8]) -> bool {
    let mut bytes = vec![0; expected.len()];
    file.read_exact_at(&mut bytes, 0).is_ok_and(|()| bytes == expected)
}

fn complete_files_outlive_their_server(compression: Option<Compression>) {
    let bed = Bed::new();
    let (mounted, source) = mounted(&bed, compression);
    let path = mounted.dir().join(WEIGHTS);
    let expected = fs::read(source.join(WEIGHTS)).unwrap();
    assert!(fs::read(&path).unwrap() == expected);
    let file = File::open(&path).unwrap();
    kill_server(&mounted);
    assert!(reads_on(&file, &expected));
}

#[test]
fn a_complete_file_of_a_raw_layer_outlives_its_server() {
    complete_files_outlive_their_server(None);
}

#[test]
fn a_complete_file_in_a_tar_outlives_its_server() {
    complete_files_outlive_their_server(Some(Compression::Plain));
}

#[test]
fn a_complete_file_in_a_compressed_tar_outlives_its_server() {
    complete_files_outlive_their_server(Some(Compression::Zstd));
}

#[test]
fn a_file_that_completes_while_it_is_open_stays_right_and_is_passed_through_next_time() {
    let bed = Bed::new();
    let (mounted, source) = mounted(&bed, None);
    let path = mounted.dir().join(WEIGHTS);
    let expected = fs::read(source.join(WEIGHTS)).unwrap();
    let early = File::open(&path).unwrap();
    let mut head = [0; 4096];
    early.read_exact_at(&mut head, 20 * MIB).unwrap();
    // The file becomes complete, and is opened again while the first open lasts.
    assert!(fs::read(&path).unwrap() == expected);
    let late = File::open(&path).unwrap();
    assert!(reads_on(&early, &expected) && reads_on(&late, &expected));
    drop((early, late));
    // The kernel tells of the last close a moment later.
    let mut passed = None;
    wait_until("a new open reads", || {
        passed = File::open(&path).ok().filter(|file| reads_on(file, &expected));
        passed.is_some()
    });
    drop(passed);
    let passed = File::open(&path).unwrap();
    kill_server(&mounted);
    assert!(reads_on(&passed, &expected));
}

#[test]
fn overlayfs_reads_a_complete_file_from_its_cache_file() {
    let bed = Bed::new();
    let (mounted, source) = mounted(&bed, Some(Compression::Plain));
    let expected = fs::read(source.join(WEIGHTS)).unwrap();
    assert!(fs::read(mounted.dir().join(WEIGHTS)).unwrap() == expected);
    let overlay = Overlay::new(&bed, mounted.dir());
    let file = File::open(overlay.0.join(WEIGHTS)).unwrap();
    kill_server(&mounted);
    assert!(reads_on(&file, &expected));
}

/// An overlay over a mount, as containerd makes it for a container.
struct Overlay(PathBuf);

impl Overlay {
    fn new(bed: &Bed, lower: &Path) -> Self {
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| bed.area.dir(name));
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .unwrap();
        Self(merged)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // A test that fails with the file open leaves it to the area.
        let _ = umount(&self.0);
    }
}
