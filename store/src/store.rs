//! The state directory: who owns it, and which blobs are open.
//!
//! ```text
//! lock                                     flock, and the owner's process id
//! session                                  how the last owner stopped
//! ingest/<n>/                              what is being written in sequence, or removed
//! pins/<name>                              blobs that are never evicted
//! blobs/sha256/<ab>/<hex>/                 a blob as its registry has it
//! blobs/sha256/<ab>/<hex>.decompressed/    what it inflates to
//!     layout  state  digests  segment-<n>  attachment-<name>  kernel/<n>
//! ```
//!
//! Invariants: one process owns the directory; after the store is closed nothing in it changes,
//! even if blobs of it are still held. Lock order: the table of open blobs, then a blob's own.

mod catalog;
mod checkpoint;
mod evictor;
mod ingest;
mod owner;
mod pins;
#[cfg(test)]
mod power_loss;
mod session;
mod usage;
mod verify;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::watch;

pub use self::ingest::Ingest;
pub use self::usage::{BlobUsage, Evicted, Pruned, Usage};
pub use self::verify::{Checked, Others, VerifyError};

pub(crate) use self::catalog::touch;
use self::catalog::{Catalog, Removal};
use self::checkpoint::Checkpointer;
use self::evictor::Evictor;
use self::ingest::IngestArea;
use self::owner::Owner;
use self::pins::Pins;
use self::session::Session;
use crate::budget::{Budget, Limits};
use crate::chunk::{ChunkTable, MAX_BLOB_BYTES};
use crate::digests::{ChunkDigests, Origin};
use crate::disk::{Disk, Durability, LocalDisk};
use crate::document::{self, Found, Kind};
use crate::shared::{Epochs, Shared, lock};
use crate::state::{Record, Verdict};
use crate::{Blob, Digest, Layout, OpenError};

/// Directory of the blobs, below the root.
const BLOBS: &str = "blobs/sha256";

/// The file that holds a blob's cuts.
const LAYOUT: &str = "layout";

/// In which form the store keeps a blob's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As the registry has them.
    AsStored,
    /// What a compressed blob inflates to; made here, by [`Store::ingest`].
    Decompressed,
}

/// Names bytes in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobId {
    /// The digest of the blob in the registry (of the compressed bytes for a decompressed form).
    pub digest: Digest,
    /// The form.
    pub form: Form,
}

/// How misses are filled. Defaults are in the configuration's one place, the snapshotter.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// A read that could not be served within this time fails.
    pub deadline: Duration,
    /// Requests in flight to one blob at the most.
    pub connections: usize,
    /// Requests in flight to one host at the most. As many are sent as bring throughput.
    pub connections_per_host: usize,
    /// Bytes of one ranged request at the most.
    pub request_bytes: u64,
    /// First read-ahead window of a sequential stream, in bytes.
    pub read_ahead_min: u64,
    /// Largest read-ahead window, in bytes.
    pub read_ahead_max: u64,
    /// What is fetched although nobody waits for it.
    pub background: Background,
    /// Whether what is expected of readers ([`Blob::expect`]) is fetched.
    pub prefetch: bool,
}

/// What is fetched in the background, after all that readers wait or are expected for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Background {
    /// Nothing.
    Off,
    /// The rest of each segment that is being read for real, not only looked at; and the rest of
    /// a blob when most of it is here.
    TouchedFiles,
    /// All of each blob that is shown ([`Blob::shown`]).
    Everything,
}

/// When the bytes of a blob are served that has no digest but that of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// As they come, trusted for their transport; the whole is hashed when it is here.
    Background,
    /// When the whole is here and hashes to its digest.
    Strict,
}

/// Whether what a blob's chunks hash to is kept when the whole was hashed: it costs as much as
/// that. They are compared when chunks are fetched again, and an index can be made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepDigests {
    /// Where the cache has a limit, and what goes will come again.
    WhereLimited,
    /// Of each blob.
    Always,
}

/// An amount of disk space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the whole file system.
    Percent(u8),
}

impl Amount {
    /// So many bytes of a file system of that size.
    pub const fn of(self, file_system: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => file_system / 100 * percent as u64,
        }
    }
}

/// How much disk the cache may take. Counted are the blocks that its files have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// At the most; `None` is as much as the file system has.
    pub limit: Option<Amount>,
    /// What the file system keeps free, whoever fills it.
    pub min_free: Amount,
}

/// When what an earlier owner recorded is hashed again before it counts as verified. It is served
/// meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recheck {
    /// Never.
    Never,
    /// After a power loss or a crash of the kernel.
    AfterCrash,
    /// After each start.
    Always,
}

/// What a store needs to know.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// How misses are filled.
    pub fetch: FetchOptions,
    /// How much may be kept.
    pub cache: CacheOptions,
    /// How long what was fetched may wait until it is synced and recorded; it comes earlier when
    /// there is much. What is not recorded is fetched again after a kill or a power loss.
    pub checkpoint_interval: Duration,
    /// When bytes are served.
    pub verify: Verify,
    /// What of an earlier run is hashed again.
    pub recheck: Recheck,
    /// Which chunk digests are kept.
    pub keep_digests: KeepDigests,
}

/// The owner of a state directory's blobs. When it is dropped, it records what is published and
/// gives the directory up (which blocks, as syncing does); blobs that are still held serve what
/// they have and fetch nothing more.
#[derive(Debug)]
pub struct Store {
    catalog: Arc<Catalog>,
    evictor: Evictor,
    checkpointer: Checkpointer,
    session: Session,
    /// Last, so that the directory is given up when all else is done.
    _owner: Owner,
}

impl Store {
    /// Takes the directory (created if it is not there; one owner at a time, `flock`). To be
    /// called in a tokio runtime, on which it fetches.
    ///
    /// # Errors
    /// Another owner, an unsuitable file system (tmpfs, overlay, network, FUSE), no permission,
    /// no runtime.
    pub fn open(root: &Path, options: StoreOptions) -> Result<Arc<Self>, OpenError> {
        Self::open_on(root, options, Arc::new(LocalDisk), &Session::current_boot())
    }

    fn open_on(
        root: &Path,
        options: StoreOptions,
        disk: Arc<dyn Disk>,
        boot: &str,
    ) -> Result<Arc<Self>, OpenError> {
        let runtime = Handle::try_current().map_err(|error| at(root)(io::Error::other(error)))?;
        // Whoever changes the working directory later must not move the cache.
        let root = &std::path::absolute(root).map_err(at(root))?;
        let owner = Owner::take(root)?;
        let blobs = root.join(BLOBS);
        make_dir(&blobs)?;
        let ingests = IngestArea::clean(root.join("ingest"))?;
        let pins = Pins::open(root.join("pins"))?;
        let StoreOptions { fetch, cache, checkpoint_interval, verify, recheck, keep_digests } =
            options;
        let session = Session::begin(root, Arc::clone(&disk), boot)?;
        let doubt_before = match recheck {
            Recheck::Never => 0,
            Recheck::AfterCrash => session.doubt_before(),
            Recheck::Always => session.epoch(),
        };
        let epochs = Epochs { now: session.epoch(), doubt_before };
        let budget = budget(root, cache)?;
        let checks = (verify, keep_digests);
        let shared = Shared::new(fetch, checks, disk, budget, epochs, boot, runtime);
        let shared = Arc::new(shared);
        let checkpointer = Checkpointer::start(Arc::clone(&shared), checkpoint_interval);
        let checkpointer = checkpointer.map_err(at(root))?;
        let catalog = Arc::new(Catalog::new(blobs, ingests, pins, shared));
        let evictor = Evictor::start(Arc::clone(&catalog)).map_err(at(root))?;
        Ok(Arc::new(Self { catalog, evictor, checkpointer, session, _owner: owner }))
    }

    /// Whether the directory, or the one that it would be made in, is on a file system that can hold
    /// a cache.
    ///
    /// # Errors
    /// [`OpenError::FileSystem`] if it is not, [`OpenError::Io`] if it can't be told.
    pub fn check_file_system(root: &Path) -> Result<(), OpenError> {
        owner::check_file_system(root)
    }

    /// Lets go of what is used least from now on, where the limits ask for it. To be called when
    /// all blobs are open that are in use from before a restart: what is not open counts as
    /// unused.
    pub fn start_evicting(&self) {
        self.catalog.start_evicting();
    }

    /// The layout of a blob that this store has on disk.
    pub fn layout(&self, id: BlobId) -> Option<Layout> {
        if let Some(blob) = self.catalog.opened(id) {
            return Some(blob.layout().clone());
        }
        read_layout(&self.catalog.dir(id))
    }

    /// Opens a blob, or creates an empty one. All openers share one [`Blob`].
    ///
    /// # Errors
    /// When it is there with another layout, is larger than 16 TiB, or the directory can't be
    /// used.
    pub fn blob(self: &Arc<Self>, id: BlobId, layout: &Layout) -> Result<Arc<Blob>, OpenError> {
        let mut open = lock(&self.catalog.open);
        if let Some(blob) = open.get(&id).and_then(Weak::upgrade) {
            return same_layout(blob, layout);
        }
        let blob = self.open_blob(id, layout)?;
        // Where the table would grow, closed blobs make room first.
        if open.len() == open.capacity() {
            open.retain(|_, blob| blob.strong_count() > 0);
        }
        open.insert(id, Arc::downgrade(&blob));
        Ok(blob)
    }

    /// As [`Store::blob`], and says what each of its chunks hashes to: 32 bytes for each, segment
    /// after segment. From now on each chunk is compared with that before it is served; what is
    /// here from before is compared, too, before that if the blob was not open. They are kept
    /// beside the blob for all who open it later.
    ///
    /// # Errors
    /// As [`Store::blob`]; digests that are not one for each chunk.
    pub fn indexed_blob(
        self: &Arc<Self>,
        id: BlobId,
        layout: &Layout,
        digests: &[u8],
    ) -> Result<Arc<Blob>, OpenError> {
        let dir = self.catalog.dir(id);
        let failed = at(&dir);
        let refuse = |why: &str| failed(io::Error::new(io::ErrorKind::InvalidInput, why));
        let table = ChunkTable::new(layout.clone()).ok_or_else(|| refuse("it is too large"))?;
        if !ChunkDigests::fit(&table, digests) {
            return Err(refuse("there is not one digest for each of its chunks"));
        }
        if read_layout(&dir).is_some_and(|known| known != *layout) {
            return Err(OpenError::OtherLayout { digest: id.digest });
        }
        if self.catalog.opened(id).is_none() {
            // Before it is opened: what is here from before is not served until it was compared.
            self.keep_digests(&dir, &table, digests).map_err(&failed)?;
        }
        let blob = self.blob(id, layout)?;
        blob.adopt(digests, Origin::Index).map_err(&failed)?;
        Ok(blob)
    }

    /// Puts digests beside a blob that is not open, unless it has the same, or some that were made
    /// here.
    fn keep_digests(&self, dir: &Path, table: &ChunkTable, digests: &[u8]) -> io::Result<()> {
        let _entered = self.catalog.shared.enter()?;
        let known = ChunkDigests::read(dir, table);
        if known.is_some_and(|known| known.are(digests) || known.origin() == Origin::Whole) {
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let disk = &*self.catalog.shared.disk;
        ChunkDigests::write(disk, dir, table, digests, Origin::Index).map(drop)
    }

    fn open_blob(&self, id: BlobId, layout: &Layout) -> Result<Arc<Blob>, OpenError> {
        let dir = self.catalog.dir(id);
        let size = layout.size();
        let too_large = || {
            let why = format!("a blob of {size} bytes is over the limit of {MAX_BLOB_BYTES}");
            at(&dir)(io::Error::new(io::ErrorKind::InvalidInput, why))
        };
        let table = ChunkTable::new(layout.clone()).ok_or_else(too_large)?;
        let _entered = self.catalog.shared.enter().map_err(at(&dir))?;
        make_dir(&dir)?;
        match read_layout(&dir) {
            Some(known) if known == *layout => {}
            Some(_) => return Err(OpenError::OtherLayout { digest: id.digest }),
            None => write_layout(&*self.catalog.shared.disk, &dir, layout).map_err(at(&dir))?,
        }
        touch(&dir);
        self.catalog.touched(id);
        let (record, digests) = (Record::read(&dir, &table), ChunkDigests::read(&dir, &table));
        Ok(Blob::open(id, dir, table, record, digests, Arc::clone(&self.catalog.shared)))
    }

    /// Begins to write a blob in sequence whose cuts become known on the way. Nothing of it is
    /// visible before [`Ingest::finish`].
    ///
    /// # Errors
    /// When the directory can't be used.
    pub fn ingest(self: &Arc<Self>, id: BlobId) -> Result<Ingest, OpenError> {
        Ingest::begin(Arc::clone(self), id)
    }

    /// Keeps a small document beside a blob (a listing, an index). Replaces an older one. The
    /// blob need not be there yet. Names are of letters, digits, `-`, `_` and `.`.
    ///
    /// # Errors
    /// Another name, more than 256 MiB, or the directory can't be used.
    pub fn attach(&self, id: BlobId, name: &str, bytes: &[u8]) -> Result<(), OpenError> {
        let dir = self.catalog.dir(id);
        let failed = at(&dir);
        let refuse = |why: &str| failed(io::Error::new(io::ErrorKind::InvalidInput, why));
        let file = attachment_file(name).ok_or_else(|| refuse("not a name for a document"))?;
        if bytes.len() as u64 > document::MAX_DOCUMENT_BYTES {
            return Err(refuse("the document is over 256 MiB"));
        }
        let _entered = self.catalog.shared.enter().map_err(&failed)?;
        make_dir(&dir)?;
        self.catalog.touched(id);
        let disk = &*self.catalog.shared.disk;
        document::write(disk, &dir, &file, Kind::Attachment, bytes, Durability::Atomic)
            .map_err(&failed)
    }

    /// A document kept beside a blob; `None` if there is none or it is damaged.
    pub fn attachment(&self, id: BlobId, name: &str) -> Option<Vec<u8>> {
        read_attachment(&self.catalog.dir(id), name)
    }

    /// The same of the store in `root`, which somebody else may own: documents are replaced whole.
    pub fn foreign_attachment(root: &Path, id: BlobId, name: &str) -> Option<Vec<u8>> {
        read_attachment(&catalog::dir_of(&root.join(BLOBS), id), name)
    }

    /// What the chunks of a blob hash to, 32 bytes for each, segment after segment, with its cuts:
    /// where they were made here, of bytes that together hash to the blob's digest. Those bytes
    /// need not be here any more.
    pub fn verified_digests(&self, id: BlobId) -> Option<(Layout, Vec<u8>)> {
        let layout = self.layout(id)?;
        let table = ChunkTable::new(layout.clone())?;
        let digests = ChunkDigests::read(&self.catalog.dir(id), &table)?;
        (digests.origin() == Origin::Whole).then(|| (layout, digests.all().to_vec()))
    }

    /// Changes each time a whole blob was found to hash to its digest.
    pub fn verified(&self) -> watch::Receiver<u64> {
        self.catalog.shared.verified.subscribe()
    }

    /// Whether anything is being fetched.
    pub fn is_busy(&self) -> bool {
        self.catalog.shared.scheduler.is_busy()
    }

    /// Makes what is published survive a restart: syncs data, then writes the records.
    /// Also done all the time in the background and when the store is dropped.
    ///
    /// # Errors
    /// The first failure; the other blobs are recorded all the same.
    pub fn checkpoint(&self) -> Result<(), OpenError> {
        checkpoint::record_changed(&self.catalog.shared)
    }

    /// The blobs that are open now.
    pub fn open_blobs(&self) -> Vec<Arc<Blob>> {
        self.catalog.all_open()
    }

    /// Removes all that is kept of a blob (a poisoned one, or one that nothing needs). What was
    /// there is gone when this returns true; it is false, and nothing happened, if it is open.
    ///
    /// # Errors
    /// When the directory can't be changed.
    pub fn discard(&self, id: BlobId) -> Result<bool, OpenError> {
        // Blobs that only wait for their record close.
        self.checkpoint()?;
        Ok(self.catalog.remove(id)? != Removal::Open)
    }

    /// Removes what an earlier user of a blob found poisoned, so that the next one asks its
    /// sources again: they may have been mended. A blob that is open stays poisoned for all.
    ///
    /// # Errors
    /// When the directory can't be changed.
    pub fn discard_poisoned(&self, id: BlobId) -> Result<bool, OpenError> {
        let dir = self.catalog.dir(id);
        let table = read_layout(&dir).and_then(ChunkTable::new);
        let record = table.and_then(|table| Record::read(&dir, &table));
        let verdict = record.and_then(|record| record.verdict);
        if !matches!(verdict, Some(Verdict::Poisoned { .. })) || !self.discard(id)? {
            return Ok(false);
        }
        tracing::warn!(blob = %id.digest, "poisoned bytes are discarded: they are fetched again");
        Ok(true)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.evictor.stop();
        self.checkpointer.stop();
        let recorded = self.checkpoint();
        self.catalog.shared.close();
        // Last: nothing changes any more.
        if let Err(error) = recorded.and_then(|()| self.session.end()) {
            tracing::error!(%error, "what was fetched last is not recorded: it will be fetched again");
        }
    }
}

/// The limits in bytes, as the file system is now.
fn budget(root: &Path, cache: CacheOptions) -> Result<Budget, OpenError> {
    let space = statvfs(root).map_err(|error| at(root)(error.into()))?;
    let whole = space.blocks() * space.fragment_size();
    let limit = cache.limit.map(|limit| limit.of(whole));
    let limits = Limits { limit, min_free: cache.min_free.of(whole) };
    Ok(Budget::new(limits, evictor::free_bytes(root)?))
}

fn same_layout(blob: Arc<Blob>, layout: &Layout) -> Result<Arc<Blob>, OpenError> {
    if blob.layout() == layout {
        return Ok(blob);
    }
    Err(OpenError::OtherLayout { digest: blob.id().digest })
}

/// Makes an I/O error one about `path`.
fn at(path: &Path) -> impl Fn(io::Error) -> OpenError + '_ {
    |source| OpenError::Io { path: path.to_owned(), source }
}

/// Makes a directory, and those above it, for the owner only.
fn make_dir(path: &Path) -> Result<(), OpenError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at(path))
}

fn read_attachment(dir: &Path, name: &str) -> Option<Vec<u8>> {
    let path = dir.join(attachment_file(name)?);
    match document::read(&path, Kind::Attachment) {
        Found::Payload(bytes) => Some(bytes),
        Found::Nothing => None,
        Found::Damaged(damage) => {
            tracing::warn!(path = %path.display(), damage, "document ignored");
            None
        }
    }
}

fn attachment_file(name: &str) -> Option<String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let good = (1..=100).contains(&name.len()) && name.bytes().all(fits);
    good.then(|| format!("{ATTACHMENT}{name}"))
}

const ATTACHMENT: &str = "attachment-";

/// `None` if there is no layout or it is damaged; then the blob's next opener says what it is.
fn read_layout(dir: &Path) -> Option<Layout> {
    let path = dir.join(LAYOUT);
    let damage = match document::read(&path, Kind::Layout) {
        Found::Nothing => return None,
        Found::Damaged(damage) => damage,
        Found::Payload(payload) => match serde_json::from_slice(&payload) {
            Ok(layout) => return Some(layout),
            Err(error) => error.to_string(),
        },
    };
    tracing::warn!(path = %path.display(), damage, "blob layout ignored");
    None
}

/// Not synced: the blob's record has a fingerprint of the layout, so it stays good without it.
fn write_layout(disk: &dyn Disk, dir: &Path, layout: &Layout) -> io::Result<()> {
    let payload = serde_json::to_vec(layout)?;
    document::write(disk, dir, LAYOUT, Kind::Layout, &payload, Durability::Atomic)
}

/// Removes a directory and what is in it, if it is there.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
