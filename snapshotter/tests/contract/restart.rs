//! What a restart finds.

use std::fs;

use tonic::Code;
use weightfs::metadata::SNAPSHOT_REF;

use crate::harness::{Answer, Harness, assert_code};
use crate::mounting::Mounted;

#[tokio::test]
async fn everything_is_the_same_after_a_restart() {
    let harness = Harness::start().await;
    harness.mounter.answer("sha256:1", Answer::Lazy(vec![("weights", "1")]));
    harness.mounter.answer("sha256:2", Answer::Lazy(vec![("more", "2")]));
    harness.committed("base", "", &[("file", "base")]).await;
    assert_code(harness.prepare_layer("lazy 1", "base", "sha256:1").await, Code::AlreadyExists);
    assert_code(harness.prepare_layer("lazy 2", "lazy 1", "sha256:2").await, Code::AlreadyExists);
    harness.prepare("container", "lazy 2", &[("l", "v")]).await.unwrap();
    harness.view("view", "base").await.unwrap();
    harness.update("base", &[("updated", "1")], None).await.unwrap();
    let infos = harness.list(&[]).await.unwrap();
    let mounts = harness.mounts("container").await.unwrap();
    let usage = harness.usage("base").await.unwrap();
    let directories = harness.directories();

    let harness = harness.restart().await;
    assert_eq!(harness.list(&[]).await.unwrap(), infos);
    assert_eq!(harness.mounts("container").await.unwrap(), mounts);
    assert_eq!(harness.usage("base").await.unwrap(), usage);
    assert_eq!(harness.directories(), directories);
    let filter = format!("labels.\"{SNAPSHOT_REF}\"==sha256:2,parent==\"lazy 1\"");
    assert_eq!(harness.names(&[&filter]).await, ["lazy 2"]);
    assert_code(harness.prepare_layer("again", "base", "sha256:1").await, Code::AlreadyExists);
    assert!(harness.mounter.requests.lock().unwrap().is_empty(), "nothing is mounted anew");
    let mounted = Mounted::new(&mounts);
    assert_eq!(mounted.read("file") + &mounted.read("weights") + &mounted.read("more"), "base12");
}

#[tokio::test]
async fn the_mounter_gets_its_records_back_parents_first() {
    let harness = Harness::start().await;
    for chain in ["sha256:1", "sha256:2"] {
        harness.mounter.answer(chain, Answer::Lazy(vec![]));
    }
    assert_code(harness.prepare_layer("z", "", "sha256:1").await, Code::AlreadyExists);
    assert_code(harness.prepare_layer("a", "z", "sha256:2").await, Code::AlreadyExists);
    let trees = harness.mounter.trees();

    let harness = harness.restart().await;
    let [first, second] = &harness.restored[..] else { panic!("{:?}", harness.restored) };
    assert_eq!((first.name.as_str(), first.tree, first.parent_tree), ("z", trees[0], None));
    assert_eq!((second.name.as_str(), second.tree), ("a", trees[1]));
    assert_eq!((second.parent.as_deref(), second.parent_tree), (Some("z"), Some(trees[0])));
    assert_eq!(second.record, serde_json::json!({ "chain": "sha256:2" }));
}

#[tokio::test]
async fn what_a_crash_left_is_removed_at_the_start_and_its_number_not_reused() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[("file", "kept")]).await;
    let kept = harness.directories();
    let snapshots = harness.root.join("snapshots");
    fs::create_dir_all(snapshots.join("700/fs")).unwrap();
    fs::write(snapshots.join("700/fs/file"), "half").unwrap();

    let harness = harness.restart().await;
    assert_eq!(harness.directories(), kept);
    harness.prepare("new", "base", &[]).await.unwrap();
    assert!(harness.directories().iter().all(|id| *id != 700));
}
