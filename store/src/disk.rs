//! What the store does to its files that a power loss can undo.
//!
//! One place for it, so that a test can stand in for a disk that forgets whatever was not synced.
//! Everything else (opening, mapping, reading) needs no such care.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};

/// How sure a write must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Replaced atomically; after a power loss it may be gone or damaged, which is noticed.
    Atomic,
    /// Replaced atomically and on disk when the call returns.
    Synced,
}

/// A disk. All of it is blocking I/O.
pub(crate) trait Disk: fmt::Debug + Send + Sync {
    /// Writes to a file, `file`, that is at `path`.
    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes what was written to a file so far survive a power loss.
    fn sync_data(&self, path: &Path) -> io::Result<()>;

    /// Frees the blocks of a part of a file, which keeps its length.
    fn punch(&self, path: &Path, range: Range<u64>) -> io::Result<()>;

    /// Replaces a small file whole; the old one stays if that fails.
    fn replace(&self, path: &Path, content: &[u8], durability: Durability) -> io::Result<()>;

    /// Removes a small file, if it is there; it is gone from the disk when the call returns.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The real one.
#[derive(Debug)]
pub(crate) struct LocalDisk;

impl Disk for LocalDisk {
    fn write_at(&self, file: &File, _path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn sync_data(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_data()
    }

    fn punch(&self, path: &Path, range: Range<u64>) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        let offset = i64::try_from(range.start).map_err(io::Error::other)?;
        let len = i64::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, mode, offset, len)?;
        Ok(())
    }

    fn replace(&self, path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
        // Distinct names, so that two writers of one document don't write into one file.
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", WRITES.fetch_add(1, Ordering::Relaxed)));
        let temporary = path.with_file_name(name);
        let written = write_new(&temporary, content, durability)
            // The commit point: before it the old document holds, after it the new one.
            .and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            // The first failure is what counts; a left-over file is overwritten or removed later.
            let _ = fs::remove_file(&temporary);
            return written;
        }
        match durability {
            Durability::Atomic => Ok(()),
            Durability::Synced => sync_parent(path),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_parent(path),
        }
    }
}

fn write_new(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    match durability {
        Durability::Atomic => Ok(()),
        Durability::Synced => file.sync_all(),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
