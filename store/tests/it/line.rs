//! A host at the far end of a line: each answer takes its time, and all share a rate.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::time::{Instant, sleep, sleep_until};
use weightfs_store::{ByteStream, Source, SourceError};

/// Bytes of a piece.
const PIECE_BYTES: usize = 256 << 10;

/// A line; the sources on it are one host.
#[derive(Debug)]
pub struct Line {
    latency: Duration,
    bytes_per_second: f64,
    /// When all that was sent so far has arrived.
    free_at: Mutex<Option<Instant>>,
    open: AtomicUsize,
    most_open: AtomicUsize,
}

impl Line {
    pub fn new(latency: Duration, bytes_per_second: f64) -> Arc<Self> {
        Arc::new(Self {
            latency,
            bytes_per_second,
            free_at: Mutex::default(),
            open: AtomicUsize::new(0),
            most_open: AtomicUsize::new(0),
        })
    }

    /// Answers that were open at the same time, at the most.
    pub fn most_open(&self) -> usize {
        self.most_open.load(Ordering::SeqCst)
    }

    async fn carry(&self, bytes: usize) {
        let arrives = {
            let mut free_at = self.free_at.lock().unwrap();
            let now = Instant::now();
            let start = free_at.map_or(now, |at| at.max(now));
            let end = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
            *free_at.insert(end)
        };
        sleep_until(arrives).await;
    }
}

/// Counts an answer as open while it is there.
struct Open(Arc<Line>);

impl Open {
    fn new(line: &Arc<Line>) -> Self {
        let now = line.open.fetch_add(1, Ordering::SeqCst) + 1;
        line.most_open.fetch_max(now, Ordering::SeqCst);
        Self(Arc::clone(line))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A blob of zeros behind a line.
#[derive(Debug)]
pub struct FarSource(pub Arc<Line>);

impl Source for FarSource {
    fn name(&self) -> &str {
        "far/blob"
    }

    fn host(&self) -> &str {
        "far"
    }

    fn fetch(&self, range: Range<u64>) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];
        let open = Open::new(&self.0);
        Box::pin(async move {
            sleep(self.0.latency).await;
            let left = (range.end - range.start) as usize;
            let pieces = stream::unfold((left, open), async |(left, open)| {
                let len = left.min(PIECE_BYTES);
                if len == 0 {
                    return None;
                }
                open.0.carry(len).await;
                Some((Ok(Bytes::from_static(&ZEROS[..len])), (left - len, open)))
            });
            Ok(pieces.boxed())
        })
    }
}
