//! Chunks that are to be fetched when there is room, in order. Unlike what waits in a lane, they
//! have no flights, so a plan for a blob of any size takes no memory to speak of.

use std::collections::VecDeque;
use std::ops::Range;

use crate::chunk::ChunkNo;

/// Ranges of a plan at the most: the files of a large model, each with a few places. What does
/// not fit is left to its readers.
const MAX_RANGES: usize = 4096;

/// What is still to be looked at, in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    ranges: VecDeque<Step>,
}

/// Chunks, and when they were planned: a number that grows over all blobs.
#[derive(Debug)]
struct Step {
    order: u64,
    chunks: Range<ChunkNo>,
}

impl Plan {
    /// Adds chunks at the end, unless they are in one of its ranges.
    pub(super) fn add(&mut self, order: u64, chunks: Range<ChunkNo>) {
        let known = |Step { chunks: range, .. }: &Step| {
            range.start <= chunks.start && chunks.end <= range.end
        };
        if !self.ranges.iter().any(known) && self.ranges.len() < MAX_RANGES {
            self.ranges.push_back(Step { order, chunks });
        }
    }

    /// When the first of them was planned.
    pub(super) fn first_order(&self) -> Option<u64> {
        self.ranges.front().map(|step| step.order)
    }

    /// Drops what lies in `chunks`.
    pub(super) fn drop_within(&mut self, chunks: &Range<ChunkNo>) {
        let within =
            |range: &Range<ChunkNo>| chunks.start <= range.start && range.end <= chunks.end;
        self.ranges.retain(|step| !within(&step.chunks));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Takes out the next chunks that are `wanted`: adjacent ones, `most` at the most, none from
    /// `cut(first)` on. What is not wanted before them is dropped.
    pub(super) fn take(
        &mut self,
        wanted: impl Fn(ChunkNo) -> bool,
        cut: impl Fn(ChunkNo) -> ChunkNo,
        most: u32,
    ) -> Option<Range<ChunkNo>> {
        while let Some(Step { chunks: range, .. }) = self.ranges.front_mut() {
            while range.start < range.end && !wanted(range.start) {
                range.start = range.start.next();
            }
            let first = range.start;
            let limit = range.end.min(cut(first)).min(ChunkNo(first.0.saturating_add(most)));
            while range.start < limit && wanted(range.start) {
                range.start = range.start.next();
            }
            let taken = first..range.start;
            if range.is_empty() {
                self.ranges.pop_front();
            }
            if !taken.is_empty() {
                return Some(taken);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(range: Range<u32>) -> Range<ChunkNo> {
        ChunkNo(range.start)..ChunkNo(range.end)
    }

    fn all(plan: &mut Plan, wanted: impl Fn(u32) -> bool) -> Vec<Range<ChunkNo>> {
        // Segments of 10 chunks.
        let cut = |chunk: ChunkNo| ChunkNo(chunk.0 / 10 * 10 + 10);
        std::iter::from_fn(|| plan.take(|chunk| wanted(chunk.0), cut, 4)).collect()
    }

    #[test]
    fn ranges_are_taken_in_order_up_to_cuts_and_gaps() {
        let mut plan = Plan::default();
        plan.add(0, chunks(30..33));
        plan.add(0, chunks(4..14));
        plan.add(0, chunks(31..33));
        let expected = [chunks(30..33), chunks(4..6), chunks(7..10), chunks(10..14)];
        assert_eq!(all(&mut plan, |chunk| chunk != 6), expected);
        assert!(plan.is_empty());
    }

    #[test]
    fn what_is_dropped_or_not_wanted_is_never_taken() {
        let mut plan = Plan::default();
        plan.add(0, chunks(0..2));
        plan.add(0, chunks(8..10));
        plan.drop_within(&chunks(8..10));
        assert_eq!(all(&mut plan, |_| true), [chunks(0..2)]);
        plan.add(0, chunks(3..9));
        assert_eq!(all(&mut plan, |_| false), []);
    }

    #[test]
    fn a_plan_is_bounded() {
        let mut plan = Plan::default();
        for start in 0..10_000 {
            plan.add(0, chunks(2 * start..2 * start + 1));
        }
        assert_eq!(plan.ranges.len(), MAX_RANGES);
    }
}
