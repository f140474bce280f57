//! Cache files that the kernel reads by itself (FUSE passthrough).
//!
//! Such readers can't be seen, and they outlive us: who has a file open goes on reading it when
//! this process is killed. So each file that is handed out is noted, `kernel/<segment>` in the
//! blob's directory, with the boot of the machine. Whoever opens the blob next asks the kernel
//! whether the file is still open somewhere, and if so, evicts nothing of it.
//!
//! The notes need no sync: after a power loss nobody reads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::Blob;
use super::slice::Hold;
use crate::segment::Segments;
use crate::shared::lock;

/// The directory of the notes.
const NOTES: &str = "kernel";

/// The segments that are handed out, and how often.
#[derive(Debug, Default)]
pub(super) struct HandedOut(Mutex<HashMap<usize, u64>>);

/// Keeps the cache file of a segment as it is, for readers that the store can't see (FUSE
/// passthrough): nothing of it is evicted until this is dropped.
#[derive(Debug)]
pub struct SegmentHold {
    blob: Arc<Blob>,
    segment: usize,
    _hold: Hold,
}

impl SegmentHold {
    /// For a segment that is complete and held.
    pub(super) fn new(blob: &Arc<Blob>, segment: usize, hold: Hold) -> io::Result<Self> {
        let mut handed_out = lock(&blob.handed_out.0);
        let count = handed_out.entry(segment).or_default();
        if *count == 0 {
            let notes = blob.segments.dir().join(NOTES);
            let _entered = blob.enter()?;
            fs::create_dir_all(&notes)?;
            // Before anybody can read the file.
            fs::write(notes.join(segment.to_string()), &*blob.shared.boot)?;
        }
        *count += 1;
        drop(handed_out);
        Ok(Self { blob: Arc::clone(blob), segment, _hold: hold })
    }
}

impl Drop for SegmentHold {
    fn drop(&mut self) {
        let mut handed_out = lock(&self.blob.handed_out.0);
        let Some(count) = handed_out.get_mut(&self.segment) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        handed_out.remove(&self.segment);
        // A note too many costs its reader one question. A store that is closed leaves its notes.
        if let Ok(_entered) = self.blob.enter() {
            let note = self.blob.segments.dir().join(NOTES).join(self.segment.to_string());
            let _ = fs::remove_file(note);
        }
    }
}

/// The segments that an earlier process handed out and that are still open somewhere. Notes of
/// others are removed. To be called before this process has opened one of the files.
pub(super) fn still_read(segments: &Segments, boot: &str) -> Vec<usize> {
    let notes = segments.dir().join(NOTES);
    let Ok(entries) = fs::read_dir(&notes) else { return vec![] };
    let noted = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let noted: Vec<usize> = noted.collect();
    let is_read = |segment: &usize| {
        let note = notes.join(segment.to_string());
        let this_boot = fs::read(&note).is_ok_and(|noted| noted == boot.as_bytes());
        let read = this_boot && is_open_elsewhere(&crate::segment::path(segments.dir(), *segment));
        if !read {
            let _ = fs::remove_file(note);
        }
        read
    };
    noted.into_iter().filter(is_read).collect()
}

/// Whether anybody has the file open, be it the kernel: a write lease is given only to the one
/// who has it open alone (`check_conflicting_open`). What can't be told counts as open.
fn is_open_elsewhere(path: &Path) -> bool {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return error.kind() != io::ErrorKind::NotFound,
    };
    let lease = |kind: i32| {
        // SAFETY: F_SETLEASE takes a descriptor, which is open here, and a number.
        #[expect(unsafe_code, reason = "no safe wrapper for F_SETLEASE")]
        unsafe {
            nix::libc::fcntl(file.as_raw_fd(), nix::libc::F_SETLEASE, kind)
        }
    };
    let alone = lease(nix::libc::F_WRLCK) == 0;
    if alone {
        // Closing the file would give it back, too; nobody may run into it before.
        lease(nix::libc::F_UNLCK);
    }
    !alone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_whether_a_file_is_open_or_mapped_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(!is_open_elsewhere(&path), "there is none");
        fs::write(&path, [1; 4096]).unwrap();
        assert!(!is_open_elsewhere(&path));
        let reader = File::open(&path).unwrap();
        assert!(is_open_elsewhere(&path));
        let mapping = memmap2::MmapOptions::new().map_raw_read_only(&reader).unwrap();
        drop(reader);
        assert!(is_open_elsewhere(&path), "mapped");
        drop(mapping);
        assert!(!is_open_elsewhere(&path));
    }
}
