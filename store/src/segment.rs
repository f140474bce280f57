//! The cache files of a blob: one sparse file for each segment, filled by `pwrite`, served from a
//! read-only mapping.
//!
//! Invariants: a file has its segment's length from the moment it is mapped and is never
//! truncated while its blob is open, so a mapping can't fault past the end (SIGBUS). Nothing is
//! written through a mapping (a full disk would be SIGBUS, too). Descriptors are held only while
//! a request fills a file: a blob may have many thousand segments.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};
use nix::unistd::{Whence, lseek};

use crate::Layout;
use crate::disk::Disk;

/// Mappings that a store keeps at the most. The kernel allows a process 65,530 by default
/// (vm.max_map_count), and others in the process need some. What is not mapped is read by `pread`.
const MAX_MAPPINGS: usize = 32_768;

/// Bytes of a block of a file system at the most (xfs). A chunk is a multiple of it.
const MAX_BLOCK_BYTES: u64 = 64 << 10;

/// Counts the mappings of a store.
#[derive(Debug, Default)]
pub(crate) struct MappingBudget(AtomicUsize);

/// One mapping of the budget; given back when it is dropped.
#[derive(Debug)]
struct Share(Arc<MappingBudget>);

impl MappingBudget {
    fn take(self: &Arc<Self>) -> Option<Share> {
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        let share = Share(Arc::clone(self));
        (before < MAX_MAPPINGS).then_some(share)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Mapping {
    map: MmapRaw,
    _share: Share,
}

/// Published bytes of a segment.
#[derive(Debug)]
pub(crate) enum View {
    /// In the mapping; get them with [`Segments::mapped`].
    Mapped,
    /// Read into memory, because there are too many mappings.
    Copied(Vec<u8>),
}

/// The cache files of a blob.
#[derive(Debug)]
pub(crate) struct Segments {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    mappings: Box<[OnceLock<Mapping>]>,
    budget: Arc<MappingBudget>,
}

impl Segments {
    pub(crate) fn new(
        dir: PathBuf,
        count: usize,
        disk: Arc<dyn Disk>,
        budget: Arc<MappingBudget>,
    ) -> Self {
        Self { dir, disk, mappings: (0..count).map(|_| OnceLock::new()).collect(), budget }
    }

    /// The disk that they are on.
    pub(crate) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Writes to the file of a segment, which [`Segments::open_to_fill`] gave.
    pub(crate) fn write(
        &self,
        file: &File,
        segment: usize,
        bytes: &[u8],
        offset: u64,
    ) -> io::Result<()> {
        self.disk.write_at(file, &path(&self.dir, segment), bytes, offset)
    }

    /// The directory that they are in.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file to fill a segment through; made, of full length and without a block, if it is
    /// not there.
    pub(crate) fn open_to_fill(&self, segment: usize, len: u64) -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path(&self.dir, segment))?;
        if file.metadata()?.len() < len {
            file.set_len(len)?;
        }
        Ok(file)
    }

    /// The file, to read.
    pub(crate) fn open(&self, segment: usize) -> io::Result<File> {
        File::open(path(&self.dir, segment))
    }

    /// Where the file has blocks, in order and without what touches; nothing if it is not there or
    /// was cut. A record that claims more was not written by us: a hole reads as zeros.
    pub(crate) fn filled(&self, segment: usize, layout: &Layout) -> Vec<Range<u64>> {
        let len = layout.segment(segment).map_or(0, |bytes| bytes.end - bytes.start);
        let Ok(file) = self.open(segment) else { return vec![] };
        if !file.metadata().is_ok_and(|found| found.len() == len) {
            return vec![];
        }
        let mut ranges = vec![];
        let mut at = 0;
        // Ends with ENXIO behind the last block (lseek(2)).
        while at < len
            && let Ok(start) = seek(&file, at, Whence::SeekData)
            && let Ok(end) = seek(&file, start, Whence::SeekHole)
            && end > start
        {
            ranges.push(start..end);
            at = end;
        }
        ranges
    }

    /// Makes what was written to the file so far survive a power loss.
    pub(crate) fn sync(&self, segment: usize) -> io::Result<()> {
        self.disk.sync_data(&path(&self.dir, segment))
    }

    /// Gives back the disk space of the bytes `range` of a file. Nobody may be reading them: they
    /// are zeros from here on.
    pub(crate) fn punch(&self, segment: usize, range: Range<u64>) -> io::Result<()> {
        // With the rest of the last block, which is freed only as a whole (ext4_punch_hole).
        let end = range.start + (range.end - range.start).next_multiple_of(MAX_BLOCK_BYTES);
        self.disk.punch(&path(&self.dir, segment), range.start..end)
    }

    /// Readies the bytes `range` of a segment of `len` bytes, counted from its start; they must
    /// be published.
    pub(crate) fn view(&self, segment: usize, len: u64, range: &Range<usize>) -> io::Result<View> {
        let Some(slot) = self.mappings.get(segment) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if slot.get().is_some() {
            return Ok(View::Mapped);
        }
        let file = self.open(segment)?;
        if file.metadata()?.len() < len {
            return Err(io::Error::other(format!("segment-{segment} was cut short")));
        }
        match self.map(&file) {
            Some(mapping) => {
                // Whoever came first keeps the slot; both mappings show the same file.
                let _ = slot.set(mapping);
                Ok(View::Mapped)
            }
            None => {
                let mut bytes = vec![0; range.len()];
                file.read_exact_at(&mut bytes, range.start as u64)?;
                Ok(View::Copied(bytes))
            }
        }
    }

    /// `None` if there are too many mappings already, by our count or by the kernel's.
    fn map(&self, file: &File) -> Option<Mapping> {
        let share = self.budget.take()?;
        let map = MmapOptions::new().map_raw_read_only(file).ok()?;
        Some(Mapping { map, _share: share })
    }

    /// The bytes `range` of a segment that [`Segments::view`] found mapped; empty otherwise.
    pub(crate) fn mapped(&self, segment: usize, range: &Range<usize>) -> &[u8] {
        let Some(mapping) = self.mappings.get(segment).and_then(OnceLock::get) else {
            return &[];
        };
        if range.start > range.end || range.end > mapping.map.len() {
            return &[];
        }
        // SAFETY: the range was just checked against the mapping, which lives as long as `self`.
        // Its bytes are published: nobody writes them again, and the file is never truncated.
        #[expect(unsafe_code, reason = "published bytes of a mapping that others still fill")]
        unsafe {
            std::slice::from_raw_parts(mapping.map.as_ptr().add(range.start), range.len())
        }
    }

    /// Bytes that all files of the directory take on disk.
    pub(crate) fn disk_bytes(&self) -> u64 {
        disk_bytes(&self.dir)
    }
}

/// Bytes that all files of a directory take on disk (`st_blocks`, which is in units of 512 bytes
/// whatever the file system's: stat(2)).
pub(crate) fn disk_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let files = entries.filter_map(|entry| entry.ok()?.metadata().ok());
    files.map(|file| file.blocks() * 512).sum()
}

fn seek(file: &File, from: u64, whence: Whence) -> io::Result<u64> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    let found = lseek(file, from, whence)?;
    u64::try_from(found).map_err(io::Error::other)
}

/// The file of a segment.
pub(crate) fn path(dir: &Path, segment: usize) -> PathBuf {
    dir.join(format!("segment-{segment}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::LocalDisk;

    fn segments(dir: &Path, budget: &Arc<MappingBudget>) -> Segments {
        Segments::new(dir.to_owned(), 2, Arc::new(LocalDisk), Arc::clone(budget))
    }

    #[test]
    fn a_file_is_sparse_and_shows_what_was_filled_in() {
        let dir = tempfile::tempdir().unwrap();
        let segments = segments(dir.path(), &Arc::default());
        let file = segments.open_to_fill(1, 64 << 20).unwrap();
        let layout = Layout::new(65 << 20, [1 << 20]).unwrap();
        assert!(segments.filled(1, &layout).is_empty() && segments.filled(0, &layout).is_empty());
        assert!(matches!(segments.view(1, 64 << 20, &(0..5)).unwrap(), View::Mapped));
        file.write_all_at(b"bytes", 1 << 20).unwrap();
        let at = 1 << 20;
        assert_eq!(segments.mapped(1, &(at..at + 5)), b"bytes");
        assert!(segments.disk_bytes() < 1 << 20);
        let filled = segments.filled(1, &layout);
        let holds = |at: u64| filled.iter().any(|range| range.contains(&at));
        assert!(holds(1 << 20) && holds((1 << 20) + 4) && !holds(0) && !holds(3 << 20));
        assert!(segments.mapped(1, &(0..(64 << 20) + 1)).is_empty());
    }

    #[test]
    fn a_file_that_was_cut_is_an_error_not_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let segments = segments(dir.path(), &Arc::default());
        segments.open_to_fill(0, 4096).unwrap().set_len(100).unwrap();
        assert!(segments.view(0, 4096, &(0..10)).is_err());
        assert!(segments.view(1, 4096, &(0..10)).is_err());
    }

    #[test]
    fn reads_go_on_without_a_mapping_when_there_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let budget = Arc::new(MappingBudget(AtomicUsize::new(MAX_MAPPINGS)));
        let segments = segments(dir.path(), &budget);
        segments.open_to_fill(0, 4096).unwrap().write_all_at(b"bytes", 10).unwrap();
        let View::Copied(bytes) = segments.view(0, 4096, &(10..15)).unwrap() else {
            panic!("mapped over the budget");
        };
        assert_eq!(bytes, b"bytes");
        assert_eq!(budget.0.load(Ordering::Relaxed), MAX_MAPPINGS);
    }

    #[test]
    fn a_dropped_blob_gives_its_mappings_back() {
        let dir = tempfile::tempdir().unwrap();
        let budget = Arc::default();
        let segments = segments(dir.path(), &budget);
        segments.open_to_fill(0, 10).unwrap();
        segments.view(0, 10, &(0..1)).unwrap();
        assert_eq!(budget.0.load(Ordering::Relaxed), 1);
        drop(segments);
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }
}
