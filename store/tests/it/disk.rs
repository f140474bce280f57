//! Disks that are full, or may not be written to: small file systems in a file. Root only;
//! elsewhere these tests say so and do nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use weightfs_store::{Blob, OpenError, Store};

use super::{MIB, blob_of, judged, noise, open, options, read};

/// An ext4 of its own; unmounted when it is dropped.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// `None` where nothing can be mounted.
    fn new(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let disk = Self { dir };
        let made = run("mkfs.ext4", &["-q", "-m", "0", path(&image)]);
        let mounted = made && run("mount", &["-o", "loop", path(&image), path(&disk.root())]);
        if !mounted {
            eprintln!("skipped: no loop-mounted ext4 can be had here");
        }
        mounted.then_some(disk)
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run("umount", &["-l", path(&self.root())]);
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let output = Command::new(program).args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

/// Reads all of it; the most that was cached at a time.
async fn read_all(blob: &Arc<Blob>, data: &[u8]) -> u64 {
    let mut most = 0;
    let size = data.len() as u64;
    for start in (0..size).step_by(300_000) {
        let range = start..size.min(start + 300_000);
        let slice = read(blob, range.clone()).await.unwrap();
        assert!(*slice == data[range.start as usize..range.end as usize], "{range:?}");
        most = most.max(blob.stats().cached);
    }
    most
}

#[tokio::test]
async fn a_blob_larger_than_the_disk_loads_completely() {
    let Some(disk) = SmallDisk::new(80 * MIB) else { return };
    let store = open(&disk.root());
    store.start_evicting();
    let data = noise(150 * MIB + 99, 1);
    let (blob, _) = blob_of(&store, &data);
    let most = read_all(&blob, &data).await;
    assert!(most > 20 * MIB, "the disk is used: {most}");
    drop((blob, store));
    // What was recorded on the full disk is right.
    let store = open(&disk.root());
    store.start_evicting();
    let (blob, _) = blob_of(&store, &data);
    read_all(&blob, &data).await;
}

#[tokio::test]
async fn a_disk_that_others_have_filled_is_no_readers_error() {
    let Some(disk) = SmallDisk::new(40 * MIB) else { return };
    let store = open(&disk.root());
    store.start_evicting();
    let hog = disk.root().join("hog");
    let filled = Command::new("dd")
        .args(["if=/dev/zero", &format!("of={}", path(&hog)), "bs=1M"])
        .output()
        .unwrap();
    assert!(!filled.status.success(), "until it is full");
    let data = noise(8 * MIB + 5, 3);
    let (blob, _) = blob_of(&store, &data);
    read_all(&blob, &data).await;
    assert!(blob.stats().cached <= MIB, "{:?}", blob.stats());
    drop(blob);
    fs::remove_file(hog).unwrap();
    // The evictor looks when somebody needs room; before it has, memory serves.
    let (mut blob, _) = blob_of(&store, &data);
    while blob.stats().cached < data.len() as u64 {
        read_all(&blob, &data).await;
        drop(blob);
        blob = blob_of(&store, &data).0;
    }
    judged(&blob).await;
}

#[tokio::test]
async fn a_directory_that_cannot_be_written_is_refused_with_its_name() {
    let Some(disk) = SmallDisk::new(16 * MIB) else { return };
    assert!(run("mount", &["-o", "remount,ro", path(&disk.root())]));
    match Store::open(&disk.root().join("state"), options()) {
        Err(OpenError::Io { path, source }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            assert!(path.starts_with(disk.root()));
        }
        other => panic!("{other:?}"),
    }
}
