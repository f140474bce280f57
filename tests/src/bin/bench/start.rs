//! How long a store takes to be ready that knows much: 100 blobs of 100 GB, a little of each here.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt as _, stream};
use tokio::runtime::Runtime;
use weightfs_store::{
    Amount, Background, Blob, BlobId, ByteStream, CHUNK_BYTES, CacheOptions, Digest, FetchOptions,
    Form, KeepDigests, Layout, Piece, Read, Recheck, Source, SourceError, Store, StoreOptions,
    Urgency, Verify,
};
use weightfs_tests::figures::Figures;

use crate::Bench;
use crate::lab::drop_caches;

const BLOBS: u64 = 100;
const BLOB_BYTES: u64 = 100_000_000_000;
/// Chunks of each blob that are here, far apart from each other.
const CHUNKS: u64 = 8;

pub(crate) fn measure(bench: &Bench, figures: &mut Figures) {
    let dir = bench.lab.mount_point();
    let runtime = Runtime::new().expect("a runtime");
    let _entered = runtime.enter();
    let store = open(dir.path());
    runtime.block_on(stream::iter(blobs(&store)).for_each_concurrent(8, fill));
    drop(store);
    drop_caches();
    let start = Instant::now();
    let store = open(dir.path());
    let blobs = blobs(&store);
    figures.add("store_start_ms", start.elapsed().as_secs_f64() * 1e3);
    let cached: u64 = blobs.iter().map(|blob| blob.stats().cached).sum();
    assert_eq!(cached, BLOBS * CHUNKS * CHUNK_BYTES, "all that was here is still known");
}

fn blobs(store: &Arc<Store>) -> Vec<Arc<Blob>> {
    let layout = Layout::whole(BLOB_BYTES);
    let id =
        |number: u64| BlobId { digest: Digest::of(&number.to_le_bytes()), form: Form::AsStored };
    (0..BLOBS).map(|number| store.blob(id(number), &layout).expect("a blob opens")).collect()
}

async fn fill(blob: Arc<Blob>) {
    blob.add_source(Arc::new(Zeros));
    for number in 0..CHUNKS {
        let at = BLOB_BYTES / CHUNKS * number;
        if let Read::Missing(miss) = blob.read(at..at + 1).expect("a read begins") {
            miss.wait().await.expect("zeros come");
        }
    }
}

fn open(dir: &Path) -> Arc<Store> {
    let fetch = FetchOptions {
        deadline: Duration::from_secs(30),
        connections: 16,
        connections_per_host: 16,
        request_bytes: CHUNK_BYTES,
        read_ahead_min: CHUNK_BYTES,
        read_ahead_max: CHUNK_BYTES,
        background: Background::Off,
        prefetch: false,
    };
    let options = StoreOptions {
        fetch,
        cache: CacheOptions { limit: None, min_free: Amount::Bytes(0) },
        checkpoint_interval: Duration::from_millis(250),
        verify: Verify::Background,
        recheck: Recheck::AfterCrash,
        keep_digests: KeepDigests::WhereLimited,
    };
    Store::open(dir, options).expect("the store opens")
}

/// A host of blobs of zeros.
#[derive(Debug)]
struct Zeros;

impl Source for Zeros {
    fn name(&self) -> &str {
        "zeros/blob"
    }

    fn host(&self) -> &str {
        "zeros"
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        Box::pin(async move {
            let chunk = Bytes::from(vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(0)]);
            let pieces = stream::unfold((range.end - range.start, chunk), async |(left, chunk)| {
                let piece = left.min(CHUNK_BYTES);
                let bytes = chunk.slice(..usize::try_from(piece).unwrap_or(0));
                (piece > 0).then(|| (Ok(Piece::of_registry(bytes)), (left - piece, chunk)))
            });
            Ok(pieces.boxed())
        })
    }
}
