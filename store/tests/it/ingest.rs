//! Blobs that are written in sequence, and documents kept beside blobs.

use std::fs;

use weightfs_store::{BlobId, Form, Layout, Trust};

use super::source::TestSource;
use super::{MIB, id, noise, open, read};

fn inflated(of: &[u8]) -> BlobId {
    BlobId { form: Form::Decompressed, ..id(of) }
}

#[tokio::test]
async fn an_ingested_blob_is_complete_verified_and_cut_where_it_was_told() {
    let dir = tempfile::tempdir().unwrap();
    let data = noise(5 * MIB, 1);
    let name = inflated(b"compressed");
    {
        let store = open(dir.path());
        let mut ingest = store.ingest(name).unwrap();
        ingest.cut().unwrap();
        ingest.write(&data[..1000]).unwrap();
        ingest.cut().unwrap();
        ingest.cut().unwrap();
        for piece in data[1000..].chunks(77_777) {
            ingest.write(piece).unwrap();
        }
        assert_eq!((ingest.position(), store.layout(name)), (5 * MIB, None));
        ingest.cut().unwrap();
        let blob = ingest.finish().unwrap();
        assert_eq!(blob.layout(), &Layout::new(5 * MIB, [1000]).unwrap());
        assert_eq!(blob.stats().trust, Trust::Verified);
    }
    let store = open(dir.path());
    let blob = store.blob(name, &store.layout(name).unwrap()).unwrap();
    assert_eq!(*read(&blob, 0..1000).await.unwrap(), data[..1000]);
    assert_eq!(*read(&blob, 1000..5 * MIB).await.unwrap(), data[1000..]);
    assert_eq!((blob.stats().trust, blob.stats().fetched), (Trust::Verified, 0));
}

#[tokio::test]
async fn an_unfinished_ingest_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut ingest = store.ingest(inflated(b"x")).unwrap();
    ingest.write(b"half").unwrap();
    drop(ingest);
    assert_eq!(fs::read_dir(dir.path().join("ingest")).unwrap().count(), 0);
    assert_eq!(store.layout(inflated(b"x")), None);
}

#[tokio::test]
async fn what_a_killed_process_left_is_removed_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let left = dir.path().join("ingest/0");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("segment-0"), b"half").unwrap();
    let _store = open(dir.path());
    assert!(!left.exists());
}

#[tokio::test]
async fn of_two_ingests_of_one_blob_the_second_gets_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let [mut one, mut two] = [(); 2].map(|()| store.ingest(inflated(b"x")).unwrap());
    one.write(b"bytes").unwrap();
    two.write(b"bytes").unwrap();
    let one = one.finish().unwrap();
    let two = two.finish().unwrap();
    assert!(std::sync::Arc::ptr_eq(&one, &two));
    drop((one, two));
    let mut three = store.ingest(inflated(b"x")).unwrap();
    three.write(b"bytes").unwrap();
    assert_eq!(*read(&three.finish().unwrap(), 0..5).await.unwrap(), b"bytes"[..]);
}

#[tokio::test]
async fn an_ingest_replaces_what_was_partly_fetched_and_keeps_its_documents() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let data = noise(2 * MIB, 2);
    let blob = store.blob(id(&data), &Layout::whole(2 * MIB)).unwrap();
    blob.add_source(TestSource::new("test", data.clone()));
    read(&blob, 0..1).await.unwrap();
    store.attach(id(&data), "listing", b"kept").unwrap();
    drop(blob);
    let mut ingest = store.ingest(id(&data)).unwrap();
    ingest.write(&data).unwrap();
    let blob = ingest.finish().unwrap();
    assert_eq!((blob.stats().cached, blob.stats().trust), (2 * MIB, Trust::Verified));
    assert_eq!(store.attachment(id(&data), "listing").unwrap(), b"kept");
}

#[tokio::test]
async fn an_empty_ingest_is_an_empty_blob() {
    let dir = tempfile::tempdir().unwrap();
    let blob = open(dir.path()).ingest(inflated(b"x")).unwrap().finish().unwrap();
    assert_eq!((blob.stats().size, blob.stats().trust), (0, Trust::Verified));
}

#[tokio::test]
async fn documents_are_replaced_whole_and_damage_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let name = id(b"x");
    assert_eq!(store.attachment(name, "listing.json"), None);
    for bytes in [&b"a longer one"[..], b"short", b""] {
        store.attach(name, "listing.json", bytes).unwrap();
        assert_eq!(store.attachment(name, "listing.json").unwrap(), bytes);
    }
    for bad in ["", "../state", "a/b", "a b", &"x".repeat(101)] {
        assert!(store.attach(name, bad, b"").is_err(), "{bad}");
        assert_eq!(store.attachment(name, bad), None);
    }
    assert_eq!(store.layout(name), None, "a document is no blob");
}
