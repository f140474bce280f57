//! Fetching: who waits for which chunk, what is asked for next, and by whom.
//!
//! Each absent chunk that somebody wants has one *flight*, which belongs to one *request*: a
//! ranged read of chunks in sequence, inside one segment. Requests wait in queues by priority and
//! run as tasks, a bounded number for each blob. A chunk is published and its waiters are woken
//! as soon as its last byte is written, not when the request ends.
//!
//! Invariants: one flight for each chunk; a flight ends when its chunk is published or its
//! request ends, however that comes (the task's guard sees to it); failures are not remembered.
//! The queue's lock is never held across I/O or an await, and hits never take it.

mod queue;
mod transfer;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use self::queue::{Queue, Request};
use crate::chunk::{ChunkNo, VerifiedChunk};
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
}

impl Failure {
    pub(crate) fn cache(error: std::io::Error) -> Self {
        Self::Cache(Arc::new(error))
    }

    /// The task ended without a word: it panicked, or the runtime shut down.
    fn abandoned() -> Self {
        Self::cache(std::io::Error::other("the fetch was abandoned"))
    }

    fn into_read_error(self, blob: &Blob) -> ReadError {
        let digest = blob.id().digest;
        match self {
            Self::Final(cause) => ReadError::Source { digest, cause },
            Self::Expired { cause } => {
                ReadError::Deadline { digest, deadline: blob.fetch_options().deadline, cause }
            }
            Self::Cache(cause) => ReadError::Cache { digest, cause },
        }
    }
}

pub(crate) type Outcome = Result<(), Failure>;

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
    outcome: oneshot::Receiver<Outcome>,
    patience: Arc<Patience>,
}

/// The fetches of a blob.
#[derive(Debug, Default)]
pub(crate) struct Fetcher {
    queue: Mutex<Queue>,
}

impl Fetcher {
    /// Asks for all of `chunks` that are absent, joining those who already do. A request that is
    /// joined goes on at least until `until`.
    pub(crate) fn demand(
        &self,
        blob: &Arc<Blob>,
        chunks: &Range<ChunkNo>,
        until: Instant,
    ) -> Vec<Ticket> {
        let tickets = lock(&self.queue).demand(chunks, blob.presence(), limits(blob), until);
        self.pump(blob);
        tickets
    }

    /// Waits for what was asked for, but not beyond `until`.
    pub(crate) async fn wait(
        &self,
        blob: &Blob,
        tickets: Vec<Ticket>,
        until: Instant,
    ) -> Result<(), ReadError> {
        for ticket in tickets {
            let outcome = match tokio::time::timeout_at(until, ticket.outcome).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(Failure::abandoned()),
                Err(_) => Err(Failure::Expired { cause: ticket.patience.cause() }),
            };
            outcome.map_err(|failure| failure.into_read_error(blob))?;
        }
        Ok(())
    }

    /// Fetches what nobody fetches yet of `chunks`, after what is in demand.
    pub(crate) fn read_ahead(&self, blob: &Arc<Blob>, chunks: &Range<ChunkNo>) {
        let until = Instant::now() + blob.fetch_options().deadline;
        lock(&self.queue).read_ahead(chunks, blob.presence(), limits(blob), until);
        self.pump(blob);
    }

    /// Starts requests while there is room for them.
    fn pump(&self, blob: &Arc<Blob>) {
        loop {
            // The lock must be free when the task is spawned: a runtime that shuts down drops the
            // task at once, and its guard comes back here.
            let next = lock(&self.queue).start_next(limits(blob));
            let Some(request) = next else { return };
            let running = Running::new(Arc::clone(blob), request);
            blob.runtime().spawn(transfer::run(running));
        }
    }

    /// Makes a chunk readable and wakes who waits for it.
    fn publish(&self, blob: &Arc<Blob>, chunk: &VerifiedChunk, entered: &Entered<'_>) {
        blob.publish(chunk, entered);
        for waiter in lock(&self.queue).landed(chunk.chunk()) {
            // A reader that went away does not wait any more.
            let _ = waiter.send(Ok(()));
        }
        blob.hash().poke(blob);
    }
}

fn limits(blob: &Blob) -> queue::Limits {
    let fetch = blob.fetch_options();
    queue::Limits::new(fetch.connections, fetch.request_bytes)
}

/// A request that runs. Its end is made known when this is dropped: by its task's end, by a panic
/// in it, or by a runtime that shuts down.
#[derive(Debug)]
struct Running {
    blob: Arc<Blob>,
    request: Request,
    outcome: Outcome,
}

impl Running {
    fn new(blob: Arc<Blob>, request: Request) -> Self {
        Self { blob, request, outcome: Err(Failure::abandoned()) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let fetcher = self.blob.fetcher();
        for waiter in lock(&fetcher.queue).ended(&self.request) {
            let _ = waiter.send(self.outcome.clone());
        }
        fetcher.pump(&self.blob);
    }
}
