//! A second account of what the database says, for the case that it is damaged:
//! `<root>/metadata.journal`, JSON lines, written anew at each start and added to at each change.
//!
//! Never synced and never read while the database is good, so it costs little. After a power loss
//! it may lack the last changes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use redb::Database;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use super::record::Record;
use super::{COUNTER_TREE, Change, Metadata, models, read_counter};

/// The file's name in the root directory.
const FILE_NAME: &str = "metadata.journal";

/// Bytes that are added before the file is written anew: a few ten thousand changes.
const GROWTH_MAX_BYTES: u64 = 32 << 20;

/// Longest line that is read. A record with all labels that containerd allows is far shorter.
const LINE_MAX_BYTES: u64 = 16 << 20;

/// A change.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Line {
    /// A snapshot was added or changed.
    Put(Record),
    /// A snapshot is gone.
    Remove(String),
    /// A model was added, or is gone (`null`).
    Model(u32, Value),
    /// The next tree's number.
    NextTree(u64),
}

/// All that a journal says.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Snapshots by name.
    pub(super) records: BTreeMap<String, Record>,
    /// Models by tree.
    pub(super) models: BTreeMap<u32, Value>,
    /// The next tree's number; 0 if it is not known.
    pub(super) next_tree: u64,
    /// Lines that could not be read.
    pub(super) unreadable: usize,
}

/// A journal that is being written.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    added: u64,
}

impl Journal {
    /// Writes it anew.
    pub(super) fn begin(root: &Path, lines: impl Iterator<Item = Line>) -> io::Result<Self> {
        let path = path(root);
        let new = path.with_extension("journal.new");
        let mut writer = BufWriter::new(File::create(&new)?);
        for line in lines {
            writer.write_all(&bytes(&line)?)?;
        }
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        std::fs::rename(new, path)?;
        Ok(Self { file, added: 0 })
    }

    /// Adds changes. They are one `write`, so a kill leaves all or none.
    pub(super) fn add(&mut self, lines: &[Line]) -> io::Result<()> {
        let bytes = lines.iter().map(bytes).collect::<io::Result<Vec<_>>>()?.concat();
        self.file.write_all(&bytes)?;
        self.added += bytes.len() as u64;
        Ok(())
    }

    /// Whether it has grown so that it is better written anew.
    pub(super) fn is_long(&self) -> bool {
        self.added > GROWTH_MAX_BYTES
    }
}

impl Account {
    /// What the journal of that directory says; nothing if there is none.
    pub(super) fn read(root: &Path) -> Self {
        use std::io::Read as _;
        let mut account = Self::default();
        let Ok(file) = File::open(path(root)) else { return account };
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            match reader.by_ref().take(LINE_MAX_BYTES).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return account,
                Ok(_) => account.follow(&line),
            }
        }
    }

    fn follow(&mut self, line: &[u8]) {
        match serde_json::from_slice(line) {
            Ok(Line::Put(record)) => {
                self.records.insert(record.info.name.clone(), record);
            }
            Ok(Line::Remove(name)) => {
                self.records.remove(&name);
            }
            Ok(Line::Model(number, Value::Null)) => {
                self.models.remove(&number);
            }
            Ok(Line::Model(number, record)) => {
                self.models.insert(number, record);
            }
            Ok(Line::NextTree(next)) => self.next_tree = self.next_tree.max(next),
            Err(_) => self.unreadable += 1,
        }
    }
}

impl Metadata {
    /// Adds to the journal; where that fails there is none until the next start.
    pub(super) fn note(&self, database: &Database, lines: &[Line]) {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = journal.as_mut() else { return };
        let added = open.add(lines);
        let long = open.is_long();
        if let Err(error) = added {
            warn!(%error, "the journal of the metadata can't be written: it ends here");
            *journal = None;
        } else if long {
            drop(journal);
            self.begin_journal(database);
        }
    }

    /// Writes the journal anew.
    pub(super) fn begin_journal(&self, database: &Database) {
        let root = self.path.parent().unwrap_or(Path::new("."));
        let records = self.index().records().map(|record| Line::Put((**record).clone())).collect();
        let begun = self.journal_of(database, records).map_err(io::Error::other);
        let begun = begun.and_then(|lines| Journal::begin(root, lines.into_iter()));
        let begun = begun.inspect_err(|error| {
            warn!(%error, "the metadata has no journal to rebuild it from");
        });
        *self.journal.lock().unwrap_or_else(PoisonError::into_inner) = begun.ok();
    }

    fn journal_of(
        &self,
        database: &Database,
        mut lines: Vec<Line>,
    ) -> Result<Vec<Line>, redb::Error> {
        let models = models::read(database)?.into_iter();
        lines.extend(models.filter_map(|(number, json)| {
            Some(Line::Model(number, serde_json::from_slice(&json).ok()?))
        }));
        lines.push(Line::NextTree(read_counter(database, COUNTER_TREE)?));
        Ok(lines)
    }
}

/// A change as the journal has it.
pub(super) fn lines(change: &Change) -> Vec<Line> {
    match change {
        Change::Put(record) => vec![Line::Put(record.clone())],
        Change::Replace { key, record } => {
            vec![Line::Remove(key.clone()), Line::Put(record.clone())]
        }
        Change::Remove(name) => vec![Line::Remove(name.clone())],
    }
}

fn path(root: &Path) -> PathBuf {
    root.join(FILE_NAME)
}

fn bytes(line: &Line) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    Ok(bytes)
}
