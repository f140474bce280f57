//! What fetching takes of memory, counted byte by byte: nothing else runs in this process.

use std::alloc::{GlobalAlloc, Layout as Size, System};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream;
use tokio::time::sleep;
use weightfs_store::{
    Amount, Background, Blob, BlobId, ByteStream, CacheOptions, Digest, FetchOptions, Form,
    KeepDigests, Layout, Piece, Read, Recheck, Source, SourceError, Store, StoreOptions, Urgency,
    Verify,
};

const MIB: u64 = 1 << 20;

/// Readers, each of a file of its own.
const READERS: u64 = 64;

/// The system's allocator, with a count of what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is done by the system's allocator; the counts are beside it.
#[expect(unsafe_code, reason = "allocators are unsafe traits")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, size: Size) -> *mut u8 {
        let now = NOW.fetch_add(size.size(), Ordering::Relaxed) + size.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, size: Size) {
        NOW.fetch_sub(size.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A blob of zeros that comes in pieces as an HTTP client has them: small, and on the heap.
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
            sleep(Duration::from_millis(100)).await;
            let pieces = stream::unfold(range.end - range.start, async |left| {
                sleep(Duration::from_millis(1)).await;
                let piece = left.min(50_001);
                let bytes = Bytes::from(vec![0; piece as usize]);
                (piece > 0).then(|| (Ok(Piece::of_registry(bytes)), left - piece))
            });
            Ok(pieces.boxed())
        })
    }
}

fn options() -> StoreOptions {
    StoreOptions {
        fetch: FetchOptions {
            deadline: Duration::from_secs(60),
            connections: 32,
            connections_per_host: 64,
            request_bytes: 16 * MIB,
            read_ahead_min: 8 * MIB,
            read_ahead_max: 256 * MIB,
            background: Background::TouchedFiles,
            prefetch: true,
        },
        cache: CacheOptions { limit: None, min_free: Amount::Bytes(0) },
        checkpoint_interval: Duration::from_secs(5),
        verify: Verify::Background,
        recheck: Recheck::AfterCrash,
        keep_digests: KeepDigests::WhereLimited,
    }
}

async fn read_through(blob: Arc<Blob>) {
    let size = blob.layout().size();
    for at in (0..size).step_by(MIB as usize) {
        let range = at..size.min(at + MIB);
        let slice = match blob.read(range.clone()).unwrap() {
            Read::Ready(slice) => slice,
            Read::Missing(miss) => miss.wait().await.unwrap(),
        };
        assert_eq!(slice.len() as u64, range.end - range.start);
    }
}

#[tokio::test(start_paused = true)]
async fn sixty_four_readers_of_cold_files_take_a_bounded_amount_of_memory() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), options()).unwrap();
    let blob = |number: u64| {
        // Of different sizes, and so with different digests, which are true.
        let size = (4 + number % 4) * MIB + number * 4096;
        let digest = Digest::of(&vec![0; size as usize]);
        let id = BlobId { digest, form: Form::AsStored };
        let blob = store.blob(id, &Layout::whole(size)).unwrap();
        blob.add_source(Arc::new(Zeros));
        blob
    };
    let blobs: Vec<_> = (0..READERS).map(blob).collect();
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let readers: Vec<_> = blobs.into_iter().map(|blob| tokio::spawn(read_through(blob))).collect();
    for reader in readers {
        reader.await.unwrap();
    }
    let most = (MOST.load(Ordering::Relaxed) - before) as f64 / MIB as f64;
    // A block of 256 KiB and a piece for each of 64 requests, and the state of readers and files.
    assert!((4.0..24.0).contains(&most), "{most:.1} MiB at once");
}
