//! What was read through a mount since it is served by this process.
//!
//! Reads of files that the kernel passes through to their cache files never come here: of those
//! only the opens are known.

use std::time::Duration;

use weightfs_store::{Counter, Histogram, ReadError, TIME_BOUNDS};

use crate::filesystem::FsError;

/// Where the bytes of a read were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFrom {
    /// In the cache: it was answered at once.
    Cache,
    /// Some of them had to be fetched, or waited for.
    Fetch,
}

impl ReadFrom {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 2] = [Self::Cache, Self::Fetch];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Fetch => "fetch",
        }
    }
}

/// How a read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadResult {
    /// With its bytes.
    Ok,
    /// No source gave them in time.
    Deadline,
    /// A source refused them for good.
    Source,
    /// The blob does not hash to its digest.
    Poisoned,
    /// The cache could not be read or written.
    Cache,
    /// There is nothing to read: a stale inode, a directory, a range that is in no file.
    Invalid,
}

impl ReadResult {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 6] =
        [Self::Ok, Self::Deadline, Self::Source, Self::Poisoned, Self::Cache, Self::Invalid];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Deadline => "deadline",
            Self::Source => "source",
            Self::Poisoned => "poisoned",
            Self::Cache => "cache",
            Self::Invalid => "invalid",
        }
    }
}

impl From<&FsError> for ReadResult {
    fn from(error: &FsError) -> Self {
        match error {
            FsError::Read(ReadError::Deadline { .. }) => Self::Deadline,
            FsError::Read(ReadError::Source { .. }) => Self::Source,
            FsError::Read(ReadError::Poisoned { .. }) => Self::Poisoned,
            FsError::Read(ReadError::Cache { .. }) => Self::Cache,
            FsError::Read(ReadError::OutOfRange { .. })
            | FsError::NotFound
            | FsError::Stale(_)
            | FsError::NotADirectory(_)
            | FsError::NotAFile(_)
            | FsError::NotASymlink(_)
            | FsError::NoAttribute => Self::Invalid,
        }
    }
}

/// Reads of one kind.
#[derive(Debug)]
struct Reads {
    ended: [Counter; ReadResult::ALL.len()],
    bytes: Counter,
    time: Histogram,
}

impl Default for Reads {
    fn default() -> Self {
        let (ended, bytes) = Default::default();
        Self { ended, bytes, time: Histogram::new(TIME_BOUNDS) }
    }
}

/// What was read through a mount.
#[derive(Debug, Default)]
pub struct MountCounters {
    cache: Reads,
    fetch: Reads,
    /// Opens of files whose reads come here.
    pub opens_served: Counter,
    /// Opens of files that the kernel reads by itself.
    pub opens_passed: Counter,
    /// Reads that began to wait, and those of them that are over.
    pub(crate) waits_begun: Counter,
    pub(crate) waits_ended: Counter,
    /// Reads that waited beyond their deadline.
    pub hung: Counter,
}

impl MountCounters {
    /// A read is over; `time` is from its request to its answer.
    pub(crate) fn read(&self, from: ReadFrom, result: ReadResult, bytes: u64, time: Duration) {
        let reads = self.of(from);
        if let Some(ended) = reads.ended.get(result as usize) {
            ended.increment();
        }
        reads.bytes.add(bytes);
        reads.time.observe_time(time);
    }

    const fn of(&self, from: ReadFrom) -> &Reads {
        match from {
            ReadFrom::Cache => &self.cache,
            ReadFrom::Fetch => &self.fetch,
        }
    }

    /// Reads that ended so.
    pub fn reads(&self, from: ReadFrom, result: ReadResult) -> u64 {
        self.of(from).ended.get(result as usize).map_or(0, Counter::get)
    }

    /// Bytes that were answered.
    pub fn bytes(&self, from: ReadFrom) -> u64 {
        self.of(from).bytes.get()
    }

    /// Time from request to answer.
    pub fn time(&self, from: ReadFrom) -> &Histogram {
        &self.of(from).time
    }

    /// Reads that wait now.
    pub fn waiting(&self) -> u64 {
        // In this order: one that begins between the two looks is not seen as ended.
        let ended = self.waits_ended.get();
        self.waits_begun.get().saturating_sub(ended)
    }
}

/// What was read of one tree.
#[derive(Debug, Default)]
pub struct TreeCounters {
    /// Reads whose bytes were here.
    pub hits: Counter,
    /// Bytes of these.
    pub hit_bytes: Counter,
    /// Reads that had to wait.
    pub misses: Counter,
    /// Bytes of these.
    pub missed_bytes: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_counted_by_kind_and_result() {
        let counters = MountCounters::default();
        for from in ReadFrom::ALL {
            for (times, result) in (1..).zip(ReadResult::ALL) {
                for _ in 0..times {
                    counters.read(from, result, 10, Duration::from_millis(1));
                }
            }
        }
        for from in ReadFrom::ALL {
            let ended = ReadResult::ALL.map(|result| counters.reads(from, result));
            assert_eq!(ended, [1, 2, 3, 4, 5, 6], "{from:?}");
            assert_eq!(counters.bytes(from), 210);
            assert_eq!(counters.time(from).values().buckets.iter().sum::<u64>(), 21);
        }
    }
}
