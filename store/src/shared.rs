//! What all blobs of a store share: options, the runtime, the gate that closes with the store,
//! and the list of blobs with something to record.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::Blob;
use crate::budget::Budget;
use crate::fetch::Scheduler;
use crate::hash::Hashers;
use crate::loose::LooseChunks;
use crate::rank::Clock;
use crate::segment::MappingBudget;
use crate::store::{BlobId, FetchOptions, Verify};

/// The longest deadline of a read: as good as none, and sums with it don't overflow.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// The share of the cache that the read-ahead of one stream may take at the most.
const READ_AHEAD_SHARE: u64 = 4;

/// A lock whose holder can't leave half a change behind: a panic in one holder does not take the
/// others down.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(crate) runtime: Handle,
    pub(crate) mappings: Arc<MappingBudget>,
    pub(crate) scheduler: Scheduler,
    pub(crate) hashers: Arc<Hashers>,
    pub(crate) clock: Clock,
    pub(crate) budget: Budget,
    pub(crate) loose: LooseChunks,
    /// Told of each eviction that ended.
    pub(crate) evicted: Notify,
    gate: RwLock<Gate>,
    /// Blobs that changed since their last record. It holds them open until it is written.
    changed: Mutex<HashMap<BlobId, Arc<Blob>>>,
}

impl Shared {
    pub(crate) fn new(
        fetch: FetchOptions,
        verify: Verify,
        budget: Budget,
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
            runtime,
            mappings: Arc::default(),
            clock: Clock::start(),
            budget,
            loose: LooseChunks::default(),
            evicted: Notify::new(),
            gate: RwLock::new(Gate::Open),
            changed: Mutex::default(),
        }
    }

    /// Leave to change files, until the guard is dropped. A store that closes waits for it, so it
    /// must not be held across an await.
    pub(crate) fn enter(&self) -> io::Result<Entered<'_>> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        match *gate {
            Gate::Open => Ok(Entered(gate)),
            Gate::Closed => Err(io::Error::other("the store is closed")),
        }
    }

    /// Ends all changes, for good: the directory may have another owner from now on.
    pub(crate) fn close(&self) {
        *self.gate.write().unwrap_or_else(PoisonError::into_inner) = Gate::Closed;
        // Their blobs hold this list's owner: without this they would keep each other for ever.
        drop(self.take_changed());
    }

    /// Asks for a new record of a blob.
    pub(crate) fn changed(&self, blob: &Arc<Blob>, _proof: &Entered<'_>) {
        lock(&self.changed).insert(blob.id(), Arc::clone(blob));
    }

    /// The blobs that need a new record.
    pub(crate) fn take_changed(&self) -> Vec<Arc<Blob>> {
        lock(&self.changed).drain().map(|(_, blob)| blob).collect()
    }
}
