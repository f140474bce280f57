//! What is fetched first, how much at once, and what is fetched without being asked for.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use tokio::time::{Instant, sleep, timeout_at};
use weightfs_store::{Background, Blob, BlobId, Digest, Form, Layout, Read, Store, Trust};

use super::line::{FarSource, Line};
use super::source::{Fault, TestSource, status};
use super::{MIB, blob_of, id, judged, noise, open, options, read};

/// A store as it is in earnest.
fn open_in_earnest(root: &Path) -> Arc<Store> {
    let mut options = options();
    options.fetch.connections = 32;
    options.fetch.request_bytes = 16 * MIB;
    options.fetch.read_ahead_min = 8 * MIB;
    options.fetch.read_ahead_max = 256 * MIB;
    options.fetch.background = Background::TouchedFiles;
    Store::open(root, options).unwrap()
}

fn open_with(root: &Path, connections_per_host: usize, background: Background) -> Arc<Store> {
    let mut options = options();
    options.fetch.connections_per_host = connections_per_host;
    options.fetch.background = background;
    Store::open(root, options).unwrap()
}

/// A blob of zeros whose digest is made up, so that nobody can verify it.
fn far_blob(store: &Arc<Store>, name: &str, size: u64, line: &Arc<Line>) -> Arc<Blob> {
    let id = BlobId { digest: Digest::of(name.as_bytes()), form: Form::AsStored };
    let blob = store.blob(id, &Layout::whole(size)).unwrap();
    blob.add_source(Arc::new(FarSource(Arc::clone(line))));
    blob
}

#[tokio::test(start_paused = true)]
async fn a_stream_from_far_away_reaches_the_rate_of_the_line() {
    const RATE: f64 = 64.0 * MIB as f64;
    let dir = tempfile::tempdir().unwrap();
    let store = open_in_earnest(dir.path());
    let line = Line::new(Duration::from_secs(1), RATE);
    let blob = far_blob(&store, "x", 1024 * MIB, &line);
    let began = Instant::now();
    let (from, to) = (began + Duration::from_secs(5), began + Duration::from_secs(8));
    // As the kernel reads ahead: four requests of 1 MiB at a time.
    let mut reads =
        stream::iter((0..1024).map(|at| read(&blob, at * MIB..(at + 1) * MIB))).buffered(4);
    let mut counted = 0;
    while let Ok(Some(slice)) = timeout_at(to, reads.next()).await {
        counted += if Instant::now() > from { slice.unwrap().len() } else { 0 };
    }
    let share = counted as f64 / RATE / (to - from).as_secs_f64();
    assert!(share >= 0.9, "only {share:.2} of the line");
}

#[tokio::test(start_paused = true)]
async fn many_readers_of_many_cold_blobs_hold_a_bounded_number_of_answers() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_in_earnest(dir.path());
    let line = Line::new(Duration::from_millis(200), 1e9);
    let readers = (0..64).map(|number| {
        // True digests: what is complete is hashed while it is read.
        let size = 4 * MIB + number;
        let blob = store.blob(id(&vec![0; size as usize]), &Layout::whole(size)).unwrap();
        blob.add_source(Arc::new(FarSource(Arc::clone(&line))));
        tokio::spawn(async move {
            for at in 0..4 {
                assert_eq!(read(&blob, at * MIB..(at + 1) * MIB).await.unwrap().len(), 1 << 20);
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    let most = line.most_open();
    assert!((16..=64).contains(&most), "{most} answers of a few hundred KiB each in memory");
}

#[tokio::test(start_paused = true)]
async fn the_bound_of_a_host_holds_for_all_of_its_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 3, Background::Everything);
    let line = Line::new(Duration::from_millis(10), 1e9);
    let blobs: Vec<_> = (0..5)
        .map(|number| far_blob(&store, &number.to_string(), 8 * MIB, &line))
        .inspect(|blob| blob.shown())
        .collect();
    for blob in &blobs {
        read(blob, 5 * MIB..6 * MIB).await.unwrap();
    }
    while blobs.iter().any(|blob| blob.stats().cached < 8 * MIB) {
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(line.most_open(), 3);
    assert!(blobs.iter().all(|blob| blob.stats().fetched == 8 * MIB), "nothing twice");
}

#[tokio::test]
async fn a_look_at_a_large_file_fetches_one_chunk_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_in_earnest(dir.path());
    let data = noise(64 * MIB, 1);
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 33 * MIB + 4096..33 * MIB + 8192).await.unwrap();
    // Whatever else there was to fetch would be asked for before this comes back.
    tokio::task::yield_now().await;
    assert_eq!(source.take_requests(), vec![33 * MIB..34 * MIB]);
    assert_eq!(blob.stats().fetched, MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_of_a_file_that_is_read_is_fetched_and_the_blob_verified() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_in_earnest(dir.path());
    // As a tar: a large file, with small things before and after it.
    let data = noise(40 * MIB, 2);
    let layout = Layout::new(40 * MIB, [512, 38 * MIB]).unwrap();
    let blob = store.blob(id(&data), &layout).unwrap();
    let source = TestSource::new("test", data.clone());
    blob.add_source(source.clone());
    for at in 20..29 {
        let start = 512 + at * MIB;
        read(&blob, start..start + MIB).await.unwrap();
    }
    assert_eq!(judged(&blob).await, Trust::Verified);
    let stats = blob.stats();
    assert_eq!((stats.cached, stats.fetched), (40 * MIB, 40 * MIB));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_nobody_reads_are_not_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_in_earnest(dir.path());
    let data = noise(64 * MIB, 3);
    let layout = Layout::new(64 * MIB, [16 * MIB]).unwrap();
    let blob = store.blob(id(&data), &layout).unwrap();
    blob.add_source(TestSource::new("test", data.clone()));
    for at in 0..16 {
        read(&blob, at * MIB..(at + 1) * MIB).await.unwrap();
    }
    read(&blob, 40 * MIB..40 * MIB + 1).await.unwrap();
    assert_eq!(blob.stats().cached, 17 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_means_blobs_that_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 8, Background::Everything);
    let (other, other_source) = blob_of(&store, &noise(MIB, 4));
    let (blob, _) = blob_of(&store, &noise(20 * MIB, 5));
    blob.shown();
    assert_eq!(judged(&blob).await, Trust::Verified);
    assert!(other_source.take_requests().is_empty());
    drop(other);
}

#[tokio::test]
async fn demand_is_asked_for_at_once_while_background_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 4, Background::Everything);
    let data = noise(64 * MIB, 6);
    let (blob, source) = blob_of(&store, &data);
    source.allow(0);
    blob.shown();
    source.requested(3).await;
    let Read::Missing(miss) = blob.read(50 * MIB..50 * MIB + 1).unwrap() else { panic!("a hit") };
    let reader = tokio::spawn(miss.wait());
    source.requested(4).await;
    assert_eq!(source.take_requests().pop(), Some(50 * MIB..51 * MIB));
    source.allow(u64::MAX);
    assert_eq!(*reader.await.unwrap().unwrap(), data[50 << 20..=50 << 20]);
    // The place at the line that was kept for demand is free again.
    assert_eq!(*read(&blob, MIB..MIB + 1).await.unwrap(), data[1 << 20..=1 << 20]);
}

#[tokio::test]
async fn a_random_read_does_not_wait_for_all_that_a_running_request_has_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 4, Background::Everything);
    let data = noise(4 * MIB, 7);
    let (blob, source) = blob_of(&store, &data);
    source.allow(MIB);
    blob.shown();
    source.requested(1).await;
    read(&blob, 0..1).await.unwrap();
    // The request for 0..4 MiB hangs after its first chunk, as do all, until more is allowed.
    let slice = read(&blob, 3 * MIB..3 * MIB + 1).await.unwrap();
    assert_eq!(*slice, data[3 << 20..=3 << 20]);
    assert_eq!(source.take_requests(), vec![0..4 * MIB, 3 * MIB..4 * MIB]);
    source.allow(u64::MAX);
    assert_eq!(judged(&blob).await, Trust::Verified);
    let wasted = blob.stats().fetched - 4 * MIB;
    assert!(wasted < MIB / 2, "of the request that was cut short, at most the piece at hand");
}

#[tokio::test]
async fn blobs_take_turns_on_the_line_of_their_host() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_with(dir.path(), 8, Background::Everything);
    let blobs: Vec<_> =
        (0..2).map(|seed| blob_of(&store, &noise(32 * MIB, 21 + 2 * seed))).collect();
    for (blob, source) in &blobs {
        source.allow(0);
        blob.shown();
    }
    // The first one's plan fills what background may use of the line; the second comes to its
    // turn when places are free.
    blobs[0].1.requested(3).await;
    blobs[1].1.requested(3).await;
    for (_, source) in &blobs {
        source.allow(u64::MAX);
    }
    for (blob, _) in &blobs {
        assert_eq!(judged(blob).await, Trust::Verified);
    }
}

#[tokio::test]
async fn after_a_failure_in_the_background_the_next_reader_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_in_earnest(dir.path());
    let data = noise(64 * MIB, 10);
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 0..7 * MIB).await.unwrap();
    source.fail([(); 2].map(|()| Fault::Refuse(status(404, None))));
    // This one makes it a file in use; its own request fails, too.
    assert!(read(&blob, 7 * MIB..9 * MIB).await.is_err());
    read(&blob, 30 * MIB..31 * MIB).await.unwrap();
    read(&blob, 40 * MIB..48 * MIB).await.unwrap();
    assert_eq!(judged(&blob).await, Trust::Verified);
}

#[tokio::test]
async fn what_is_expected_is_fetched_and_nothing_around_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (blob, source) = blob_of(&store, &noise(64 * MIB, 11));
    blob.expect(&(10 * MIB + 5..10 * MIB + 6));
    blob.expect(&(60 * MIB..99 * MIB));
    while !blob.is_cached(10 * MIB..11 * MIB) {
        tokio::task::yield_now().await;
    }
    assert_eq!(source.take_requests(), vec![10 * MIB..11 * MIB]);
}
