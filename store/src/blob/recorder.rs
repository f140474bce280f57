//! What of a blob a restart may believe.
//!
//! Invariants: a chunk is in a record only after its data was synced, and its bytes are given up
//! only after a record without it is on disk.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::Blob;
use crate::chunk::ChunkNo;
use crate::digests::ChunkDigests;
use crate::presence::ones;
use crate::shared::{Entered, lock};
use crate::state::{self, Record};

/// The records of a blob.
#[derive(Debug)]
pub(super) struct Recorder {
    /// Held while data is synced for a record, which may take long.
    syncing: Mutex<()>,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Said {
    /// What the record on disk says at the most; all of it is synced.
    recorded: Vec<u64>,
    /// What is being synced, to be recorded next, less what is evicted meanwhile.
    pending: Vec<u64>,
    data: Data,
}

/// Whether a sync proves anything.
#[derive(Debug, PartialEq, Eq)]
enum Data {
    Sound,
    /// A sync failed: the kernel may have dropped what it could not write and calls it clean.
    Doubtful,
}

impl Recorder {
    /// `recorded` is what the record on disk says.
    pub(super) fn new(recorded: Vec<u64>) -> Self {
        let said = Said { recorded, pending: vec![], data: Data::Sound };
        Self { syncing: Mutex::default(), said: Mutex::new(said) }
    }
}

impl Blob {
    /// Makes what is published now survive a restart.
    pub(crate) fn record(&self) -> io::Result<()> {
        let _syncing = lock(&self.recorder.syncing);
        {
            let mut said = lock(&self.recorder.said);
            if said.data == Data::Doubtful {
                return Ok(());
            }
            // First what the record will say: a chunk in it is in a segment that was marked
            // before. Then the marks; then the data of these segments; last the record itself.
            said.pending = self.here();
        }
        for segment in self.unsynced.take() {
            if let Err(error) = self.segments.sync(usize::try_from(segment).unwrap_or(usize::MAX)) {
                lock(&self.recorder.said).data = Data::Doubtful;
                return Err(error);
            }
        }
        let mut said = lock(&self.recorder.said);
        said.recorded = std::mem::take(&mut said.pending);
        self.write_record(&said)
    }

    /// Makes the record on disk say no more than what is published. To be called before anything
    /// is fetched: a chunk that the record claims must not be half written.
    pub(super) fn take_back(self: &Arc<Self>) -> io::Result<()> {
        let here = self.here();
        let claimed = lock(&self.recorder.said).recorded.clone();
        let lost = claimed.iter().zip(&here).map(|(claimed, here)| claimed & !here);
        let lost: Vec<_> = ones(lost).map(ChunkNo).collect();
        if lost.is_empty() {
            return Ok(());
        }
        let entered = self.enter()?;
        self.record_absence(&lost, &entered)
    }

    /// Makes it known that `chunks` are not here any more; it is on disk when this returns. They
    /// have been withdrawn, and nobody can publish them again before it returns.
    pub(super) fn record_absence(
        self: &Arc<Self>,
        chunks: &[ChunkNo],
        entered: &Entered<'_>,
    ) -> io::Result<()> {
        let mut said = lock(&self.recorder.said);
        let mut known = false;
        for chunk in chunks {
            clear(&mut said.pending, *chunk);
            known |= clear(&mut said.recorded, *chunk);
        }
        if !known {
            return Ok(());
        }
        self.write_record(&said).or_else(|error| {
            if error.kind() != io::ErrorKind::StorageFull {
                return Err(error);
            }
            // No room for a new record, and room is what this is about: none says enough. What
            // else it said is said again by the next one.
            state::remove(self.segments.disk(), self.segments.dir())?;
            self.shared.changed(self, 0, entered);
            Ok(())
        })
    }

    /// A bit for each chunk that is published or kept to be compared.
    fn here(&self) -> Vec<u64> {
        // In this order: a chunk is published before it is no longer kept.
        let kept = self.checks.snapshot();
        let published = self.presence.snapshot();
        kept.iter().zip(&published).map(|(kept, published)| kept | published).collect()
    }

    fn write_record(&self, said: &Said) -> io::Result<()> {
        let (verdict, epoch) = (self.verdict(), self.epoch.load(Ordering::Acquire));
        // Digests that have come since then make no difference: what they found published they
        // have marked.
        let promises = self.promises();
        let compared = promises.digests().filter(|_| self.checks.are_done()).map(ChunkDigests::id);
        drop(promises);
        let record = Record { verdict, compared, epoch, present: said.recorded.clone() };
        record.write(self.segments.disk(), self.segments.dir(), self.layout())
    }
}

/// Clears a chunk's bit; whether it was set.
fn clear(words: &mut [u64], ChunkNo(chunk): ChunkNo) -> bool {
    let word = usize::try_from(chunk / 64).ok().and_then(|index| words.get_mut(index));
    let Some(word) = word else { return false };
    let mask = 1 << (chunk % 64);
    let was_set = *word & mask != 0;
    *word &= !mask;
    was_set
}
