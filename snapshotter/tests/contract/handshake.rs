//! The remote handshake: Prepare with `containerd.io/snapshot.ref`.

use futures::future::join_all;
use tonic::Code;
use weightfs::metadata::{Backing, SNAPSHOT_REF};
use weightfs::reason::Reason;

use crate::harness::{Answer, Harness, assert_code, sorted};

const KEY: &str = "default/1/extract-7152-Y3O6 sha256:aa";
const CHAIN: &str = "sha256:aa";

async fn with_lazy(chain: &str) -> Harness {
    let harness = Harness::start().await;
    harness.mounter.answer(chain, Answer::Lazy(vec![("file", "content")]));
    harness
}

/// What containerd asks after "already exists".
async fn find(harness: &Harness, chain: &str, parent: &str) -> Vec<String> {
    let filter = format!("labels.\"{SNAPSHOT_REF}\"=={chain},parent==\"{parent}\"");
    harness.names(&[&filter]).await
}

#[tokio::test]
async fn a_lazy_layer_is_committed_at_once_and_found_by_label_and_parent() {
    let harness = with_lazy("sha256:bb").await;
    harness.mounter.answer(CHAIN, Answer::Lazy(vec![]));
    assert_code(harness.prepare_layer(KEY, "", CHAIN).await, Code::AlreadyExists);
    let below = find(&harness, CHAIN, "").await;
    assert_eq!(below.len(), 1);
    let labels = [(SNAPSHOT_REF, "sha256:bb"), ("containerd.io/snapshot/x", "y"), ("other", "z")];
    assert_code(harness.prepare("key 2", &below[0], &labels).await, Code::AlreadyExists);
    let above = find(&harness, "sha256:bb", &below[0]).await;
    assert_eq!(above.len(), 1);
    let info = harness.stat(&above[0]).await.unwrap();
    assert_eq!((info.kind, info.parent.as_str()), (3, below[0].as_str()));
    assert_eq!(sorted(&info.labels), labels.into());
    assert_eq!(info.created_at, info.updated_at);
    assert!(harness.directories().is_empty(), "a lazy snapshot has no directory");
    assert!(find(&harness, "sha256:bb", "").await.is_empty());
    assert_code(harness.commit("name", &above[0], &[]).await, Code::FailedPrecondition);
}

#[tokio::test]
async fn the_mounter_gets_what_containerd_says() {
    let harness = with_lazy(CHAIN).await;
    let labels = [
        (SNAPSHOT_REF, CHAIN),
        ("containerd.io/snapshot/cri.image-ref", "registry/model:1"),
        ("containerd.io/snapshot/cri.manifest-digest", "sha256:m"),
        ("containerd.io/snapshot/cri.layer-digest", "sha256:l"),
        ("containerd.io/snapshot/cri.image-layers", "sha256:l,sha256:n"),
        ("containerd.io/snapshot/weightfs.path", "model.safetensors"),
        ("containerd.io/gc.root", "now"),
    ];
    assert_code(harness.prepare("a", "", &labels).await, Code::AlreadyExists);
    harness.prepare_layer("b", "a", "sha256:other").await.unwrap();
    harness.commit("b committed", "b", &[]).await.unwrap();
    harness.prepare_layer("c", "b committed", "sha256:third").await.unwrap();

    let requests = harness.mounter.requests.lock().unwrap();
    let first = &requests[0];
    assert_eq!(first.chain_id, CHAIN);
    assert_eq!(first.image_ref.as_deref(), Some("registry/model:1"));
    assert_eq!(first.manifest_digest.as_deref(), Some("sha256:m"));
    assert_eq!(first.layer_digest.as_deref(), Some("sha256:l"));
    assert_eq!(first.image_layers, ["sha256:l", "sha256:n"]);
    let annotations: Vec<_> = first.annotations.iter().collect();
    let path = "containerd.io/snapshot/weightfs.path".to_owned();
    assert_eq!(annotations, [(&path, &"model.safetensors".to_owned())]);
    assert_eq!((&first.parent, first.has_parent), (&None, false));
    let parent = requests[1].parent.as_ref().unwrap();
    assert_eq!((parent.name.as_str(), requests[1].has_parent), ("a", true));
    assert_eq!((&requests[2].parent, requests[2].has_parent), (&None, true));
}

#[tokio::test]
async fn a_declined_layer_is_an_ordinary_snapshot_with_its_reason() {
    let harness = Harness::start().await;
    let gzip = Reason::Compressed { with: "gzip".to_owned() };
    harness.mounter.answer(CHAIN, Answer::Ordinary(gzip.clone()));
    let mounts = harness.prepare_layer(KEY, "", CHAIN).await.unwrap();
    assert_eq!(mounts[0].r#type, "bind");
    harness.commit(CHAIN, KEY, &[(SNAPSHOT_REF, CHAIN)]).await.unwrap();
    let record = harness.metadata.snapshot(CHAIN).unwrap();
    let Backing::Directory { reason, .. } = &record.backing else { panic!("{record:?}") };
    assert_eq!(reason.as_ref(), Some(&gzip));
    // Another image with the same chain finds what was unpacked.
    assert_code(harness.prepare_layer("default/9/other", "", CHAIN).await, Code::AlreadyExists);
    assert_eq!(find(&harness, CHAIN, "").await, [CHAIN]);
    assert_eq!(harness.mounter.requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn an_artifact_that_can_not_be_shown_fails_the_call_and_leaves_nothing() {
    let harness = Harness::start().await;
    harness.mounter.answer(CHAIN, Answer::Ordinary(Reason::failed("no such luck")));
    let show = ("containerd.io/snapshot/weightfs.show", "artifact");
    let labels = [(SNAPSHOT_REF, CHAIN), show];
    let refused = harness.prepare("artifact", "", &labels).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("no such luck"), "{refused}");
    assert!(harness.names(&[]).await.is_empty() && harness.directories().is_empty());
    // A layer whose annotations say so is a layer all the same.
    let digest = ("containerd.io/snapshot/cri.layer-digest", "sha256:l");
    harness.prepare("layer", "", &[labels[0], show, digest]).await.unwrap();
    harness.mounter.answer(CHAIN, Answer::Lazy(vec![("file", "content")]));
    assert_code(harness.prepare("artifact", "", &labels).await, Code::AlreadyExists);
    assert_eq!(harness.stat("artifact").await.unwrap().kind, 3);
}

#[tokio::test]
async fn a_layer_of_a_client_that_sends_no_labels_says_so() {
    let harness = Harness::start().await;
    harness.prepare("unpack", "", &[]).await.unwrap();
    harness.commit("layer", "unpack", &[]).await.unwrap();
    harness.prepare("container", "layer", &[]).await.unwrap();
    let reason = |name: &str| match &harness.metadata.snapshot(name).unwrap().backing {
        Backing::Directory { reason, .. } => reason.clone(),
        lazy => panic!("{lazy:?}"),
    };
    assert_eq!(reason("layer"), Some(Reason::NoLabels));
    assert_eq!(reason("container"), None, "it is no layer");
}

#[tokio::test]
async fn an_unpack_under_way_does_not_stand_for_its_layer() {
    let harness = Harness::start().await;
    harness.prepare_layer("first", "", CHAIN).await.unwrap();
    harness.prepare_layer("second", "", CHAIN).await.expect("both unpack; the first commit wins");
}

#[tokio::test]
async fn a_prepare_without_the_label_is_never_lazy() {
    let harness = with_lazy(CHAIN).await;
    harness
        .prepare(CHAIN, "", &[("containerd.io/snapshot/cri.layer-digest", CHAIN)])
        .await
        .unwrap();
    assert!(harness.mounter.requests.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_second_prepare_of_a_layer_finds_the_first() {
    let harness = with_lazy(CHAIN).await;
    for key in ["one/1/a", "two/2/b", "one/1/a"] {
        assert_code(harness.prepare_layer(key, "", CHAIN).await, Code::AlreadyExists);
    }
    assert_eq!(harness.mounter.requests.lock().unwrap().len(), 1);
    assert_eq!(find(&harness, CHAIN, "").await, ["one/1/a"]);
}

#[tokio::test]
async fn concurrent_prepares_of_one_layer_mount_it_once() {
    let harness = with_lazy(CHAIN).await;
    let keys: Vec<String> = (0..20).map(|number| format!("default/{number}/key")).collect();
    let prepares = keys.iter().map(|key| harness.prepare_layer(key, "", CHAIN));
    for result in join_all(prepares).await {
        assert_code(result, Code::AlreadyExists);
    }
    assert_eq!(harness.mounter.trees().len(), 1);
    assert_eq!(find(&harness, CHAIN, "").await.len(), 1);
}

#[tokio::test]
async fn concurrent_prepares_and_views_of_one_key_have_one_winner() {
    let harness = with_lazy(CHAIN).await;
    let ordinary = join_all((0..10).map(|_| harness.prepare("key", "", &[])));
    let lazy = join_all((0..10).map(|_| harness.prepare_layer("key", "", CHAIN)));
    let views = join_all((0..10).map(|_| harness.view("key", "")));
    let (ordinary, lazy, views) = futures::join!(ordinary, lazy, views);
    let won = ordinary.iter().chain(&lazy).chain(&views).filter(|result| result.is_ok()).count();
    let lost = |result: Result<_, tonic::Status>| match result {
        Ok(_) => {}
        Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status}"),
    };
    ordinary.into_iter().chain(lazy).chain(views).for_each(lost);
    assert_eq!(harness.names(&[]).await, ["key"]);
    // A lazy winner is told "already exists" as well; then it is the tree that is there.
    assert_eq!(won + harness.mounter.trees().len(), 1);
    assert_eq!(harness.directories().len(), won);
}

#[tokio::test]
async fn many_pulls_and_removals_at_once_leave_nothing() {
    let harness = Harness::start().await;
    let pulls = (0..50).map(|number| {
        let chain = format!("sha256:{number}");
        if number % 2 == 0 {
            harness.mounter.answer(&chain, Answer::Lazy(vec![("file", "x")]));
        }
        let harness = &harness;
        async move {
            let layer = format!("layer {number}");
            match harness.prepare_layer(&layer, "", &chain).await {
                Ok(_) => {
                    let committed = format!("committed {number}");
                    harness.commit(&committed, &layer, &[(SNAPSHOT_REF, &chain)]).await.unwrap();
                }
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists),
            }
            let name = find(harness, &chain, "").await.remove(0);
            let container = format!("container {number}");
            harness.prepare(&container, &name, &[]).await.unwrap();
            assert_code(harness.remove(&name).await, Code::FailedPrecondition);
            harness.remove(&container).await.unwrap();
            harness.remove(&name).await.unwrap();
        }
    });
    join_all(pulls).await;
    assert!(harness.names(&[]).await.is_empty());
    assert!(harness.directories().is_empty());
    assert!(harness.mounter.trees().is_empty());
}

#[tokio::test]
async fn removing_a_lazy_snapshot_takes_its_tree_away_children_first() {
    let harness = with_lazy(CHAIN).await;
    harness.mounter.answer("sha256:bb", Answer::Lazy(vec![]));
    assert_code(harness.prepare_layer("a", "", CHAIN).await, Code::AlreadyExists);
    assert_code(harness.prepare_layer("b", "a", "sha256:bb").await, Code::AlreadyExists);
    let status = assert_code(harness.remove("a").await, Code::FailedPrecondition);
    assert!(status.message().contains("remove"));
    assert_eq!(harness.mounter.trees().len(), 2);
    harness.remove("b").await.unwrap();
    harness.remove("a").await.unwrap();
    assert!(harness.mounter.trees().is_empty());
    // Nothing of it stands in the way of the next pull.
    assert_code(harness.prepare_layer("c", "", CHAIN).await, Code::AlreadyExists);
    assert_eq!(find(&harness, CHAIN, "").await, ["c"]);
}

#[tokio::test]
async fn usage_of_a_lazy_layer_is_what_the_mounter_says() {
    let harness = with_lazy(CHAIN).await;
    assert_code(harness.prepare_layer("a", "", CHAIN).await, Code::AlreadyExists);
    let usage = harness.usage("a").await.unwrap();
    assert_eq!(usage.size, 1000 + i64::from(harness.mounter.trees()[0].0));
    assert_eq!(usage.inodes, 3);
}
