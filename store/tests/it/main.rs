//! The store against sources that fail on command, and the registry client against a small HTTP
//! server.

mod blobs;
mod digests;
mod disk;
mod eviction;
mod faults;
mod hedging;
mod ingest;
mod kill;
mod line;
mod model;
mod outages;
mod quirks;
mod registry;
mod restart;
mod scheduling;
mod server;
mod source;
mod usage;
mod verify;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use weightfs_store::{
    Amount, Background, Blob, BlobId, CacheOptions, Digest, FetchOptions, Form, KeepDigests,
    Layout, Read, ReadError, Recheck, Slice, Store, StoreOptions, Trust, Verify,
};

use source::TestSource;

const MIB: u64 = 1 << 20;

/// Bytes that look like nothing in particular; the same for the same length and seed.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = vec![0; len as usize];
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&next().to_le_bytes()[..piece.len()]);
    }
    bytes
}

fn id(bytes: &[u8]) -> BlobId {
    BlobId { digest: Digest::of(bytes), form: Form::AsStored }
}

fn options() -> StoreOptions {
    StoreOptions {
        fetch: FetchOptions {
            deadline: Duration::from_secs(30),
            connections: 4,
            connections_per_host: 64,
            request_bytes: 4 * MIB,
            read_ahead_min: 0,
            read_ahead_max: 0,
            background: Background::Off,
            prefetch: true,
        },
        cache: CacheOptions { limit: None, min_free: Amount::Bytes(0) },
        checkpoint_interval: Duration::from_secs(5),
        verify: Verify::Background,
        recheck: Recheck::AfterCrash,
        keep_digests: KeepDigests::WhereLimited,
    }
}

fn open(root: &Path) -> Arc<Store> {
    Store::open(root, options()).unwrap()
}

/// With a limit that is never reached: what is hashed as a whole has chunk digests from then on.
fn keeping_digests() -> StoreOptions {
    let mut options = options();
    options.cache.limit = Some(Amount::Bytes(1 << 30));
    options
}

/// See [`keeping_digests`].
fn open_keeping_digests(root: &Path) -> Arc<Store> {
    Store::open(root, keeping_digests()).unwrap()
}

/// A blob of `data` in one segment whose source is a new [`TestSource`].
fn blob_of(store: &Arc<Store>, data: &[u8]) -> (Arc<Blob>, Arc<TestSource>) {
    let blob = store.blob(id(data), &Layout::whole(data.len() as u64)).unwrap();
    let source = TestSource::new("test", data.to_vec());
    blob.add_source(source.clone());
    (blob, source)
}

async fn read(blob: &Arc<Blob>, range: std::ops::Range<u64>) -> Result<Slice, ReadError> {
    match blob.read(range)? {
        Read::Ready(slice) => Ok(slice),
        Read::Missing(miss) => miss.wait().await,
    }
}

/// Waits until the blob is judged. Bounded only by the test's own time.
async fn judged(blob: &Blob) -> Trust {
    loop {
        match blob.stats().trust {
            Trust::Transport => tokio::task::yield_now().await,
            trust => return trust,
        }
    }
}
