//! Layers of every kind, opened from a source in memory into a real store.

use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;

use flate2::write::GzEncoder;
use tar::Builder;
use tempfile::TempDir;
use weightfs_store::Read;

use super::*;
use crate::archive::tests::add_file;
use crate::artifact::{RawFile, RawKind};
use crate::listing::EntryKind;
use crate::testing::{Fault, MemorySource, open_store, store};
use crate::tree::Timestamp;

const DEADLINE: Duration = Duration::from_secs(10);

fn descriptor(blob: &[u8], compression: Compression, content: LayerContent) -> LayerDescriptor {
    let (digest, size) = (Digest::of(blob), blob.len() as u64);
    LayerDescriptor { digest, size, media_type: "test".to_owned(), compression, content }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

/// A small file, two large ones and a small one.
fn sample() -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let files = [("a", 10), ("b/large", 3 << 20), ("b/larger", (1 << 20) + 1), ("z", 5000)];
    let files = files.map(|(path, length)| (path.to_owned(), pattern(length)));
    let mut tar = Builder::new(Vec::new());
    for (path, content) in &files {
        add_file(&mut tar, path, content);
    }
    (tar.into_inner().unwrap(), files.into())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Opened in a task of its own, as the daemon does it.
async fn open(
    store: &Arc<Store>,
    source: &Arc<MemorySource>,
    layer: &LayerDescriptor,
) -> Result<Arc<OpenLayer>, LayerError> {
    let (store, source, layer) = (Arc::clone(store), Arc::clone(source), layer.clone());
    let work = async move { open_layer(&store, source, &layer, DEADLINE, &Quiet).await };
    tokio::spawn(work).await.unwrap()
}

async fn read(layer: &OpenLayer, range: std::ops::Range<u64>) -> Vec<u8> {
    match layer.blob.read(range).unwrap() {
        Read::Ready(slice) => slice.to_vec(),
        Read::Missing(miss) => miss.wait().await.unwrap().to_vec(),
    }
}

async fn assert_files(layer: &OpenLayer, files: &[(String, Vec<u8>)]) {
    assert_eq!(layer.listing.entries().len(), files.len());
    for (entry, (path, content)) in layer.listing.entries().iter().zip(files) {
        assert_eq!(entry.path, path.as_bytes());
        let EntryKind::File(range) = entry.kind.clone() else { panic!("{entry:?}") };
        assert!(read(layer, range).await == *content, "{path}");
    }
}

fn left_in(root: &TempDir, directory: &str) -> usize {
    fn files(path: &Path) -> usize {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 }).sum()
    }
    files(&root.path().join(directory))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_tar_is_listed_lazily_and_reopened_without_its_source() {
    let (root, store) = store();
    let (tar, files) = sample();
    let layer = descriptor(&tar, Compression::None, LayerContent::ImageTar);
    let source = MemorySource::new(tar);
    let opened = open(&store, &source, &layer).await.unwrap();
    assert_eq!(opened.blob.stats().cached, 0, "nothing but headers was fetched");
    assert_eq!(opened.listing.layout().segments(), 5);
    assert_files(&opened, &files).await;

    let requests = source.requests().len();
    drop(opened);
    let again = open(&store, &source, &layer).await.unwrap();
    assert_eq!(source.requests().len(), requests, "the listing was kept");
    drop((again, store));

    let store = open_store(&root);
    let reopened = reopen_layer(&store, vec![], &layer).unwrap().unwrap();
    assert_files(&reopened, &files).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_tars_are_inflated_once() {
    let (tar, files) = sample();
    let (first, second) = tar.split_at(1_000_000);
    let members = [gzip(first), gzip(second)].concat();
    let frames = [zstd::encode_all(first, 1).unwrap(), zstd::encode_all(second, 1).unwrap()];
    for (compression, blob) in [
        (Compression::Gzip, gzip(&tar)),
        (Compression::Gzip, members),
        (Compression::Zstd, zstd::encode_all(&tar[..], 3).unwrap()),
        (Compression::Zstd, frames.concat()),
    ] {
        let (root, store) = store();
        let layer = descriptor(&blob, compression, LayerContent::ImageTar);
        let source = MemorySource::new(blob);
        source.fail_next([Fault::Refuse, Fault::CutAfter(100)]);
        let opened = open(&store, &source, &layer).await.unwrap();
        assert_eq!(opened.blob.stats().cached, tar.len() as u64);
        assert_eq!(opened.blob.layout(), opened.listing.layout());
        assert_files(&opened, &files).await;
        drop((opened, store));

        let store = open_store(&root);
        let reopened = reopen_layer(&store, vec![], &layer).unwrap().unwrap();
        assert_files(&reopened, &files).await;
        assert_eq!(left_in(&root, "ingest"), 0);
    }
}

#[derive(Default)]
struct Told(Mutex<Vec<u64>>);

impl Progress for Told {
    fn downloaded(&self, _layer: &LayerDescriptor, bytes: u64) {
        self.0.lock().unwrap().push(bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_in_several_ranges_tells_its_progress() {
    let (_root, store) = store();
    let mut tar = Builder::new(Vec::new());
    add_file(&mut tar, "f", &pattern(20 << 20));
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::none());
    encoder.write_all(&tar.into_inner().unwrap()).unwrap();
    let blob = encoder.finish().unwrap();
    let layer = descriptor(&blob, Compression::Gzip, LayerContent::ImageTar);
    let told = Told::default();
    let source = MemorySource::new(blob);
    let opened = open_layer(&store, source, &layer, DEADLINE, &told).await.unwrap();
    assert_eq!(*told.0.lock().unwrap(), [8 << 20, 16 << 20, layer.size]);
    assert_files(&opened, &[("f".to_owned(), pattern(20 << 20))]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_inflated_leaves_nothing_behind() {
    let (tar, _) = sample();
    let good = gzip(&tar);
    let mut flipped = good.clone();
    flipped[5000] ^= 1;
    let cut_gzip = good[..good.len() / 2].to_vec();
    let cut_tar = gzip(&tar[..2 << 20]);
    let of = |blob: &[u8]| descriptor(blob, Compression::Gzip, LayerContent::ImageTar);
    for (blob, layer) in [
        (&flipped, LayerDescriptor { digest: Digest::of(&good), ..of(&flipped) }),
        (&flipped, of(&flipped)),
        (&cut_gzip, of(&cut_gzip)),
        (&cut_tar, of(&cut_tar)),
    ] {
        let (root, store) = store();
        let error = open(&store, &MemorySource::new(blob.clone()), &layer).await.unwrap_err();
        let wrong_digest = layer.digest != Digest::of(blob);
        assert_eq!(matches!(error, LayerError::Digest { .. }), wrong_digest, "{error}");
        assert!(error.to_string().contains(&layer.digest.to_string()), "{error}");
        assert!(reopen_layer(&store, vec![], &layer).unwrap().is_none());
        assert_eq!((left_in(&root, "ingest"), left_in(&root, "blobs")), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_for_good_ends_the_download() {
    let (root, store) = store();
    let blob = gzip(&sample().0);
    let layer = descriptor(&blob, Compression::Gzip, LayerContent::ImageTar);
    let source = MemorySource::new(blob);
    source.fail_always(Fault::NotFound);
    let error = open(&store, &source, &layer).await.unwrap_err();
    assert!(matches!(error, LayerError::Source { .. }), "{error}");
    assert_eq!((left_in(&root, "ingest"), left_in(&root, "blobs")), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_layer_needs_no_network() {
    let (_root, store) = store();
    let bytes = pattern(2 << 20);
    let file = RawFile {
        path: "w.bin".into(),
        kind: RawKind::File,
        permissions: 0o644,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        created: Timestamp::default(),
    };
    let layer = descriptor(&bytes, Compression::None, LayerContent::Raw(file));
    let source = MemorySource::new(bytes.clone());
    let opened = open(&store, &source, &layer).await.unwrap();
    assert!(source.requests().is_empty());
    assert_eq!(opened.listing.layout().segments(), 1);
    assert!(read(&opened, 0..layer.size).await == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_listing_is_made_anew() {
    let (_root, store) = store();
    let (tar, files) = sample();
    let layer = descriptor(&tar, Compression::None, LayerContent::ImageTar);
    store.attach(blob_id(&layer), LISTING, b"{}").unwrap();
    assert!(reopen_layer(&store, vec![], &layer).unwrap().is_none());
    let opened = open(&store, &MemorySource::new(tar), &layer).await.unwrap();
    assert_files(&opened, &files).await;
}
