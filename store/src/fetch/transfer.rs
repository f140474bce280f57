//! The run of one request: sources in turn, retries, deadlines. What is slow is asked for twice:
//! see [`super::race`].
//!
//! A body that ends early, a server that is busy or away: tried again from the first chunk that
//! is still missing, with growing, jittered pauses, while the request's patience lasts. A chunk
//! that is not what its digest promises: asked for from the next source, of each source twice;
//! then whoever waits for it fails, and the request goes on behind it.
//!
//! Its extents are held all the while: what it finds published stays so.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::time::{Instant, timeout_at};
use tracing::{Instrument as _, debug_span};

use super::filler::Filler;
use super::queue::Request;
use super::race::Race;
use super::room::{self, Gatherer, Room};
use super::{Attempts, Failure, Outcome, Patience, Running, whole};
use crate::chunk::{ChunkNo, Unfit};
use crate::shared::jittered;
use crate::source::{Piece, Source};
use crate::{Blob, Digest, SourceError};

/// A source that gives no byte for this long is asked again on another connection.
const MAX_IDLE: Duration = Duration::from_secs(10);

/// Shares of the deadline that a silent source may use up before it is asked again.
const TRIES_PER_DEADLINE: u32 = 3;

/// Pauses between tries: short enough that a registry's restart is hardly noticed, long enough
/// that thousands of nodes don't keep it down.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often each source is asked for a chunk of which it gave something else. The second time
/// mends what went wrong on the way.
const TRIES_OF_WRONG: usize = 2;

/// Runs a request to its end.
pub(super) async fn run(mut running: Running) {
    let Running { blob, request, bytes, attempts, .. } = &mut running;
    running.outcome = fill(blob, request, blob.sources(), bytes, attempts).await;
}

/// How often a request finds the disk full before it gives up on it. The first time the evictor
/// gets its chance.
const MAX_DISK_FULL: u32 = 2;

/// Fetches a request's chunks from these sources; counts what comes.
pub(super) async fn fill(
    blob: &Arc<Blob>,
    request: &Request,
    sources: Vec<Arc<dyn Source>>,
    bytes: &mut u64,
    attempts: &mut Attempts,
) -> Outcome {
    let patience = &*request.patience;
    let extents = blob.table().extents_of(&(request.start()..request.end()));
    let Some(_hold) = blob.hold(&extents, patience.until()).await else {
        return Err(Failure::Expired { cause: "evicting takes long".into() });
    };
    let mut from = request.start();
    let mut disk_full = 0;
    let mut sources = Sources::new(sources);
    let mut pauses = pauses();
    let mut refused = Refused::default();
    // Asked again each time: the request may have become shorter.
    while let Some(first) = blob.presence().first_absent(&(from..request.end())) {
        if blob.is_kept(first) {
            check(blob, first).await.map_err(Failure::cache)?;
            continue;
        }
        let Some(source) = sources.current() else { return Err(sources.into_failure()) };
        let room = room::find(blob, request, first, disk_full < MAX_DISK_FULL).await;
        let room = room.ok_or_else(|| Failure::Expired { cause: "no room in memory".into() })?;
        let loose = match room {
            Room::Disk(_) => None,
            Room::Memory(chunk, _) => Some(chunk),
            Room::Nowhere => return Err(Failure::NoRoom),
        };
        attempts.ask();
        let error = match attempt(blob, &*source, request, first, room, bytes, attempts).await {
            Ok(()) => {
                from = loose.map_or(from, ChunkNo::next);
                continue;
            }
            Err(Trouble::Cache(error)) if is_full(&error) => {
                tracing::debug!(blob = %blob.id().digest, %error, "the disk is full");
                blob.budget().disk_is_full();
                disk_full += 1;
                continue;
            }
            Err(Trouble::Cache(error)) => return Err(Failure::cache(error)),
            Err(Trouble::Wrong(chunk, actual)) => {
                let error = wrong(blob, chunk, actual, &*source);
                patience.failed(&error);
                if refused.is_final(chunk, sources.count()) {
                    let failure = Failure::Final(error);
                    blob.fetcher().give_up(chunk, &failure);
                    refused.last = Some(failure);
                    from = chunk.next();
                } else {
                    blob.counters().retries.increment();
                }
                sources.turn();
                continue;
            }
            Err(Trouble::Source(SourceError::NoRanges { .. })) => {
                whole::follow(blob, &source, first, patience).await?;
                continue;
            }
            Err(Trouble::Source(error)) => error,
        };
        tracing::debug!(blob = %blob.id().digest, %error, "fetch failed");
        patience.failed(&error);
        if blob.presence().has(first) {
            pauses = self::pauses();
        }
        if error.is_complaint() {
            blob.counters().complaints.increment();
            blob.scheduler().refused(source.host());
        }
        if let Some(wait) = sources.after(error, &mut pauses) {
            pause(wait, patience).await?;
        }
        if !sources.is_empty() {
            blob.counters().retries.increment();
        }
    }
    refused.last.map_or(Ok(()), Err)
}

/// Compares what the cache file has of a chunk, where it does not hold up the runtime.
async fn check(blob: &Arc<Blob>, chunk: ChunkNo) -> io::Result<()> {
    let own = Arc::clone(blob);
    let checked = tokio::task::spawn_blocking(move || own.check_marked(chunk)).await;
    checked.map_err(io::Error::other)?.map(drop)
}

/// A source gave something else than the chunk.
fn wrong(blob: &Blob, chunk: ChunkNo, actual: Digest, source: &dyn Source) -> SourceError {
    blob.rejected(chunk, actual, source.name());
    let bytes = blob.table().bytes_of(chunk).map_or(0..0, |(_, bytes)| bytes);
    source.gave_wrong(&bytes);
    SourceError::BadAnswer {
        source_name: source.name().to_owned(),
        what: format!("the chunk at byte {}", bytes.start),
        message: format!("it hashes to {actual}, which is not what the index has"),
    }
}

/// Chunks of a request of which sources gave something else.
#[derive(Default)]
struct Refused {
    /// The last one, and how often that was.
    chunk: Option<ChunkNo>,
    tries: usize,
    /// What was given up.
    last: Option<Failure>,
}

impl Refused {
    /// Whether no source is to be asked again for the chunk.
    fn is_final(&mut self, chunk: ChunkNo, sources: usize) -> bool {
        self.tries = if self.chunk == Some(chunk) { self.tries + 1 } else { 1 };
        self.chunk = Some(chunk);
        self.tries >= sources * TRIES_OF_WRONG
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

async fn pause(wait: Duration, patience: &Patience) -> Result<(), Failure> {
    // A server may ask for more time than can be told.
    match Instant::now().checked_add(wait) {
        Some(end) if end < patience.until() => tokio::time::sleep_until(end).await,
        _ => return Err(Failure::Expired { cause: patience.cause() }),
    }
    Ok(())
}

/// The sources of a blob, in turn, without those that refused for good.
struct Sources {
    left: Vec<Arc<dyn Source>>,
    at: usize,
    refusal: Option<SourceError>,
}

impl Sources {
    fn new(left: Vec<Arc<dyn Source>>) -> Self {
        Self { left, at: 0, refusal: None }
    }

    fn count(&self) -> usize {
        self.left.len()
    }

    fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// The next one has its turn.
    fn turn(&mut self) {
        self.at = if self.at + 1 < self.left.len() { self.at + 1 } else { 0 };
    }

    fn current(&self) -> Option<Arc<dyn Source>> {
        self.left.get(self.at).cloned()
    }

    /// Goes on to the next source; how long to wait before, which is only when each had its turn.
    fn after(&mut self, error: SourceError, pauses: &mut ExponentialBackoff) -> Option<Duration> {
        if error.may_be_mended() {
            self.at += 1;
        } else {
            self.left.remove(self.at);
            self.refusal = Some(error.clone());
        }
        if self.at < self.left.len() || self.left.is_empty() {
            return None;
        }
        self.at = 0;
        // More than what is asked for, or all who were refused would come back at once.
        let rest = jittered(error.asks_for_rest().unwrap_or_default());
        Some(rest.saturating_add(pauses.next().unwrap_or(LONGEST_PAUSE)))
    }

    /// Why no source is left.
    fn into_failure(self) -> Failure {
        self.refusal.map_or_else(
            || Failure::Expired { cause: "it has no source to fetch from".into() },
            Failure::Final,
        )
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Where an attempt's bytes go.
enum Sink<'a> {
    Disk(Filler<'a>),
    Memory(Gatherer),
}

impl<'a> Sink<'a> {
    fn open(blob: &Blob, request: &'a Request, first: ChunkNo, room: Room<'a>) -> io::Result<Self> {
        let nowhere = || io::Error::from(io::ErrorKind::StorageFull);
        match room {
            Room::Disk(room) => Filler::open(blob, request, first, room).map(Self::Disk),
            Room::Memory(chunk, berth) => {
                Gatherer::new(blob, chunk, berth).map(Self::Memory).ok_or_else(nowhere)
            }
            Room::Nowhere => Err(nowhere()),
        }
    }

    fn wanted(&self) -> Range<u64> {
        match self {
            Self::Disk(filler) => filler.wanted(),
            Self::Memory(gatherer) => gatherer.wanted(),
        }
    }

    fn is_done(&self) -> bool {
        match self {
            Self::Disk(filler) => filler.is_done(),
            Self::Memory(gatherer) => gatherer.missing() == 0,
        }
    }

    fn was_cut_short(&self) -> bool {
        match self {
            Self::Disk(filler) => filler.was_cut_short(),
            Self::Memory(_) => false,
        }
    }

    fn missing(&self) -> u64 {
        match self {
            Self::Disk(filler) => filler.missing(),
            Self::Memory(gatherer) => gatherer.missing(),
        }
    }

    fn take(&mut self, blob: &Arc<Blob>, piece: &[u8]) -> Result<(), Unfit> {
        match self {
            Self::Disk(filler) => filler.take(blob, piece),
            Self::Memory(gatherer) => {
                gatherer.take(piece);
                Ok(())
            }
        }
    }

    fn finish(self, blob: &Arc<Blob>) -> Result<(), Unfit> {
        match self {
            // Chunk by chunk, as they came.
            Self::Disk(_) => Ok(()),
            Self::Memory(gatherer) => gatherer.finish(blob),
        }
    }
}

enum Trouble {
    Source(SourceError),
    Cache(io::Error),
    /// The chunk is something else, which hashes to that.
    Wrong(ChunkNo, Digest),
}

impl From<Unfit> for Trouble {
    fn from(unfit: Unfit) -> Self {
        match unfit {
            Unfit::NotWhole => Self::Cache(io::Error::other("not a whole chunk")),
            Unfit::Wrong { chunk, actual } => Self::Wrong(chunk, actual),
            Unfit::Cache(error) => Self::Cache(error),
        }
    }
}

impl From<SourceError> for Trouble {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Cache(error)
    }
}

/// Asks one source once for the request's chunks from `first` on; counts what comes.
async fn attempt(
    blob: &Arc<Blob>,
    source: &dyn Source,
    request: &Request,
    first: ChunkNo,
    room: Room<'_>,
    bytes: &mut u64,
    attempts: &mut Attempts,
) -> Result<(), Trouble> {
    let sink = Sink::open(blob, request, first, room)?;
    let wanted = sink.wanted();
    let span = debug_span!(
        "range",
        blob = %blob.id().digest,
        source = source.name(),
        start = wanted.start,
        end = wanted.end
    );
    receive(blob, source, request, sink, bytes, attempts).instrument(span).await
}

/// Has a sink filled by a source.
async fn receive(
    blob: &Arc<Blob>,
    source: &dyn Source,
    request: &Request,
    mut sink: Sink<'_>,
    bytes: &mut u64,
    attempts: &mut Attempts,
) -> Result<(), Trouble> {
    let patience = &*request.patience;
    let silent = || SourceError::Unreachable {
        source_name: source.name().to_owned(),
        message: "gives no data".into(),
    };
    let mut race = Race::new(source, blob.scheduler(), sink.wanted(), request.priority);
    loop {
        let piece = timeout_at(next_byte_by(blob, patience), race.next()).await;
        for (from, bytes) in race.take_dropped() {
            blob.count_fetched(from, bytes);
        }
        match piece.map_err(|_| silent())? {
            // More than it was asked for; what follows is not ours.
            Some(_) if sink.is_done() => break,
            Some(piece) => {
                let Piece { bytes: piece, from } = piece?;
                if piece.is_empty() {
                    patience.extend(Instant::now() + blob.fetch_options().deadline);
                    continue;
                }
                if let Some(wait) = attempts.answer() {
                    blob.counters().first_byte.observe_time(wait);
                }
                blob.count_fetched(from, piece.len() as u64);
                *bytes += piece.len() as u64;
                sink.take(blob, &piece)?;
                if sink.was_cut_short() {
                    break;
                }
            }
            None if sink.is_done() => break,
            None => {
                let message = format!("the body ended {} bytes early", sink.missing());
                let source_name = source.name().to_owned();
                return Err(SourceError::Unreachable { source_name, message }.into());
            }
        }
    }
    Ok(sink.finish(blob)?)
}

/// When a source that gives nothing is given up.
fn next_byte_by(blob: &Blob, patience: &Patience) -> Instant {
    let idle = (blob.fetch_options().deadline / TRIES_PER_DEADLINE).min(MAX_IDLE);
    patience.until().min(Instant::now() + idle)
}
