//! Reads of one length, at one distance from each other: a rank of a tensor-parallel load that
//! takes its columns of a tensor, row by row.
//!
//! Distances under a quarter of a MiB are no business of this module: such reads are a run.

use std::num::NonZeroUsize;
use std::ops::Range;

use lru::LruCache;

/// Strides that are followed in a blob: as many as ranks and threads read at once.
const MAX_STRIDES: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// Longest distance of two reads. Rows of the widest tensors take some MiB.
const MAX_DISTANCE: u64 = 64 << 20;

/// Equal distances that make a stride. Two can be chance.
const MIN_EQUAL: u32 = 3;

/// Reads ahead at first; doubled with each read that goes on.
const FIRST_AHEAD: u64 = 4;

/// Reads ahead at the most.
const MAX_AHEAD: u64 = 64;

#[derive(Debug)]
struct Stride {
    segment: usize,
    last: u64,
    /// How far apart the last reads began; unknown after the first.
    distance: Option<u64>,
    equal: u32,
    /// Where the first read begins that was not asked for.
    ahead: u64,
}

/// The strides of a blob.
#[derive(Debug)]
pub(super) struct Strides {
    known: LruCache<u64, Stride>,
    next: u64,
}

impl Default for Strides {
    fn default() -> Self {
        Self { known: LruCache::new(MAX_STRIDES), next: 0 }
    }
}

impl Strides {
    /// A read that continues no run. What to fetch ahead of it, `most` bytes at the most, if it
    /// is one of a stride.
    pub(super) fn on_read(
        &mut self,
        segment: usize,
        covers: &Range<u64>,
        read: &Range<u64>,
        most: u64,
    ) -> Option<Vec<Range<u64>>> {
        let distance = |stride: &Stride| {
            let ahead = read.start.checked_sub(stride.last).filter(|ahead| *ahead > 0)?;
            (stride.segment == segment && ahead <= MAX_DISTANCE).then_some(ahead)
        };
        let continues =
            |stride: &Stride| stride.distance.is_some() && distance(stride) == stride.distance;
        let begins = |stride: &Stride| stride.distance.is_none() && distance(stride).is_some();
        let found = self.known.iter().find(|(_, stride)| continues(stride));
        let found = found.or_else(|| self.known.iter().find(|(_, stride)| begins(stride)));
        let Some(id) = found.map(|(id, _)| *id) else {
            self.begin(segment, read.start);
            return None;
        };
        let stride = self.known.get_mut(&id)?;
        let step = distance(stride)?;
        (stride.distance, stride.last) = (Some(step), read.start);
        stride.equal = stride.equal.saturating_add(1);
        if stride.equal < MIN_EQUAL {
            return None;
        }
        Some(stride.ahead_of(step, covers, read, most))
    }

    fn begin(&mut self, segment: usize, start: u64) {
        let stride = Stride { segment, last: start, distance: None, equal: 0, ahead: 0 };
        self.known.put(self.next, stride);
        self.next = self.next.wrapping_add(1);
    }
}

impl Stride {
    fn ahead_of(
        &mut self,
        step: u64,
        covers: &Range<u64>,
        read: &Range<u64>,
        most: u64,
    ) -> Vec<Range<u64>> {
        let len = read.end - read.start;
        let doubled = FIRST_AHEAD << (self.equal - MIN_EQUAL).min(8);
        let count = doubled.min(MAX_AHEAD).min(most / len.max(1));
        let end = read.start.saturating_add(step.saturating_mul(count));
        let mut at = self.ahead.max(read.start.saturating_add(step));
        let mut ahead = vec![];
        while at <= end && at < covers.end {
            ahead.push(at..at.saturating_add(len).min(covers.end));
            at = at.saturating_add(step);
        }
        self.ahead = at;
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MOST: u64 = 128 * MIB;

    fn read(strides: &mut Strides, start: u64, len: u64) -> Vec<Range<u64>> {
        let covers = 0..1000 * MIB;
        strides.on_read(0, &covers, &(start..start + len), MOST).unwrap_or_default()
    }

    #[test]
    fn slices_of_rows_are_fetched_ahead_once_each() {
        let mut strides = Strides::default();
        let mut asked = vec![];
        for row in 0..100 {
            let ahead = read(&mut strides, 7 * MIB + row * 4 * MIB, MIB);
            assert!(row >= 3 || ahead.is_empty(), "three distances make a stride");
            asked.extend(ahead);
        }
        let expected: Vec<_> = (4..asked.len() as u64 + 4)
            .map(|row| 7 * MIB + row * 4 * MIB)
            .map(|start| start..start + MIB)
            .collect();
        assert_eq!(asked, expected);
        assert!(asked.len() > 120, "well ahead of the reader");
    }

    #[test]
    fn several_ranks_are_told_apart() {
        let mut strides = Strides::default();
        let mut asked = 0;
        for row in 0..20 {
            // The second rank began later and reads another tensor.
            asked += read(&mut strides, row * 5 * MIB, 1000).len();
            asked += read(&mut strides, 500 * MIB + row * 3 * MIB, 2000).len();
        }
        assert!(asked > 40, "{asked}");
    }

    #[test]
    fn random_backward_and_distant_reads_are_no_stride() {
        let mut strides = Strides::default();
        let mut at = 12345u64;
        for _ in 0..5000 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            assert!(read(&mut strides, (at >> 20) % (900 * MIB), 4096).is_empty());
        }
        let mut strides = Strides::default();
        for step in 0..100 {
            assert!(read(&mut strides, (900 - step * 9) * MIB, 4096).is_empty());
        }
        let mut strides = Strides::default();
        for step in 0..15 {
            assert!(read(&mut strides, step * 65 * MIB, 4096).is_empty());
        }
    }

    #[test]
    fn nothing_is_asked_for_beyond_the_segment_or_the_window() {
        let mut strides = Strides::default();
        let covers = 0..40 * MIB;
        for start in (0..40 * MIB).step_by(4 << 20) {
            let read = start..start + MIB;
            for range in strides.on_read(0, &covers, &read, 2 * MIB).unwrap_or_default() {
                assert!(range.end <= covers.end && range.start <= start + 8 * MIB, "{range:?}");
            }
        }
    }
}
