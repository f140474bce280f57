//! What a directory takes on the disk.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::SnapshotError;
use crate::metadata::Usage;

/// `st_blocks` counts in these, whatever the file system's block size (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// Adds up the allocated blocks of a directory and all below it, a hard-linked file once. What
/// vanishes meanwhile is not counted: a container may be at work in it.
pub(super) fn measure(root: &Path) -> Result<Usage, SnapshotError> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut pending: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let Some(metadata) = unless_gone(fs::symlink_metadata(&path), &path)? else { continue };
        let counted = metadata.nlink() > 1
            && !metadata.is_dir()
            && !linked.insert((metadata.dev(), metadata.ino()));
        if counted {
            continue;
        }
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * STAT_BLOCK_BYTES;
        if metadata.is_dir() {
            let Some(entries) = unless_gone(fs::read_dir(&path), &path)? else { continue };
            for entry in entries {
                pending.extend(unless_gone(entry, &path)?.map(|entry| entry.path()));
            }
        }
    }
    Ok(usage)
}

fn unless_gone<T>(result: io::Result<T>, path: &Path) -> Result<Option<T>, SnapshotError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(SnapshotError::io("measure", path)(error)),
    }
}
