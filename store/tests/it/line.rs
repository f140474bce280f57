//! A host at the far end of a line: each answer takes its time, and all share a rate.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::time::{Instant, sleep, sleep_until};
use weightfs_store::{ByteStream, Piece, Source, SourceError, Urgency};

use super::source::status;

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
    /// Answers that it gives at the same time; more are refused with 429.
    bears: AtomicUsize,
    refused: AtomicUsize,
}

impl Line {
    pub fn new(latency: Duration, bytes_per_second: f64) -> Arc<Self> {
        Arc::new(Self {
            latency,
            bytes_per_second,
            free_at: Mutex::default(),
            open: AtomicUsize::new(0),
            most_open: AtomicUsize::new(0),
            bears: AtomicUsize::new(usize::MAX),
            refused: AtomicUsize::new(0),
        })
    }

    /// From now on more than `most` requests at the same time are refused, with a second's wait.
    pub fn bear(&self, most: usize) {
        self.bears.store(most, Ordering::SeqCst);
    }

    /// Requests that were refused since the last call.
    pub fn take_refused(&self) -> usize {
        self.refused.swap(0, Ordering::SeqCst)
    }

    /// Forgets how many answers were open.
    pub fn forget_most_open(&self) {
        self.most_open.store(0, Ordering::SeqCst);
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

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];
        let open = Open::new(&self.0);
        Box::pin(async move {
            if self.0.open.load(Ordering::SeqCst) > self.0.bears.load(Ordering::SeqCst) {
                self.0.refused.fetch_add(1, Ordering::SeqCst);
                return Err(status(429, Some(1)));
            }
            sleep(self.0.latency).await;
            let left = (range.end - range.start) as usize;
            let pieces = stream::unfold((left, open), async |(left, open)| {
                let len = left.min(PIECE_BYTES);
                if len == 0 {
                    return None;
                }
                open.0.carry(len).await;
                let piece = Piece::of_registry(Bytes::from_static(&ZEROS[..len]));
                Some((Ok(piece), (left - len, open)))
            });
            Ok(pieces.boxed())
        })
    }
}
