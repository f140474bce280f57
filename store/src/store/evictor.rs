//! The thread that measures what the cache takes and makes room in it.
//!
//! What goes first: blobs that nobody has open, the one that was used longest ago first; then
//! parts of open ones, in the order of their rank. Pinned blobs stay.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::statvfs::statvfs;

use super::at;
use super::catalog::{Catalog, Removal};
use crate::blob::Candidate;
use crate::budget::{Freed, Measured, Task, Woken};
use crate::shared::lock;
use crate::{Blob, BlobId, OpenError, segment};

/// How often is looked what others do to the free space, if nothing else is to be done.
const TICK: Duration = Duration::from_secs(10);

/// The pause after a pass that freed nothing: whoever asks again then finds that something was
/// released, or goes without.
const BARREN_PAUSE: Duration = Duration::from_millis(20);

/// The thread; it ends with [`Evictor::stop`].
#[derive(Debug)]
pub(super) struct Evictor {
    catalog: Arc<Catalog>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Evictor {
    pub(super) fn start(catalog: Arc<Catalog>) -> io::Result<Self> {
        let mut pass = Pass { catalog: Arc::clone(&catalog), closed: HashMap::new() };
        let work = move || {
            while pass.catalog.shared.budget.rest(TICK) == Woken::Work {
                let freed = pass.run().unwrap_or_else(|error| {
                    tracing::error!(%error, "the cache can't be measured");
                    Freed::default()
                });
                pass.catalog.shared.loose.expire();
                pass.catalog.shared.budget.passed(freed);
                if freed.is_nothing() {
                    std::thread::sleep(BARREN_PAUSE);
                }
            }
        };
        let thread = std::thread::Builder::new().name("weightfs-evict".into()).spawn(work)?;
        Ok(Self { catalog, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the thread, after the pass that it is at.
    pub(super) fn stop(&self) {
        let Some(thread) = lock(&self.thread).take() else { return };
        self.catalog.shared.budget.end();
        if thread.join().is_err() {
            tracing::error!("the evicting thread panicked");
        }
    }
}

/// Bytes of the file system that are free for others than root's own reserve.
pub(super) fn free_bytes(catalog_root: &std::path::Path) -> Result<u64, OpenError> {
    let space = statvfs(catalog_root).map_err(|error| at(catalog_root)(error.into()))?;
    Ok(space.blocks_available() * space.fragment_size())
}

#[derive(Debug)]
struct Pass {
    catalog: Arc<Catalog>,
    /// What blobs took that have not been open since: they don't change.
    closed: HashMap<BlobId, u64>,
}

impl Pass {
    /// Measures and makes the room that is missing.
    fn run(&mut self) -> Result<Freed, OpenError> {
        let budget = &Arc::clone(&self.catalog).shared.budget;
        let written = budget.written();
        let task = budget.measured(self.measure()?, written);
        if task.unused == 0 {
            return Ok(Freed::default());
        }
        if !self.catalog.may_evict() {
            return Ok(Freed { wanted: task, ..Freed::default() });
        }
        let freed = self.make_room(task);
        let written = budget.written();
        budget.measured(self.measure()?, written);
        Ok(freed)
    }

    fn measure(&mut self) -> Result<Measured, OpenError> {
        let free = free_bytes(self.catalog.root())?;
        if self.catalog.shared.budget.limits().limit.is_none() {
            return Ok(Measured { used: 0, free });
        }
        for id in self.catalog.take_touched() {
            self.closed.remove(&id);
        }
        let ids = self.catalog.on_disk()?;
        let mut closed = HashMap::with_capacity(ids.len());
        let mut used = self.catalog.ingests.disk_bytes();
        for id in ids {
            let is_open = self.catalog.opened(id).is_some();
            let bytes = match self.closed.get(&id) {
                Some(bytes) if !is_open => *bytes,
                _ => segment::disk_bytes(&self.catalog.dir(id)),
            };
            used += bytes;
            if !is_open {
                closed.insert(id, bytes);
            }
        }
        self.closed = closed;
        Ok(Measured { used, free })
    }

    fn make_room(&self, task: Task) -> Freed {
        let unused = self.remove_unused(task.unused);
        let parts = match task.anything.checked_sub(unused) {
            None | Some(0) => 0,
            Some(missing) => self.evict_parts(missing),
        };
        Freed { wanted: task, unused, parts }
    }

    fn remove_unused(&self, wanted: u64) -> u64 {
        let catalog = &self.catalog;
        let ids = catalog.on_disk().unwrap_or_else(|error| {
            tracing::error!(%error, "no unused blob is evicted");
            vec![]
        });
        let unused = |id: &BlobId| catalog.opened(*id).is_none() && !catalog.pins.has(*id);
        let mut ids: Vec<_> = ids.into_iter().filter(unused).collect();
        ids.sort_by_cached_key(|id| catalog.last_used(*id));
        let mut freed = 0;
        for id in ids {
            if freed >= wanted {
                break;
            }
            match catalog.remove(id) {
                Ok(Removal::Removed(bytes)) => {
                    tracing::info!(blob = %id.digest, bytes, "an unused blob is evicted");
                    catalog.evicted(bytes);
                    freed += bytes;
                }
                Ok(Removal::Open | Removal::Nothing) => {}
                Err(error) => tracing::error!(blob = %id.digest, %error, "can't be evicted"),
            }
        }
        freed
    }

    fn evict_parts(&self, wanted: u64) -> u64 {
        let blobs: Vec<_> = self.catalog.all_open();
        let swept: u64 = blobs.iter().map(sweep).sum();
        if swept >= wanted {
            return swept;
        }
        let wanted = wanted - swept;
        let blobs: Vec<_> =
            blobs.into_iter().filter(|blob| !self.catalog.pins.has(blob.id())).collect();
        let mut candidates: Vec<(Candidate, &Arc<Blob>)> = blobs
            .iter()
            .flat_map(|blob| blob.candidates().into_iter().map(move |found| (found, blob)))
            .collect();
        candidates.sort_unstable_by_key(|(candidate, _)| *candidate);
        let mut chosen: HashMap<BlobId, (&Arc<Blob>, Vec<u32>)> = HashMap::new();
        let mut sum = 0;
        for (candidate, blob) in candidates {
            if sum >= wanted {
                break;
            }
            sum += candidate.bytes;
            let (_, extents) = chosen.entry(blob.id()).or_insert_with(|| (blob, vec![]));
            extents.push(candidate.extent);
        }
        let evicted = chosen.into_values().map(|(blob, extents)| evict(blob, &extents));
        swept + evicted.sum::<u64>()
    }
}

/// Frees what a blob takes for nothing, in bytes.
pub(super) fn sweep(blob: &Arc<Blob>) -> u64 {
    blob.sweep().unwrap_or_else(|error| {
        tracing::error!(blob = %blob.id().digest, %error, "blocks of absent chunks stay");
        0
    })
}

/// Evicts parts of a blob; the bytes that are gone.
pub(super) fn evict(blob: &Arc<Blob>, extents: &[u32]) -> u64 {
    match blob.evict(extents) {
        Ok(bytes) => {
            tracing::debug!(blob = %blob.id().digest, bytes, "parts of a blob are evicted");
            bytes
        }
        Err(error) => {
            tracing::error!(blob = %blob.id().digest, %error, "parts of a blob can't be evicted");
            0
        }
    }
}
