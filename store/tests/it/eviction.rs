//! A cache that is smaller than what goes through it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use weightfs_store::{Amount, Background, Blob, Evicted, Layout, Read, Store, StoreOptions, Trust};

use super::restart::find;
use super::source::TestSource;
use super::{MIB, blob_of, id, judged, noise, open, open_keeping_digests, options, read};

/// Bytes that all files below take on disk.
fn on_disk(root: &Path) -> u64 {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => on_disk(&entry.path()),
        Ok(found) => found.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

fn limited(limit: u64) -> StoreOptions {
    let mut options = options();
    options.cache.limit = Some(Amount::Bytes(limit));
    options
}

fn open_limited(root: &Path, limit: u64) -> Arc<Store> {
    let store = Store::open(root, limited(limit)).unwrap();
    store.start_evicting();
    store
}

async fn read_all(blob: &Arc<Blob>, data: &[u8], step: u64) {
    let size = data.len() as u64;
    for start in (0..size).step_by(step as usize) {
        let range = start..size.min(start + step);
        let slice = read(blob, range.clone()).await.unwrap();
        assert!(*slice == data[range.start as usize..range.end as usize], "{range:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_larger_than_the_cache_loads_completely_and_the_limit_holds() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 64 * MIB;
    let store = open_limited(dir.path(), limit);
    let data = noise(200 * MIB + 12_345, 1);
    let (blob, _) = blob_of(&store, &data);
    for _ in 0..2 {
        let size = data.len() as u64;
        for start in (0..size).step_by(MIB as usize) {
            let range = start..size.min(start + MIB);
            let slice = read(&blob, range.clone()).await.unwrap();
            assert!(*slice == data[range.start as usize..range.end as usize], "{range:?}");
            drop(slice);
            let used = on_disk(dir.path());
            assert!(used <= limit + limit / 100, "{used} bytes after {range:?}");
        }
    }
    let stats = blob.stats();
    assert!(stats.cached >= limit / 2, "{stats:?}: the cache is used");
    // The first pass was hashed as it came, before it was evicted; the second brought others.
    assert_eq!(stats.trust, Trust::Transport);
}

#[tokio::test]
async fn what_somebody_holds_stays_and_the_rest_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(64 * MIB, 3);
    let (blob, source) = blob_of(&store, &data);
    read_all(&blob, &data, 4 * MIB).await;
    let held = read(&blob, 20 * MIB..21 * MIB).await.unwrap();
    // Requests that are just ending hold extents, too.
    while blob.stats().cached > 16 * MIB {
        assert!(matches!(store.evict(id(&data)).unwrap(), Evicted::Part { .. }));
        tokio::task::yield_now().await;
    }
    assert!((16 * MIB..17 * MIB).contains(&blob.disk_bytes()));
    assert!(*held == data[20 * MIB as usize..21 * MIB as usize], "no zeros under a reader");
    assert_eq!(blob.stats().cached, 16 * MIB);
    assert!(blob.is_cached(16 * MIB..32 * MIB) && !blob.is_cached(32 * MIB..33 * MIB));
    drop(held);
    source.take_requests();
    read_all(&blob, &data, 4 * MIB).await;
    let fetched: u64 = source.take_requests().iter().map(|range| range.end - range.start).sum();
    assert_eq!(fetched, 48 * MIB, "what went is fetched again, and no more");
}

#[tokio::test]
async fn a_file_that_the_kernel_reads_is_never_touched() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let store = open_limited(dir.path(), 64 * MIB);
    let data = noise(40 * MIB, 5);
    let layout = Layout::new(40 * MIB, [8 * MIB]).unwrap();
    let blob = store.blob(id(&data), &layout).unwrap();
    blob.add_source(TestSource::new("test", data.clone()));
    read_all(&blob, &data, MIB).await;
    let (file, hold) = blob.segment_file(1).unwrap().unwrap();
    let other = noise(128 * MIB, 7);
    let (second, _) = blob_of(&store, &other);
    read_all(&second, &other, MIB).await;
    while blob.stats().cached > 32 * MIB {
        store.evict(id(&data)).unwrap();
        tokio::task::yield_now().await;
    }
    let mut bytes = vec![0; 32 * MIB as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == data[8 * MIB as usize..]);
    drop(hold);
    // Whoever hashes it holds it, too.
    while blob.stats().cached > 0 {
        store.evict(id(&data)).unwrap();
        tokio::task::yield_now().await;
    }
    assert!(blob.segment_file(1).unwrap().is_none());
}

#[tokio::test]
async fn unused_blobs_go_first_the_oldest_before_and_pinned_ones_never() {
    let dir = tempfile::tempdir().unwrap();
    let blobs: Vec<_> = (0..4).map(|seed| noise(16 * MIB, 2 * seed + 1)).collect();
    {
        let store = open(dir.path());
        for data in &blobs {
            let (blob, _) = blob_of(&store, data);
            read_all(&blob, data, MIB).await;
            judged(&blob).await;
            store.checkpoint().unwrap();
        }
        store.pin(id(&blobs[0])).unwrap();
    }
    let store = open_limited(dir.path(), 72 * MIB);
    // Opened and closed: no longer the oldest that is not pinned.
    drop(blob_of(&store, &blobs[1]));
    let (mounted, _) = blob_of(&store, &blobs[3]);
    let data = noise(20 * MIB, 21);
    let (new, _) = blob_of(&store, &data);
    read_all(&new, &data, MIB).await;
    let cached = |data: &[u8]| {
        let usage = store.usage().unwrap();
        usage.blobs.iter().find(|blob| blob.id == id(data)).map(|blob| blob.cached)
    };
    assert_eq!(cached(&blobs[0]), Some(16 * MIB), "pinned");
    assert_eq!(cached(&blobs[2]), None, "the oldest");
    assert_eq!(cached(&blobs[1]), Some(16 * MIB), "one is enough");
    assert_eq!(mounted.stats().cached, 16 * MIB, "in use");
    assert_eq!(new.stats().cached, 20 * MIB);
}

#[tokio::test]
async fn what_nobody_asked_for_makes_room_first_and_takes_none_from_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = limited(96 * MIB);
    options.fetch.background = Background::Everything;
    let store = Store::open(dir.path(), options).unwrap();
    store.start_evicting();
    let (wanted, unasked) = (noise(48 * MIB, 1), noise(128 * MIB, 3));
    let (first, _) = blob_of(&store, &wanted);
    read_all(&first, &wanted, MIB).await;
    let (second, source) = blob_of(&store, &unasked);
    second.shown();
    // It ends when there is no room left.
    source.requested(8).await;
    let began = std::time::Instant::now();
    while second.stats().fetched < 44 * MIB {
        assert!(
            began.elapsed().as_secs() < 10,
            "{:?} {:?} {:?}",
            second.stats(),
            first.stats(),
            source.take_requests()
        );
        tokio::task::yield_now().await;
    }
    assert_eq!(first.stats().cached, 48 * MIB);
    let third = noise(32 * MIB, 5);
    let (third_blob, _) = blob_of(&store, &third);
    read_all(&third_blob, &third, MIB).await;
    assert_eq!(first.stats().cached, 48 * MIB, "what was read stays");
    assert!(second.stats().cached <= 17 * MIB, "{:?}", second.stats());
}

#[tokio::test]
async fn where_nothing_can_go_reads_are_served_from_memory() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_limited(dir.path(), 64 * MIB);
    let (pinned, other) = (noise(63 * MIB, 1), noise(8 * MIB + 77, 3));
    store.pin(id(&pinned)).unwrap();
    let (first, _) = blob_of(&store, &pinned);
    read_all(&first, &pinned, MIB).await;
    let (second, source) = blob_of(&store, &other);
    read_all(&second, &other, 300_000).await;
    assert!(second.stats().cached <= MIB && first.stats().cached == 63 * MIB);
    assert!(store.counters().loose_chunks.get() >= 7, "{:?}", store.counters());
    let asked: u64 = source.take_requests().iter().map(|range| range.end - range.start).sum();
    assert!(asked <= 9 * MIB, "{asked} bytes: small reads of a chunk ask for it once");
    store.unpin(id(&pinned)).unwrap();
    drop(first);
    // What is in memory goes with its last reader. Whoever finds no room asks the evictor, so
    // there is some, sooner or later.
    let mut second = second;
    while second.stats().cached < 8 * MIB + 77 {
        drop(second);
        second = blob_of(&store, &other).0;
        read_all(&second, &other, MIB).await;
    }
    assert_eq!(judged(&second).await, Trust::Verified);
}

#[tokio::test]
async fn what_was_evicted_is_absent_after_a_restart_and_the_rest_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(40 * MIB, 9);
    {
        let store = open_keeping_digests(dir.path());
        let (blob, _) = blob_of(&store, &data);
        read_all(&blob, &data, MIB).await;
        assert_eq!(judged(&blob).await, Trust::Verified);
        let _held = read(&blob, 0..MIB).await.unwrap();
        store.evict(id(&data)).unwrap();
        assert_eq!(blob.stats().trust, Trust::Verified, "what is left was hashed");
    }
    let store = open_keeping_digests(dir.path());
    let (blob, source) = blob_of(&store, &data);
    assert_eq!((blob.stats().cached, blob.stats().trust), (16 * MIB, Trust::Verified));
    assert!(matches!(blob.read(0..16 * MIB).unwrap(), Read::Ready(_)));
    read(&blob, 16 * MIB..17 * MIB).await.unwrap();
    assert_eq!(blob.stats().trust, Trust::Verified, "what came now was compared");
    read_all(&blob, &data, MIB).await;
    assert!(!source.take_requests().is_empty());
    assert_eq!(judged(&blob).await, Trust::Verified);
}

#[tokio::test]
async fn what_a_lying_source_gives_in_place_of_evicted_bytes_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_keeping_digests(dir.path());
    let data = noise(40 * MIB, 11);
    let (blob, _) = blob_of(&store, &data);
    read_all(&blob, &data, MIB).await;
    assert_eq!(judged(&blob).await, Trust::Verified);
    store.evict(id(&data)).unwrap();
    let mut lie = data.clone();
    lie[30 * MIB as usize] ^= 1;
    blob.add_source(TestSource::new("test", lie.clone()));
    for start in 0..40 {
        let result = read(&blob, start * MIB..(start + 1) * MIB).await;
        assert_eq!(result.is_err(), start == 30, "{start}: {result:?}");
    }
    assert_eq!(judged(&blob).await, Trust::Verified, "what is here is right");
}

#[tokio::test]
async fn a_blob_without_a_source_is_not_evicted_in_part() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(20 * MIB, 13);
    let store = open(dir.path());
    let mut ingest = store.ingest(id(&data)).unwrap();
    ingest.write(&data).unwrap();
    let blob = ingest.finish().unwrap();
    let Evicted::Part { freed, .. } = store.evict(id(&data)).unwrap() else { panic!("open") };
    assert_eq!((freed, blob.stats().cached), (0, 20 * MIB));
    drop(blob);
    assert!(matches!(store.evict(id(&data)).unwrap(), Evicted::Whole { .. }));
}

#[tokio::test]
async fn a_blob_made_here_that_does_not_fit_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_limited(dir.path(), 64 * MIB);
    let data = noise(80 * MIB, 15);
    let mut ingest = store.ingest(id(&data)).unwrap();
    let written = data.chunks(1 << 20).try_for_each(|piece| ingest.write(piece));
    assert!(written.unwrap_err().to_string().contains("cache.limit"));
    drop(ingest);
    assert!(on_disk(dir.path()) < MIB);
}

#[tokio::test]
async fn a_file_that_outlived_its_daemon_in_a_reader_is_not_touched_by_the_next() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let data = noise(20 * MIB, 17);
    let layout = Layout::new(20 * MIB, [4 * MIB]).unwrap();
    let open_blob = |store: &Arc<Store>| {
        let blob = store.blob(id(&data), &layout).unwrap();
        blob.add_source(TestSource::new("test", data.clone()));
        blob
    };
    let store = open(dir.path());
    let blob = open_blob(&store);
    read_all(&blob, &data, MIB).await;
    judged(&blob).await;
    let (file, hold) = blob.segment_file(1).unwrap().unwrap();
    let note = find(dir.path(), "kernel").join("1");
    let noted = fs::read(&note).unwrap();
    drop(hold);
    assert!(!note.exists());
    drop((blob, store));
    // As a process leaves it that is killed; the reader has the file still open.
    fs::write(&note, noted).unwrap();
    let store = open(dir.path());
    let blob = open_blob(&store);
    store.evict(id(&data)).unwrap();
    assert_eq!(blob.stats().cached, 16 * MIB);
    let mut bytes = vec![0; 16 * MIB as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == data[4 * MIB as usize..], "the reader sees no hole");
    drop((blob, store, file));
    let store = open(dir.path());
    let blob = open_blob(&store);
    store.evict(id(&data)).unwrap();
    assert_eq!(blob.stats().cached, 0, "its last reader is gone");
}

#[tokio::test]
async fn blocks_that_no_record_speaks_of_make_room() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(56 * MIB, 19);
    {
        let store = open(dir.path());
        let (blob, _) = blob_of(&store, &data);
        read_all(&blob, &data, MIB).await;
        judged(&blob).await;
    }
    fs::write(find(dir.path(), "state"), b"noise").unwrap();
    let store = open_limited(dir.path(), 64 * MIB);
    let (blob, _) = blob_of(&store, &data);
    let other = noise(40 * MIB, 23);
    let (second, _) = blob_of(&store, &other);
    assert_eq!(blob.stats().cached, 0);
    read_all(&second, &other, MIB).await;
    assert_eq!(second.stats().cached, 40 * MIB);
    assert!(blob.disk_bytes() < 30 * MIB);
}
