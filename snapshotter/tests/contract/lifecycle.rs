//! Keys and names, kinds, error classes, times, removal.

use tonic::Code;

use crate::harness::{Harness, assert_code, sorted};

const ACTIVE: i32 = 2;
const VIEW: i32 = 1;
const COMMITTED: i32 = 3;

#[tokio::test]
async fn a_key_in_use_refuses_prepare_and_view() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("active", "base", &[]).await.unwrap();
    harness.view("view", "base").await.unwrap();
    for key in ["active", "view"] {
        assert_code(harness.prepare(key, "base", &[]).await, Code::AlreadyExists);
        assert_code(harness.prepare(key, "", &[]).await, Code::AlreadyExists);
        assert_code(harness.view(key, "base").await, Code::AlreadyExists);
        assert_code(harness.commit(key, "active", &[]).await, Code::AlreadyExists);
    }
    assert_eq!(harness.names(&[]).await, ["active", "base", "view"]);
}

#[tokio::test]
async fn a_name_in_use_refuses_prepare_view_and_commit() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("active", "", &[]).await.unwrap();
    assert_code(harness.prepare("base", "", &[]).await, Code::AlreadyExists);
    assert_code(harness.view("base", "base").await, Code::AlreadyExists);
    assert_code(harness.commit("base", "active", &[]).await, Code::AlreadyExists);
    assert_eq!(harness.stat("active").await.unwrap().kind, ACTIVE);
}

#[tokio::test]
async fn what_does_not_exist_is_not_found() {
    let harness = Harness::start().await;
    assert_code(harness.stat("none").await, Code::NotFound);
    assert_code(harness.mounts("none").await, Code::NotFound);
    assert_code(harness.usage("none").await, Code::NotFound);
    assert_code(harness.remove("none").await, Code::NotFound);
    assert_code(harness.commit("name", "none", &[]).await, Code::NotFound);
    assert_code(harness.update("none", &[], None).await, Code::NotFound);
    assert_code(harness.prepare("key", "none", &[]).await, Code::NotFound);
    assert_code(harness.view("key", "none").await, Code::NotFound);
    assert!(harness.names(&[]).await.is_empty());
    assert!(harness.directories().is_empty());
}

#[tokio::test]
async fn the_wrong_kind_is_a_failed_precondition() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.view("view", "base").await.unwrap();
    assert_code(harness.mounts("base").await, Code::FailedPrecondition);
    assert_code(harness.commit("name", "view", &[]).await, Code::FailedPrecondition);
    assert_code(harness.commit("name", "base", &[]).await, Code::FailedPrecondition);
}

#[tokio::test]
async fn bad_arguments_are_refused() {
    let harness = Harness::start().await;
    harness.prepare("active", "", &[]).await.unwrap();
    assert_code(harness.prepare("key", "active", &[]).await, Code::InvalidArgument);
    assert_code(harness.view("key", "active").await, Code::InvalidArgument);
    assert_code(harness.prepare("", "", &[]).await, Code::InvalidArgument);
    assert_code(harness.commit("", "active", &[]).await, Code::InvalidArgument);
    assert_code(harness.prepare(&"k".repeat(40_000), "", &[]).await, Code::InvalidArgument);
    let value = "v".repeat(600 << 10);
    assert_code(harness.prepare("key", "", &[("big", &value)]).await, Code::InvalidArgument);
    assert_eq!(harness.names(&[]).await, ["active"]);
}

#[tokio::test]
async fn removing_a_parent_with_children_fails_with_remove_in_the_text() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("child", "base", &[]).await.unwrap();
    let status = assert_code(harness.remove("base").await, Code::FailedPrecondition);
    assert!(status.message().contains("remove"), "{status}");
    harness.remove("child").await.unwrap();
    harness.remove("base").await.unwrap();
    assert!(harness.directories().is_empty());
}

#[tokio::test]
async fn created_equals_updated_after_prepare_and_again_after_commit() {
    let harness = Harness::start().await;
    harness.prepare("key", "", &[]).await.unwrap();
    let prepared = harness.stat("key").await.unwrap();
    assert_eq!(prepared.created_at, prepared.updated_at);
    let updated = harness.update("key", &[("a", "b")], None).await.unwrap();
    assert_ne!(updated.created_at, updated.updated_at);
    harness.commit("name", "key", &[]).await.unwrap();
    let committed = harness.stat("name").await.unwrap();
    assert_eq!(committed.created_at, committed.updated_at);
    assert_ne!(committed.created_at, prepared.created_at);
}

#[tokio::test]
async fn times_have_nanoseconds() {
    let harness = Harness::start().await;
    let mut fractions = Vec::new();
    for key in ["a", "b", "c", "d"] {
        harness.prepare(key, "", &[]).await.unwrap();
        fractions.push(harness.stat(key).await.unwrap().created_at.unwrap().nanos);
    }
    assert!(fractions.iter().any(|nanos| nanos % 1000 != 0), "{fractions:?}");
}

#[tokio::test]
async fn the_active_key_is_gone_after_commit() {
    let harness = Harness::start().await;
    harness.prepare("key", "", &[]).await.unwrap();
    harness.commit("name", "key", &[]).await.unwrap();
    assert_code(harness.stat("key").await, Code::NotFound);
    assert_code(harness.mounts("key").await, Code::NotFound);
    assert_code(harness.commit("again", "key", &[]).await, Code::NotFound);
    harness.prepare("key", "name", &[]).await.expect("the key is free again");
}

#[tokio::test]
async fn a_commit_keeps_the_parent_and_replaces_the_labels() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("key", "base", &[("prepared", "1"), ("both", "old")]).await.unwrap();
    let active = harness.stat("key").await.unwrap();
    assert_eq!(sorted(&active.labels), [("both", "old"), ("prepared", "1")].into());
    harness.commit("name", "key", &[("both", "new"), ("committed", "1")]).await.unwrap();
    let committed = harness.stat("name").await.unwrap();
    assert_eq!(committed.parent, "base");
    assert_eq!(committed.kind, COMMITTED);
    assert_eq!(sorted(&committed.labels), [("both", "new"), ("committed", "1")].into());
}

#[tokio::test]
async fn walks_entries_equal_stats_exactly() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("active", "base", &[("l", "1")]).await.unwrap();
    harness.view("view", "base").await.unwrap();
    let walked = harness.list(&[]).await.unwrap();
    assert_eq!(walked.iter().map(|info| info.kind).collect::<Vec<_>>(), [ACTIVE, COMMITTED, VIEW]);
    for info in walked {
        assert_eq!(harness.stat(&info.name).await.unwrap(), info);
    }
}

#[tokio::test]
async fn stat_and_changes_inside_a_walk_do_not_deadlock() {
    let harness = Harness::start().await;
    for number in 0..250 {
        harness.prepare(&format!("key-{number:03}"), "", &[]).await.unwrap();
    }
    let request = containerd_client::services::v1::snapshots::ListSnapshotsRequest::default();
    let mut walk = harness.client.clone().list(request).await.unwrap().into_inner();
    let mut seen = 0;
    while let Some(message) = walk.message().await.unwrap() {
        for info in message.info {
            assert_eq!(harness.stat(&info.name).await.unwrap(), info);
            if seen % 50 == 0 {
                harness.remove(&info.name).await.unwrap();
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 250);
    assert_eq!(harness.names(&[]).await.len(), 245);
}

#[tokio::test]
async fn keys_are_opaque_and_never_paths_of_ours() {
    let harness = Harness::start().await;
    let keys = [
        "default/1/extract-7152-Y3O6 sha256:0123",
        "k8s.io/2//var/lib/kubelet/pods/x/volumes",
        "../../../escape",
        "/",
        ".",
        "a\nb\u{0}c",
        "ключ \"quoted\" \\",
    ];
    for key in keys {
        harness.prepare(key, "", &[]).await.unwrap();
        assert_eq!(harness.stat(key).await.unwrap().name, key);
        let name = format!("{key} committed");
        harness.commit(&name, key, &[]).await.unwrap();
        harness.view(key, &name).await.unwrap();
        assert_eq!(harness.stat(key).await.unwrap().parent, name);
    }
    assert_eq!(harness.directories().len(), 2 * keys.len());
}

#[tokio::test]
async fn garbage_collection_removes_children_first_and_leaves_nothing() {
    let harness = Harness::start().await;
    harness.committed("1", "", &[("a", "x")]).await;
    harness.committed("2", "1", &[("b", "x")]).await;
    harness.prepare("container", "2", &[]).await.unwrap();
    harness.view("view", "1").await.unwrap();
    let mut left = harness.list(&[]).await.unwrap();
    while !left.is_empty() {
        let is_parent = |name: &str| left.iter().any(|info| info.parent == name);
        let leaf = left.iter().position(|info| !is_parent(&info.name)).unwrap();
        harness.remove(&left.remove(leaf).name).await.unwrap();
    }
    harness.cleanup().await.unwrap();
    assert!(harness.names(&[]).await.is_empty());
    assert!(harness.directories().is_empty());
}

#[tokio::test]
async fn cleanup_removes_what_removals_left_and_nothing_else() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[("file", "kept")]).await;
    harness.prepare("active", "base", &[]).await.unwrap();
    let kept = harness.directories();
    let snapshots = harness.root.join("snapshots");
    std::fs::create_dir_all(snapshots.join("4000/fs/deep")).unwrap();
    std::fs::write(snapshots.join("4000/fs/deep/file"), "left").unwrap();
    harness.cleanup().await.unwrap();
    assert_eq!(harness.directories(), kept);
}

#[tokio::test]
async fn usage_counts_allocated_bytes_and_hard_links_once() {
    let harness = Harness::start().await;
    let mounts = harness.prepare("key", "", &[]).await.unwrap();
    let empty = harness.usage("key").await.unwrap();
    assert_eq!(empty.inodes, 1);
    let files = crate::harness::writable_directory(&mounts);
    std::fs::write(files.join("file"), vec![1; 100_000]).unwrap();
    std::fs::hard_link(files.join("file"), files.join("link")).unwrap();
    std::fs::create_dir(files.join("directory")).unwrap();
    std::fs::File::create(files.join("directory/sparse")).unwrap().set_len(1 << 30).unwrap();
    let full = harness.usage("key").await.unwrap();
    assert_eq!(full.inodes, 4);
    assert!((100_000..300_000).contains(&full.size), "{full:?}");
    harness.commit("name", "key", &[]).await.unwrap();
    assert_eq!(harness.usage("name").await.unwrap(), full, "a commit measures once for all");
    harness.view("view", "name").await.unwrap();
    assert_eq!(harness.usage("view").await.unwrap().size, 0);
}
