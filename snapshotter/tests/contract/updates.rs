//! Update and its field masks.

use containerd_client::services::v1::snapshots::Info;
use tonic::Code;

use crate::harness::{Harness, assert_code, map, sorted};

async fn with_labels() -> Harness {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("key", "base", &[("a", "1"), ("b", "2")]).await.unwrap();
    harness
}

#[tokio::test]
async fn update_without_a_mask_replaces_the_labels_and_ignores_the_parent() {
    let harness = with_labels().await;
    let info = Info {
        name: "key".to_owned(),
        parent: "another".to_owned(),
        kind: 3,
        labels: map(&[("b", "3"), ("c", "4")]),
        ..Default::default()
    };
    let answered = harness.update_info(info, None).await.unwrap();
    assert_eq!(sorted(&answered.labels), [("b", "3"), ("c", "4")].into());
    assert_eq!((answered.parent.as_str(), answered.kind), ("base", 2));
    assert_eq!(harness.stat("key").await.unwrap(), answered);
}

#[tokio::test]
async fn an_empty_mask_is_no_mask() {
    let harness = with_labels().await;
    let answered = harness.update("key", &[("c", "4")], Some(&[])).await.unwrap();
    assert_eq!(sorted(&answered.labels), [("c", "4")].into());
}

#[tokio::test]
async fn a_masked_label_absent_from_the_info_is_deleted() {
    let harness = with_labels().await;
    let answered = harness.update("key", &[], Some(&["labels.a"])).await.unwrap();
    assert_eq!(sorted(&answered.labels), [("b", "2")].into());
}

#[tokio::test]
async fn a_masked_label_is_set_and_others_stay() {
    let harness = with_labels().await;
    let given = [("a", "9"), ("c.d/e", "5"), ("ignored", "x")];
    let mask: &[&str] = &["labels.a", "labels.c.d/e"];
    let answered = harness.update("key", &given, Some(mask)).await.unwrap();
    assert_eq!(sorted(&answered.labels), [("a", "9"), ("b", "2"), ("c.d/e", "5")].into());
}

#[tokio::test]
async fn mask_labels_replaces_all() {
    let harness = with_labels().await;
    let answered = harness.update("key", &[("c", "4")], Some(&["labels"])).await.unwrap();
    assert_eq!(sorted(&answered.labels), [("c", "4")].into());
}

#[tokio::test]
async fn mask_parent_is_an_invalid_argument_and_changes_nothing() {
    let harness = with_labels().await;
    let before = harness.stat("key").await.unwrap();
    for field in ["parent", "kind", "name", "created_at", "label.a", ""] {
        let mask = ["labels.a", field];
        let status =
            assert_code(harness.update("key", &[], Some(&mask)).await, Code::InvalidArgument);
        assert!(status.message().contains(&format!("{field:?}")), "{status}");
    }
    assert_eq!(harness.stat("key").await.unwrap(), before);
}

#[tokio::test]
async fn created_stays_and_updated_moves() {
    let harness = with_labels().await;
    let before = harness.stat("key").await.unwrap();
    let after = harness.update("key", &[("a", "1"), ("b", "2")], None).await.unwrap();
    assert_eq!(after.created_at, before.created_at);
    let time = |info: &Info| info.updated_at.map(|at| (at.seconds, at.nanos)).unwrap();
    assert!(time(&after) > time(&before));
}

#[tokio::test]
async fn a_committed_snapshot_is_found_by_its_new_label_at_once() {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    let filter = "labels.\"containerd.io/snapshot.ref\"==sha256:1,parent==\"\"";
    assert!(harness.names(&[filter]).await.is_empty());
    let label = [("containerd.io/snapshot.ref", "sha256:1")];
    harness.update("base", &label, None).await.unwrap();
    assert_eq!(harness.names(&[filter]).await, ["base"]);
    harness.update("base", &[], Some(&["labels"])).await.unwrap();
    assert!(harness.names(&[filter]).await.is_empty());
}

#[tokio::test]
async fn a_label_with_an_empty_value_is_no_label() {
    let harness = with_labels().await;
    let answered = harness.update("key", &[("a", "")], Some(&["labels.a"])).await.unwrap();
    assert_eq!(sorted(&answered.labels), [("b", "2")].into());
}
