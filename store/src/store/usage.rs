//! What the cache holds, and taking something out of it on request.

use std::time::SystemTime;

use super::catalog::Removal;
use super::evictor::{evict, free_bytes, sweep};
use super::{Store, at, read_layout};
use crate::budget::Limits;
use crate::chunk::ChunkTable;
use crate::presence::ones;
use crate::state::{Record, Verdict};
use crate::{BlobId, OpenError, Trust, segment};

/// What the cache holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that the cache may take on disk, if that is limited.
    pub limit: Option<u64>,
    /// Bytes of the file system that the cache leaves free.
    pub min_free: u64,
    /// Bytes of the file system that are free.
    pub free: u64,
    /// Bytes that all blobs take on disk.
    pub used: u64,
    /// Each blob, in no order; pinned ones also if nothing of them is here.
    pub blobs: Vec<BlobUsage>,
}

/// One blob in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobUsage {
    /// Its name.
    pub id: BlobId,
    /// Bytes of the blob; 0 if they are not known.
    pub size: u64,
    /// Bytes of it that are published.
    pub cached: u64,
    /// Bytes that it takes on disk, with what is kept beside it.
    pub disk: u64,
    /// What is known of its bytes.
    pub trust: Trust,
    /// Whether somebody has it open: a mount, or a fetch that goes on.
    pub in_use: bool,
    /// Whether it is kept whatever happens.
    pub pinned: bool,
    /// When it was opened or closed last, if that is known. One that is in use was used now.
    pub last_used: Option<SystemTime>,
}

/// What became of a blob that was to be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evicted {
    /// All of it is gone.
    Whole {
        /// Bytes of disk that it took.
        freed: u64,
    },
    /// It is open: what is not being read at this moment is gone.
    Part {
        /// Bytes of disk that were freed.
        freed: u64,
        /// Bytes of disk that it still takes.
        kept: u64,
    },
    /// It is pinned: nothing happened.
    Pinned,
    /// Nothing of it was there.
    Nothing,
}

/// What [`Store::prune`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Blobs that were removed.
    pub blobs: usize,
    /// Bytes of disk that they took.
    pub freed: u64,
}

impl Store {
    /// What the cache holds. Looks at each blob on disk: milliseconds for a hundred of them.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn usage(&self) -> Result<Usage, OpenError> {
        let catalog = &self.catalog;
        let mut ids = catalog.on_disk()?;
        let unseen = catalog.pins.all().into_iter().filter(|id| !ids.contains(id));
        ids.extend(unseen.collect::<Vec<_>>());
        let blobs: Vec<_> = ids.into_iter().map(|id| self.usage_of(id)).collect();
        let Limits { limit, min_free } = catalog.shared.budget.limits();
        Ok(Usage {
            limit,
            min_free,
            free: free_bytes(catalog.root())?,
            used: blobs.iter().map(|blob| blob.disk).sum(),
            blobs,
        })
    }

    fn usage_of(&self, id: BlobId) -> BlobUsage {
        let catalog = &self.catalog;
        let open = catalog.opened(id);
        let (size, cached, trust) = match &open {
            Some(blob) => {
                let stats = blob.stats();
                (stats.size, stats.cached, stats.trust)
            }
            None => self.recorded(id),
        };
        BlobUsage {
            id,
            size,
            cached,
            disk: segment::disk_bytes(&catalog.dir(id)),
            trust,
            in_use: open.is_some(),
            pinned: catalog.pins.has(id),
            last_used: open.map_or_else(|| catalog.last_used(id), |_| Some(SystemTime::now())),
        }
    }

    /// Size, published bytes and trust of a blob that is not open.
    fn recorded(&self, id: BlobId) -> (u64, u64, Trust) {
        let dir = self.catalog.dir(id);
        let Some(layout) = read_layout(&dir) else { return (0, 0, Trust::Transport) };
        let size = layout.size();
        let Some(table) = ChunkTable::new(layout) else { return (size, 0, Trust::Transport) };
        let Some(record) = Record::read(&dir, &table) else { return (size, 0, Trust::Transport) };
        let chunks = ones(record.present.iter().copied()).map(crate::chunk::ChunkNo);
        let bytes = chunks.filter_map(|chunk| table.bytes_of(chunk));
        let cached = bytes.map(|(_, bytes)| bytes.end - bytes.start).sum();
        let trust = match record.verdict {
            None if record.compared.is_some() => Trust::Indexed,
            None => Trust::Transport,
            Some(Verdict::Verified) => Trust::Verified,
            Some(Verdict::Poisoned { .. }) => Trust::Poisoned,
        };
        (size, cached, trust)
    }

    /// Whether nothing more need be known of a blob: all of it is here, or what is here is
    /// compared chunk by chunk. Looks at its record only, if it is not open.
    pub fn is_settled(&self, id: BlobId) -> bool {
        let (size, cached, trust) = match self.catalog.opened(id) {
            Some(blob) => {
                let stats = blob.stats();
                (stats.size, stats.cached, stats.trust)
            }
            None => self.recorded(id),
        };
        match trust {
            Trust::Indexed | Trust::Verified => true,
            Trust::Transport => cached > 0 && cached == size,
            Trust::Poisoned => false,
        }
    }

    /// What is known of a blob's bytes. Looks at its record only, if it is not open.
    pub fn trust(&self, id: BlobId) -> Trust {
        match self.catalog.opened(id) {
            Some(blob) => blob.stats().trust,
            None => self.recorded(id).2,
        }
    }

    /// Keeps a blob from being evicted, from now on and after restarts. It need not be here yet.
    ///
    /// # Errors
    /// When that can't be written down.
    pub fn pin(&self, id: BlobId) -> Result<(), OpenError> {
        let _entered = self.catalog.shared.enter().map_err(at(self.catalog.root()))?;
        self.catalog.pins.add(id)
    }

    /// Takes a pin away, if there is one.
    ///
    /// # Errors
    /// When that can't be written down.
    pub fn unpin(&self, id: BlobId) -> Result<(), OpenError> {
        let _entered = self.catalog.shared.enter().map_err(at(self.catalog.root()))?;
        self.catalog.pins.remove(id)
    }

    /// Takes out of the cache what it holds of a blob: all of it if the blob is not open, else
    /// what nobody reads at this moment. Blocking I/O.
    ///
    /// # Errors
    /// When the directory can't be changed.
    pub fn evict(&self, id: BlobId) -> Result<Evicted, OpenError> {
        if self.catalog.pins.has(id) {
            return Ok(Evicted::Pinned);
        }
        self.checkpoint()?;
        match self.catalog.remove(id)? {
            Removal::Removed(freed) => Ok(Evicted::Whole { freed }),
            Removal::Nothing => Ok(Evicted::Nothing),
            Removal::Open => Ok(self.evict_parts(id)),
        }
    }

    fn evict_parts(&self, id: BlobId) -> Evicted {
        let dir = self.catalog.dir(id);
        let before = segment::disk_bytes(&dir);
        if let Some(blob) = self.catalog.opened(id) {
            sweep(&blob);
            let extents: Vec<_> =
                blob.candidates().into_iter().map(|candidate| candidate.extent).collect();
            evict(&blob, &extents);
        }
        let kept = segment::disk_bytes(&dir);
        Evicted::Part { freed: before.saturating_sub(kept), kept }
    }

    /// Removes all blobs that are neither open nor pinned. Blocking I/O.
    ///
    /// # Errors
    /// The first failure; the other blobs are removed all the same.
    pub fn prune(&self) -> Result<Pruned, OpenError> {
        self.checkpoint()?;
        let mut pruned = Pruned::default();
        let mut result = Ok(());
        for id in self.catalog.on_disk()? {
            if self.catalog.pins.has(id) {
                continue;
            }
            match self.catalog.remove(id) {
                Ok(Removal::Removed(bytes)) => {
                    pruned.blobs += 1;
                    pruned.freed += bytes;
                }
                Ok(Removal::Open | Removal::Nothing) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result.map(|()| pruned)
    }
}
