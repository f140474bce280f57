//! Which bytes to fetch before they are asked for. A pure state machine: it is told of reads and
//! says what to fetch; it does no I/O and knows no time.
//!
//! Readers are told apart by where they read, not by descriptor or thread: loaders read one file
//! from many threads, and many descriptors show one stream. A *run* is a sequence of reads of
//! which each begins about where the last one ended. When a run has covered
//! [`OPENING_BYTES`] in at least two reads it is a *stream*: it gets a window ahead of it, which
//! doubles each time the reader has come a quarter through. So what is in flight grows fourfold
//! in each round trip of a source that is far away, until the largest window.
//!
//! Reads of one length at one distance from each other are a *stride* ([`strides`]): the slices
//! of a tensor. Random and backward reads continue neither.
//!
//! Invariant: what is asked for lies inside the segment of the read and ahead of what was asked
//! for before in that stream, at most the largest window ahead of the reader.

mod strides;

use std::ops::Range;

use lru::LruCache;

use self::strides::Strides;
/// Runs that are remembered for a blob; the least recently continued one is forgotten. Loaders
/// read with up to 32 threads at once, with some random reads between.
const MAX_RUNS: std::num::NonZeroUsize = std::num::NonZeroUsize::new(64).unwrap();

/// Bytes that a run covers before a window opens. Headers of weight files are mostly shorter, so
/// reading only them fetches little; half a chunk is early enough for readers in small steps,
/// and two requests of the kernel's largest size (1 MiB) are more than enough.
const OPENING_BYTES: u64 = 512 << 10;

/// Bytes that a read may leave out and still continue a run: tensors are aligned, and the kernel
/// skips pages that it has.
const GAP_BYTES: u64 = 256 << 10;

/// Bytes that a read may lie behind its stream and still belong to it: several threads serve the
/// kernel's requests, which thus come out of order.
const REORDER_BYTES: u64 = 8 << 20;

/// How a read relates to those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// It goes on where others were, or is about where they will be.
    Sequential,
    /// It comes from nowhere.
    Random,
}

/// What to make of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Advice {
    pub(crate) access: Access,
    /// What to fetch now, besides what was read.
    pub(crate) ahead: Vec<Range<u64>>,
    /// Bytes of the window that it belongs to.
    pub(crate) window: u64,
}

impl Advice {
    fn new(access: Access, ahead: Vec<Range<u64>>, window: u64) -> Self {
        Self { access, ahead, window }
    }
}

#[derive(Debug)]
enum Phase {
    /// Not enough was read yet to call it a stream.
    Opening {
        /// Bytes read in sequence.
        covered: u64,
    },
    /// A stream, with a window ahead.
    Streaming {
        /// Bytes of the window.
        window: u64,
        /// One past the last byte that was asked for.
        ahead: u64,
    },
}

#[derive(Debug)]
struct Run {
    segment: usize,
    /// One past the last byte that was read.
    position: u64,
    phase: Phase,
}

impl Run {
    fn continues(&self, segment: usize, read: &Range<u64>) -> bool {
        let (from, to) = match self.phase {
            Phase::Opening { .. } => (self.position, self.position),
            Phase::Streaming { ahead, .. } => {
                (self.position.saturating_sub(REORDER_BYTES), ahead.max(self.position))
            }
        };
        self.segment == segment && from <= read.start && read.start <= to.saturating_add(GAP_BYTES)
    }

    /// Moves on to what was read; what to fetch ahead of it now, and for which window.
    fn advance(
        &mut self,
        windows: &Range<u64>,
        covers: &Range<u64>,
        read: &Range<u64>,
    ) -> Option<(Range<u64>, u64)> {
        let new = read.end.saturating_sub(read.start.max(self.position));
        self.position = self.position.max(read.end);
        let (window, from) = match self.phase {
            Phase::Opening { covered } if covered + new < OPENING_BYTES => {
                self.phase = Phase::Opening { covered: covered + new };
                return None;
            }
            Phase::Opening { .. } => (windows.start, self.position),
            Phase::Streaming { window, ahead } => {
                let left = ahead.saturating_sub(self.position);
                if left > window - window / 4 || ahead >= covers.end {
                    return None;
                }
                (window.saturating_mul(2).min(windows.end), ahead.max(self.position))
            }
        };
        let ahead = self.position.saturating_add(window).min(covers.end).max(from);
        self.phase = Phase::Streaming { window, ahead };
        (from < ahead).then_some((from..ahead, window))
    }
}

/// The runs of a blob.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    /// First and largest window, in bytes.
    windows: Range<u64>,
    runs: LruCache<u64, Run>,
    next_run: u64,
    strides: Strides,
}

impl ReadAhead {
    /// Windows begin with `min` bytes and grow up to `max`.
    pub(crate) fn new(min: u64, max: u64) -> Self {
        let windows = min.min(max)..max;
        let runs = LruCache::new(MAX_RUNS);
        Self { windows, runs, next_run: 0, strides: Strides::default() }
    }

    /// Bytes `read` of the blob were asked for, in a segment that covers `covers`.
    pub(crate) fn on_read(
        &mut self,
        segment: usize,
        covers: &Range<u64>,
        read: &Range<u64>,
    ) -> Advice {
        let continued = self.runs.iter().find(|(_, run)| run.continues(segment, read));
        if let Some(run) = continued.map(|(id, _)| *id).and_then(|id| self.runs.get_mut(&id)) {
            let (ahead, window) = run.advance(&self.windows, covers, read).unzip();
            return Advice::new(
                Access::Sequential,
                ahead.into_iter().collect(),
                window.unwrap_or(self.windows.start),
            );
        }
        self.begin(segment, read);
        match self.strides.on_read(segment, covers, read, self.windows.end) {
            Some(ahead) => Advice::new(Access::Sequential, ahead, self.windows.end),
            None => Advice::new(Access::Random, vec![], self.windows.start),
        }
    }

    fn begin(&mut self, segment: usize, read: &Range<u64>) {
        let phase = Phase::Opening { covered: read.end.saturating_sub(read.start) };
        self.runs.put(self.next_run, Run { segment, position: read.end, phase });
        self.next_run = self.next_run.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// What is asked for when `read` is read in `covers`: one range, or none.
    fn on_read(
        ahead: &mut ReadAhead,
        segment: usize,
        covers: &Range<u64>,
        read: &Range<u64>,
    ) -> Option<Range<u64>> {
        let advice = ahead.on_read(segment, covers, read);
        assert!(advice.ahead.len() <= 1, "{advice:?}");
        advice.ahead.into_iter().next()
    }

    fn read_ahead() -> ReadAhead {
        ReadAhead::new(8 * MIB, 128 * MIB)
    }

    /// Reads of `step` bytes from `start` on; what was asked for.
    fn sequence(ahead: &mut ReadAhead, start: u64, step: u64, count: u64) -> Vec<Range<u64>> {
        let reads = (0..count).map(|i| start + i * step..start + (i + 1) * step);
        reads.filter_map(|read| on_read(ahead, 0, &(0..GIB), &read)).collect()
    }

    #[test]
    fn the_second_large_read_opens_a_window_and_windows_double() {
        let mut ahead = read_ahead();
        assert_eq!(on_read(&mut ahead, 0, &(0..GIB), &(0..MIB)), None);
        assert_eq!(on_read(&mut ahead, 0, &(0..GIB), &(MIB..2 * MIB)), Some(2 * MIB..10 * MIB));
        let asked = sequence(&mut ahead, 2 * MIB, MIB, 1000);
        let mut at = 10 * MIB;
        for range in &asked {
            assert_eq!(range.start, at, "no gap and nothing twice");
            at = range.end;
        }
        assert_eq!(asked[0], 10 * MIB..20 * MIB, "16 MiB ahead of the reader at 4 MiB");
        let widest = asked.iter().map(|range| range.end - range.start).max().unwrap();
        assert!((32 * MIB..=128 * MIB).contains(&widest), "{widest}");
    }

    #[test]
    fn a_stream_is_never_further_ahead_than_the_largest_window() {
        let mut ahead = read_ahead();
        for at in 0..900 {
            let read = at * MIB..(at + 1) * MIB;
            if let Some(range) = on_read(&mut ahead, 0, &(0..GIB), &read) {
                assert!(range.end <= read.end + 128 * MIB);
            }
        }
    }

    #[test]
    fn small_sequential_reads_open_a_window_before_the_first_chunk_ends() {
        let asked = sequence(&mut read_ahead(), 0, 4 * KIB, 200);
        assert_eq!(asked, vec![512 * KIB..512 * KIB + 8 * MIB]);
    }

    #[test]
    fn reading_only_a_header_asks_for_nothing() {
        let mut ahead = read_ahead();
        for shard in 0..20 {
            let covers = shard * GIB..(shard + 1) * GIB;
            let start = covers.start;
            let index = usize::try_from(shard).unwrap();
            assert_eq!(on_read(&mut ahead, index, &covers, &(start..start + 8)), None);
            assert_eq!(on_read(&mut ahead, index, &covers, &(start + 8..start + 400 * KIB)), None);
        }
    }

    #[test]
    fn random_reads_ask_for_nothing() {
        let mut ahead = read_ahead();
        let mut at = 12345u64;
        for _ in 0..5000 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = at % (GIB / 4096) * 4096;
            assert_eq!(on_read(&mut ahead, 0, &(0..GIB), &(start..start + 4096)), None);
        }
    }

    #[test]
    fn backward_reads_ask_for_nothing() {
        let mut ahead = read_ahead();
        for at in (0..500).rev() {
            assert_eq!(on_read(&mut ahead, 0, &(0..GIB), &(at * MIB..(at + 1) * MIB)), None);
        }
    }

    #[test]
    fn streams_in_one_segment_don_t_disturb_each_other() {
        let mut ahead = read_ahead();
        let mut asked = vec![0; 8];
        for step in 0..8 {
            for (stream, asked) in asked.iter_mut().enumerate() {
                let start = stream as u64 * 100 * MIB + step * MIB;
                let range = on_read(&mut ahead, 0, &(0..GIB), &(start..start + MIB));
                *asked += range.map_or(0, |range| range.end - range.start);
            }
        }
        assert_eq!(asked, [38 * MIB; 8], "8 MiB, then 16 ahead of 4 MiB, then 32 ahead of 8");
    }

    #[test]
    fn requests_out_of_order_are_still_one_stream() {
        let mut ahead = read_ahead();
        let order = [1, 0, 2, 3, 5, 4, 7, 6, 8, 10, 9, 11, 12, 13, 14, 15];
        let reads = order.map(|at: u64| at * MIB..(at + 1) * MIB);
        let asked: Vec<_> =
            reads.iter().filter_map(|read| on_read(&mut ahead, 0, &(0..GIB), read)).collect();
        assert_eq!(asked[0], 3 * MIB..11 * MIB);
        assert!(asked.windows(2).all(|pair| pair[0].end == pair[1].start), "{asked:?}");
    }

    #[test]
    fn read_ahead_stays_inside_the_segment() {
        let mut ahead = read_ahead();
        let covers = 100 * MIB..105 * MIB;
        let mut asked = vec![];
        for at in 100..105 {
            asked.extend(on_read(&mut ahead, 3, &covers, &(at * MIB..(at + 1) * MIB)));
        }
        assert_eq!(asked, vec![102 * MIB..105 * MIB]);
        let next = 105 * MIB..110 * MIB;
        assert_eq!(on_read(&mut ahead, 4, &next, &(105 * MIB..106 * MIB)), None, "another segment");
    }

    #[test]
    fn forgotten_runs_are_bounded_and_live_streams_survive_random_reads() {
        let mut ahead = read_ahead();
        let mut asked = 0;
        for step in 0..64u64 {
            let range = on_read(&mut ahead, 0, &(0..GIB), &(step * MIB..(step + 1) * MIB));
            asked += range.map_or(0, |range| range.end - range.start);
            for other in 0..10u64 {
                let number = step * 10 + other;
                let at = 512 * MIB + number * 700 * KIB + number.pow(3) % 61 * 3 * KIB;
                assert_eq!(on_read(&mut ahead, 0, &(0..GIB), &(at..at + 4096)), None);
            }
        }
        assert!(asked > 100 * MIB);
        assert!(ahead.runs.len() <= MAX_RUNS.get());
    }

    #[test]
    fn no_window_means_no_read_ahead() {
        assert_eq!(sequence(&mut ReadAhead::new(0, 0), 0, MIB, 100), []);
    }
}
