//! What a blob looks like from outside: where its chunks are, and what is on its way.

use std::collections::HashSet;
use std::ops::Range;
use std::time::Duration;

use super::Blob;
use crate::chunk::{ChunkNo, each};

/// What was read within this time is hot.
const HOT: Duration = Duration::from_secs(10);

/// Where a chunk is. The later ones say more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChunkState {
    /// Not here.
    Absent,
    /// Asked for, or about to be.
    InFlight,
    /// Here, and not compared with any digest yet.
    Published,
    /// Here, and what its digest or that of the whole blob promises.
    Verified,
    /// Here, and read a moment ago.
    Hot,
}

impl ChunkState {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 5] =
        [Self::Absent, Self::InFlight, Self::Published, Self::Verified, Self::Hot];

    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::InFlight => "in flight",
            Self::Published => "published",
            Self::Verified => "verified",
            Self::Hot => "hot",
        }
    }
}

/// Some chunks in sequence: how many there are in each state, as [`ChunkState::ALL`] has them.
pub type MapCell = [u32; ChunkState::ALL.len()];

/// What of a blob is on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlight {
    /// Requests that run.
    pub requests: usize,
    /// Bytes that run or wait, those of plans excepted.
    pub bytes: u64,
}

impl Blob {
    /// The states of its chunks, in `cells` parts of about the same size, or one for each chunk if
    /// there are fewer. It is a look and no snapshot: things go on meanwhile.
    pub fn map(&self, cells: usize) -> Vec<MapCell> {
        let total = self.table.all().end.0;
        let cells = u32::try_from(cells).unwrap_or(u32::MAX).min(total);
        let in_flight = self.fetcher.in_flight();
        let edge = |cell: u32| u64::from(total) * u64::from(cell) / u64::from(cells);
        let edge = |cell: u32| ChunkNo(u32::try_from(edge(cell)).unwrap_or(total));
        (0..cells).map(|cell| self.cell(edge(cell)..edge(cell + 1), &in_flight)).collect()
    }

    fn cell(&self, chunks: Range<ChunkNo>, in_flight: &HashSet<ChunkNo>) -> MapCell {
        let mut cell = MapCell::default();
        for chunk in each(&chunks) {
            if let Some(count) = cell.get_mut(self.state_of(chunk, in_flight) as usize) {
                *count += 1;
            }
        }
        cell
    }

    fn state_of(&self, chunk: ChunkNo, in_flight: &HashSet<ChunkNo>) -> ChunkState {
        if !self.is_here(chunk) {
            return match in_flight.contains(&chunk) {
                true => ChunkState::InFlight,
                false => ChunkState::Absent,
            };
        }
        let extents = self.table.extents_of(&(chunk..chunk.next()));
        if extents.into_iter().any(|extent| self.ranks.is_hot(extent, HOT, &self.shared.clock)) {
            return ChunkState::Hot;
        }
        let compared = self.checks.origin().is_some() && !self.checks.has(chunk);
        match self.judgement.is_verified() || compared {
            true => ChunkState::Verified,
            false => ChunkState::Published,
        }
    }

    /// What of it is on its way.
    pub fn in_flight(&self) -> InFlight {
        let chunks = self.fetcher.in_flight();
        let bytes = chunks.iter().map(|chunk| self.table.len_of(*chunk)).sum();
        InFlight { requests: self.fetcher.running(), bytes }
    }
}
