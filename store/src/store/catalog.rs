//! The blobs of a state directory: where their files are, and which of them are open.
//!
//! Invariant: whatever removes a blob's directory holds the table of open blobs and has found it
//! closed there, so nobody opens a blob that is being removed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

use super::ingest::IngestArea;
use super::pins::Pins;
use super::{LAYOUT, at};
use crate::shared::{Shared, lock};
use crate::{Blob, BlobId, Digest, Form, OpenError};

/// Ends the directory name of a blob in its decompressed form.
const DECOMPRESSED: &str = ".decompressed";

/// What a store and its threads know of the blobs.
#[derive(Debug)]
pub(super) struct Catalog {
    root: PathBuf,
    pub(super) ingests: IngestArea,
    pub(super) pins: Pins,
    pub(super) shared: Arc<Shared>,
    pub(super) open: Mutex<HashMap<BlobId, Weak<Blob>>>,
    /// Blobs whose directory may have changed since the evictor looked.
    touched: Mutex<HashSet<BlobId>>,
    may_evict: AtomicBool,
}

/// What came of a wish to remove a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    /// It is gone; so many bytes are free.
    Removed(u64),
    /// It is open.
    Open,
    /// There was nothing.
    Nothing,
}

impl Catalog {
    pub(super) fn new(root: PathBuf, ingests: IngestArea, pins: Pins, shared: Arc<Shared>) -> Self {
        let (open, touched) = Default::default();
        Self { root, ingests, pins, shared, open, touched, may_evict: AtomicBool::new(false) }
    }

    /// Whether the evictor may take anything yet.
    pub(super) fn may_evict(&self) -> bool {
        self.may_evict.load(Ordering::Acquire)
    }

    pub(super) fn start_evicting(&self) {
        self.may_evict.store(true, Ordering::Release);
    }

    /// The files of a closed blob change, or it opens.
    pub(super) fn touched(&self, id: BlobId) {
        lock(&self.touched).insert(id);
    }

    /// The blobs of which that was said since the last call.
    pub(super) fn take_touched(&self) -> HashSet<BlobId> {
        std::mem::take(&mut *lock(&self.touched))
    }

    /// A blob that is open.
    pub(super) fn opened(&self, id: BlobId) -> Option<Arc<Blob>> {
        lock(&self.open).get(&id).and_then(Weak::upgrade)
    }

    /// All blobs that are open.
    pub(super) fn all_open(&self) -> Vec<Arc<Blob>> {
        lock(&self.open).values().filter_map(Weak::upgrade).collect()
    }

    /// Where a blob's files are.
    pub(super) fn dir(&self, id: BlobId) -> PathBuf {
        dir_of(&self.root, id)
    }

    /// All blobs that have a directory.
    pub(super) fn on_disk(&self) -> Result<Vec<BlobId>, OpenError> {
        let mut ids = vec![];
        for shard in fs::read_dir(&self.root).map_err(at(&self.root))? {
            let shard = shard.map_err(at(&self.root))?.path();
            let entries = match fs::read_dir(&shard) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
                Err(error) => return Err(at(&shard)(error)),
            };
            ids.extend(entries.filter_map(|entry| blob_named(entry.ok()?.file_name().to_str()?)));
        }
        Ok(ids)
    }

    /// Removes all that is kept of a blob, unless it is open.
    pub(super) fn remove(&self, id: BlobId) -> Result<Removal, OpenError> {
        let dir = self.dir(id);
        let failed = at(&dir);
        let open = lock(&self.open);
        if open.get(&id).is_some_and(|blob| blob.strong_count() > 0) {
            return Ok(Removal::Open);
        }
        if !dir.try_exists().map_err(&failed)? {
            return Ok(Removal::Nothing);
        }
        let bytes = crate::segment::disk_bytes(&dir);
        let _entered = self.shared.enter().map_err(&failed)?;
        // By one rename: from here on the blob is gone.
        let doomed = self.ingests.take_away(&dir)?;
        drop(open);
        drop(doomed);
        Ok(Removal::Removed(bytes))
    }

    /// The directory above all blobs.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// When a blob was opened or closed last: the time is kept with its layout.
    pub(super) fn last_used(&self, id: BlobId) -> Option<SystemTime> {
        fs::metadata(self.dir(id).join(LAYOUT)).and_then(|layout| layout.modified()).ok()
    }
}

/// Notes that a blob is used now. Failing changes nothing but the order of eviction.
pub(crate) fn touch(dir: &Path) {
    let layout = fs::File::options().write(true).open(dir.join(LAYOUT));
    let _ = layout.and_then(|layout| layout.set_modified(SystemTime::now()));
}

/// Where a blob's files are, below the directory of all.
pub(super) fn dir_of(root: &Path, id: BlobId) -> PathBuf {
    let name = directory_name(id);
    root.join(name.get(..2).unwrap_or_default()).join(name)
}

/// The name of a blob's directory.
pub(super) fn directory_name(id: BlobId) -> String {
    match id.form {
        Form::AsStored => id.digest.hex(),
        Form::Decompressed => id.digest.hex() + DECOMPRESSED,
    }
}

/// The blob whose directory has that name.
pub(super) fn blob_named(name: &str) -> Option<BlobId> {
    let (hex, form) = match name.strip_suffix(DECOMPRESSED) {
        Some(hex) => (hex, Form::Decompressed),
        None => (name, Form::AsStored),
    };
    let digest = format!("sha256:{hex}").parse::<Digest>().ok()?;
    Some(BlobId { digest, form })
}
