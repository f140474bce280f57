//! Chunks that are to be fetched when there is room, in order. Unlike what waits in a lane, they
//! have no flights, so a plan for a blob of any size takes no memory to speak of.

use std::collections::VecDeque;
use std::ops::Range;

use weightfs_swarm::{GROUP_BYTES, Scatter};

use crate::chunk::ChunkNo;
use crate::layout::CHUNK_BYTES;

/// Ranges of a plan at the most: the files of a large model, each with a few places. What does
/// not fit is left to its readers.
const MAX_RANGES: usize = 4096;

/// Chunks of a group, where they begin with one.
const GROUP_CHUNKS: u32 = (GROUP_BYTES / CHUNK_BYTES) as u32;

/// What is still to be looked at, in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    ranges: VecDeque<Step>,
    /// Where others fetch the same, each has an order of its own.
    scatter: Option<Scatter>,
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

    /// From now on every other time something further on is taken.
    pub(super) fn scatter(&mut self, scatter: Scatter) {
        self.scatter = Some(scatter);
    }

    /// Puts the group that is next before all else.
    fn bring_forward(&mut self) {
        let room = self.ranges.len() + 2 <= MAX_RANGES;
        let (Some(scatter), Some(Step { order, chunks }), true) =
            (&mut self.scatter, self.ranges.front(), room)
        else {
            return;
        };
        let (order, Range { start, end }) = (*order, chunks.clone());
        let groups = end.0.saturating_sub(start.0).div_ceil(GROUP_CHUNKS);
        let next = scatter.next(usize::try_from(groups).unwrap_or(0));
        let next = u32::try_from(next).unwrap_or(0).saturating_mul(GROUP_CHUNKS);
        if next == 0 {
            return;
        }
        let at = ChunkNo(start.0.saturating_add(next));
        let after = ChunkNo(at.0.saturating_add(GROUP_CHUNKS)).min(end);
        self.ranges.pop_front();
        for chunks in [after..end, start..at, at..after] {
            if !chunks.is_empty() {
                self.ranges.push_front(Step { order, chunks });
            }
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
        self.bring_forward();
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
    fn a_scattered_plan_is_carried_out_in_another_order_and_wholly() {
        let all = |seed| {
            let mut plan = Plan::default();
            plan.scatter(Scatter::new(seed));
            plan.add(0, chunks(0..1000));
            let cut = |_| ChunkNo(1000);
            let taken: Vec<_> = std::iter::from_fn(|| plan.take(|_| true, cut, 4)).collect();
            taken
        };
        let (one, other) = (all(1), all(2));
        assert_ne!(one, other);
        let mut chunks: Vec<_> = one.iter().flat_map(|range| range.start.0..range.end.0).collect();
        assert!(!chunks.is_sorted());
        chunks.sort_unstable();
        assert_eq!(chunks, (0..1000).collect::<Vec<_>>());
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
