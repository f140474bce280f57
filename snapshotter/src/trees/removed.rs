//! What removed trees were made of, for as long as the kernel may hold inodes of them: a daemon
//! that is killed meanwhile leaves them to its successor.
//!
//! One small file a tree, `<root>/removed/<number>`. Nothing is synced: when the machine goes
//! down, so does the mount.

use std::io;
use std::path::{Path, PathBuf};

use tracing::warn;
use weightfs_fusefs::TreeNumber;

use super::TreeRecord;

/// Directory below the root.
const DIRECTORY: &str = "removed";

/// The trees that were removed while they were in use.
#[derive(Debug)]
pub struct Removed(PathBuf);

impl Removed {
    /// Those of that state directory.
    ///
    /// # Errors
    /// When the directory can't be made.
    pub fn open(root: &Path) -> io::Result<Self> {
        let directory = root.join(DIRECTORY);
        std::fs::create_dir_all(&directory)?;
        Ok(Self(directory))
    }

    /// Remembers a tree that is about to be removed.
    pub fn put(&self, number: TreeNumber, record: &TreeRecord) {
        let written = serde_json::to_vec(record)
            .map_err(io::Error::from)
            .and_then(|json| std::fs::write(self.path(number), json));
        if let Err(error) = written {
            let tree = number.0;
            warn!(tree, %error, "a removed tree is not remembered: a restart ends its users");
        }
    }

    /// What a removed tree was made of.
    ///
    /// # Errors
    /// When it is not remembered.
    pub fn get(&self, number: TreeNumber) -> io::Result<TreeRecord> {
        Ok(serde_json::from_slice(&std::fs::read(self.path(number))?)?)
    }

    /// Forgets all but those that are still `served`.
    pub fn sweep(&self, served: impl Fn(TreeNumber) -> bool) {
        let Ok(entries) = self.0.read_dir() else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse().ok()).map(TreeNumber);
            if !number.is_some_and(&served) {
                // One that stays is tried again the next time.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    fn path(&self, number: TreeNumber) -> PathBuf {
        self.0.join(number.directory_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_trees_are_remembered_while_they_are_served() {
        let root = tempfile::tempdir().unwrap();
        let record = TreeRecord::new(vec![], true);
        let (a, b) = (TreeNumber(1), TreeNumber(2));
        let removed = Removed::open(root.path()).unwrap();
        removed.put(a, &record);
        removed.put(b, &record);
        removed.sweep(|number| number == b);
        let removed = Removed::open(root.path()).unwrap();
        assert!(removed.get(a).is_err());
        assert_eq!(removed.get(b).unwrap(), record);
        removed.sweep(|_| false);
        assert!(removed.get(b).is_err());
    }
}
