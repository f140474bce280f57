//! What reads give, and what they cost.

use std::path::Path;
use std::sync::Arc;

use weightfs_store::{BlobId, Form, Layout, OpenError, Read, ReadError, Store, Trust};

use super::source::TestSource;
use super::{MIB, blob_of, id, judged, noise, open, options, read};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_reads_from_several_tasks_see_the_same_bytes_as_memory() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = Arc::new(noise(24 * MIB + 12345, 1));
    let cuts = [1, 4096, 3 * MIB + 7, 3 * MIB + 8, 9 * MIB, 20 * MIB + 1];
    let layout = Layout::new(data.len() as u64, cuts).unwrap();
    let blob = store.blob(id(&data), &layout).unwrap();
    blob.add_source(TestSource::new("test", data.to_vec()));
    let tasks = (0..6u64).map(|seed| {
        let (blob, data, layout) = (blob.clone(), data.clone(), layout.clone());
        tokio::spawn(async move {
            let mut numbers = noise(8 * 400, seed + 77).into_iter();
            let mut number = || {
                let bytes: Vec<u8> = numbers.by_ref().take(8).collect();
                u64::from_le_bytes(bytes.try_into().unwrap())
            };
            for _ in 0..200 {
                let start = number() % data.len() as u64;
                let end = layout.segment(layout.segment_at(start).unwrap()).unwrap().end;
                let len = (number() % (2 * MIB)).min(end - start);
                let slice = read(&blob, start..start + len).await.unwrap();
                assert_eq!(&*slice, &data[start as usize..(start + len) as usize]);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let stats = blob.stats();
    assert_eq!(stats.fetched, stats.cached, "nothing is fetched twice");
}

#[tokio::test]
async fn a_small_read_in_a_cold_blob_fetches_one_chunk_and_never_more_than_two() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_reading_ahead(dir.path());
    let data = noise(64 * MIB, 2);
    let (blob, source) = blob_of(&store, &data);
    let at = 31 * MIB + 5000;
    assert_eq!(&*read(&blob, at..at + 4096).await.unwrap(), &data[at as usize..][..4096]);
    assert_eq!(source.take_requests(), vec![31 * MIB..32 * MIB]);
    let at = 8 * MIB - 100;
    read(&blob, at..at + 4096).await.unwrap();
    assert_eq!(source.take_requests(), vec![7 * MIB..9 * MIB], "one request for both chunks");
    assert_eq!(blob.stats().fetched, 3 * MIB);
    assert!(blob.disk_bytes() < 4 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_one_chunk_share_one_request() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 3);
    let (blob, source) = blob_of(&store, &data);
    source.allow(0);
    let readers: Vec<_> = (0..50u64)
        .map(|at| {
            let blob = blob.clone();
            tokio::spawn(
                async move { read(&blob, MIB + at..MIB + at + 10).await.unwrap().to_vec() },
            )
        })
        .collect();
    source.requested(1).await;
    source.allow(u64::MAX);
    for (at, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.await.unwrap(), data[MIB as usize + at..][..10]);
    }
    assert_eq!(source.take_requests(), vec![MIB..2 * MIB]);
}

#[tokio::test]
async fn chunks_of_a_running_request_are_readable_as_they_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(4 * MIB, 4);
    let (blob, source) = blob_of(&store, &data);
    // All but the last byte of the third chunk: two are whole.
    source.allow(3 * MIB - 1);
    let Read::Missing(all) = blob.read(0..4 * MIB).unwrap() else { panic!("a cold blob hits") };
    let all = tokio::spawn(all.wait());
    source.requested(1).await;
    assert_eq!(*read(&blob, 0..2 * MIB).await.unwrap(), data[..2 * MIB as usize]);
    assert!(!blob.is_cached(2 * MIB..3 * MIB) && !all.is_finished());
    source.allow(u64::MAX);
    assert_eq!(*all.await.unwrap().unwrap(), data[..]);
    assert_eq!(source.take_requests(), vec![0..4 * MIB]);
}

#[tokio::test]
async fn a_reader_that_goes_away_breaks_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(MIB, 5);
    let (blob, source) = blob_of(&store, &data);
    source.allow(10);
    let Read::Missing(first) = blob.read(0..10).unwrap() else { panic!("a cold blob hits") };
    let first = tokio::spawn(first.wait());
    source.requested(1).await;
    let second = tokio::spawn({
        let blob = blob.clone();
        async move { read(&blob, 5..15).await.unwrap().to_vec() }
    });
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    source.allow(u64::MAX);
    assert_eq!(second.await.unwrap(), data[5..15]);
    assert_eq!(source.take_requests(), vec![0..MIB]);
}

#[tokio::test]
async fn a_slice_outlives_everything_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(MIB, 6);
    let (blob, _) = blob_of(&store, &data);
    let slice = read(&blob, 100..200).await.unwrap();
    drop((blob, store));
    assert_eq!(*slice, data[100..200]);
}

#[tokio::test]
async fn ranges_outside_a_segment_are_refused_and_empty_ones_are_ready() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(100, 7);
    let blob = store.blob(id(&data), &Layout::new(100, [50]).unwrap()).unwrap();
    for range in [40..60, 99..101, 100..101, u64::MAX - 1..u64::MAX] {
        assert!(matches!(blob.read(range), Err(ReadError::OutOfRange { .. })));
    }
    for at in [0, 50, 100] {
        assert!(matches!(blob.read(at..at).unwrap(), Read::Ready(slice) if slice.is_empty()));
    }
    assert!(matches!(blob.read(101..101), Err(ReadError::OutOfRange { .. })));
}

#[tokio::test]
async fn a_whole_blob_is_verified_and_an_empty_one_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(20 * MIB + 3, 8);
    let (blob, _) = blob_of(&store, &data);
    read(&blob, 0..5).await.unwrap();
    assert_eq!(blob.stats().trust, Trust::Transport);
    read(&blob, 0..data.len() as u64).await.unwrap();
    assert_eq!(judged(&blob).await, Trust::Verified);
    let empty = store.blob(id(b""), &Layout::whole(0)).unwrap();
    assert_eq!(judged(&empty).await, Trust::Verified);
}

#[tokio::test]
async fn a_complete_segment_has_a_file_of_its_own() {
    use std::io::Read as _;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(3 * MIB, 9);
    let blob = store.blob(id(&data), &Layout::new(3 * MIB, [MIB + 5]).unwrap()).unwrap();
    blob.add_source(TestSource::new("test", data.clone()));
    read(&blob, MIB + 5..MIB + 6).await.unwrap();
    assert!(blob.segment_file(1).unwrap().is_none(), "a chunk of it is absent");
    read(&blob, MIB + 5..3 * MIB).await.unwrap();
    let mut bytes = vec![];
    blob.segment_file(1).unwrap().unwrap().0.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, data[MIB as usize + 5..]);
    assert!(blob.segment_file(0).unwrap().is_none() && blob.segment_file(2).unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequential_reader_is_read_ahead_of_in_growing_requests() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_reading_ahead(dir.path());
    let data = noise(48 * MIB, 10);
    let (blob, source) = blob_of(&store, &data);
    for at in 0..48 {
        let slice = read(&blob, at * MIB..(at + 1) * MIB).await.unwrap();
        assert_eq!(*slice, data[(at * MIB) as usize..((at + 1) * MIB) as usize]);
    }
    let mut requests = source.take_requests();
    assert!(requests.len() < 30, "{requests:?}");
    requests.sort_by_key(|range| range.start);
    assert!(requests.windows(2).all(|pair| pair[0].end == pair[1].start), "{requests:?}");
    assert_eq!(blob.stats().fetched, 48 * MIB);
}

#[tokio::test]
async fn all_openers_share_one_blob_and_agree_on_its_cuts() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let name = id(b"x");
    let layout = Layout::new(100, [10]).unwrap();
    assert_eq!(store.layout(name), None);
    let blob = store.blob(name, &layout).unwrap();
    assert!(Arc::ptr_eq(&blob, &store.blob(name, &layout).unwrap()));
    assert_eq!(store.layout(name), Some(layout.clone()));
    let other = Layout::whole(100);
    assert!(matches!(store.blob(name, &other), Err(OpenError::OtherLayout { .. })));
    assert_eq!(store.open_blobs().len(), 1);
    drop(blob);
    assert!(store.open_blobs().is_empty());
    assert!(matches!(store.blob(name, &other), Err(OpenError::OtherLayout { .. })));
    assert_eq!(store.layout(name), Some(layout));
    let inflated = BlobId { form: Form::Decompressed, ..name };
    store.blob(inflated, &other).unwrap();
}

#[tokio::test]
async fn an_absurd_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = open(dir.path()).blob(id(b"x"), &Layout::whole(u64::MAX));
    assert!(refused.unwrap_err().to_string().contains("over the limit"));
}

/// A store whose sequential readers are read ahead of.
fn open_reading_ahead(root: &Path) -> Arc<Store> {
    let mut options = options();
    options.fetch.read_ahead_min = 8 * MIB;
    options.fetch.read_ahead_max = 32 * MIB;
    Store::open(root, options).unwrap()
}
