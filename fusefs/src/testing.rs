//! What several modules' tests need.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, stream};
use tempfile::TempDir;
use weightfs_store::{
    Amount, Background, Blob, BlobId, ByteStream, CacheOptions, Digest, FetchOptions, Form,
    KeepDigests, Layout, Piece, Recheck, Source, SourceError, Store, StoreOptions, Urgency, Verify,
};

use crate::artifact::{Compression, LayerContent, LayerDescriptor};
use crate::layer::OpenLayer;
use crate::listing::{Entry, Listing};

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Anything but the whole.
    NoRanges,
    Refuse,
    NotFound,
    CutAfter(usize),
    Hang,
    HangAfter(usize),
}

/// A source that has a blob in memory, counts requests and fails on command.
#[derive(Debug)]
pub struct MemorySource {
    bytes: Bytes,
    requests: Mutex<Vec<Range<u64>>>,
    next: Mutex<VecDeque<Fault>>,
    always: Mutex<Option<Fault>>,
}

impl MemorySource {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        let (requests, next, always) = Default::default();
        Arc::new(Self { bytes: bytes.into(), requests, next, always })
    }

    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn requests(&self) -> Vec<Range<u64>> {
        self.requests.lock().unwrap().clone()
    }

    pub fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.next.lock().unwrap().extend(faults);
    }

    pub fn fail_always(&self, fault: Fault) {
        *self.always.lock().unwrap() = Some(fault);
    }

    fn answer(&self, range: Range<u64>) -> Result<ByteStream, SourceError> {
        self.requests.lock().unwrap().push(range.clone());
        let fault = self.next.lock().unwrap().pop_front().or(*self.always.lock().unwrap());
        let bytes = self.bytes.slice(range.start as usize..range.end as usize);
        let refused =
            || SourceError::Unreachable { source_name: "memory".into(), message: "refused".into() };
        let some = |length| stream::iter([Ok(Piece::of_registry(bytes.slice(..length)))]);
        match fault {
            Some(Fault::NoRanges) if range != (0..self.size()) => {
                Err(SourceError::NoRanges { source_name: "memory".into(), what: "blob".into() })
            }
            None | Some(Fault::NoRanges) => {
                let pieces: Vec<_> =
                    bytes.chunks(100_000).map(|part| bytes.slice_ref(part)).collect();
                Ok(stream::iter(pieces.into_iter().map(|bytes| Ok(Piece::of_registry(bytes))))
                    .boxed())
            }
            Some(Fault::Refuse) => Err(refused()),
            Some(Fault::NotFound) => {
                Err(SourceError::NotFound { source_name: "memory".into(), what: "blob".into() })
            }
            Some(Fault::CutAfter(length)) => {
                Ok(some(length).chain(stream::iter([Err(refused())])).boxed())
            }
            Some(Fault::HangAfter(length)) => Ok(some(length).chain(stream::pending()).boxed()),
            Some(Fault::Hang) => Ok(stream::pending().boxed()),
        }
    }
}

impl Source for MemorySource {
    fn name(&self) -> &str {
        "memory"
    }

    fn host(&self) -> &str {
        "memory"
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        async move { self.answer(range) }.boxed()
    }
}

/// A store in a directory that goes away with the first value. To be called in a runtime.
pub fn store() -> (TempDir, Arc<Store>) {
    let root = tempfile::tempdir().unwrap();
    let store = open_store(&root);
    (root, store)
}

pub fn open_store(root: &TempDir) -> Arc<Store> {
    let fetch = FetchOptions {
        deadline: Duration::from_secs(10),
        connections: 2,
        connections_per_host: 8,
        request_bytes: 4 << 20,
        read_ahead_min: 1 << 20,
        read_ahead_max: 4 << 20,
        background: Background::Off,
        prefetch: true,
    };
    let cache = CacheOptions { limit: None, min_free: Amount::Bytes(0) };
    let checkpoint_interval = Duration::from_secs(5);
    let (verify, recheck) = (Verify::Background, Recheck::AfterCrash);
    let keep_digests = KeepDigests::WhereLimited;
    let options = StoreOptions { fetch, cache, checkpoint_interval, verify, recheck, keep_digests };
    Store::open(root.path(), options).unwrap()
}

/// An empty blob, for trees whose files nobody reads.
pub fn blob() -> Arc<Blob> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let (_root, store) = store();
    let id = BlobId { digest: Digest::of(b""), form: Form::AsStored };
    store.blob(id, &Layout::whole(0)).unwrap()
}

/// A layer that was listed, without any of its bytes.
pub fn listed(
    blob: &Arc<Blob>,
    digest: Digest,
    content: LayerContent,
    entries: Vec<Entry>,
) -> Arc<OpenLayer> {
    let size = 1 << 30;
    let descriptor = LayerDescriptor {
        digest,
        size,
        media_type: "test".to_owned(),
        compression: Compression::None,
        content,
    };
    let listing = Listing::new(entries, size).unwrap();
    Arc::new(OpenLayer { descriptor, blob: Arc::clone(blob), listing })
}
