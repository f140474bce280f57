//! What all blobs of a store share: options, the runtime, the gate that closes with the store,
//! and the list of blobs with something to record.

use std::collections::HashMap;
use std::io;
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError,
};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

use crate::Blob;
use crate::budget::Budget;
use crate::disk::Disk;
use crate::fetch::Scheduler;
use crate::hash::Hashers;
use crate::loose::LooseChunks;
use crate::rank::Clock;
use crate::segment::MappingBudget;
use crate::store::{BlobId, FetchOptions, KeepDigests, Verify};

/// The longest deadline of a read: as good as none, and sums with it don't overflow.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// Published bytes that are synced and recorded at once, even before their time has come.
const GROUP_BYTES: u64 = 64 << 20;

/// The longest wait without a look: a condition variable can't wait for ever.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The share of the cache that the read-ahead of one stream may take at the most.
const READ_AHEAD_SHARE: u64 = 4;

/// A time that many are told to wait, and a random quarter of it more: they shall not all come back
/// at once.
pub(crate) fn jittered(wait: Duration) -> Duration {
    wait.saturating_add((wait / 4).mul_f64(fastrand::f64()))
}

/// A lock whose holder can't leave half a change behind: a panic in one holder does not take the
/// others down.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See `store/session.rs`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Epochs {
    /// The one that this is.
    pub(crate) now: u64,
    /// What was recorded before it is in doubt.
    pub(crate) doubt_before: u64,
}

/// Whether the store may still change its directory.
#[derive(Debug)]
enum Gate {
    Open,
    Closed,
}

/// Held while something in the directory is changed.
#[derive(Debug)]
pub(crate) struct Entered<'a>(#[expect(dead_code, reason = "held")] RwLockReadGuard<'a, Gate>);

/// Shared by a store and its blobs.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) fetch: FetchOptions,
    pub(crate) verify: Verify,
    pub(crate) keep_digests: KeepDigests,
    /// Counts whole blobs that were found to hash to their digest.
    pub(crate) verified: watch::Sender<u64>,
    pub(crate) runtime: Handle,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) mappings: Arc<MappingBudget>,
    pub(crate) scheduler: Scheduler,
    pub(crate) hashers: Arc<Hashers>,
    pub(crate) clock: Clock,
    pub(crate) epochs: Epochs,
    /// Names the boot of the machine.
    pub(crate) boot: Box<str>,
    pub(crate) budget: Budget,
    pub(crate) loose: LooseChunks,
    /// Told of each eviction that ended.
    pub(crate) evicted: Notify,
    gate: RwLock<Gate>,
    changes: Mutex<Changes>,
    /// For the thread that records.
    told: Condvar,
    /// Held while blobs are recorded.
    recording: Mutex<()>,
}

/// What is to be recorded.
#[derive(Debug, Default)]
struct Changes {
    /// Blobs that changed since their last record. They are held open until it is written.
    blobs: HashMap<BlobId, Arc<Blob>>,
    /// Bytes that were published since then.
    bytes: u64,
    /// When the first of them changed.
    since: Option<Instant>,
    ended: bool,
}

impl Shared {
    pub(crate) fn new(
        fetch: FetchOptions,
        (verify, keep_digests): (Verify, KeepDigests),
        disk: Arc<dyn Disk>,
        budget: Budget,
        epochs: Epochs,
        boot: &str,
        runtime: Handle,
    ) -> Self {
        let deadline = fetch.deadline.min(MAX_DEADLINE);
        // What is read ahead must not push itself out before it is read.
        let window = budget.limits().limit.map_or(u64::MAX, |limit| limit / READ_AHEAD_SHARE);
        let read_ahead_max = fetch.read_ahead_max.min(window);
        let read_ahead_min = fetch.read_ahead_min.min(window);
        Self {
            scheduler: Scheduler::new(fetch.connections_per_host),
            hashers: Hashers::new(),
            fetch: FetchOptions { deadline, read_ahead_min, read_ahead_max, ..fetch },
            verify,
            keep_digests,
            verified: watch::Sender::default(),
            runtime,
            disk,
            mappings: Arc::default(),
            clock: Clock::start(),
            epochs,
            boot: boot.into(),
            budget,
            loose: LooseChunks::default(),
            evicted: Notify::new(),
            gate: RwLock::new(Gate::Open),
            changes: Mutex::default(),
            told: Condvar::new(),
            recording: Mutex::default(),
        }
    }

    /// Leave to change files, until the guard is dropped. A store that closes waits for it, so it
    /// must not be held across an await.
    pub(crate) fn enter(&self) -> io::Result<Entered<'_>> {
        let closed = || io::Error::other("the store is closed");
        // Nobody but `close` takes it alone, and who is inside must not wait for that.
        let gate = match self.gate.try_read() {
            Ok(gate) => gate,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(closed()),
        };
        match *gate {
            Gate::Open => Ok(Entered(gate)),
            Gate::Closed => Err(closed()),
        }
    }

    /// Ends all changes, for good: the directory may have another owner from now on.
    pub(crate) fn close(&self) {
        *self.gate.write().unwrap_or_else(PoisonError::into_inner) = Gate::Closed;
        // Their blobs hold this list's owner: without this they would keep each other for ever.
        drop(self.take_changed());
    }

    /// Asks for a new record of a blob, of which so many more bytes are published.
    pub(crate) fn changed(&self, blob: &Arc<Blob>, bytes: u64, _proof: &Entered<'_>) {
        let mut changes = lock(&self.changes);
        changes.blobs.insert(blob.id(), Arc::clone(blob));
        let before = changes.bytes;
        changes.bytes += bytes;
        let is_first = changes.since.is_none();
        changes.since.get_or_insert_with(Instant::now);
        if is_first || (before < GROUP_BYTES && changes.bytes >= GROUP_BYTES) {
            self.told.notify_all();
        }
    }

    /// Waits until there is something to record that is `latest` old, or large enough; false when
    /// no more is to be recorded.
    pub(crate) fn await_group(&self, latest: Duration) -> bool {
        let mut changes = lock(&self.changes);
        while !changes.ended {
            let left = match changes.since {
                Some(_) if changes.bytes >= GROUP_BYTES => return true,
                Some(since) => latest.saturating_sub(since.elapsed()),
                None => Duration::MAX,
            };
            if left.is_zero() {
                return true;
            }
            let woken = self.told.wait_timeout(changes, left.min(MAX_WAIT));
            (changes, _) = woken.unwrap_or_else(PoisonError::into_inner);
        }
        false
    }

    /// Waits, unless it is ended.
    pub(crate) fn pause_recording(&self, time: Duration) {
        let changes = lock(&self.changes);
        drop(self.told.wait_timeout_while(changes, time, |changes| !changes.ended));
    }

    /// Ends the waiting for groups.
    pub(crate) fn end_groups(&self) {
        lock(&self.changes).ended = true;
        self.told.notify_all();
    }

    /// Runs `record` on the blobs that need a new record, after whoever does the same. Those of
    /// which it fails need one still. Gives the first failure.
    pub(crate) fn record_changed<E>(
        self: &Arc<Self>,
        record: impl Fn(&Arc<Blob>) -> Result<(), E>,
    ) -> Result<(), E> {
        let _recording = lock(&self.recording);
        let mut result = Ok(());
        for blob in self.take_changed() {
            if let Err(error) = record(&blob) {
                if let Ok(entered) = self.enter() {
                    self.changed(&blob, 0, &entered);
                }
                result = result.and(Err(error));
            }
        }
        result
    }

    fn take_changed(&self) -> Vec<Arc<Blob>> {
        let mut changes = lock(&self.changes);
        changes.bytes = 0;
        changes.since = None;
        changes.blobs.drain().map(|(_, blob)| blob).collect()
    }
}
