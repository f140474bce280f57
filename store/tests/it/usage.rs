//! What the cache says that it holds, and taking something out of it on request.

use weightfs_store::{BlobUsage, Evicted, Form, Layout, Store, Trust};

use super::{MIB, blob_of, id, judged, noise, open, read};

fn of(store: &Store, id: weightfs_store::BlobId) -> BlobUsage {
    let usage = store.usage().unwrap();
    usage.blobs.into_iter().find(|blob| blob.id == id).unwrap()
}

#[tokio::test]
async fn usage_tells_what_is_here_whether_open_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    assert_eq!(store.usage().unwrap().blobs, []);
    let (partial, whole) = (noise(20 * MIB, 1), noise(3 * MIB, 3));
    let (first, _) = blob_of(&store, &partial);
    let (second, _) = blob_of(&store, &whole);
    read(&first, 0..MIB).await.unwrap();
    read(&second, 0..3 * MIB).await.unwrap();
    assert_eq!(judged(&second).await, Trust::Verified);
    let seen = of(&store, id(&partial));
    assert_eq!((seen.size, seen.cached, seen.in_use), (20 * MIB, MIB, true));
    assert!((MIB..2 * MIB).contains(&seen.disk), "what is on disk, not the length of the file");
    drop((first, second, store));
    let store = open(dir.path());
    let (first, second) = (of(&store, id(&partial)), of(&store, id(&whole)));
    assert_eq!((first.size, first.cached, first.trust), (20 * MIB, MIB, Trust::Transport));
    assert_eq!((second.cached, second.trust), (3 * MIB, Trust::Verified));
    assert!(!first.in_use && !first.pinned && first.last_used.is_some());
    assert_eq!(store.usage().unwrap().used, first.disk + second.disk);
}

#[tokio::test]
async fn what_is_not_open_is_evicted_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(2 * MIB, 3);
    let (blob, _) = blob_of(&store, &data);
    read(&blob, 0..2 * MIB).await.unwrap();
    judged(&blob).await;
    drop(blob);
    let Evicted::Whole { freed } = store.evict(id(&data)).unwrap() else { panic!("still open") };
    assert!(freed >= 2 * MIB);
    assert_eq!(store.evict(id(&data)).unwrap(), Evicted::Nothing);
    let (blob, source) = blob_of(&store, &data);
    assert_eq!(*read(&blob, 0..MIB).await.unwrap(), data[..MIB as usize]);
    assert_eq!(source.take_requests(), vec![0..MIB]);
}

#[tokio::test]
async fn pins_hold_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (kept, other, absent) = (noise(MIB, 5), noise(MIB, 7), noise(MIB, 9));
    {
        let store = open(dir.path());
        for data in [&kept, &other] {
            let (blob, _) = blob_of(&store, data);
            read(&blob, 0..MIB).await.unwrap();
        }
        store.pin(id(&kept)).unwrap();
        store.pin(id(&absent)).unwrap();
    }
    let store = open(dir.path());
    let mut decompressed = id(&absent);
    decompressed.form = Form::Decompressed;
    store.pin(decompressed).unwrap();
    assert_eq!(store.evict(id(&kept)).unwrap(), Evicted::Pinned);
    let pruned = store.prune().unwrap();
    assert_eq!(pruned.blobs, 1);
    assert!(pruned.freed >= MIB, "{pruned:?}");
    let pinned: Vec<_> = store.usage().unwrap().blobs;
    assert!(pinned.len() == 3 && pinned.iter().all(|blob| blob.pinned));
    assert_eq!(of(&store, id(&kept)).cached, MIB);
    store.unpin(id(&kept)).unwrap();
    store.unpin(id(&other)).unwrap();
    assert!(matches!(store.evict(id(&kept)).unwrap(), Evicted::Whole { .. }));
}

#[tokio::test]
async fn a_blob_without_a_byte_can_be_evicted_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(MIB, 7);
    drop(blob_of(&store, &data));
    assert_eq!(of(&store, id(&data)).cached, 0);
    assert_eq!(store.prune().unwrap().blobs, 1);
    assert!(store.blob(id(&data), &Layout::whole(MIB)).is_ok());
}
