//! Who keeps which extent of a blob where it is.
//!
//! An extent is what is evicted at once: some chunks in sequence of one segment. Whoever reads,
//! writes or hands out bytes of one holds it; only what nobody holds can be evicted.
//!
//! Invariants: an extent is held or being evicted, never both. Both are one atomic word, so that
//! holding costs a reader one instruction and no lock. While an extent is held, its published
//! chunks stay published and their bytes stay in place.

use std::ops::Range;

use crate::atomic::{AtomicU32, Ordering};

/// Set in an extent's word while it is being evicted. The other bits count its holders.
const EVICTING: u32 = 1 << 31;

/// The extents of a blob.
#[derive(Debug)]
pub(crate) struct Extents {
    words: Box<[AtomicU32]>,
}

impl Extents {
    pub(crate) fn new(count: u32) -> Self {
        Self { words: (0..count).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Holds all of `extents`; false, and none of them is held, if one is being evicted.
    pub(crate) fn hold(&self, extents: &Range<u32>) -> bool {
        for extent in extents.clone() {
            let Some(word) = self.word(extent) else { continue };
            // Acquire: what the last eviction took out of presence is seen.
            if word.fetch_add(1, Ordering::Acquire) & EVICTING != 0 {
                self.release(&(extents.start..extent + 1));
                return false;
            }
        }
        true
    }

    /// Ends what [`Extents::hold`] began.
    pub(crate) fn release(&self, extents: &Range<u32>) {
        for extent in extents.clone() {
            if let Some(word) = self.word(extent) {
                // Release: what was read is read before the bytes can go.
                word.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Whether nobody holds the extent now.
    pub(crate) fn is_free(&self, extent: u32) -> bool {
        self.word(extent).is_some_and(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// Begins to evict an extent; false if somebody holds it or evicts it already.
    pub(crate) fn begin_eviction(&self, extent: u32) -> bool {
        self.word(extent).is_some_and(|word| {
            word.compare_exchange(0, EVICTING, Ordering::Acquire, Ordering::Relaxed).is_ok()
        })
    }

    /// Ends what [`Extents::begin_eviction`] began.
    pub(crate) fn end_eviction(&self, extent: u32) {
        if let Some(word) = self.word(extent) {
            // Not a store: somebody may be about to find out that he can't hold it.
            word.fetch_and(!EVICTING, Ordering::Release);
        }
    }

    fn word(&self, extent: u32) -> Option<&AtomicU32> {
        self.words.get(usize::try_from(extent).ok()?)
    }
}
