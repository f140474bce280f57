//! What is there after a restart.

use std::fs;
use std::path::{Path, PathBuf};

use weightfs_store::{Layout, OpenError, Read, Store, Trust};

use super::source::TestSource;
use super::{MIB, blob_of, id, judged, noise, open, options, read};

pub fn find(root: &Path, name: &str) -> PathBuf {
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap() == name {
                return path;
            }
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    panic!("no {name}");
}

#[tokio::test]
async fn after_a_restart_all_that_was_cached_is_a_hit() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(20 * MIB, 1);
    let layout = Layout::new(20 * MIB, [3 * MIB + 1]).unwrap();
    {
        let store = open(dir.path());
        let blob = store.blob(id(&data), &layout).unwrap();
        blob.add_source(TestSource::new("test", data.clone()));
        read(&blob, 0..MIB + 1).await.unwrap();
        read(&blob, 10 * MIB..11 * MIB).await.unwrap();
        store.checkpoint().unwrap();
    }
    let store = open(dir.path());
    let blob = store.blob(id(&data), &layout).unwrap();
    for range in [0..2 * MIB, 10 * MIB..11 * MIB] {
        let Read::Ready(slice) = blob.read(range.clone()).unwrap() else { panic!("not cached") };
        assert_eq!(*slice, data[range.start as usize..range.end as usize]);
    }
    assert!(!blob.is_cached(5 * MIB..5 * MIB + 1));
    assert_eq!((blob.stats().fetched, blob.stats().cached), (0, 4 * MIB));
    // The rest, and then the whole is hashed although most of it was never hashed here.
    blob.add_source(TestSource::new("test", data.clone()));
    read(&blob, 0..3 * MIB + 1).await.unwrap();
    read(&blob, 3 * MIB + 1..20 * MIB).await.unwrap();
    assert_eq!(judged(&blob).await, Trust::Verified);
    drop((blob, store));
    let store = open(dir.path());
    assert_eq!(store.blob(id(&data), &layout).unwrap().stats().trust, Trust::Verified);
}

#[tokio::test]
async fn a_store_that_is_dropped_records_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(2 * MIB, 2);
    {
        let store = open(dir.path());
        let (blob, _) = blob_of(&store, &data);
        read(&blob, 0..MIB).await.unwrap();
    }
    let store = open(dir.path());
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    assert!(source.take_requests().is_empty());
}

#[tokio::test]
async fn a_blob_that_is_closed_and_opened_again_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(2 * MIB, 3);
    let (blob, _) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    drop(blob);
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    drop(blob);
    store.checkpoint().unwrap();
    let (blob, second) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    assert!(source.take_requests().is_empty() && second.take_requests().is_empty());
}

#[tokio::test]
async fn a_torn_or_foreign_record_means_nothing_is_cached() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(2 * MIB, 4);
    for damage in [
        |state: &Path| fs::write(state, b"").unwrap(),
        |state: &Path| fs::write(state, [0xa5; 500]).unwrap(),
        |state: &Path| {
            let mut bytes = fs::read(state).unwrap();
            bytes.truncate(bytes.len() - 1);
            fs::write(state, bytes).unwrap();
        },
        |state: &Path| {
            let mut bytes = fs::read(state).unwrap();
            *bytes.last_mut().unwrap() ^= 2;
            fs::write(state, bytes).unwrap();
        },
    ] {
        {
            let store = open(dir.path());
            let (blob, _) = blob_of(&store, &data);
            read(&blob, 0..MIB).await.unwrap();
        }
        damage(&find(dir.path(), "state"));
        let store = open(dir.path());
        let (blob, source) = blob_of(&store, &data);
        assert_eq!(blob.stats().cached, 0);
        assert_eq!(*read(&blob, 0..2 * MIB).await.unwrap(), data[..]);
        assert_eq!(source.take_requests(), vec![0..2 * MIB]);
    }
}

#[tokio::test]
async fn a_segment_that_is_gone_or_cut_is_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(3 * MIB, 5);
    let layout = Layout::new(3 * MIB, [MIB, 2 * MIB]).unwrap();
    {
        let store = open(dir.path());
        let blob = store.blob(id(&data), &layout).unwrap();
        blob.add_source(TestSource::new("test", data.clone()));
        for at in 0..3 {
            read(&blob, at * MIB..(at + 1) * MIB).await.unwrap();
        }
        assert_eq!(judged(&blob).await, Trust::Verified);
    }
    fs::remove_file(find(dir.path(), "segment-0")).unwrap();
    let cut = fs::OpenOptions::new().write(true).open(find(dir.path(), "segment-2")).unwrap();
    cut.set_len(100).unwrap();
    let store = open(dir.path());
    let blob = store.blob(id(&data), &layout).unwrap();
    assert_eq!(blob.stats().cached, MIB);
    blob.add_source(TestSource::new("test", data.clone()));
    for at in 0..3 {
        let slice = read(&blob, at * MIB..(at + 1) * MIB).await.unwrap();
        assert_eq!(*slice, data[(at * MIB) as usize..((at + 1) * MIB) as usize]);
    }
    assert_eq!(judged(&blob).await, Trust::Verified);
}

#[tokio::test]
async fn a_damaged_layout_is_written_anew_and_the_record_stays_good() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(MIB, 6);
    {
        let store = open(dir.path());
        let (blob, _) = blob_of(&store, &data);
        read(&blob, 0..MIB).await.unwrap();
    }
    fs::write(find(dir.path(), "layout"), b"noise").unwrap();
    let store = open(dir.path());
    assert_eq!(store.layout(id(&data)), None);
    let (blob, source) = blob_of(&store, &data);
    read(&blob, 0..MIB).await.unwrap();
    assert!(source.take_requests().is_empty());
    assert_eq!(store.layout(id(&data)), Some(Layout::whole(MIB)));
}

#[tokio::test]
async fn a_directory_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("state");
    let store = open(&root);
    match Store::open(&root, options()) {
        Err(OpenError::Owned { pid, .. }) => assert_eq!(pid, std::process::id()),
        other => panic!("{other:?}"),
    }
    let (blob, source) = blob_of(&store, &noise(2 * MIB, 7));
    read(&blob, 0..MIB).await.unwrap();
    drop(store);
    // A blob that outlives its store serves what it has, and changes nothing any more.
    let _second = open(&root);
    assert!(matches!(blob.read(0..MIB).unwrap(), Read::Ready(_)));
    source.take_requests();
    assert!(read(&blob, MIB..2 * MIB).await.unwrap_err().to_string().contains("closed"));
    assert!(source.take_requests().is_empty());
}

#[tokio::test]
async fn the_state_directory_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/b");
    let _store = open(&root);
    assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
}
