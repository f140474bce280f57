//! Sources that refuse, stall, cut and lie.

use std::sync::Arc;
use std::time::Duration;

use weightfs_store::{Read, ReadError, SourceError, Store, Trust};

use super::source::{Fault, TestSource, status, unreachable};
use super::{MIB, blob_of, id, judged, noise, open, options, read};

/// A store whose reads fail soon.
fn impatient(root: &std::path::Path) -> Arc<Store> {
    let mut options = options();
    options.fetch.deadline = Duration::from_millis(300);
    Store::open(root, options).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hits_are_served_while_every_fetch_hangs_and_misses_end() {
    let dir = tempfile::tempdir().unwrap();
    let store = impatient(dir.path());
    let data = noise(64 * MIB, 1);
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    source.allow(0);
    let misses: Vec<_> = (1..60)
        .map(|at| {
            let blob = blob.clone();
            tokio::spawn(async move { read(&blob, at * MIB..at * MIB + 1).await.map(drop) })
        })
        .collect();
    source.requested(5).await;
    for at in 0..1000 {
        // Not awaited: a hit is ready at once.
        let Read::Ready(slice) = blob.read(at..at + 4096).unwrap() else { panic!("no hit") };
        assert_eq!(*slice, data[at as usize..at as usize + 4096]);
    }
    for miss in misses {
        assert!(matches!(miss.await.unwrap(), Err(ReadError::Deadline { .. })));
    }
    source.allow(u64::MAX);
    read(&blob, 5 * MIB..6 * MIB).await.expect("failures are not remembered");
}

#[tokio::test]
async fn a_cut_body_is_resumed_at_the_first_missing_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 2);
    let (blob, source) = blob_of(&store, &data);
    source.fail([Fault::Break(2 * MIB + 5), Fault::End(MIB - 1), Fault::Break(0)]);
    assert_eq!(*read(&blob, 0..4 * MIB).await.unwrap(), data[..]);
    let asked = source.take_requests();
    assert_eq!(asked, [0..4 * MIB, 2 * MIB..4 * MIB, 2 * MIB..4 * MIB, 2 * MIB..4 * MIB]);
    assert_eq!(judged(&blob).await, Trust::Verified);
}

#[tokio::test]
async fn a_source_that_is_busy_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(100, 3);
    let (blob, source) = blob_of(&store, &data);
    let busy = [status(503, None), status(429, Some(0)), status(500, None), unreachable("test")];
    source.fail(busy.map(Fault::Refuse));
    assert_eq!(*read(&blob, 0..100).await.unwrap(), data[..]);
    assert_eq!(source.take_requests().len(), 5);
}

#[tokio::test]
async fn a_source_that_asks_for_more_time_than_there_is_fails_the_read_with_its_words() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (blob, source) = blob_of(&store, &noise(100, 4));
    for seconds in [3600, u64::MAX] {
        source.fail([Fault::Refuse(status(429, Some(seconds)))]);
        let error = read(&blob, 0..1).await.unwrap_err();
        assert!(matches!(&error, ReadError::Deadline { .. }), "{error}");
        assert!(error.to_string().contains("429"), "{error}");
    }
}

#[tokio::test]
async fn a_refusal_fails_the_read_at_once_and_the_next_read_asks_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(100, 5);
    let (blob, source) = blob_of(&store, &data);
    let (source_name, what) = ("test".to_owned(), "blob".to_owned());
    let refusals = [
        SourceError::NotFound { source_name: source_name.clone(), what: what.clone() },
        SourceError::BadAnswer { source_name, what, message: "odd".into() },
        status(400, None),
    ];
    for refusal in refusals {
        source.fail([Fault::Refuse(refusal.clone())]);
        match read(&blob, 0..1).await {
            Err(ReadError::Source { cause, .. }) => {
                assert_eq!(cause.to_string(), refusal.to_string());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(source.take_requests().len(), 1);
    }
    read(&blob, 0..1).await.unwrap();
}

#[tokio::test]
async fn a_read_without_credentials_waits_until_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (blob, source) = blob_of(&store, &noise(100, 5));
    let refusal = SourceError::Unauthorized {
        source_name: "test".into(),
        what: "blob".into(),
        credentials: "no credentials".into(),
    };
    source.fail(std::iter::repeat_n(Fault::Refuse(refusal), 3));
    read(&blob, 0..1).await.unwrap();
    assert_eq!(source.take_requests().len(), 4);
}

#[tokio::test]
async fn the_next_source_is_asked_when_one_fails() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(100, 6);
    let (blob, first) = blob_of(&store, &data);
    let second = TestSource::new("second", data.clone());
    blob.add_source(second.clone());
    first.fail([Fault::Refuse(status(404, None))]);
    read(&blob, 0..1).await.unwrap();
    assert_eq!((first.take_requests().len(), second.take_requests().len()), (1, 1));
}

#[tokio::test]
async fn a_source_of_the_same_name_replaces_the_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(100, 7);
    let (blob, first) = blob_of(&store, &data);
    blob.add_source(TestSource::new("test", data));
    read(&blob, 0..1).await.unwrap();
    assert!(first.take_requests().is_empty());
}

#[tokio::test]
async fn a_blob_without_a_source_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let blob = store.blob(id(b"x"), &weightfs_store::Layout::whole(10)).unwrap();
    let error = read(&blob, 0..1).await.unwrap_err();
    assert!(error.to_string().contains("no source to fetch from"), "{error}");
}

#[tokio::test]
async fn a_panic_in_a_source_fails_its_readers_and_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(100, 8);
    let (blob, source) = blob_of(&store, &data);
    source.fail([Fault::Panic]);
    assert!(matches!(read(&blob, 0..1).await, Err(ReadError::Cache { .. })));
    assert_eq!(*read(&blob, 0..100).await.unwrap(), data[..]);
}

#[tokio::test]
async fn a_source_that_lies_poisons_the_blob_until_it_is_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(12 * MIB, 9);
    let mut lie = data.clone();
    lie[5_000_000] ^= 1;
    let layout = weightfs_store::Layout::whole(12 * MIB);
    {
        let store = open(dir.path());
        let blob = store.blob(id(&data), &layout).unwrap();
        blob.add_source(TestSource::new("liar", lie.clone()));
        let before = read(&blob, 0..12 * MIB).await.unwrap();
        assert_eq!(judged(&blob).await, Trust::Poisoned);
        assert_eq!(*before, lie[..], "a slice that was given out stays as it is");
        match blob.read(0..1) {
            Err(ReadError::Poisoned { digest, actual }) => {
                assert_eq!((digest, actual), (id(&data).digest, id(&lie).digest));
            }
            other => panic!("{other:?}"),
        }
        assert!(blob.segment_file(0).unwrap().is_none());
    }
    let store = open(dir.path());
    let blob = store.blob(id(&data), &layout).unwrap();
    assert!(matches!(blob.read(0..1), Err(ReadError::Poisoned { .. })), "after a restart, too");
    assert!(!store.discard_poisoned(id(&data)).unwrap(), "it is open");
    drop(blob);
    assert!(store.discard_poisoned(id(&data)).unwrap());
    let (blob, _) = blob_of(&store, &data);
    assert_eq!(*read(&blob, 0..12 * MIB).await.unwrap(), data[..]);
    assert_eq!(judged(&blob).await, Trust::Verified);
    drop(blob);
    assert!(!store.discard_poisoned(id(&data)).unwrap(), "what is good stays");
}
