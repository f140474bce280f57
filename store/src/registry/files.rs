//! Files that say how to reach a registry: read with a bound, and watched for changes.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Reads a file of that size at the most.
pub(super) fn read(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![];
    File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(io::Error::other(format!("it is larger than {} MiB", max_bytes >> 20)));
    }
    Ok(bytes)
}

/// How files and directories were when they were looked at, also that they were not there.
#[derive(Debug, Default)]
pub(super) struct Stamp(Vec<(PathBuf, Option<State>)>);

/// Device, inode, size, and time of the last change of status, which nobody can set.
type State = (u64, u64, u64, i64, i64);

impl Stamp {
    /// To be called before it is read: what changes in between is seen later.
    pub(super) fn note(&mut self, path: &Path) {
        self.0.push((path.to_owned(), state(path)));
    }

    pub(super) fn is_current(&self) -> bool {
        self.0.iter().all(|(path, noted)| state(path) == *noted)
    }
}

fn state(path: &Path) -> Option<State> {
    let metadata = fs::metadata(path).ok()?;
    let (seconds, nanos) = (metadata.ctime(), metadata.ctime_nsec());
    Some((metadata.dev(), metadata.ino(), metadata.len(), seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_changes_or_goes_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts.toml");
        let stamp = || {
            let mut stamp = Stamp::default();
            stamp.note(&path);
            stamp
        };
        let before = stamp();
        assert!(before.is_current());
        fs::write(&path, "a").unwrap();
        assert!(!before.is_current());
        let small = stamp();
        assert!(small.is_current());
        fs::write(&path, "ab").unwrap();
        assert!(!small.is_current());
        let here = stamp();
        fs::remove_file(&path).unwrap();
        assert!(!here.is_current());
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, [0; 17]).unwrap();
        assert_eq!(read(&path, 17).unwrap().len(), 17);
        assert!(read(&path, 16).is_err());
    }
}
