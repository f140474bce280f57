//! Blobs whose chunks have digests: what a source, a disk or an earlier run gives wrong is never
//! served.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use weightfs_store::{
    Blob, Checked, Digest, KeepDigests, Layout, Others, Read, ReadError, Recheck, SourceError,
    Store, StoreOptions, Trust, Verify,
};

use super::restart::find;
use super::source::{Fault, TestSource};
use super::{MIB, blob_of, id, judged, noise, open, open_keeping_digests, options, read};

/// The digest of each chunk of a blob in one segment.
fn digests(data: &[u8]) -> Vec<u8> {
    data.chunks(MIB as usize).flat_map(|chunk| *Digest::of(chunk).as_raw()).collect()
}

/// A blob with digests whose sources are new ones of these names.
fn indexed<const N: usize>(
    store: &Arc<Store>,
    data: &[u8],
    names: [&str; N],
) -> (Arc<Blob>, [Arc<TestSource>; N]) {
    let layout = Layout::whole(data.len() as u64);
    let blob = store.indexed_blob(id(data), &layout, &digests(data)).unwrap();
    let sources = names.map(|name| TestSource::new(name, data.to_vec()));
    sources.iter().for_each(|source| blob.add_source(source.clone()));
    (blob, sources)
}

/// Changes bytes in the cache file of a blob.
fn spoil(root: &Path, data: &[u8], at: u64) {
    let file = find(&find(root, &id(data).digest.hex()), "segment-0");
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(b"rot", at).unwrap();
}

fn rechecking() -> StoreOptions {
    StoreOptions { recheck: Recheck::Always, ..options() }
}

/// Bytes of requests.
fn sum(requests: Vec<Range<u64>>) -> u64 {
    requests.into_iter().map(|range| range.end - range.start).sum()
}

/// Waits until all that is here was compared.
async fn compared(blob: &Blob) {
    while blob.stats().trust == Trust::Transport {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_byte_that_was_flipped_on_the_way_is_never_served_and_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(8 * MIB + 5, 1);
    let (blob, [source]) = indexed(&store, &data, ["test"]);
    assert_eq!(blob.stats().trust, Trust::Indexed, "nothing is here that was not compared");
    source.fail([Fault::Flip(2 * MIB + 7)]);
    assert_eq!(*read(&blob, 0..8 * MIB + 5).await.unwrap(), data[..]);
    let stats = blob.stats();
    assert_eq!((stats.trust, stats.cached, stats.rejected), (Trust::Indexed, 8 * MIB + 5, 1));
}

#[tokio::test]
async fn a_source_that_always_lies_is_left_for_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 3);
    let (blob, [bad, good]) = indexed(&store, &data, ["bad", "good"]);
    bad.fail([const { Fault::Flip(MIB) }; 100]);
    assert_eq!(*read(&blob, 0..4 * MIB).await.unwrap(), data[..]);
    assert!(blob.stats().rejected >= 1);
    assert_eq!(good.take_requests().first(), Some(&(MIB..4 * MIB)), "from the wrong chunk on");
}

#[tokio::test]
async fn a_chunk_that_nobody_has_fails_its_readers_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 5);
    let (blob, [source]) = indexed(&store, &data, ["test"]);
    source.fail([const { Fault::Flip(MIB) }; 100]);
    let all = {
        let blob = blob.clone();
        tokio::spawn(async move { read(&blob, 0..4 * MIB).await.map(drop) })
    };
    source.requested(1).await;
    let last = read(&blob, 3 * MIB..4 * MIB).await.unwrap();
    assert_eq!(*last, data[3 << 20..], "its request met the wrong chunk before");
    let error = all.await.unwrap().unwrap_err();
    let ReadError::Source { cause: SourceError::BadAnswer { what, .. }, .. } = &error else {
        panic!("{error}")
    };
    assert!(what.contains(&MIB.to_string()), "{error}");
    assert_eq!(blob.stats().cached, 3 * MIB);
    source.clear_faults();
    assert_eq!(*read(&blob, MIB..2 * MIB).await.unwrap(), data[1 << 20..2 << 20], "not for good");
}

#[tokio::test]
async fn whichever_chunk_is_flipped_it_alone_is_not_served() {
    for at in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let data = noise(4 * MIB + 9, 29);
        let (blob, [source]) = indexed(&store, &data, ["test"]);
        source.fail([const { Fault::Flip(0) }; 100].map(|_| Fault::Flip(at * MIB + 5)));
        for chunk in 0..5 {
            let range = chunk * MIB..(chunk * MIB + MIB).min(4 * MIB + 9);
            let bytes = &data[range.start as usize..range.end as usize];
            match read(&blob, range).await {
                Ok(slice) => assert!(chunk != at && *slice == *bytes, "{chunk} with {at} flipped"),
                Err(error) => assert_eq!(chunk, at, "{error}"),
            }
        }
        assert!(blob.stats().rejected > 0, "it is counted");
    }
}

#[tokio::test]
async fn digests_are_kept_of_each_blob_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let always = StoreOptions { keep_digests: KeepDigests::Always, ..options() };
    let store = Store::open(dir.path(), always).unwrap();
    let data = noise(3 * MIB + 1, 31);
    let (blob, _) = blob_of(&store, &data);
    let mut verified = store.verified();
    assert_eq!(store.verified_digests(id(&data)), None);
    blob.complete().await.unwrap();
    verified.changed().await.unwrap();
    assert_eq!(judged(&blob).await, Trust::Verified);
    let known = store.verified_digests(id(&data)).unwrap();
    assert_eq!(known, (blob.layout().clone(), digests(&data)));
    // Those of an index are not.
    let other = noise(MIB, 33);
    let _indexed = indexed(&store, &other, []);
    assert_eq!(store.verified_digests(id(&other)), None);
}

#[tokio::test]
async fn a_strict_read_is_answered_as_soon_as_its_chunks_were_compared() {
    let dir = tempfile::tempdir().unwrap();
    let strict = StoreOptions { verify: Verify::Strict, ..options() };
    let store = Store::open(dir.path(), strict).unwrap();
    let data = noise(16 * MIB, 7);
    let (blob, [source]) = indexed(&store, &data, ["test"]);
    assert_eq!(*read(&blob, 9 * MIB..9 * MIB + 5).await.unwrap(), data[9 << 20..][..5]);
    assert!(matches!(blob.read(9 * MIB..10 * MIB).unwrap(), Read::Ready(_)));
    assert_eq!(sum(source.take_requests()), MIB);
}

#[tokio::test]
async fn what_was_compared_is_believed_after_a_restart_unless_it_is_in_doubt() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(6 * MIB, 9);
    {
        let store = open(dir.path());
        let (blob, _) = indexed(&store, &data, ["test"]);
        read(&blob, 0..4 * MIB).await.unwrap();
    }
    {
        let store = open(dir.path());
        let (blob, _) = blob_of(&store, &data);
        assert_eq!((blob.stats().trust, blob.stats().cached), (Trust::Indexed, 4 * MIB));
        assert!(matches!(blob.read(0..MIB).unwrap(), Read::Ready(_)));
    }
    spoil(dir.path(), &data, MIB + 3);
    let store = Store::open(dir.path(), rechecking()).unwrap();
    // Without the digests at hand: they are kept beside the blob.
    let (blob, source) = blob_of(&store, &data);
    assert_eq!(*read(&blob, 0..4 * MIB).await.unwrap(), data[..4 << 20]);
    compared(&blob).await;
    let stats = blob.stats();
    assert_eq!((stats.trust, stats.rejected, stats.cached), (Trust::Indexed, 1, 4 * MIB));
    assert_eq!(source.take_requests(), vec![MIB..2 * MIB], "the wrong chunk and no other");
}

#[tokio::test]
async fn what_is_in_doubt_is_compared_although_nobody_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(6 * MIB, 11);
    {
        let store = open(dir.path());
        let (blob, _) = indexed(&store, &data, ["test"]);
        read(&blob, 0..6 * MIB).await.unwrap();
    }
    spoil(dir.path(), &data, 5 * MIB);
    {
        let store = Store::open(dir.path(), rechecking()).unwrap();
        let (blob, source) = blob_of(&store, &data);
        compared(&blob).await;
        assert_eq!((blob.stats().cached, blob.stats().rejected), (5 * MIB, 1));
        assert_eq!(source.take_requests(), [], "it is fetched when it is read");
    }
    let store = open(dir.path());
    assert_eq!(blob_of(&store, &data).0.stats().cached, 5 * MIB, "the record says that it is gone");
}

#[tokio::test]
async fn what_was_fetched_without_digests_is_compared_before_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(4 * MIB, 13);
    {
        let store = open(dir.path());
        let (blob, source) = blob_of(&store, &data);
        source.fail([Fault::Flip(MIB)]);
        read(&blob, 0..3 * MIB).await.unwrap();
        assert_eq!(blob.stats().trust, Trust::Transport);
    }
    let store = open(dir.path());
    let (blob, [source]) = indexed(&store, &data, ["test"]);
    assert_eq!(*read(&blob, 0..3 * MIB).await.unwrap(), data[..3 << 20]);
    assert_eq!(source.take_requests(), vec![MIB..2 * MIB]);
    assert_eq!(blob.stats().rejected, 1);
}

#[tokio::test]
async fn digests_that_come_while_a_blob_is_open_find_what_is_wrong_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 15);
    let (blob, source) = blob_of(&store, &data);
    source.fail([Fault::Flip(MIB)]);
    read(&blob, 0..3 * MIB).await.unwrap();
    source.take_requests();
    let (same, _) = indexed(&store, &data, []);
    assert!(Arc::ptr_eq(&blob, &same));
    compared(&blob).await;
    assert_eq!((blob.stats().trust, blob.stats().rejected), (Trust::Indexed, 1));
    assert_eq!(*read(&blob, 0..4 * MIB).await.unwrap(), data[..]);
    assert_eq!(sum(source.take_requests()), 2 * MIB);
}

#[tokio::test]
async fn verifying_finds_the_wrong_chunk_and_a_repair_fetches_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(20 * MIB, 17);
    let (blob, [source]) = indexed(&store, &data, ["test"]);
    let verify = || store.verify(id(&data), |_| ()).unwrap();
    read(&blob, 0..2 * MIB).await.unwrap();
    assert_eq!(verify(), Checked::Good, "what is here of it");
    blob.complete().await.unwrap();
    assert_eq!(verify(), Checked::Good);
    source.take_requests();
    spoil(dir.path(), &data, 17 * MIB + 9);
    assert_eq!(verify(), Checked::BadChunks { count: 1, others: Others::Here });
    assert_eq!(blob.stats().cached, 19 * MIB);
    blob.complete().await.unwrap();
    assert_eq!(source.take_requests(), vec![17 * MIB..18 * MIB]);
    assert_eq!(*read(&blob, 0..20 * MIB).await.unwrap(), data[..]);
}

#[tokio::test]
async fn a_wrong_chunk_that_is_in_use_poisons_the_blob() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(2 * MIB, 19);
    let (blob, _) = indexed(&store, &data, ["test"]);
    let reader = read(&blob, 0..MIB).await.unwrap();
    spoil(dir.path(), &data, 9);
    assert!(matches!(store.verify(id(&data), |_| ()).unwrap(), Checked::Bad { .. }));
    assert!(matches!(blob.read(0..1), Err(ReadError::Poisoned { .. })));
    drop(reader);
}

#[tokio::test]
async fn a_blob_with_digests_is_never_hashed_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Its digests are right, its name is not: nobody notices, because nothing is hashed twice.
    let (data, name) = (noise(3 * MIB, 21), noise(3 * MIB, 23));
    let layout = Layout::whole(3 * MIB);
    let blob = store.indexed_blob(id(&name), &layout, &digests(&data)).unwrap();
    blob.add_source(TestSource::new("test", data.clone()));
    blob.complete().await.unwrap();
    assert_eq!(judged(&blob).await, Trust::Indexed);
}

#[tokio::test]
async fn a_blob_that_was_verified_as_a_whole_knows_its_chunks_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(40 * MIB, 27);
    {
        let store = open_keeping_digests(dir.path());
        let (blob, _) = blob_of(&store, &data);
        blob.complete().await.unwrap();
    }
    let store = open_keeping_digests(dir.path());
    let (blob, source) = blob_of(&store, &data);
    assert_eq!(blob.stats().trust, Trust::Verified);
    while blob.stats().cached > 0 {
        store.evict(id(&data)).unwrap();
        tokio::task::yield_now().await;
    }
    source.fail([Fault::Flip(MIB + 5)]);
    assert_eq!(*read(&blob, 0..3 * MIB).await.unwrap(), data[..3 << 20]);
    let stats = blob.stats();
    assert_eq!((stats.trust, stats.rejected), (Trust::Verified, 1), "what comes again is the same");
    // An index that says otherwise is not believed.
    let lie = vec![7; 40 * 32];
    store.indexed_blob(id(&data), &Layout::whole(40 * MIB), &lie).unwrap();
    assert_eq!(*read(&blob, 4 * MIB..5 * MIB).await.unwrap(), data[4 << 20..5 << 20]);
}

#[tokio::test]
async fn digests_that_are_not_one_for_each_chunk_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(2 * MIB, 25);
    let all = digests(&data);
    for wrong in [&all[..32], &all[..63], &[], &[&all[..], &all[..]].concat()] {
        assert!(store.indexed_blob(id(&data), &Layout::whole(2 * MIB), wrong).is_err());
    }
    let cut = Layout::new(2 * MIB, [5]).unwrap();
    assert!(store.indexed_blob(id(&data), &cut, &all).is_err());
}
