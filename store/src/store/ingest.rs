//! Blobs that are written in sequence: what a compressed layer inflates to.
//!
//! Invariant: a blob appears complete, synced and with its record, by one rename, or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ATTACHMENT, Store, at, make_dir, remove_tree, write_layout};
use crate::chunk::{ChunkTable, MAX_BLOB_BYTES};
use crate::layout::MAX_SEGMENTS;
use crate::shared::lock;
use crate::state::Record;
use crate::{Blob, BlobId, Layout, LayoutError, OpenError, segment};

/// Bytes that are gathered before they are written: decompressors give small pieces.
const BUFFER_BYTES: usize = 256 << 10;

/// Where blobs are written before they are complete.
#[derive(Debug)]
pub(super) struct IngestArea {
    root: PathBuf,
    next: AtomicU64,
}

impl IngestArea {
    /// Takes the directory and removes what an earlier run left there.
    pub(super) fn clean(root: PathBuf) -> Result<Self, OpenError> {
        remove_tree(&root).map_err(at(&root))?;
        make_dir(&root)?;
        Ok(Self { root, next: AtomicU64::new(0) })
    }

    /// Bytes that all of it takes on disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        let Ok(drafts) = fs::read_dir(&self.root) else { return 0 };
        drafts.filter_map(|draft| Some(segment::disk_bytes(&draft.ok()?.path()))).sum()
    }

    fn fresh(&self) -> PathBuf {
        self.root.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// Takes a directory of the store away, by one rename; what was in it vanishes when the result
    /// is dropped. It need not be there.
    pub(super) fn take_away(&self, dir: &Path) -> Result<Draft, OpenError> {
        let doomed = self.fresh();
        match fs::rename(dir, &doomed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(dir)(error)),
            _ => Ok(Draft(doomed)),
        }
    }
}

/// A temporary directory; removed with what is in it unless it was renamed away.
#[derive(Debug)]
pub(super) struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "left behind until the next start");
        }
    }
}

/// A blob that is being written in sequence. Dropped unfinished, it leaves nothing behind.
#[derive(Debug)]
pub struct Ingest {
    store: Arc<Store>,
    id: BlobId,
    draft: Draft,
    /// First byte of each segment.
    starts: Vec<u64>,
    position: u64,
    /// The segment that is being written, if it has a byte.
    file: Option<BufWriter<File>>,
}

impl Ingest {
    pub(super) fn begin(store: Arc<Store>, id: BlobId) -> Result<Self, OpenError> {
        let draft = Draft(store.catalog.ingests.fresh());
        let entered = store.catalog.shared.enter().map_err(at(&draft.0));
        entered.and_then(|_entered| make_dir(&draft.0))?;
        Ok(Self { store, id, draft, starts: vec![], position: 0, file: None })
    }

    /// The bytes that follow begin a new segment. Two cuts at one place are one; so is a cut at
    /// the end.
    ///
    /// # Errors
    /// When the segment before can't be written.
    pub fn cut(&mut self) -> Result<(), OpenError> {
        match self.file.take() {
            Some(mut file) => file.flush().map_err(at(&self.draft.0)),
            None => Ok(()),
        }
    }

    /// Appends bytes. Blocking I/O.
    ///
    /// # Errors
    /// When they can't be written, or the blob gets too large or has too many segments.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), OpenError> {
        let len = bytes.len() as u64;
        let written = self.append(bytes).map_err(at(&self.draft.0));
        self.position += len;
        written
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.store.catalog.shared.enter()?;
        if self.position.saturating_add(bytes.len() as u64) > MAX_BLOB_BYTES {
            return Err(io::Error::other(format!("more than {MAX_BLOB_BYTES} bytes")));
        }
        let budget = &self.store.catalog.shared.budget;
        // Nothing of a blob that is made here can be served before all of it is here.
        let mut room = budget.reserve_in_thread(bytes.len() as u64).ok_or_else(|| {
            let why =
                "no room in the cache, and nothing that could go: see cache.limit, cache.min_free";
            io::Error::new(io::ErrorKind::StorageFull, why)
        })?;
        let file = match &mut self.file {
            Some(file) => file,
            None if self.starts.len() == MAX_SEGMENTS => {
                return Err(io::Error::other(LayoutError::TooMany));
            }
            None => {
                let file = File::create_new(segment::path(&self.draft.0, self.starts.len()))?;
                self.starts.push(self.position);
                self.file.insert(BufWriter::with_capacity(BUFFER_BYTES, file))
            }
        };
        let written = file.write_all(bytes);
        if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::StorageFull) {
            budget.disk_is_full();
        }
        room.spend(bytes.len() as u64);
        written
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Syncs and publishes the blob, complete and verified. The caller has checked the digest of
    /// what the bytes were made from. Blocking I/O. Where the same blob is open already, that
    /// one is returned.
    ///
    /// # Errors
    /// When it can't be written, or the blob is open with other cuts.
    pub fn finish(mut self) -> Result<Arc<Blob>, OpenError> {
        self.cut()?;
        let cuts = self.starts.iter().copied().skip(1);
        let layout = Layout::new(self.position, cuts)
            .map_err(|error| at(&self.draft.0)(io::Error::other(error)))?;
        self.seal(&layout).map_err(at(&self.draft.0))?;
        // Blobs that only wait for their record close: an older state of this one may be such.
        self.store.checkpoint()?;
        self.install(&layout)?;
        self.store.blob(self.id, &layout)
    }

    /// Writes layout and record and syncs all files of the draft.
    fn seal(&self, layout: &Layout) -> io::Result<()> {
        let _entered = self.store.catalog.shared.enter()?;
        let table = ChunkTable::new(layout.clone())
            .ok_or_else(|| io::Error::other(format!("more than {MAX_BLOB_BYTES} bytes")))?;
        let disk = &*self.store.catalog.shared.disk;
        write_layout(disk, &self.draft.0, layout)?;
        Record::complete(&table, self.store.catalog.shared.epochs.now).write(
            disk,
            &self.draft.0,
            layout,
        )?;
        // The draft is invisible until the rename, so the order within it does not matter. One
        // call for all: a sync for each of thousands of segments would take minutes.
        nix::unistd::syncfs(File::open(&self.draft.0)?)?;
        Ok(())
    }

    /// Puts the draft in its place, unless the blob is open there.
    fn install(&self, layout: &Layout) -> Result<(), OpenError> {
        let open = lock(&self.store.catalog.open);
        if open.get(&self.id).is_some_and(|blob| blob.strong_count() > 0) {
            return Ok(());
        }
        let dir = self.store.catalog.dir(self.id);
        let failed = at(&dir);
        let _entered = self.store.catalog.shared.enter().map_err(&failed)?;
        let parent = dir.parent().unwrap_or(&dir);
        make_dir(parent)?;
        self.keep_attachments(&dir).map_err(&failed)?;
        drop(self.store.catalog.ingests.take_away(&dir)?);
        self.store.catalog.touched(self.id);
        // The commit point.
        fs::rename(&self.draft.0, &dir).map_err(&failed)?;
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(&failed)?;
        tracing::debug!(blob = %self.id.digest, size = layout.size(), "blob written");
        Ok(())
    }

    /// Takes along the documents of the directory that the draft replaces.
    fn keep_attachments(&self, dir: &Path) -> io::Result<()> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(ATTACHMENT.as_bytes()) {
                fs::rename(entry.path(), self.draft.0.join(entry.file_name()))?;
            }
        }
        Ok(())
    }
}
