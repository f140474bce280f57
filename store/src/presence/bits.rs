//! Bitmaps.

use crate::atomic::{AtomicU64, Ordering};

/// A bitmap of fixed length that many threads change.
#[derive(Debug)]
pub(crate) struct Bits {
    words: Box<[AtomicU64]>,
    len: u32,
}

impl Bits {
    pub(crate) fn new(len: u32) -> Self {
        let words = (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, len }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Sets a bit; whether it was clear.
    pub(crate) fn set(&self, bit: u32) -> bool {
        let Some(word) = self.word(bit) else { return false };
        let mask = 1 << (bit % 64);
        word.fetch_or(mask, Ordering::AcqRel) & mask == 0
    }

    /// Clears a bit; whether it was set.
    pub(crate) fn clear(&self, bit: u32) -> bool {
        let Some(word) = self.word(bit) else { return false };
        let mask = 1 << (bit % 64);
        word.fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    pub(crate) fn get(&self, bit: u32) -> bool {
        self.word(bit).is_some_and(|word| word.load(Ordering::Acquire) >> (bit % 64) & 1 == 1)
    }

    /// Clears all bits and gives those that were set.
    pub(crate) fn take(&self) -> Vec<u32> {
        let words = self.words.iter().map(|word| word.swap(0, Ordering::AcqRel));
        ones(words).collect()
    }

    /// The words as they are now.
    pub(crate) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    fn word(&self, bit: u32) -> Option<&AtomicU64> {
        if bit >= self.len {
            return None;
        }
        self.words.get(usize::try_from(bit / 64).ok()?)
    }
}

/// The numbers of the bits that are set in `words`.
pub(crate) fn ones(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
    (0u32..).step_by(64).zip(words).flat_map(|(base, word)| {
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| base + bit)
    })
}
