//! Whether a segment is being read for real, or only looked at. A pure state machine.
//!
//! A loader that reads a file's header, or a probe of a few places, wants no more of it; one that
//! goes on wants all of it.

use std::num::NonZeroUsize;

use lru::LruCache;

/// Bytes read from a segment that make it read for real: more than the headers of weight files
/// and what the kernel reads around a first page fault (4 MiB), less than a tensor or two. Of a
/// small segment, a half: it may hold many small files, of which a few are wanted.
const REAL_BYTES: u64 = 8 << 20;

/// What a read counts for at the least if it must be fetched. Page faults all over a file are a
/// load, too; sixteen of them say so.
const MISS_BYTES: u64 = 512 << 10;

/// Segments that are remembered; the least recently read one is forgotten.
const MAX_SEGMENTS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// So many bytes were read.
    LookedAt(u64),
    /// That was said.
    Real,
}

/// The segments of a blob.
#[derive(Debug)]
pub(crate) struct Interest(LruCache<usize, State>);

impl Default for Interest {
    fn default() -> Self {
        Self(LruCache::new(MAX_SEGMENTS))
    }
}

impl Interest {
    /// `bytes` of a segment of `len` bytes were read, and `missed` if some had to be fetched.
    /// Whether that makes it read for real; said once.
    pub(crate) fn on_read(&mut self, segment: usize, len: u64, bytes: u64, missed: bool) -> bool {
        let state = self.0.get_or_insert_mut(segment, || State::LookedAt(0));
        let State::LookedAt(before) = *state else { return false };
        let counts = if missed { bytes.max(MISS_BYTES) } else { bytes };
        let read = before.saturating_add(counts);
        let real = read >= REAL_BYTES.min(len / 2);
        *state = if real { State::Real } else { State::LookedAt(read) };
        real
    }

    /// Begins anew.
    pub(crate) fn forget(&mut self, segment: usize) {
        self.0.pop(&segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_look_is_no_reading_and_reading_is_said_once() {
        let mut interest = Interest::default();
        assert!(!interest.on_read(0, 256 * MIB, 4096, true));
        assert!(!interest.on_read(0, 256 * MIB, 5 * MIB, true), "a header");
        assert!(interest.on_read(0, 256 * MIB, 3 * MIB, true));
        assert!(!interest.on_read(0, 256 * MIB, 100 * MIB, true));
        interest.forget(0);
        assert!(interest.on_read(0, 256 * MIB, 9 * MIB, false), "asked again");
    }

    #[test]
    fn page_faults_all_over_a_file_are_a_load() {
        let mut interest = Interest::default();
        let faults = (0..100).filter(|_| interest.on_read(3, 256 * MIB, 4096, true)).count();
        assert_eq!(faults, 1);
        let mut interest = Interest::default();
        assert!((0..100).all(|_| !interest.on_read(3, 256 * MIB, 4096, false)), "hits are cheap");
    }

    #[test]
    fn half_of_a_small_segment_is_enough() {
        let mut interest = Interest::default();
        assert!(!interest.on_read(0, 4 * MIB, 4096, true));
        assert!(!interest.on_read(0, 4 * MIB, MIB, true));
        assert!(interest.on_read(0, 4 * MIB, MIB, true));
    }
}
