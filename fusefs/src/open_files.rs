//! How each open file is served: by this process, or by the kernel from the cache file itself
//! (FUSE passthrough, Linux 6.9).
//!
//! Invariant: all simultaneous opens of an inode are of one mode and use one backing id; the
//! kernel answers a mixed open with EIO (`fuse_file_io_open`). So the first open chooses, and a
//! file that becomes complete while it is open is passed through from its next first open on.
//! The kernel sends RELEASE after the last close and munmap, so counting opens is enough.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Who serves the reads of an open file. `B` is what the kernel knows the cache file by.
#[derive(Debug)]
pub(crate) enum Mode<B> {
    /// This process.
    Served,
    /// The kernel.
    Passthrough(Arc<B>),
}

// Not derived: B need not be Clone.
impl<B> Clone for Mode<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Served => Self::Served,
            Self::Passthrough(backing) => Self::Passthrough(Arc::clone(backing)),
        }
    }
}

#[derive(Debug)]
struct OpenFile<B> {
    mode: Mode<B>,
    opens: u64,
}

/// The files that are open, by inode.
#[derive(Debug)]
pub(crate) struct OpenFiles<B>(Mutex<HashMap<u64, OpenFile<B>>>);

impl<B> Default for OpenFiles<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B> OpenFiles<B> {
    /// Counts an open. The first one of an inode asks `backing` for a complete cache file.
    pub(crate) fn open(&self, inode: u64, backing: impl FnOnce() -> Option<B>) -> Mode<B> {
        let mut files = self.lock();
        let file = files.entry(inode).or_insert_with(|| {
            let mode = match backing() {
                Some(backing) => Mode::Passthrough(Arc::new(backing)),
                None => Mode::Served,
            };
            OpenFile { mode, opens: 0 }
        });
        file.opens += 1;
        file.mode.clone()
    }

    /// Counts a release. The last one lets go of the cache file.
    pub(crate) fn release(&self, inode: u64) {
        let mut files = self.lock();
        let Some(file) = files.get_mut(&inode) else { return };
        file.opens -= 1;
        if file.opens == 0 {
            files.remove(&inode);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, OpenFile<B>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed_through(mode: &Mode<u32>) -> Option<u32> {
        match mode {
            Mode::Served => None,
            Mode::Passthrough(backing) => Some(**backing),
        }
    }

    #[test]
    fn the_first_open_chooses_for_all_until_the_last_release() {
        let files = OpenFiles::default();
        assert_eq!(passed_through(&files.open(7, || None)), None);
        assert_eq!(passed_through(&files.open(7, || Some(1))), None, "complete while it is open");
        files.release(7);
        assert_eq!(passed_through(&files.open(7, || Some(2))), None, "still open once");
        files.release(7);
        files.release(7);
        assert_eq!(passed_through(&files.open(7, || Some(3))), Some(3));
        assert_eq!(passed_through(&files.open(7, || Some(4))), Some(3), "one backing id");
        assert_eq!(passed_through(&files.open(8, || None)), None, "each inode by itself");
    }

    #[test]
    fn the_last_release_lets_go_of_the_cache_file() {
        let files = OpenFiles::default();
        let backing = Arc::new(());
        for _ in 0..2 {
            files.open(1, || Some(Arc::clone(&backing)));
        }
        files.release(1);
        assert_eq!(Arc::strong_count(&backing), 2);
        files.release(1);
        assert_eq!(Arc::strong_count(&backing), 1);
        files.release(1);
    }
}
