//! Fetching: who waits for which chunk, what is asked for next, and by whom.
//!
//! Each absent chunk that somebody wants has one *flight*, which belongs to one *request*: a
//! ranged read of chunks in sequence, inside one segment. Requests wait in their blob's queue by
//! priority; the scheduler lets blobs send them in turn, a bounded number for each blob, each
//! host and in all. They run as tasks. A chunk is published and its waiters are woken as soon as
//! its last byte is written, not when the request ends.
//!
//! What is fetched without being asked for (profiles, background) is only *planned*: it has no
//! flights before there is room for it.
//!
//! Invariants: one flight for each chunk; a flight ends when its chunk is published or its
//! request ends, however that comes (the task's guard sees to it); failures are not remembered.
//! No lock is held across I/O or an await, and hits take none of these.

mod filler;
mod hedge;
mod line;
mod plan;
mod queue;
mod race;
mod room;
mod scheduler;
mod transfer;
mod whole;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::Instrument as _;
use weightfs_swarm::Scatter;

pub(crate) use self::line::Priority;
pub(crate) use self::scheduler::Scheduler;
pub use self::scheduler::Traffic;

use self::line::Times;
use self::queue::{Queue, Request};
use self::scheduler::Next;
use self::whole::Pass;
use crate::chunk::{ChunkNo, VerifiedChunk};
use crate::loose::LooseChunk;
use crate::read_ahead::Access;
use crate::shared::{Entered, lock};
use crate::{Blob, ReadError, SourceError};

/// Why a request ended without all of its bytes.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// Another try would not mend it.
    Final(SourceError),
    /// It might have passed, but the time is over.
    Expired {
        /// The last failure seen.
        cause: String,
    },
    /// The cache file could not be written.
    Cache(Arc<std::io::Error>),
    /// There is no room for it, and nobody waited.
    NoRoom,
}

impl Failure {
    pub(crate) fn cache(error: std::io::Error) -> Self {
        Self::Cache(Arc::new(error))
    }

    /// The task ended without a word: it panicked, or the runtime shut down.
    fn abandoned() -> Self {
        Self::cache(std::io::Error::other("the fetch was abandoned"))
    }

    pub(crate) fn into_read_error(self, blob: &Blob) -> ReadError {
        let digest = blob.id().digest;
        match self {
            Self::Final(cause) => ReadError::Source { digest, cause },
            Self::Expired { cause } => {
                ReadError::Deadline { digest, deadline: blob.fetch_options().deadline, cause }
            }
            Self::Cache(cause) => ReadError::Cache { digest, cause },
            Self::NoRoom => {
                let cause = std::io::Error::from(std::io::ErrorKind::StorageFull);
                ReadError::Cache { digest, cause: Arc::new(cause) }
            }
        }
    }
}

pub(crate) type Outcome = Result<(), Failure>;

/// Where a chunk is that somebody waited for.
#[derive(Debug, Clone)]
pub(crate) enum Landed {
    /// In the cache, published.
    InCache,
    /// Only in memory, because there is no room.
    InMemory(ChunkNo, Arc<LooseChunk>),
}

/// Who waits for a chunk.
type Waiter = oneshot::Sender<Result<Landed, Failure>>;

/// How long a request may go on trying, and what went wrong last. Readers who join it extend it.
#[derive(Debug)]
pub(crate) struct Patience {
    epoch: Instant,
    /// Milliseconds after `epoch`.
    until: AtomicU64,
    last: Mutex<Option<SourceError>>,
}

impl Patience {
    fn new(until: Instant) -> Self {
        Self { epoch: until, until: AtomicU64::new(0), last: Mutex::default() }
    }

    /// When the request gives up.
    fn until(&self) -> Instant {
        self.epoch + Duration::from_millis(self.until.load(Ordering::Acquire))
    }

    fn extend(&self, until: Instant) {
        let more = until.saturating_duration_since(self.epoch).as_millis();
        self.until.fetch_max(u64::try_from(more).unwrap_or(u64::MAX), Ordering::AcqRel);
    }

    fn failed(&self, error: &SourceError) {
        *lock(&self.last) = Some(error.clone());
    }

    /// The last failure in words.
    fn cause(&self) -> String {
        lock(&self.last).as_ref().map_or_else(|| "no answer".into(), ToString::to_string)
    }
}

/// One chunk that a reader waits for.
#[derive(Debug)]
pub(crate) struct Ticket {
    outcome: oneshot::Receiver<Result<Landed, Failure>>,
    patience: Arc<Patience>,
}

/// The fetches of a blob.
#[derive(Debug, Default)]
pub(crate) struct Fetcher {
    queue: Mutex<Queue>,
    pass: Pass,
}

impl Fetcher {
    /// Asks for all of `chunks` that are absent, joining those who already do. A request that is
    /// joined goes on at least until `until`.
    pub(crate) fn demand(
        &self,
        blob: &Arc<Blob>,
        chunks: &Range<ChunkNo>,
        access: Access,
        until: Instant,
    ) -> Vec<Ticket> {
        let tickets =
            lock(&self.queue).demand(chunks, access, blob.presence(), limits(blob), until);
        pump(blob);
        tickets
    }

    /// Waits for what was asked for, but not beyond `until`. Gives the chunks that did not come
    /// into the cache.
    pub(crate) async fn wait(
        &self,
        tickets: Vec<Ticket>,
        until: Instant,
    ) -> Result<Vec<(ChunkNo, Arc<LooseChunk>)>, Failure> {
        let mut loose = vec![];
        for ticket in tickets {
            let outcome = match tokio::time::timeout_at(until, ticket.outcome).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(Failure::abandoned()),
                Err(_) => Err(Failure::Expired { cause: ticket.patience.cause() }),
            };
            match outcome? {
                Landed::InCache => {}
                Landed::InMemory(chunk, bytes) => loose.push((chunk, bytes)),
            }
        }
        Ok(loose)
    }

    /// Fetches what nobody fetches yet of `chunks`, part of a window of so many bytes, after what
    /// is in demand.
    pub(crate) fn read_ahead(&self, blob: &Arc<Blob>, chunks: &Range<ChunkNo>, window: u64) {
        let (limits, until) = (limits(blob), patience(blob));
        blob.counters().windows.observe(window);
        let request_bytes = blob.scheduler().window_request_bytes(&blob.host(), window);
        lock(&self.queue).read_ahead(chunks, request_bytes, blob.presence(), limits, until);
        pump(blob);
    }

    /// Fetches `chunks`, of several segments if need be, when there is room.
    pub(crate) fn plan(&self, blob: &Arc<Blob>, priority: Priority, chunks: Range<ChunkNo>) {
        let order = blob.scheduler().next_order();
        lock(&self.queue).plan(priority, order, chunks);
        pump(blob);
    }

    /// What nobody has asked for is fetched in an order of this node's own from now on.
    pub(crate) fn scatter(&self, scatter: Scatter) {
        lock(&self.queue).scatter(scatter);
    }

    /// Gives up what is planned inside `chunks`.
    pub(crate) fn drop_plans(&self, chunks: &Range<ChunkNo>) {
        lock(&self.queue).drop_plans(chunks);
    }

    /// Whether nothing but what is expected of loaders is to be fetched any more.
    pub(crate) fn is_calm(&self) -> bool {
        lock(&self.queue).is_calm()
    }

    /// Chunks that have a flight.
    pub(crate) fn in_flight(&self) -> HashSet<ChunkNo> {
        lock(&self.queue).in_flight()
    }

    /// Requests that run.
    pub(crate) fn running(&self) -> usize {
        lock(&self.queue).running()
    }

    /// For the scheduler: the next request of that priority.
    fn start_next(&self, blob: &Blob, priority: Priority, planned: u32) -> Option<Request> {
        let (limits, until, presence) = (limits(blob), patience(blob), blob.presence());
        let mut queue = lock(&self.queue);
        queue.start_next(priority, planned, presence, blob.table(), limits, until)
    }

    /// For the scheduler: when the first of what is expected was planned.
    fn first_expected(&self) -> Option<u64> {
        lock(&self.queue).first_expected()
    }

    /// For the scheduler: whether the blob is to be put into the ring.
    fn enters_ring(&self) -> bool {
        let mut queue = lock(&self.queue);
        !queue.is_idle() && !std::mem::replace(&mut queue.in_ring, true)
    }

    /// For the scheduler: whether the blob has still something to fetch.
    fn stays_in_ring(&self) -> bool {
        let mut queue = lock(&self.queue);
        queue.in_ring = !queue.is_idle();
        queue.in_ring
    }

    /// Makes a chunk readable and wakes who waits for it.
    pub(crate) fn publish(
        &self,
        blob: &Arc<Blob>,
        chunk: &VerifiedChunk,
        priority: Priority,
        entered: &Entered<'_>,
    ) {
        blob.publish(chunk, priority, entered);
        for waiter in lock(&self.queue).landed(chunk.chunk()) {
            // A reader that went away does not wait any more.
            let _ = waiter.send(Ok(Landed::InCache));
        }
        blob.hash().poke(blob);
    }

    /// Gives a chunk that has no room in the cache to those who wait for it.
    fn hand_over(&self, chunk: ChunkNo, bytes: &Arc<LooseChunk>) {
        for waiter in lock(&self.queue).landed(chunk) {
            let _ = waiter.send(Ok(Landed::InMemory(chunk, Arc::clone(bytes))));
        }
    }

    /// No source has a chunk as it should be: whoever waits for it fails, whoever waits for others
    /// of the same request does not.
    fn give_up(&self, chunk: ChunkNo, failure: &Failure) {
        for waiter in lock(&self.queue).landed(chunk) {
            let _ = waiter.send(Err(failure.clone()));
        }
    }

    /// Of a host that ignores ranges.
    fn pass(&self) -> &Pass {
        &self.pass
    }

    /// The first of `chunks` that somebody waits for.
    fn first_waited_for(&self, chunks: &Range<ChunkNo>) -> Option<ChunkNo> {
        lock(&self.queue).first_waited_for(chunks)
    }
}

fn limits(blob: &Blob) -> queue::Limits {
    let fetch = blob.fetch_options();
    queue::Limits::new(fetch.connections, fetch.request_bytes)
}

/// When a request that nobody waits for gives up.
fn patience(blob: &Blob) -> Instant {
    Instant::now() + blob.fetch_options().deadline
}

/// Has a blob's requests started, and those of others, while there is room for them.
fn pump(blob: &Arc<Blob>) {
    let scheduler = blob.scheduler();
    scheduler.enter(&blob.host(), blob);
    // No lock may be held when the task is spawned: a runtime that shuts down drops the task at
    // once, and its guard comes back here.
    while let Some(next) = scheduler.next() {
        let blob = Arc::clone(&next.blob);
        let (span, running) = (next.request.span.clone(), Running::new(next));
        blob.runtime().spawn(transfer::run(running).instrument(span));
    }
}

/// A request that runs. Its end is made known when this is dropped: by its task's end, by a panic
/// in it, or by a runtime that shuts down.
#[derive(Debug)]
struct Running {
    blob: Arc<Blob>,
    request: Request,
    /// The host whose line it takes a place on. A request that turns to another source keeps it.
    host: Arc<str>,
    /// Bytes that came.
    bytes: u64,
    attempts: Attempts,
    outcome: Outcome,
}

/// The attempts of a request.
#[derive(Debug, Default)]
struct Attempts {
    count: u32,
    /// When the last one asked.
    asked: Option<Instant>,
    /// When its first bytes came.
    answered: Option<Instant>,
}

impl Attempts {
    fn ask(&mut self) {
        *self = Self { count: self.count + 1, asked: Some(Instant::now()), answered: None };
    }

    /// Something came; how long that took, if it is the first.
    fn answer(&mut self) -> Option<Duration> {
        if self.answered.is_some() {
            return None;
        }
        let now = *self.answered.insert(Instant::now());
        Some(now - self.asked?)
    }

    /// How a request went that was asked for once.
    fn times(&self) -> Option<Times> {
        let (asked, answered) = (self.asked?, self.answered?);
        let times = Times { wait: answered - asked, body: answered.elapsed() };
        (self.count == 1).then_some(times)
    }
}

impl Running {
    fn new(Next { blob, request, host }: Next) -> Self {
        let (attempts, outcome) = (Attempts::default(), Err(Failure::abandoned()));
        Self { blob, request, host, bytes: 0, attempts, outcome }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let blob = &self.blob;
        for waiter in lock(&blob.fetcher().queue).ended(&self.request) {
            let _ = waiter.send(self.outcome.clone().map(|()| Landed::InCache));
        }
        let times = self.outcome.is_ok().then(|| self.attempts.times()).flatten();
        blob.scheduler().ended(&self.host, self.request.priority, self.bytes, times);
        match self.outcome {
            Ok(()) => {
                blob.counters().requests_done.increment();
                blob.round_off();
            }
            // Nobody waited for it any more.
            Err(Failure::NoRoom) => self.give_up_plans(),
            Err(_) => {
                blob.counters().requests_failed.increment();
                self.give_up_plans();
            }
        }
        pump(blob);
    }
}

impl Running {
    /// After a failure nothing more of the segment is fetched unasked: its next reader sees
    /// whether the source is back.
    fn give_up_plans(&self) {
        let chunk = self.request.start();
        let Some((segment, _)) = self.blob.table().bytes_of(chunk) else { return };
        let chunks = self.blob.table().of_segment(segment);
        lock(&self.blob.fetcher().queue).drop_plans(&chunks);
        self.blob.forget_interest(segment);
    }
}
