//! The record of a blob: which chunks are here and whether the whole can be believed.
//!
//! Invariants: a record is written only after the data that it speaks of is synced, so it may
//! know less than is there, never more. A record of other cuts, or one that is damaged, means
//! that nothing is cached.

use std::io;
use std::path::Path;

use crate::Digest;
use crate::chunk::ChunkTable;
use crate::disk::{Disk, Durability};
use crate::document::{self, Found, Kind};
use crate::layout::Layout;

/// The file that holds it.
const FILE: &str = "state";

/// Removes the record in `dir`; it is gone from the disk when the call returns.
pub(crate) fn remove(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    disk.remove(&dir.join(FILE))
}

/// The judgement of a whole blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It hashes to its digest.
    Verified,
    /// It hashes to another one.
    Poisoned {
        /// The digest that it has.
        actual: Digest,
    },
}

/// What a restart needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// The judgement, if the whole was hashed.
    pub(crate) verdict: Option<Verdict>,
    /// What all that is here was compared with: see `digests.rs`. Only without a verdict.
    pub(crate) compared: Option<Digest>,
    /// The epoch in which what is here was written, or hashed, last: see `store/session.rs`.
    pub(crate) epoch: u64,
    /// A bit for each chunk that is here.
    pub(crate) present: Vec<u64>,
}

impl Record {
    /// The record of a complete, believed blob.
    pub(crate) fn complete(table: &ChunkTable, epoch: u64) -> Self {
        let chunks = table.all().end.0;
        let word = |index: u32| match chunks - index * 64 {
            64.. => u64::MAX,
            rest => (1 << rest) - 1,
        };
        let present = (0..chunks.div_ceil(64)).map(word).collect();
        Self { verdict: Some(Verdict::Verified), compared: None, epoch, present }
    }

    /// Replaces the record in `dir`; it is on disk when the call returns.
    pub(crate) fn write(&self, disk: &dyn Disk, dir: &Path, layout: &Layout) -> io::Result<()> {
        document::write(disk, dir, FILE, Kind::State, &self.encode(layout), Durability::Synced)
    }

    /// The record in `dir`. A damaged or foreign one is said once, here, and is `None`.
    pub(crate) fn read(dir: &Path, table: &ChunkTable) -> Option<Self> {
        let path = dir.join(FILE);
        let damage = match document::read(&path, Kind::State) {
            Found::Nothing => return None,
            Found::Damaged(damage) => damage,
            Found::Payload(payload) => match Self::decode(&payload, table) {
                Some(record) => return Some(record),
                None => "it speaks of other cuts".into(),
            },
        };
        tracing::warn!(path = %path.display(), damage, "blob state ignored: nothing is cached");
        None
    }

    /// The layout's fingerprint, the verdict (0 none, 1 verified, 2 poisoned, 3 none, but compared
    /// chunk by chunk), the digest that the bytes have (2) or of the chunk digests (3) or zeros,
    /// the epoch, the bitmap's words.
    pub(crate) fn encode(&self, layout: &Layout) -> Vec<u8> {
        let (tag, digest) = match (self.verdict, self.compared) {
            (None, None) => (0u8, [0; 32]),
            (Some(Verdict::Verified), _) => (1, [0; 32]),
            (Some(Verdict::Poisoned { actual }), _) => (2, *actual.as_raw()),
            (None, Some(digests)) => (3, *digests.as_raw()),
        };
        let mut bytes = fingerprint(layout).as_raw().to_vec();
        bytes.push(tag);
        bytes.extend_from_slice(&digest);
        bytes.extend_from_slice(&self.epoch.to_le_bytes());
        bytes.extend(self.present.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    }

    pub(crate) fn decode(bytes: &[u8], table: &ChunkTable) -> Option<Self> {
        let (layout, rest) = bytes.split_first_chunk::<32>()?;
        let (tag, rest) = rest.split_first()?;
        let (digest, rest) = rest.split_first_chunk::<32>()?;
        let digest = Digest::from_raw(*digest);
        let (epoch, words) = rest.split_first_chunk::<8>()?;
        let epoch = u64::from_le_bytes(*epoch);
        let (verdict, compared) = match tag {
            0 => (None, None),
            1 => (Some(Verdict::Verified), None),
            2 => (Some(Verdict::Poisoned { actual: digest }), None),
            3 => (None, Some(digest)),
            _ => return None,
        };
        let (words, rest) = words.as_chunks::<8>();
        let present: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let expected = usize::try_from(table.all().end.0.div_ceil(64)).ok()?;
        let fits = rest.is_empty() && present.len() == expected;
        (fits && fingerprint(table.layout()).as_raw() == layout).then_some(Self {
            verdict,
            compared,
            epoch,
            present,
        })
    }
}

/// A digest that differs for layouts that differ.
pub(crate) fn fingerprint(layout: &Layout) -> Digest {
    let starts = (0..layout.segments()).filter_map(|index| layout.segment(index));
    let mut bytes = layout.size().to_le_bytes().to_vec();
    bytes.extend(starts.flat_map(|segment| segment.start.to_le_bytes()));
    Digest::of(&bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::LocalDisk;
    use crate::layout::CHUNK_BYTES;

    fn table(cuts: &[u64]) -> ChunkTable {
        let layout = Layout::new(100 * CHUNK_BYTES, cuts.iter().copied()).unwrap();
        ChunkTable::new(layout).unwrap()
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let table = table(&[CHUNK_BYTES]);
        let actual = Digest::of(b"other");
        let standings = [
            (None, None),
            (Some(Verdict::Verified), None),
            (Some(Verdict::Poisoned { actual }), None),
            (None, Some(actual)),
        ];
        for (verdict, compared) in standings {
            let record = Record { verdict, compared, epoch: 7, present: vec![5, 1 << 35] };
            record.write(&LocalDisk, dir.path(), table.layout()).unwrap();
            assert_eq!(Record::read(dir.path(), &table), Some(record));
        }
    }

    #[test]
    fn a_complete_record_has_each_chunk_and_no_more() {
        assert_eq!(Record::complete(&table(&[]), 1).present, [u64::MAX, (1 << 36) - 1]);
        let empty = ChunkTable::new(Layout::whole(0)).unwrap();
        assert!(Record::complete(&empty, 1).present.is_empty());
        let even = ChunkTable::new(Layout::whole(128 * CHUNK_BYTES)).unwrap();
        assert_eq!(Record::complete(&even, 1).present, [u64::MAX; 2]);
    }

    #[test]
    fn a_record_of_other_cuts_means_nothing_is_cached() {
        let dir = tempfile::tempdir().unwrap();
        let one = table(&[CHUNK_BYTES]);
        Record::complete(&one, 1).write(&LocalDisk, dir.path(), one.layout()).unwrap();
        assert_eq!(Record::read(dir.path(), &table(&[2 * CHUNK_BYTES])), None);
        assert_eq!(Record::read(dir.path(), &table(&[])), None);
    }

    #[test]
    fn a_torn_record_means_nothing_is_cached() {
        let dir = tempfile::tempdir().unwrap();
        let table = table(&[]);
        assert_eq!(Record::read(dir.path(), &table), None, "no record at all");
        Record::complete(&table, 1).write(&LocalDisk, dir.path(), table.layout()).unwrap();
        let good = fs::read(dir.path().join(FILE)).unwrap();
        for bad in [&good[..good.len() - 1], &[], &[0xaa; 4096]] {
            fs::write(dir.path().join(FILE), bad).unwrap();
            assert_eq!(Record::read(dir.path(), &table), None);
        }
    }
}
