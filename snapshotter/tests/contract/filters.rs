//! Filters of List, as they come over the wire.

use tonic::Code;

use crate::harness::{Harness, assert_code};

async fn with_snapshots() -> Harness {
    let harness = Harness::start().await;
    harness.committed("base", "", &[]).await;
    harness.prepare("active 1", "base", &[("a.b/c", "x"), ("n", "1")]).await.unwrap();
    harness.prepare("active 2", "base", &[("a.b/c", "y")]).await.unwrap();
    harness.view("view", "base").await.unwrap();
    harness
}

#[tokio::test]
async fn filters_select_by_kind_name_parent_and_label() {
    let harness = with_snapshots().await;
    let cases: &[(&str, &[&str])] = &[
        ("kind==active", &["active 1", "active 2"]),
        ("kind==view", &["view"]),
        ("kind==committed", &["base"]),
        ("name==base", &["base"]),
        ("name==\"active 1\"", &["active 1"]),
        ("parent==base", &["active 1", "active 2", "view"]),
        ("parent==\"\"", &["base"]),
        ("labels.\"a.b/c\"==x", &["active 1"]),
        ("labels.\"a.b/c\"!=x", &["active 2", "base", "view"]),
        ("kind!=active", &["base", "view"]),
        ("name~=^active", &["active 1", "active 2"]),
        ("labels.\"a.b/c\"~=/^[xy]$/", &["active 1", "active 2"]),
        ("labels.n", &["active 1"]),
        ("labels.\"a.b/c\"", &["active 1", "active 2"]),
    ];
    for (filter, expected) in cases {
        assert_eq!(harness.names(&[filter]).await, *expected, "{filter}");
    }
}

#[tokio::test]
async fn a_comma_is_and_and_several_filters_are_or() {
    let harness = with_snapshots().await;
    assert_eq!(harness.names(&["kind==active,labels.n==1"]).await, ["active 1"]);
    assert_eq!(harness.names(&["kind==view", "labels.n==1"]).await, ["active 1", "view"]);
    assert_eq!(harness.names(&["kind==view", "name==view"]).await, ["view"]);
    assert_eq!(harness.names(&[""]).await.len(), 4);
}

#[tokio::test]
async fn a_bad_filter_is_an_invalid_argument_that_says_where() {
    let harness = with_snapshots().await;
    let status = assert_code(harness.list(&["kind=active"]).await, Code::InvalidArgument);
    assert!(status.message().contains("byte 4"), "{status}");
    let status = assert_code(harness.list(&["kind==view", "name~=("]).await, Code::InvalidArgument);
    assert!(status.message().contains("name~=("), "{status}");
}

#[tokio::test]
async fn a_list_of_hundreds_comes_whole_and_in_order() {
    let harness = Harness::start().await;
    let keys: Vec<String> = (0..205).map(|number| format!("key-{number:03}")).collect();
    for key in &keys {
        harness.prepare(key, "", &[]).await.unwrap();
    }
    assert_eq!(harness.names(&[]).await, keys);
}
