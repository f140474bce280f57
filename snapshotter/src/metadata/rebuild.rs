//! A damaged database is set aside, and a new one made of what the journal says.
//!
//! Invariant: what can't be accounted for is left alone: directories of snapshots that are made
//! later have higher numbers, and lower ones without a record are never removed.

use std::path::Path;

use redb::Database;
use tracing::{error, warn};

use super::journal::Account;
use super::{
    Backing, COUNTER_DIRECTORY, COUNTER_TREE, COUNTER_UNKNOWN, COUNTERS, Change, Index, Metadata,
    MetadataError, SNAPSHOTS, TreeNumber,
};

/// What a damaged database is renamed to.
const SET_ASIDE: &str = "metadata.db.damaged";

/// Tree numbers that are left out where it is not known which were given: a number is never used
/// for two trees.
const UNKNOWN_TREES: u64 = 1 << 20;

impl Metadata {
    /// Opens the database as [`Metadata::open`] does; one that is damaged is rebuilt as far as
    /// possible. Blocks.
    ///
    /// # Errors
    /// As [`Metadata::open`], but for damage.
    pub fn open_or_rebuild(root: &Path) -> Result<Self, MetadataError> {
        let damage = match Self::open(root) {
            Err(error) if error.is_damage() => error,
            other => return other,
        };
        let account = Account::read(root);
        let database = root.join(super::FILE_NAME);
        let aside = root.join(SET_ASIDE);
        error!(
            error = %damage,
            set_aside = %aside.display(),
            snapshots = account.records.len(),
            models = account.models.len(),
            unreadable = account.unreadable,
            "the metadata is damaged and is rebuilt from its journal; pull images anew that are missing"
        );
        std::fs::rename(&database, &aside).map_err(|source| MetadataError::Open {
            path: database,
            source: Box::new(source.into()),
        })?;
        Self::open(root)?.fill(account, directories_end(root))?;
        Self::open(root)
    }

    /// Stores what an account says in an empty database.
    fn fill(self, account: Account, directories: u64) -> Result<(), MetadataError> {
        let mut index = Index::default();
        account.records.into_values().for_each(|record| index.apply(Change::Put(record)));
        while let Some(name) = index.first_without_root().map(str::to_owned) {
            warn!(snapshot = name, "its parents are unknown: it is left out");
            index.apply(Change::Remove(name));
        }
        let trees = index.records().filter_map(|record| match record.backing {
            Backing::Lazy { tree: TreeNumber(tree), .. } => Some(u64::from(tree)),
            Backing::Directory { .. } => None,
        });
        let trees = trees.chain(account.models.keys().map(|tree| u64::from(*tree)));
        let known = trees.max().map_or(1, |tree| tree + 1).max(account.next_tree);
        let lost = if account.next_tree == 0 { UNKNOWN_TREES } else { 0 };
        let counters = [
            (COUNTER_UNKNOWN, directories),
            (COUNTER_DIRECTORY, directories),
            (COUNTER_TREE, known.saturating_add(lost)),
        ];
        {
            let mut writer = self.writer();
            let database = self.reopened(&mut writer)?;
            store(database, &index, &counters).map_err(|source| self.write_error(source))?;
        }
        for (tree, model) in account.models {
            self.put_model(TreeNumber(tree), &model)?;
        }
        Ok(())
    }
}

/// One above the highest number of a snapshot's directory.
fn directories_end(root: &Path) -> u64 {
    let entries = root.join("snapshots").read_dir().into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    numbers.max().map_or(1, |highest| highest.saturating_add(1))
}

fn store(database: &Database, index: &Index, counters: &[(&str, u64)]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut snapshots = transaction.open_table(SNAPSHOTS)?;
        for record in index.records() {
            let json = serde_json::to_vec(&**record).map_err(std::io::Error::from)?;
            snapshots.insert(record.info.name.as_str(), json.as_slice())?;
        }
        let mut table = transaction.open_table(COUNTERS)?;
        for (name, value) in counters {
            table.insert(name, value)?;
        }
    }
    transaction.commit()?;
    Ok(())
}
