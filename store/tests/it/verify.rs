//! Strict reads, and hashing again what is in the cache.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use weightfs_store::{Amount, Checked, Layout, Others, Read, ReadError, Store, Trust, Verify};

use super::restart::find;
use super::source::{Fault, TestSource, status};
use super::{
    MIB, blob_of, id, judged, keeping_digests, noise, open, open_keeping_digests, options, read,
};

fn strict(root: &Path) -> Arc<Store> {
    let mut options = keeping_digests();
    options.verify = Verify::Strict;
    Store::open(root, options).unwrap()
}

#[tokio::test]
async fn a_strict_read_is_answered_when_the_whole_is_here_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let store = strict(dir.path());
    let data = noise(24 * MIB, 1);
    let layout = Layout::new(24 * MIB, [5 * MIB + 3]).unwrap();
    let blob = store.blob(id(&data), &layout).unwrap();
    let source = TestSource::new("test", data.clone());
    source.allow(MIB + 1);
    blob.add_source(source.clone());
    let readers: Vec<_> = [0, 7 * MIB, 23 * MIB]
        .map(|at| {
            let blob = blob.clone();
            tokio::spawn(async move { read(&blob, at..at + 10).await.map(|slice| slice.to_vec()) })
        })
        .into();
    while blob.stats().cached < 2 * MIB {
        tokio::task::yield_now().await;
    }
    assert!(matches!(blob.read(0..10).unwrap(), Read::Missing(_)), "it is here, but not verified");
    assert!(!blob.is_cached(0..10) && blob.segment_file(0).unwrap().is_none());
    source.allow(u64::MAX);
    for (reader, at) in readers.into_iter().zip([0, 7 << 20, 23 << 20]) {
        assert_eq!(reader.await.unwrap().unwrap(), data[at..at + 10]);
    }
    assert_eq!(blob.stats().trust, Trust::Verified);
    assert!(matches!(blob.read(0..10).unwrap(), Read::Ready(_)));
    assert!(blob.segment_file(0).unwrap().is_some());
}

#[tokio::test]
async fn a_strict_read_never_sees_a_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(8 * MIB, 3);
    let store = strict(dir.path());
    let (blob, source) = blob_of(&store, &data);
    source.fail([Fault::Flip(7 * MIB), Fault::Flip(7 * MIB), Fault::Flip(7 * MIB)]);
    let result = read(&blob, 0..10).await;
    assert!(matches!(result, Err(ReadError::Poisoned { .. })), "{result:?}");
}

#[tokio::test(start_paused = true)]
async fn a_strict_read_ends_when_nothing_comes_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let store = strict(dir.path());
    let data = noise(16 * MIB, 5);
    let (blob, source) = blob_of(&store, &data);
    source.allow(2 * MIB);
    let began = Instant::now();
    let result = read(&blob, 0..10).await;
    assert!(matches!(result, Err(ReadError::Deadline { .. })), "{result:?}");
    assert!(began.elapsed() >= options().fetch.deadline, "each chunk that came gave it more time");
    source.allow(u64::MAX);
    // The hash runs in a thread, for which no clock jumps.
    tokio::time::resume();
    assert_eq!(*read(&blob, 0..10).await.unwrap(), data[..10], "failures are not remembered");
    let other = noise(4 * MIB, 7);
    let (blob, source) = blob_of(&store, &other);
    source.fail([Fault::Refuse(status(404, None)), Fault::Refuse(status(404, None))]);
    assert!(matches!(read(&blob, 0..10).await, Err(ReadError::Source { .. })));
}

#[tokio::test]
async fn what_was_cached_before_strict_is_verified_before_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(4 * MIB, 9);
    {
        let store = open(dir.path());
        let (blob, _) = blob_of(&store, &data);
        read(&blob, 0..2 * MIB).await.unwrap();
    }
    let store = strict(dir.path());
    let (blob, source) = blob_of(&store, &data);
    assert!(matches!(blob.read(0..10).unwrap(), Read::Missing(_)));
    assert_eq!(*read(&blob, 0..10).await.unwrap(), data[..10]);
    let asked: u64 = source.take_requests().into_iter().map(|range| range.end - range.start).sum();
    assert_eq!(asked, 2 * MIB, "only what was missing");
}

#[tokio::test]
async fn verifying_finds_what_changed_on_disk_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad, partial) = (noise(3 * MIB, 11), noise(3 * MIB, 13), noise(3 * MIB, 15));
    let store = open_keeping_digests(dir.path());
    for (data, end) in [(&good, 3 * MIB), (&bad, 3 * MIB), (&partial, MIB)] {
        let (blob, _) = blob_of(&store, data);
        read(&blob, 0..end).await.unwrap();
        if end == 3 * MIB {
            assert_eq!(judged(&blob).await, Trust::Verified);
        }
    }
    store.checkpoint().unwrap();
    let spoilt = find(&find(dir.path(), &id(&bad).digest.hex()), "segment-0");
    let file = std::fs::OpenOptions::new().write(true).open(spoilt).unwrap();
    file.write_all_at(b"rot", 2 << 20).unwrap();
    let mut hashed = 0;
    let mut verify = |data: &[u8]| store.verify(id(data), |bytes| hashed += bytes).unwrap();
    assert_eq!(verify(&good), Checked::Good);
    assert_eq!(verify(&bad), Checked::BadChunks { count: 1, others: Others::Here });
    assert_eq!(verify(&partial), Checked::Partial);
    assert_eq!(verify(b"never seen"), Checked::Absent);
    assert_eq!(hashed, 7 * MIB);
    // From now on nothing of that chunk is served, after a restart, too.
    drop(store);
    let store = open_keeping_digests(dir.path());
    let (blob, source) = blob_of(&store, &bad);
    assert_eq!(blob.stats().cached, 2 * MIB);
    assert_eq!(*read(&blob, 0..3 * MIB).await.unwrap(), bad[..]);
    assert_eq!(source.take_requests(), vec![2 * MIB..3 * MIB]);
}

#[tokio::test]
async fn a_poisoned_blob_stays_so_until_it_is_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(3 * MIB, 23);
    let store = open(dir.path());
    let (blob, source) = blob_of(&store, &data);
    source.fail([Fault::Flip(5)]);
    let _ = read(&blob, 0..3 * MIB).await;
    assert_eq!(judged(&blob).await, Trust::Poisoned);
    assert!(matches!(store.verify(id(&data), |_| ()).unwrap(), Checked::Bad { .. }));
    drop((blob, store));
    let store = open(dir.path());
    let (blob, _) = blob_of(&store, &data);
    assert!(matches!(blob.read(0..1), Err(ReadError::Poisoned { .. })));
    drop(blob);
    assert!(store.discard_poisoned(id(&data)).unwrap());
    let (blob, _) = blob_of(&store, &data);
    blob.complete().await.unwrap();
    assert_eq!(*read(&blob, 0..3 * MIB).await.unwrap(), data[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_read_of_what_does_not_fit_into_the_cache_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options();
    options.verify = Verify::Strict;
    options.cache.limit = Some(Amount::Bytes(40 * MIB));
    options.fetch.deadline = Duration::from_secs(2);
    let store = Store::open(dir.path(), options).unwrap();
    store.start_evicting();
    let data = noise(64 * MIB, 17);
    let (blob, _) = blob_of(&store, &data);
    let error = read(&blob, 0..10).await.unwrap_err();
    assert!(error.to_string().contains("no room for all of it"), "{error}");
    let fits = noise(8 * MIB, 19);
    let (other, _) = blob_of(&store, &fits);
    drop(blob);
    // What does not fit goes when its last record is written; nothing remembers the failures.
    let slice = loop {
        match read(&other, 0..10).await {
            Ok(slice) => break slice,
            Err(error) => assert!(error.to_string().contains("no room"), "{error}"),
        }
    };
    assert_eq!(*slice, fits[..10]);
}

#[tokio::test]
async fn what_was_evicted_is_verified_again_before_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = strict(dir.path());
    let data = noise(40 * MIB, 21);
    let (blob, source) = blob_of(&store, &data);
    drop(read(&blob, 0..10).await.unwrap());
    // What requests that are just ending hold stays at first.
    while blob.stats().cached > 0 {
        store.evict(id(&data)).unwrap();
        tokio::task::yield_now().await;
    }
    source.fail([const { Fault::Flip(30 * MIB) }; 20]);
    let result = read(&blob, 30 * MIB..30 * MIB + 10).await;
    assert!(matches!(result, Err(ReadError::Source { .. })), "{result:?}");
}
