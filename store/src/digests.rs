//! The sha256 of each chunk of a blob, where somebody knows them: from an index, or because the
//! whole was hashed here.
//!
//! A document beside the blob, used where it lies: for 100 GB it has 3 MB, which are mapped and
//! not copied. Its payload: the layout's fingerprint (32 bytes), who says so (1), 32 bytes for
//! each chunk.
//!
//! Invariant: there is one digest for each chunk of the layout that they are used with.

use std::io;
use std::path::Path;

use crate::Digest;
use crate::chunk::{ChunkNo, ChunkTable};
use crate::disk::{Disk, Durability};
use crate::document::{self, Kind, Mapped};
use crate::state::fingerprint;

/// The file that holds them.
const FILE: &str = "digests";

/// Bytes of a digest.
const DIGEST_BYTES: usize = 32;

/// Bytes before the digests.
const HEAD_BYTES: usize = DIGEST_BYTES + 1;

/// Who says what the chunks hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// An index, which was found beside the artifact.
    Index,
    /// This store: they were made of bytes that together hash to the blob's digest.
    Whole,
}

impl Origin {
    const fn tag(self) -> u8 {
        match self {
            Self::Index => 1,
            Self::Whole => 2,
        }
    }

    const fn of_tag(tag: u8) -> Option<Self> {
        match tag {
            1 => Some(Self::Index),
            2 => Some(Self::Whole),
            _ => None,
        }
    }
}

/// The digests of all chunks of a blob.
#[derive(Debug)]
pub(crate) struct ChunkDigests {
    document: Mapped,
    origin: Origin,
}

impl ChunkDigests {
    /// Whether `digests` has as many as the blob has chunks.
    pub(crate) fn fit(table: &ChunkTable, digests: &[u8]) -> bool {
        let chunks = usize::try_from(table.all().end.0).ok();
        let bytes = chunks.and_then(|chunks| chunks.checked_mul(DIGEST_BYTES));
        bytes == Some(digests.len())
    }

    /// Those in `dir`, if they are of these cuts. A damaged document is said once, here.
    pub(crate) fn read(dir: &Path, table: &ChunkTable) -> Option<Self> {
        let path = dir.join(FILE);
        let damage = match Mapped::open(&path, Kind::Digests) {
            Ok(None) => return None,
            Ok(Some(document)) => match Self::of(document, table) {
                Some(digests) => return Some(digests),
                None => "they are of other cuts".to_owned(),
            },
            Err(damage) => damage,
        };
        tracing::warn!(path = %path.display(), damage, "chunk digests ignored");
        None
    }

    fn of(document: Mapped, table: &ChunkTable) -> Option<Self> {
        let (layout, rest) = document.payload().split_first_chunk::<DIGEST_BYTES>()?;
        let (tag, digests) = rest.split_first()?;
        let origin = Origin::of_tag(*tag)?;
        let fit = fingerprint(table.layout()).as_raw() == layout && Self::fit(table, digests);
        fit.then_some(Self { document, origin })
    }

    /// Replaces those in `dir` and reads them back. `digests` must fit.
    pub(crate) fn write(
        disk: &dyn Disk,
        dir: &Path,
        table: &ChunkTable,
        digests: &[u8],
        origin: Origin,
    ) -> io::Result<Self> {
        let fingerprint = fingerprint(table.layout());
        let parts = [fingerprint.as_raw(), &[origin.tag()][..], digests];
        // Synced: a record that says what was compared must not outlive what it was compared with.
        document::write_parts(disk, dir, FILE, Kind::Digests, &parts, Durability::Synced)?;
        Self::read(dir, table).ok_or_else(|| io::Error::other("chunk digests can't be read back"))
    }

    /// Who says so.
    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }

    /// What they are known by in records.
    pub(crate) fn id(&self) -> Digest {
        self.document.digest()
    }

    /// Whether they are these.
    pub(crate) fn are(&self, digests: &[u8]) -> bool {
        self.all() == digests
    }

    /// What a chunk must hash to.
    pub(crate) fn get(&self, ChunkNo(chunk): ChunkNo) -> Option<Digest> {
        let at = usize::try_from(chunk).ok()?.checked_mul(DIGEST_BYTES)?;
        let (digest, _) = self.all().get(at..)?.split_first_chunk::<DIGEST_BYTES>()?;
        Some(Digest::from_raw(*digest))
    }

    /// 32 bytes for each chunk.
    pub(crate) fn all(&self) -> &[u8] {
        self.document.payload().get(HEAD_BYTES..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;
    use crate::disk::LocalDisk;
    use crate::layout::{CHUNK_BYTES, Layout};

    fn table(chunks: u64, cuts: &[u64]) -> ChunkTable {
        ChunkTable::new(Layout::new(chunks * CHUNK_BYTES, cuts.iter().copied()).unwrap()).unwrap()
    }

    fn digests(count: u64) -> Vec<u8> {
        (0..count).flat_map(|chunk| *Digest::of(&chunk.to_le_bytes()).as_raw()).collect()
    }

    #[test]
    fn each_chunk_has_the_digest_that_was_written_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let (table, all) = (table(5, &[]), digests(5));
        assert!(ChunkDigests::read(dir.path(), &table).is_none());
        for origin in [Origin::Index, Origin::Whole] {
            ChunkDigests::write(&LocalDisk, dir.path(), &table, &all, origin).unwrap();
            let read = ChunkDigests::read(dir.path(), &table).unwrap();
            assert_eq!(read.origin(), origin);
            assert!(read.are(&all) && !read.are(&digests(4)));
            for chunk in 0..5 {
                let expected = Digest::of(&u64::from(chunk).to_le_bytes());
                assert_eq!(read.get(ChunkNo(chunk)), Some(expected));
            }
            assert_eq!(read.get(ChunkNo(5)), None);
        }
    }

    #[test]
    fn those_of_other_cuts_and_damaged_ones_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let one = table(5, &[]);
        ChunkDigests::write(&LocalDisk, dir.path(), &one, &digests(5), Origin::Index).unwrap();
        assert!(ChunkDigests::read(dir.path(), &table(5, &[CHUNK_BYTES])).is_none());
        assert!(ChunkDigests::read(dir.path(), &table(6, &[])).is_none());
        let good = fs::read(dir.path().join(FILE)).unwrap();
        for bad in [&good[..good.len() - 1], &[], &[0; 4096]] {
            fs::write(dir.path().join(FILE), bad).unwrap();
            assert!(ChunkDigests::read(dir.path(), &one).is_none());
        }
    }

    #[test]
    fn digests_of_100_gb_are_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let chunks = 100_000_000_000 / CHUNK_BYTES;
        let table = table(chunks, &[]);
        let all = vec![7; usize::try_from(chunks).unwrap() * DIGEST_BYTES];
        ChunkDigests::write(&LocalDisk, dir.path(), &table, &all, Origin::Index).unwrap();
        let began = Instant::now();
        let read = ChunkDigests::read(dir.path(), &table).unwrap();
        println!("opened in {:?}", began.elapsed());
        assert_eq!(read.get(ChunkNo(90_000)), Some(Digest::from_raw([7; 32])));
    }
}
