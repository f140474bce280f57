//! What the store has counted since it was opened, for whoever watches it.
//!
//! Invariants: counting is one relaxed atomic addition, without a lock and without memory, so
//! that a read can afford it; nothing is ever set back; how many counters there are does not
//! depend on blobs, hosts or names.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::source::SourceKind;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one more.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts so many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// What was counted.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of times, in nanoseconds: from what a page that is in memory takes to what a
/// source that is away for a while does.
pub const TIME_BOUNDS: &[u64] = &[
    10_000,
    50_000,
    100_000,
    500_000,
    1_000_000,
    5_000_000,
    10_000_000,
    50_000_000,
    100_000_000,
    500_000_000,
    1_000_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
];

/// Upper bounds of read-ahead windows, in bytes: powers of two.
const WINDOW_BOUNDS: &[u64] =
    &[1 << 20, 8 << 20, 16 << 20, 32 << 20, 64 << 20, 128 << 20, 256 << 20, 512 << 20];

/// How many values there were up to each of some bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One for each bound, and one for what is above them all.
    buckets: Box<[Counter]>,
    sum: Counter,
}

/// What a histogram has counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistogramValues {
    /// Values by bucket: up to a bound and above the one before it, as
    /// [`Histogram::bounds`] has them; the last is of those above all bounds.
    pub buckets: Vec<u64>,
    /// The sum of all values.
    pub sum: u64,
}

impl Histogram {
    /// Nothing counted yet; the bounds grow.
    pub fn new(bounds: &'static [u64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| Counter::default()).collect();
        Self { bounds, buckets, sum: Counter::default() }
    }

    /// Counts a value.
    pub fn observe(&self, value: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.increment();
        }
        self.sum.add(value);
    }

    /// Counts a time, in nanoseconds.
    pub fn observe_time(&self, time: Duration) {
        self.observe(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The upper bounds of all buckets but the last, which has none.
    pub const fn bounds(&self) -> &'static [u64] {
        self.bounds
    }

    /// What was counted. While others count, the sum can be a value ahead of the buckets.
    pub fn values(&self) -> HistogramValues {
        let buckets = self.buckets.iter().map(Counter::get).collect();
        HistogramValues { buckets, sum: self.sum.get() }
    }
}

/// Bytes by the kind of source that they came from.
#[derive(Debug, Default)]
pub struct BySource([Counter; SourceKind::ALL.len()]);

impl BySource {
    /// Bytes came from a source of that kind.
    pub(crate) fn add(&self, kind: SourceKind, bytes: u64) {
        if let Some(counter) = self.0.get(kind as usize) {
            counter.add(bytes);
        }
    }

    /// Bytes of that kind.
    pub fn get(&self, kind: SourceKind) -> u64 {
        self.0.get(kind as usize).map_or(0, Counter::get)
    }

    /// Bytes of all kinds.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

/// What a store has counted.
#[derive(Debug)]
pub struct Counters {
    /// Bytes that came from sources, those that were thrown away included.
    pub fetched: BySource,
    /// Requests that brought all that they were to bring.
    pub requests_done: Counter,
    /// Requests that were given up.
    pub requests_failed: Counter,
    /// Times that a source was asked again, or the next one, because something had failed.
    pub retries: Counter,
    /// Answers of hosts that said that they were asked too much.
    pub complaints: Counter,
    /// Time until the first byte of an answer.
    pub first_byte: Histogram,
    /// Slow requests that were sent a second time.
    pub hedges: Counter,
    /// Those of them that overtook the first.
    pub hedges_won: Counter,
    /// Windows of read-ahead that were asked for, in bytes.
    pub windows: Histogram,
    /// Chunks that were handed to their readers in memory, because the disk had no room.
    pub loose_chunks: Counter,
    /// Chunks that were not what their digests promise.
    pub wrong_chunks: Counter,
    /// Blobs that hash to their digest.
    pub verified_blobs: Counter,
    /// Blobs that don't.
    pub poisoned_blobs: Counter,
    /// Blobs that nobody used and that were evicted, and their bytes on disk.
    pub evicted_blobs: Counter,
    /// See `evicted_blobs`.
    pub evicted_blob_bytes: Counter,
    /// Extents of blobs in use that were evicted, and their bytes.
    pub evicted_extents: Counter,
    /// See `evicted_extents`.
    pub evicted_extent_bytes: Counter,
}

impl Default for Counters {
    fn default() -> Self {
        let (counter, bytes) = (Counter::default, BySource::default());
        Self {
            fetched: bytes,
            requests_done: counter(),
            requests_failed: counter(),
            retries: counter(),
            complaints: counter(),
            first_byte: Histogram::new(TIME_BOUNDS),
            hedges: counter(),
            hedges_won: counter(),
            windows: Histogram::new(WINDOW_BOUNDS),
            loose_chunks: counter(),
            wrong_chunks: counter(),
            verified_blobs: counter(),
            poisoned_blobs: counter(),
            evicted_blobs: counter(),
            evicted_blob_bytes: counter(),
            evicted_extents: counter(),
            evicted_extent_bytes: counter(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_counted_in_the_first_bucket_that_it_fits() {
        let histogram = Histogram::new(&[10, 20]);
        for value in [0, 10, 11, 20, 21, 1000] {
            histogram.observe(value);
        }
        let expected = HistogramValues { buckets: vec![2, 2, 2], sum: 1062 };
        assert_eq!(histogram.values(), expected);
    }

    #[test]
    fn bounds_grow() {
        for bounds in [TIME_BOUNDS, WINDOW_BOUNDS] {
            assert!(bounds.is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn each_kind_of_source_has_its_own_counter() {
        let counters = BySource::default();
        for (number, kind) in (1..).zip(SourceKind::ALL) {
            counters.add(kind, number);
        }
        let counted = SourceKind::ALL.map(|kind| counters.get(kind));
        assert!(counted.is_sorted_by(|a, b| a < b) && counted[0] == 1, "{counted:?}");
        assert_eq!(counters.total(), counted.into_iter().sum::<u64>());
    }
}
