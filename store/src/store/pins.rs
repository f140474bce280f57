//! Blobs that are never evicted: an empty file for each, named like the blob's directory.
//!
//! They are kept apart from the blobs, so that a pin outlives what is cached: a poisoned blob that
//! is fetched again, or one of which nothing is here yet.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

use super::catalog::{blob_named, directory_name};
use super::{at, make_dir};
use crate::shared::lock;
use crate::{BlobId, OpenError};

/// The pins of a state directory.
#[derive(Debug)]
pub(super) struct Pins {
    dir: PathBuf,
    pinned: Mutex<HashSet<BlobId>>,
}

impl Pins {
    /// Reads the pins in `dir`, which is made if it is not there.
    pub(super) fn open(dir: PathBuf) -> Result<Self, OpenError> {
        make_dir(&dir)?;
        let entries = fs::read_dir(&dir).map_err(at(&dir))?;
        let ids = entries.filter_map(|entry| blob_named(entry.ok()?.file_name().to_str()?));
        let pinned = Mutex::new(ids.collect());
        Ok(Self { dir, pinned })
    }

    pub(super) fn has(&self, id: BlobId) -> bool {
        lock(&self.pinned).contains(&id)
    }

    pub(super) fn all(&self) -> Vec<BlobId> {
        lock(&self.pinned).iter().copied().collect()
    }

    /// Pins a blob; it is on disk when this returns.
    pub(super) fn add(&self, id: BlobId) -> Result<(), OpenError> {
        let mut pinned = lock(&self.pinned);
        let path = self.dir.join(directory_name(id));
        File::create(&path).map_err(at(&path))?;
        self.sync()?;
        pinned.insert(id);
        Ok(())
    }

    /// Takes a pin away; it is gone from the disk when this returns.
    pub(super) fn remove(&self, id: BlobId) -> Result<(), OpenError> {
        let mut pinned = lock(&self.pinned);
        let path = self.dir.join(directory_name(id));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&path)(error)),
            _ => {}
        }
        self.sync()?;
        pinned.remove(&id);
        Ok(())
    }

    fn sync(&self) -> Result<(), OpenError> {
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(at(&self.dir))
    }
}
