//! Slow requests are sent a second time, within a budget. In virtual time.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::time::{Instant, sleep};
use weightfs_store::{Blob, ByteStream, Layout, Piece, Source, SourceError, Store, Urgency};

use super::source::status;
use super::{MIB, id, noise, open, read};

/// How a source answers one request.
#[derive(Debug, Clone)]
enum Answer {
    /// Its first byte comes after this time, the rest evenly over the other.
    After(Duration, Duration),
    /// So many bytes come at once, and then nothing.
    Stall(usize),
    Refuse,
    /// After this time.
    RefuseLate(Duration),
}

const USUAL: Answer = Answer::After(Duration::from_millis(100), Duration::from_millis(100));
const PIECES: usize = 10;

/// A source that answers as it is told: by the number of the request, from 0.
struct Scripted {
    data: Bytes,
    asked: AtomicUsize,
    requests: Mutex<Vec<Range<u64>>>,
    script: Box<dyn Fn(usize) -> Answer + Send + Sync>,
}

impl std::fmt::Debug for Scripted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scripted")
    }
}

impl Source for Scripted {
    fn name(&self) -> &str {
        "scripted"
    }

    fn host(&self) -> &str {
        "scripted"
    }

    fn fetch(
        &self,
        range: Range<u64>,
        _urgency: Urgency,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        let answer = (self.script)(self.asked.fetch_add(1, Ordering::SeqCst));
        self.requests.lock().unwrap().push(range.clone());
        let data = self.data.slice(range.start as usize..range.end as usize);
        Box::pin(async move {
            match answer {
                Answer::Refuse => Err(status(503, None)),
                Answer::RefuseLate(time) => {
                    sleep(time).await;
                    Err(status(500, None))
                }
                Answer::Stall(bytes) => {
                    let some =
                        stream::iter([Ok(Piece::of_registry(data.slice(..bytes.min(data.len()))))]);
                    Ok(some.chain(stream::pending()).boxed())
                }
                Answer::After(first, rest) => {
                    sleep(first).await;
                    let size = data.len().div_ceil(PIECES);
                    let pieces = stream::unfold(data, move |mut data| async move {
                        if data.is_empty() {
                            return None;
                        }
                        sleep(rest / PIECES as u32).await;
                        let piece = data.split_to(size.min(data.len()));
                        Some((Ok(Piece::of_registry(piece)), data))
                    });
                    Ok(pieces.boxed())
                }
            }
        })
    }
}

/// A blob of 200 chunks whose source answers so.
fn scripted(
    store: &Arc<Store>,
    script: impl Fn(usize) -> Answer + Send + Sync + 'static,
) -> (Arc<Blob>, Arc<Scripted>, Vec<u8>) {
    // Of a length that is no divisor of a chunk's: no two chunks are alike.
    let mut data = noise(MIB + 13, 1).repeat(200);
    data.truncate(200 << 20);
    // The blob never becomes whole: nobody hashes it.
    let blob = store.blob(id(b"scripted"), &Layout::whole(200 * MIB)).unwrap();
    let source = Arc::new(Scripted {
        data: data.clone().into(),
        asked: AtomicUsize::new(0),
        requests: Mutex::default(),
        script: Box::new(script),
    });
    blob.add_source(source.clone());
    (blob, source, data)
}

/// Reads chunks one after the other, of every other one; how long the slowest took.
async fn read_chunks(blob: &Arc<Blob>, data: &[u8], chunks: Range<u64>) -> Duration {
    let mut slowest = Duration::ZERO;
    for chunk in chunks {
        let (began, at) = (Instant::now(), 2 * chunk * MIB);
        let slice = read(blob, at..at + MIB).await.unwrap();
        assert!(*slice == data[at as usize..(at + MIB) as usize], "chunk {chunk}");
        slowest = slowest.max(began.elapsed());
    }
    slowest
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_is_sent_again_and_the_first_answer_wins() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let hours = Duration::from_secs(3600);
    let script = move |number| if number == 40 { Answer::After(hours, hours) } else { USUAL };
    let (blob, source, data) = scripted(&store, script);
    let slowest = read_chunks(&blob, &data, 0..60).await;
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let requests = source.requests.lock().unwrap();
    assert_eq!(requests.len(), 61);
    assert_eq!(requests[40], requests[41]);
    let counters = store.counters();
    assert_eq!((counters.hedges.get(), counters.hedges_won.get()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn of_a_body_that_stalls_only_the_rest_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let script = |number| if number == 40 { Answer::Stall(700_000) } else { USUAL };
    let (blob, source, data) = scripted(&store, script);
    let slowest = read_chunks(&blob, &data, 0..60).await;
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let requests = source.requests.lock().unwrap();
    assert_eq!(requests[41], requests[40].start + 700_000..requests[40].end);
    assert_eq!(requests.len(), 61);
}

#[tokio::test(start_paused = true)]
async fn when_the_first_answer_comes_after_all_the_second_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let late = Answer::After(Duration::from_millis(250), Duration::from_millis(100));
    let script = move |number| if number == 40 { late.clone() } else { USUAL };
    let (blob, source, data) = scripted(&store, script);
    let slowest = read_chunks(&blob, &data, 0..60).await;
    assert!(slowest <= Duration::from_millis(400), "{slowest:?}");
    assert_eq!(source.requests.lock().unwrap().len(), 61);
    assert_eq!(blob.stats().fetched, 60 * MIB, "no byte came twice");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_became_slow_is_asked_one_time_in_twenty_more_at_the_most() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let slow = Answer::After(Duration::from_secs(4), Duration::from_secs(1));
    let script = move |number| if number < 30 { USUAL } else { slow.clone() };
    let (blob, source, data) = scripted(&store, script);
    read_chunks(&blob, &data, 0..100).await;
    let asked = source.requests.lock().unwrap().len();
    assert!(asked <= 105, "{asked} requests for 100 chunks");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_complains_is_not_asked_twice() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let slow = Answer::After(Duration::from_secs(2), Duration::from_secs(1));
    let script = move |number| match number {
        40 => Answer::Refuse,
        41..50 => slow.clone(),
        _ => USUAL,
    };
    let (blob, source, data) = scripted(&store, script);
    read_chunks(&blob, &data, 0..49).await;
    assert_eq!(source.requests.lock().unwrap().len(), 50, "the refused one, and no other, twice");
}

#[tokio::test(start_paused = true)]
async fn when_the_second_fails_the_first_is_listened_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // The 41st has no answer in time; the one sent after it is refused; then the 41st comes.
    let late = Answer::After(Duration::from_millis(900), Duration::from_millis(100));
    let script = move |number| match number {
        40 => late.clone(),
        41 => Answer::Refuse,
        _ => USUAL,
    };
    let (blob, source, data) = scripted(&store, script);
    let slowest = read_chunks(&blob, &data, 0..60).await;
    assert!(slowest <= Duration::from_millis(1100), "{slowest:?}");
    assert_eq!(source.requests.lock().unwrap().len(), 61);
}

#[tokio::test(start_paused = true)]
async fn when_the_first_fails_the_second_is_listened_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let slow = Answer::After(Duration::from_millis(900), Duration::from_millis(100));
    let script = move |number| match number {
        40 => Answer::RefuseLate(Duration::from_millis(600)),
        41 => slow.clone(),
        _ => USUAL,
    };
    let (blob, source, data) = scripted(&store, script);
    let slowest = read_chunks(&blob, &data, 0..60).await;
    assert!(slowest <= Duration::from_millis(1300), "{slowest:?}");
    assert_eq!(source.requests.lock().unwrap().len(), 61, "no third request");
}
