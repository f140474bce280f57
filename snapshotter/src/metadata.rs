//! The metadata database, `<root>/metadata.db`: which snapshots exist, and the counters from
//! which directories and trees get their numbers.
//!
//! A snapshot exists if and only if its record does, and a transaction here is the commit point
//! of every operation on snapshots. Everything is also in memory (`index`): reads never touch
//! the disk. Memory is changed after the transaction, so it never says what the disk doesn't.
//!
//! After a failed write (a full disk) redb refuses to go on with its open file. The next change
//! opens it anew and reads it again; until then reads are answered from memory.
//!
//! Lock order: `writer`, then `index`. Neither is held across an await; all writing methods block
//! on the disk.

mod index;
mod journal;
mod models;
mod rebuild;
mod record;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use redb::backends::FileBackend;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition};

pub(crate) use index::{Change, Index};
use journal::{Journal, Line};
pub use record::{
    Backing, Copies, DirectoryId, Kind, LazySnapshot, Record, SNAPSHOT_REF, SnapshotInfo, Usage,
};
pub use weightfs_fusefs::TreeNumber;

/// The file's name in the root directory.
const FILE_NAME: &str = "metadata.db";

/// The version of the tables below. A file of another version is refused, not guessed at.
const FORMAT: u64 = 2;

/// redb's page cache. All records are in memory already, so it only has to hold the upper pages
/// of the tree; redb's own default is 1 GiB.
const CACHE_BYTES: usize = 4 << 20;

/// Name or key of a snapshot to its [`Record`] as JSON.
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");

/// Counters by name.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
const COUNTER_FORMAT: &str = "format";
const COUNTER_DIRECTORY: &str = "next-directory";
const COUNTER_TREE: &str = "next-tree";
/// Directories below it may be of snapshots that a rebuilt database does not know.
const COUNTER_UNKNOWN: &str = "unknown-below";

/// The metadata database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The file can't be opened: missing rights, a file that is no database, damage.
    #[error(
        "the metadata database {} can't be opened; if it is damaged, move it away and start \
         again (images have to be pulled again)", path.display()
    )]
    Open {
        /// The database file.
        path: PathBuf,
        /// What redb says.
        #[source]
        source: Box<redb::Error>,
    },
    /// Another process has it open.
    #[error("the metadata database {} is in use by another weightfs", path.display())]
    InUse {
        /// The database file.
        path: PathBuf,
    },
    /// The file was written by another version.
    #[error(
        "the metadata database {} has format {found}, this weightfs reads format {FORMAT}; use \
         the version that wrote it", path.display()
    )]
    Format {
        /// The database file.
        path: PathBuf,
        /// The format found.
        found: u64,
    },
    /// A record can't be read.
    #[error("the metadata database {} is damaged: the record of snapshot {name:?} can't be read",
        path.display())]
    Record {
        /// The database file.
        path: PathBuf,
        /// The snapshot.
        name: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A record's parents are not there.
    #[error("the metadata database {} is damaged: the parents of snapshot {name:?} are missing",
        path.display())]
    Orphan {
        /// The database file.
        path: PathBuf,
        /// The snapshot.
        name: String,
    },
    /// A transaction failed, and nothing of it took place.
    #[error("the metadata database {} can't be written; is the disk full?", path.display())]
    Write {
        /// The database file.
        path: PathBuf,
        /// What redb says.
        #[source]
        source: Box<redb::Error>,
    },
    /// A transaction failed, and the file can't be read to see whether it took place.
    #[error(
        "the metadata database {} failed in mid-write and can't be read again; snapshots can't \
         be changed until it can", path.display()
    )]
    Unknown {
        /// The database file.
        path: PathBuf,
        /// Why it can't be read.
        #[source]
        source: Box<MetadataError>,
    },
    /// All tree numbers are used up.
    #[error("the metadata database {} has no tree number left", path.display())]
    NoTreeNumber {
        /// The database file.
        path: PathBuf,
    },
}

/// The metadata database. One per root directory, opened once.
#[derive(Debug)]
pub struct Metadata {
    path: PathBuf,
    /// `None` after a failed write, until the file could be read again.
    writer: Mutex<Option<Database>>,
    index: RwLock<Index>,
    next_directory: AtomicU64,
    unknown_below: u64,
    /// `None` where it can't be written.
    journal: Mutex<Option<Journal>>,
}

impl Metadata {
    /// Opens `<root>/metadata.db`, or makes it. Checks every page and reads every record. Blocks.
    pub fn open(root: &Path) -> Result<Metadata, MetadataError> {
        let path = root.join(FILE_NAME);
        let database = open_database(&path)?;
        let index = read_index(&database, &path)?;
        let counter = |name| {
            read_counter(&database, name)
                .map_err(|source| MetadataError::Open { path: path.clone(), source: source.into() })
        };
        let next = counter(COUNTER_DIRECTORY)?;
        let unknown_below = counter(COUNTER_UNKNOWN)?;
        let metadata = Metadata {
            path,
            writer: Mutex::new(None),
            index: RwLock::new(index),
            next_directory: AtomicU64::new(next),
            unknown_below,
            journal: Mutex::new(None),
        };
        metadata.begin_journal(&database);
        *metadata.writer() = Some(database);
        Ok(metadata)
    }

    /// The record of a snapshot, from memory.
    pub fn snapshot(&self, name: &str) -> Option<Arc<Record>> {
        self.index().get(name).cloned()
    }

    /// All records in the order of their names, from memory.
    pub fn snapshots(&self) -> Vec<Arc<Record>> {
        self.index().records().cloned().collect()
    }

    /// All lazy snapshots, parents first: what a mounter has to show again after a restart.
    pub fn lazy_snapshots(&self) -> Vec<LazySnapshot> {
        self.index().lazy()
    }

    /// Gives out a tree number that was never given before. Blocks on the disk.
    pub fn allocate_tree(&self) -> Result<TreeNumber, MetadataError> {
        let mut writer = self.writer();
        let database = self.reopened(&mut writer)?;
        let next = read_counter(database, COUNTER_TREE).and_then(|next| {
            write_counter(database, COUNTER_TREE, next.saturating_add(1))?;
            Ok(next)
        });
        match next {
            Ok(next) => {
                self.note(database, &[Line::NextTree(next.saturating_add(1))]);
                u32::try_from(next)
                    .map(TreeNumber)
                    .map_err(|_| MetadataError::NoTreeNumber { path: self.path.clone() })
            }
            Err(source) => {
                *writer = None;
                Err(self.write_error(source))
            }
        }
    }

    /// The records, for questions that need more than one of them to agree.
    pub(crate) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory number that was never given before, once a record with it is stored.
    pub(crate) fn next_directory(&self) -> DirectoryId {
        DirectoryId(self.next_directory.fetch_add(1, Ordering::Relaxed))
    }

    /// Whether a directory without a record may be of a snapshot that was lost with the database.
    pub(crate) fn is_unknown(&self, id: DirectoryId) -> bool {
        id.0 < self.unknown_below
    }

    /// Never gives out this number or a lower one: a directory of it lies on the disk.
    pub(crate) fn skip_directory(&self, id: DirectoryId) {
        self.next_directory.fetch_max(id.0.saturating_add(1), Ordering::Relaxed);
    }

    /// Makes sure that memory and disk agree. Blocks on the disk after a failed write.
    pub(crate) fn settle(&self) -> Result<(), MetadataError> {
        self.reopened(&mut self.writer()).map(|_| ())
    }

    /// Decides on a change and carries it out, with no other change in between. Blocks on the
    /// disk. `decide` sees what is stored; what it returns is stored before this returns.
    ///
    /// With any error but [`MetadataError::Unknown`] nothing was stored.
    pub(crate) fn change<T, E: From<MetadataError>>(
        &self,
        decide: impl FnOnce(&Index) -> Result<(Change, T), E>,
    ) -> Result<T, E> {
        let mut writer = self.writer();
        let database = self.reopened(&mut writer)?;
        let (change, value) = decide(&self.index())?;
        match write(database, &change) {
            Ok(()) => {
                let lines = journal::lines(&change);
                self.index_mut(|index| index.apply(change));
                self.note(database, &lines);
                Ok(value)
            }
            Err(source) => {
                *writer = None;
                self.reopened(&mut writer).map_err(|source| self.unknown(source))?;
                if self.index().reflects(&change) {
                    return Ok(value);
                }
                Err(self.write_error(source).into())
            }
        }
    }

    fn index_mut(&self, change: impl FnOnce(&mut Index)) {
        change(&mut self.index.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn writer(&self) -> MutexGuard<'_, Option<Database>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open database; after a failed write it is opened and read again first.
    fn reopened<'a>(
        &self,
        writer: &'a mut Option<Database>,
    ) -> Result<&'a mut Database, MetadataError> {
        let database = match writer.take() {
            Some(database) => database,
            None => self.reopen()?,
        };
        Ok(writer.insert(database))
    }

    fn reopen(&self) -> Result<Database, MetadataError> {
        let database = open_database(&self.path)?;
        let index = read_index(&database, &self.path)?;
        self.index_mut(|stale| *stale = index);
        Ok(database)
    }

    fn open_error(&self, source: redb::Error) -> MetadataError {
        MetadataError::Open { path: self.path.clone(), source: source.into() }
    }

    fn write_error(&self, source: redb::Error) -> MetadataError {
        MetadataError::Write { path: self.path.clone(), source: source.into() }
    }

    fn unknown(&self, source: MetadataError) -> MetadataError {
        MetadataError::Unknown { path: self.path.clone(), source: source.into() }
    }
}

impl MetadataError {
    /// Whether the file is there and can't be what it should be.
    fn is_damage(&self) -> bool {
        match self {
            Self::Open { source, .. } => match source.as_ref() {
                redb::Error::Corrupted(_) => true,
                redb::Error::Io(error) => {
                    matches!(
                        error.kind(),
                        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                    )
                }
                _ => false,
            },
            Self::Record { .. } | Self::Orphan { .. } => true,
            Self::InUse { .. }
            | Self::Format { .. }
            | Self::Write { .. }
            | Self::Unknown { .. }
            | Self::NoTreeNumber { .. } => false,
        }
    }
}

fn open_database(path: &Path) -> Result<Database, MetadataError> {
    let opened = create_file(path).map_err(redb::DatabaseError::from).and_then(|file| {
        Builder::new()
            .set_cache_size(CACHE_BYTES)
            // Without it, redb trusts the file, and a damaged one can make it panic.
            .set_check_integrity_on_open(true)
            .create_with_backend(FileBackend::new(file)?)
    });
    let open = |source| MetadataError::Open { path: path.to_owned(), source: Box::new(source) };
    let database = opened.map_err(|error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => MetadataError::InUse { path: path.to_owned() },
        other => open(other.into()),
    })?;
    match prepare_tables(&database).map_err(open)? {
        FORMAT => Ok(database),
        found => Err(MetadataError::Format { path: path.to_owned(), found }),
    }
}

/// Opens the database file or creates it, its directory entry on the disk.
fn create_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let file = options.create_new(true).open(path)?;
            if let Some(directory) = path.parent() {
                File::open(directory)?.sync_all()?;
            }
            Ok(file)
        }
        opened => opened,
    }
}

/// Makes the tables of a new database, and returns the format of any.
fn prepare_tables(database: &Database) -> Result<u64, redb::Error> {
    let transaction = database.begin_write()?;
    let format = {
        transaction.open_table(SNAPSHOTS)?;
        let mut counters = transaction.open_table(COUNTERS)?;
        let format = counters.get(COUNTER_FORMAT)?.map(|value| value.value());
        match format {
            Some(format) => format,
            None => {
                counters.insert(COUNTER_FORMAT, FORMAT)?;
                FORMAT
            }
        }
    };
    transaction.commit()?;
    Ok(format)
}

fn read_index(database: &Database, path: &Path) -> Result<Index, MetadataError> {
    let records = read_records(database)
        .map_err(|source| MetadataError::Open { path: path.to_owned(), source: source.into() })?;
    let mut index = Index::default();
    for (name, json) in records {
        let record = serde_json::from_slice(&json).map_err(|source| MetadataError::Record {
            path: path.to_owned(),
            name,
            source,
        })?;
        index.apply(Change::Put(record));
    }
    match index.first_without_root() {
        None => Ok(index),
        Some(name) => Err(MetadataError::Orphan { path: path.to_owned(), name: name.to_owned() }),
    }
}

fn read_records(database: &Database) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
    let table = database.begin_read()?.open_table(SNAPSHOTS)?;
    let mut records = Vec::new();
    for entry in table.iter()? {
        let (name, json) = entry?;
        records.push((name.value().to_owned(), json.value().to_vec()));
    }
    Ok(records)
}

fn read_counter(database: &Database, name: &str) -> Result<u64, redb::Error> {
    let table = database.begin_read()?.open_table(COUNTERS)?;
    Ok(table.get(name)?.map_or(1, |value| value.value()))
}

fn write_counter(database: &Database, name: &str, value: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(COUNTERS)?.insert(name, value)?;
    transaction.commit()?;
    Ok(())
}

/// One transaction for one change. Its commit is the commit point of the operation.
fn write(database: &Database, change: &Change) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut snapshots = transaction.open_table(SNAPSHOTS)?;
        let (removed, added) = match change {
            Change::Put(record) => (None, Some(record)),
            Change::Replace { key, record } => (Some(key), Some(record)),
            Change::Remove(name) => (Some(name), None),
        };
        if let Some(name) = removed {
            snapshots.remove(name.as_str())?;
        }
        if let Some(record) = added {
            let json = serde_json::to_vec(record).map_err(io::Error::from)?;
            snapshots.insert(record.info.name.as_str(), json.as_slice())?;
            write_next_directory(&transaction, record)?;
        }
    }
    transaction.commit()?;
    Ok(())
}

fn write_next_directory(
    transaction: &redb::WriteTransaction,
    record: &Record,
) -> Result<(), redb::Error> {
    let Backing::Directory { id, .. } = record.backing else { return Ok(()) };
    let mut counters = transaction.open_table(COUNTERS)?;
    let stored = counters.get(COUNTER_DIRECTORY)?.map_or(1, |value| value.value());
    if stored <= id.0 {
        counters.insert(COUNTER_DIRECTORY, id.0.saturating_add(1))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
