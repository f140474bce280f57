//! The directories of ordinary snapshots: `<root>/snapshots/<id>/{fs,work}`.
//!
//! Order on the disk: a directory is made and synced before the transaction that names it, and
//! removed after the one that forgets it. So a record never lacks its directory, and a directory
//! without a record is left over: [`Directories::orphans`] finds it.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SnapshotError;
use crate::metadata::{DirectoryId, Kind, Metadata};

/// The mode of an upper directory without a parent, and so of a container's root.
const FRESH_ROOT_MODE: u32 = 0o755;

/// Only root goes through a snapshot's directory by its path.
const OUTER_MODE: u32 = 0o700;

/// Overlay's work directory, as containerd makes it.
const WORK_MODE: u32 = 0o711;

/// Characters that separate or quote in overlay mount options.
const RESERVED: [char; 5] = [',', ':', '\\', '"', '\''];

/// The directory of all ordinary snapshots.
#[derive(Debug)]
pub(super) struct Directories {
    path: PathBuf,
    metadata: Arc<Metadata>,
    /// Made or about to be made, and not yet named by a record.
    pending: Mutex<HashSet<DirectoryId>>,
}

/// A new directory, removed again unless it is kept.
#[derive(Debug)]
pub(super) struct NewDirectory<'a> {
    directories: &'a Directories,
    id: DirectoryId,
    kept: bool,
}

impl Directories {
    /// Opens `<root>/snapshots`, or makes it. Numbers of directories that lie there are not given
    /// out again.
    pub(super) fn open(root: &Path, metadata: Arc<Metadata>) -> Result<Self, SnapshotError> {
        let path = root.join("snapshots");
        check_path(&path)?;
        DirBuilder::new()
            .recursive(true)
            .mode(OUTER_MODE)
            .create(&path)
            .map_err(SnapshotError::io("create directory", &path))?;
        let directories = Directories { path, metadata, pending: Mutex::default() };
        for id in directories.on_disk()? {
            directories.metadata.skip_directory(id);
        }
        Ok(directories)
    }

    /// The files of a snapshot: overlay's upper directory while it is active, a lower one later.
    pub(super) fn files(&self, id: DirectoryId) -> PathBuf {
        self.outer(id).join("fs")
    }

    /// Overlay's work directory of an active snapshot.
    pub(super) fn work(&self, id: DirectoryId) -> PathBuf {
        self.outer(id).join("work")
    }

    fn outer(&self, id: DirectoryId) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// Makes and syncs the directory of a new snapshot. With a parent, its root gets the parent
    /// root's mode and owner, since overlayfs shows the upper directory's.
    pub(super) fn create(
        &self,
        kind: Kind,
        parent_root: Option<&Path>,
    ) -> Result<NewDirectory<'_>, SnapshotError> {
        let directory = NewDirectory::register(self);
        let outer = self.outer(directory.id);
        make(&outer, OUTER_MODE)?;
        let files = self.files(directory.id);
        make(&files, FRESH_ROOT_MODE)?;
        if let Some(parent_root) = parent_root {
            inherit(&files, parent_root)?;
        }
        if kind == Kind::Active {
            make(&self.work(directory.id), WORK_MODE)?;
        }
        for synced in [&files, &outer, &self.path] {
            sync(synced)?;
        }
        Ok(directory)
    }

    /// Removes a directory that no record names any more. One that is gone already is fine.
    pub(super) fn remove(&self, id: DirectoryId) -> Result<(), SnapshotError> {
        let outer = self.outer(id);
        match fs::remove_dir_all(&outer) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(SnapshotError::Io { action: "remove directory", path: outer, source: error })
            }
            _ => Ok(()),
        }
    }

    /// Directories that no record names and nobody is making.
    pub(super) fn orphans(&self) -> Result<Vec<DirectoryId>, SnapshotError> {
        let mut found = self.on_disk()?;
        // First what is being made, then what is recorded: a directory that got its record between
        // the two is seen by one of them.
        found.retain(|id| !self.pending().contains(id));
        let index = self.metadata.index();
        found.retain(|id| !index.owns_directory(*id) && !self.metadata.is_unknown(*id));
        Ok(found)
    }

    fn on_disk(&self) -> Result<Vec<DirectoryId>, SnapshotError> {
        let entries =
            fs::read_dir(&self.path).map_err(SnapshotError::io("list directory", &self.path))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(SnapshotError::io("list directory", &self.path))?;
            // A name that is no number was not made here, and is left alone.
            found.extend(entry.file_name().to_str().and_then(parse_id));
        }
        Ok(found)
    }

    fn pending(&self) -> MutexGuard<'_, HashSet<DirectoryId>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> NewDirectory<'a> {
    fn register(directories: &'a Directories) -> Self {
        let id = directories.metadata.next_directory();
        directories.pending().insert(id);
        NewDirectory { directories, id, kept: false }
    }

    pub(super) fn id(&self) -> DirectoryId {
        self.id
    }

    /// Leaves the directory where it is: its record is stored.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewDirectory<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.directories.remove(self.id)
        {
            tracing::warn!(directory = %self.id, error = %super::describe(&error),
                "a directory is left for the next cleanup");
        }
        self.directories.pending().remove(&self.id);
    }
}

/// Refuses a path that can't stand in overlay mount options.
pub(super) fn check_path(path: &Path) -> Result<(), SnapshotError> {
    let usable = |text: &str| !text.contains(RESERVED);
    match path.to_str() {
        Some(text) if path.is_absolute() && usable(text) => Ok(()),
        _ => Err(SnapshotError::Path { path: path.to_owned() }),
    }
}

/// The number that a directory's name is, in the one way that we write it.
fn parse_id(name: &str) -> Option<DirectoryId> {
    let id = name.parse().map(DirectoryId).ok()?;
    (id.to_string() == name).then_some(id)
}

/// Makes a directory with exactly this mode, whatever the umask.
fn make(path: &Path, mode: u32) -> Result<(), SnapshotError> {
    fs::create_dir(path)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(SnapshotError::io("create directory", path))
}

fn inherit(path: &Path, parent_root: &Path) -> Result<(), SnapshotError> {
    let parent =
        fs::metadata(parent_root).map_err(SnapshotError::io("read the mode of", parent_root))?;
    // The owner first: a change of owner drops the setuid and setgid bits.
    lchown(path, Some(parent.uid()), Some(parent.gid()))
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(parent.mode() & 0o7777)))
        .map_err(SnapshotError::io("set mode and owner of", path))
}

fn sync(path: &Path) -> Result<(), SnapshotError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(SnapshotError::io("sync directory", path))
}
