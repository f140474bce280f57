//! Calls that fail in the middle, clients that hang up: nothing is left, everything goes on.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use weightfs::metadata::{Backing, SNAPSHOT_REF};

use weightfs::reason::Reason;

use crate::harness::{Answer, Harness, assert_code, new_root};

const CHAIN: &str = "sha256:aa";

/// The beginning of the HTTP/2 frame by which the server says that it has read the settings.
const SETTINGS_ACK: &[u8] = b"\0\0\0\x04\x01";

/// Long enough for any machine; a test that needs it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

async fn assert_nothing_left(harness: &Harness) {
    assert!(harness.names(&[]).await.is_empty());
    assert!(harness.directories().is_empty());
    assert!(harness.mounter.trees().is_empty());
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_leaves_nothing() {
    let harness = Harness::start().await;
    let snapshots = harness.root.join("snapshots");
    fs::remove_dir(&snapshots).unwrap();
    fs::write(&snapshots, "in the way").unwrap();
    let status = assert_code(harness.prepare("key", "", &[]).await, Code::Internal);
    assert!(status.message().contains("create directory"), "{status}");
    assert_code(harness.view("key", "").await, Code::Internal);
    assert_code(harness.prepare_layer("key", "", CHAIN).await, Code::Internal);
    assert_code(harness.stat("key").await, Code::NotFound);
    fs::remove_file(&snapshots).unwrap();
    fs::create_dir(&snapshots).unwrap();
    harness.prepare("key", "", &[]).await.expect("the key is free");
}

#[tokio::test]
async fn a_parent_whose_root_cannot_be_read_leaves_nothing() {
    let harness = Harness::start().await;
    harness.mounter.answer(CHAIN, Answer::Lazy(vec![]));
    assert_code(harness.prepare_layer("lazy", "", CHAIN).await, Code::AlreadyExists);
    let tree = harness.root.join("mnt").join(harness.mounter.trees()[0].to_string());
    let aside = harness.root.join("aside");
    fs::rename(&tree, &aside).unwrap();
    assert_code(harness.prepare("key", "lazy", &[]).await, Code::Internal);
    assert!(harness.directories().is_empty());
    fs::rename(&aside, &tree).unwrap();
    harness.prepare("key", "lazy", &[]).await.unwrap();
}

#[tokio::test]
async fn a_mounter_that_panics_fails_one_call_and_leaves_nothing() {
    let harness = Harness::start().await;
    harness.mounter.answer(CHAIN, Answer::Panic);
    assert_code(harness.prepare_layer("key", "", CHAIN).await, Code::Internal);
    assert_nothing_left(&harness).await;
    harness.mounter.answer(CHAIN, Answer::Ordinary(Reason::failed("mended")));
    harness.prepare_layer("key", "", CHAIN).await.unwrap();
}

#[tokio::test]
async fn a_key_taken_during_the_mount_unmounts_the_tree() {
    let harness = Harness::start().await;
    harness.mounter.answer(CHAIN, Answer::Lazy(vec![("file", "x")]));
    let closed = harness.mounter.gate.acquire().await.unwrap();
    let prepare = harness.prepare_layer("key", "", CHAIN);
    let meanwhile = async {
        wait_for_request(&harness).await;
        harness.prepare("key", "", &[]).await.unwrap();
        drop(closed);
    };
    let (prepared, ()) = tokio::join!(prepare, meanwhile);
    assert_code(prepared, Code::AlreadyExists);
    assert!(harness.mounter.trees().is_empty());
    assert_eq!(harness.stat("key").await.unwrap().kind, 2);
}

#[tokio::test]
async fn a_parent_removed_during_the_mount_unmounts_the_tree() {
    let harness = Harness::start().await;
    harness.mounter.answer(CHAIN, Answer::Lazy(vec![("file", "x")]));
    harness.committed("base", "", &[]).await;
    let closed = harness.mounter.gate.acquire().await.unwrap();
    let prepare = harness.prepare_layer("key", "base", CHAIN);
    let meanwhile = async {
        wait_for_request(&harness).await;
        harness.remove("base").await.unwrap();
        drop(closed);
    };
    let (prepared, ()) = tokio::join!(prepare, meanwhile);
    assert_code(prepared, Code::NotFound);
    assert_nothing_left(&harness).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_a_whole_snapshot() {
    let harness = Harness::start().await;
    harness.mounter.answer(CHAIN, Answer::Lazy(vec![("file", "x")]));
    let closed = harness.mounter.gate.acquire().await.unwrap();
    tokio::select! {
        biased;
        _ = harness.prepare_layer("key", "", CHAIN) => panic!("the mount is held up"),
        () = wait_for_request(&harness) => {}
    }
    drop(closed);
    // The next one waits for its turn, and so for the end of the first.
    assert_code(harness.prepare_layer("other", "", CHAIN).await, Code::AlreadyExists);
    assert_eq!(harness.names(&[]).await, ["key"]);
    assert_eq!(harness.mounter.trees().len(), 1);
}

#[tokio::test]
async fn stat_and_other_prepares_go_on_while_a_mount_stalls() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    let closed = harness.mounter.gate.acquire().await.unwrap();
    let stalled = harness.prepare_layer("stalled", "", CHAIN);
    let others = async {
        wait_for_request(&harness).await;
        harness.stat("base").await.unwrap();
        harness.prepare("container", "base", &[]).await.unwrap();
        harness.remove("container").await.unwrap();
        assert_eq!(harness.names(&[]).await, ["base"]);
        harness.cleanup().await.unwrap();
        drop(closed);
    };
    let (stalled, ()) = tokio::join!(stalled, others);
    stalled.unwrap();
}

#[tokio::test]
async fn the_service_ends_although_a_client_ignores_its_goodbye() {
    let harness = Harness::start().await;
    let mut client = tokio::net::UnixStream::connect(harness.root.join("s.sock")).await.unwrap();
    // An HTTP/2 preface and empty settings: from here on it never answers.
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(SETTINGS_ACK.len()).any(|frame| frame == SETTINGS_ACK) {
        assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "the server closed");
    }
    let restarted = tokio::time::timeout(PATIENCE, harness.restart()).await;
    let harness = restarted.expect("the service waits for its client");
    harness.prepare("key", "", &[]).await.unwrap();
    drop(client);
}

/// A tmpfs of 4 MiB. Detached when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> SmallDisk {
        let directory = new_root();
        let (flags, size) = (MsFlags::empty(), Some("size=4m"));
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), flags, size).unwrap();
        SmallDisk(directory)
    }

    fn fill(&self) -> PathBuf {
        let path = self.0.path().join("filler");
        let mut file = fs::File::create(&path).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.0.path(), MntFlags::MNT_DETACH) {
            eprintln!("{} is left mounted: {error}", self.0.path().display());
        }
    }
}

/// Directories and trees are those of the snapshots that are there.
fn assert_only_what_is_recorded(harness: &Harness) {
    let (mut directories, mut trees) = (Vec::new(), Vec::new());
    for record in harness.metadata.snapshots() {
        match record.backing {
            Backing::Directory { id, .. } => directories.push(id.0),
            Backing::Lazy { tree, .. } => trees.push(tree),
        }
    }
    directories.sort_unstable();
    trees.sort();
    assert_eq!(harness.directories(), directories);
    assert_eq!(harness.mounter.trees(), trees);
}

#[tokio::test]
async fn a_transaction_that_fails_on_a_full_disk_leaves_nothing() {
    let disk = SmallDisk::mount();
    let harness = Harness::start_in(tempfile::tempdir_in(disk.0.path()).unwrap()).await;
    harness.committed("base", "", &[]).await;
    let filler = disk.fill();
    let padding = "x".repeat(300 << 10);
    let (mut ordinary, mut lazy) = (0, 0);
    for number in 0..20 {
        let labels = [("padding", padding.as_str())];
        if let Err(status) = harness.prepare(&format!("key {number}"), "base", &labels).await {
            assert_eq!(status.code(), Code::Internal, "{status}");
            ordinary += 1;
        }
        assert_only_what_is_recorded(&harness);
        let chain = format!("sha256:{number}");
        harness.mounter.answer(&chain, Answer::Lazy(vec![]));
        let labels = [("padding", padding.as_str()), (SNAPSHOT_REF, &chain)];
        let prepared = harness.prepare(&format!("lazy {number}"), "base", &labels).await;
        let status = prepared.unwrap_err();
        lazy += usize::from(status.message().contains("can't be written"));
        assert_only_what_is_recorded(&harness);
    }
    assert!(ordinary > 0 && lazy > 0, "the disk never was full");
    assert_eq!(harness.names(&["name==base"]).await, ["base"]);

    fs::remove_file(filler).unwrap();
    harness.prepare("after", "base", &[]).await.expect("there is room again");
    let infos = harness.list(&[]).await.unwrap();
    let harness = harness.restart().await;
    assert_eq!(harness.list(&[]).await.unwrap(), infos);
    assert_only_what_is_recorded(&harness);
}

/// Waits until a mount has begun.
async fn wait_for_request(harness: &Harness) {
    let begun = async {
        while harness.mounter.requests.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, begun).await.expect("the mount never began");
}
