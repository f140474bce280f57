//! How each open file is served: by this process, or by the kernel from the cache file itself
//! (FUSE passthrough, Linux 6.9).
//!
//! Invariant: all simultaneous opens of an inode are of one mode and use one backing id; the
//! kernel answers a mixed open with EIO (`fuse_file_io_open`). So the first open chooses, and a
//! file that becomes complete while it is open is passed through from its next first open on.
//! The kernel sends RELEASE after the last close and munmap, so counting opens is enough.
//!
//! Invariant: it holds across a restart. An open is in the [`Ledger`] before the kernel has its
//! answer, a release after it: a process that is killed between the two has counted one open too
//! many, and the file only keeps its mode longer than it had to.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::ledger::{Entry, Kind, Ledger, Slot};

/// Marks a request that the kernel sends again (`FUSE_UNIQUE_RESEND`).
const RESENT: u64 = 1 << 63;

/// What the kernel knows a cache file by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BackingNumber(pub(crate) u32);

/// Who serves the reads of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// This process.
    Served,
    /// The kernel.
    Passthrough(BackingNumber),
}

#[derive(Debug)]
struct OpenFile<H> {
    mode: Mode,
    opens: u64,
    slot: Slot,
    /// Dropped with the last open. `None` also where a predecessor opened it: the store has
    /// found that out by itself.
    _hold: Option<H>,
}

/// The files that are open, by inode. `H` keeps the cache file of one in passthrough as it is.
#[derive(Debug)]
pub(crate) struct OpenFiles<H> {
    ledger: Arc<Ledger>,
    files: Mutex<HashMap<u64, OpenFile<H>>>,
}

impl<H> OpenFiles<H> {
    /// The files that the ledger says are open; `close` closes backing ids that a predecessor
    /// did not come to close.
    ///
    /// # Errors
    /// When the ledger can't be read.
    pub(crate) fn new(
        ledger: Arc<Ledger>,
        mut close: impl FnMut(BackingNumber),
    ) -> io::Result<Self> {
        let mut files = HashMap::new();
        for (slot, entry) in ledger.entries()? {
            let mode = match entry.kind {
                Kind::Tree => continue,
                Kind::Served => Mode::Served,
                Kind::Passthrough => Mode::Passthrough(BackingNumber(entry.backing)),
                Kind::Closing => {
                    close(BackingNumber(entry.backing));
                    ledger.clear(slot)?;
                    continue;
                }
            };
            files.insert(entry.key, OpenFile { mode, opens: entry.count, slot, _hold: None });
        }
        Ok(Self { ledger, files: Mutex::new(files) })
    }

    /// Counts an open, by the request with that number. The first one of an inode asks `backing`
    /// for a complete cache file.
    ///
    /// # Errors
    /// When it can't be recorded; then it does not count.
    pub(crate) fn open(
        &self,
        inode: u64,
        request: u64,
        backing: impl FnOnce() -> Option<(BackingNumber, H)>,
    ) -> io::Result<Mode> {
        let mut files = self.lock();
        match files.entry(inode) {
            Place::Vacant(place) => {
                // First, so that nothing is made that could not be recorded.
                let slot = self.ledger.reserve()?;
                let (mode, hold) = match backing() {
                    Some((backing, hold)) => (Mode::Passthrough(backing), Some(hold)),
                    None => (Mode::Served, None),
                };
                self.ledger.set(slot, &entry(inode, mode, 1, request))?;
                place.insert(OpenFile { mode, opens: 1, slot, _hold: hold });
                Ok(mode)
            }
            Place::Occupied(place) => {
                let file = place.into_mut();
                if !self.is_counted(file.slot, request) {
                    self.ledger
                        .set(file.slot, &entry(inode, file.mode, file.opens + 1, request))?;
                    file.opens += 1;
                }
                Ok(file.mode)
            }
        }
    }

    /// Counts a release. After the last one nobody uses the backing id any more: `close` gets it.
    pub(crate) fn release(&self, inode: u64, close: impl FnOnce(BackingNumber)) {
        let mut files = self.lock();
        let Some(file) = files.get_mut(&inode) else { return };
        file.opens = file.opens.saturating_sub(1);
        let recorded = match (file.opens, file.mode) {
            (0, Mode::Served) => self.ledger.clear(file.slot),
            (0, Mode::Passthrough(backing)) => self.close(file.slot, inode, backing, close),
            (opens, mode) => self.ledger.set(file.slot, &entry(inode, mode, opens, 0)),
        };
        if file.opens == 0 {
            files.remove(&inode);
        }
        if let Err(error) = recorded {
            warn!(%error, "a closed file is still recorded as open");
        }
    }

    /// Records that the id is no file's any more, closes it, and forgets it: whatever a kill
    /// leaves, a successor neither uses a closed id nor leaves one open.
    fn close(
        &self,
        slot: Slot,
        inode: u64,
        backing: BackingNumber,
        close: impl FnOnce(BackingNumber),
    ) -> io::Result<()> {
        let closing =
            Entry { kind: Kind::Closing, ..entry(inode, Mode::Passthrough(backing), 0, 0) };
        self.ledger.set(slot, &closing)?;
        close(backing);
        self.ledger.clear(slot)
    }

    /// Whether a predecessor counted this request and was killed before it had answered.
    fn is_counted(&self, slot: Slot, request: u64) -> bool {
        request & RESENT != 0
            && self.ledger.get(slot).is_some_and(|entry| entry.mark == request & !RESENT)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, OpenFile<H>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry(inode: u64, mode: Mode, count: u64, request: u64) -> Entry {
    let (kind, backing) = match mode {
        Mode::Served => (Kind::Served, 0),
        Mode::Passthrough(BackingNumber(backing)) => (Kind::Passthrough, backing),
    };
    Entry { kind, backing, key: inode, count, mark: request & !RESENT }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVED: Mode = Mode::Served;

    fn passed(id: u32) -> Mode {
        Mode::Passthrough(BackingNumber(id))
    }

    fn backing(id: u32) -> impl FnOnce() -> Option<(BackingNumber, Arc<()>)> {
        move || Some((BackingNumber(id), Arc::default()))
    }

    fn files() -> OpenFiles<Arc<()>> {
        OpenFiles::new(Arc::new(Ledger::new().unwrap()), |_| unreachable!()).unwrap()
    }

    /// The files as a successor finds them after a kill, and the ids that it closes.
    fn succeed(files: &OpenFiles<Arc<()>>) -> (OpenFiles<Arc<()>>, Vec<u32>) {
        let descriptor = files.ledger.descriptor().try_clone_to_owned().unwrap();
        let ledger = Arc::new(Ledger::inherited(descriptor).unwrap());
        let mut closed = Vec::new();
        let files = OpenFiles::new(ledger, |BackingNumber(id)| closed.push(id)).unwrap();
        (files, closed)
    }

    /// Releases, and gives the id that is closed thereby.
    fn release(files: &OpenFiles<Arc<()>>, inode: u64) -> Option<u32> {
        let mut closed = None;
        files.release(inode, |BackingNumber(id)| closed = Some(id));
        closed
    }

    #[test]
    fn the_first_open_chooses_for_all_until_the_last_release() {
        let files = files();
        assert_eq!(files.open(7, 1, || None).unwrap(), SERVED);
        assert_eq!(files.open(7, 2, backing(1)).unwrap(), SERVED, "complete while it is open");
        release(&files, 7);
        assert_eq!(files.open(7, 3, backing(2)).unwrap(), SERVED, "still open once");
        release(&files, 7);
        release(&files, 7);
        assert_eq!(files.open(7, 4, backing(3)).unwrap(), passed(3));
        assert_eq!(files.open(7, 5, backing(4)).unwrap(), passed(3), "one backing id");
        assert_eq!(files.open(8, 6, || None).unwrap(), SERVED, "each inode by itself");
    }

    #[test]
    fn the_last_release_closes_the_backing_id() {
        let files = files();
        for request in 0..2 {
            files.open(1, request, backing(5)).unwrap();
        }
        assert_eq!(release(&files, 1), None);
        assert_eq!(release(&files, 1), Some(5));
        assert_eq!(release(&files, 1), None, "an open that was not counted");
    }

    #[test]
    fn the_cache_file_is_held_until_the_backing_id_is_closed() {
        let (files, hold) = (files(), Arc::new(()));
        let with_hold = || Some((BackingNumber(5), Arc::clone(&hold)));
        files.open(1, 1, with_hold).unwrap();
        files.open(1, 2, with_hold).unwrap();
        release(&files, 1);
        files.release(1, |_| assert_eq!(Arc::strong_count(&hold), 2, "closed first"));
        assert_eq!(Arc::strong_count(&hold), 1);
    }

    #[test]
    fn a_successor_serves_open_files_as_they_were() {
        let files = files();
        files.open(1, 1, || None).unwrap();
        files.open(2, 2, backing(3)).unwrap();
        files.open(2, 3, backing(3)).unwrap();
        files.open(4, 4, backing(9)).unwrap();
        release(&files, 4);
        let (next, closed) = succeed(&files);
        assert!(closed.is_empty());
        assert_eq!(next.open(1, 5, backing(7)).unwrap(), SERVED);
        assert_eq!(next.open(2, 6, || None).unwrap(), passed(3));
        for _ in 0..2 {
            assert_eq!(release(&next, 2), None);
        }
        assert_eq!(release(&next, 2), Some(3));
    }

    #[test]
    fn an_open_that_is_sent_again_counts_once() {
        let files = files();
        files.open(1, 10, backing(3)).unwrap();
        files.open(1, 12, backing(3)).unwrap();
        let (next, _) = succeed(&files);
        assert_eq!(next.open(1, 12 | RESENT, || None).unwrap(), passed(3));
        assert_eq!(next.open(1, 14 | RESENT, || None).unwrap(), passed(3), "this one was not");
        assert_eq!(release(&next, 1), None);
        assert_eq!(release(&next, 1), None);
        assert_eq!(release(&next, 1), Some(3));
    }

    #[test]
    fn an_id_that_was_being_closed_is_closed_by_the_successor() {
        let files = files();
        files.open(1, 1, backing(3)).unwrap();
        // What a kill inside of `close` leaves.
        let mut left = None;
        files.release(1, |_| left = Some(succeed(&files)));
        let (next, closed) = left.unwrap();
        assert_eq!(closed, [3]);
        assert_eq!(next.open(1, 2, backing(4)).unwrap(), passed(4), "its next open chooses anew");
    }
}
