//! All records in memory, with what answers containerd's frequent questions without a scan:
//! Stat by name, List by `snapshot.ref` and parent, the number of children.
//!
//! Invariant: every parent of a record is here, is committed, and no chain is a circle. It is
//! checked when the database is read, and kept by those who decide on a change.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::TreeNumber;
use super::record::{Backing, DirectoryId, Kind, LazySnapshot, Record};

/// A layer above a parent: what `containerd.io/snapshot.ref` and the parent's name say together.
type Target = (String, Option<String>);

/// A change of one snapshot, one transaction.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// Adds a record, or replaces the one of the same name.
    Put(Record),
    /// Takes one record away and adds another: a commit.
    Replace {
        /// The key that ends.
        key: String,
        /// What takes its place.
        record: Record,
    },
    /// Takes a record away.
    Remove(String),
}

/// The records in memory.
#[derive(Debug, Default)]
pub(crate) struct Index {
    records: BTreeMap<String, Arc<Record>>,
    children: HashMap<String, usize>,
    targets: HashMap<Target, BTreeSet<String>>,
    directories: HashSet<DirectoryId>,
}

impl Index {
    /// The record of a name.
    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Record>> {
        self.records.get(name)
    }

    /// All records in the order of their names.
    pub(crate) fn records(&self) -> impl Iterator<Item = &Arc<Record>> {
        self.records.values()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// How many snapshots have this one as their parent.
    pub(crate) fn children(&self, name: &str) -> usize {
        self.children.get(name).copied().unwrap_or(0)
    }

    /// The snapshots of a layer above a parent, of any kind, in the order of their names.
    pub(crate) fn targets(
        &self,
        reference: &str,
        parent: Option<&str>,
    ) -> impl Iterator<Item = &Arc<Record>> {
        let target = (reference.to_owned(), parent.map(str::to_owned));
        self.targets.get(&target).into_iter().flatten().filter_map(|name| self.records.get(name))
    }

    /// Whether a snapshot owns the directory.
    pub(crate) fn owns_directory(&self, id: DirectoryId) -> bool {
        self.directories.contains(&id)
    }

    /// The ancestors of a snapshot, itself excluded, nearest first.
    pub(crate) fn ancestors(&self, record: &Record) -> Vec<Arc<Record>> {
        let parent = |record: &Record| {
            record.info.parent.as_deref().and_then(|name| self.records.get(name)).cloned()
        };
        std::iter::successors(parent(record), |record| parent(record)).collect()
    }

    /// Lazy snapshots, parents first: a tree's number is given after its parent's commit, so the
    /// order of the numbers is one of parents before children.
    pub(crate) fn lazy(&self) -> Vec<LazySnapshot> {
        let mut found: Vec<LazySnapshot> =
            self.records.values().filter_map(|record| self.lazy_snapshot(record)).collect();
        found.sort_by_key(|lazy| lazy.tree);
        found
    }

    fn lazy_snapshot(&self, record: &Record) -> Option<LazySnapshot> {
        let Backing::Lazy { tree, record: opaque } = &record.backing else { return None };
        let parent = record.info.parent.clone();
        let parent_tree = parent.as_deref().and_then(|name| self.tree_of(name));
        let name = record.info.name.clone();
        Some(LazySnapshot { name, parent, parent_tree, tree: *tree, record: opaque.clone() })
    }

    /// The tree of a snapshot, if it is lazy.
    pub(crate) fn tree_of(&self, name: &str) -> Option<TreeNumber> {
        match self.records.get(name)?.backing {
            Backing::Lazy { tree, .. } => Some(tree),
            Backing::Directory { .. } => None,
        }
    }

    /// Carries out a change.
    pub(crate) fn apply(&mut self, change: Change) {
        match change {
            Change::Put(record) => self.put(record),
            Change::Replace { key, record } => {
                self.take(&key);
                self.put(record);
            }
            Change::Remove(name) => self.take(&name),
        }
    }

    /// Whether a change is already part of what is here.
    pub(crate) fn reflects(&self, change: &Change) -> bool {
        let holds = |record: &Record| {
            self.records.get(&record.info.name).is_some_and(|found| **found == *record)
        };
        match change {
            Change::Put(record) => holds(record),
            Change::Replace { key, record } => !self.records.contains_key(key) && holds(record),
            Change::Remove(name) => !self.records.contains_key(name),
        }
    }

    fn put(&mut self, record: Record) {
        self.take(&record.info.name);
        let name = record.info.name.clone();
        if let Some(parent) = &record.info.parent {
            *self.children.entry(parent.clone()).or_default() += 1;
        }
        if let Some(target) = target(&record) {
            self.targets.entry(target).or_default().insert(name.clone());
        }
        if let Backing::Directory { id, .. } = record.backing {
            self.directories.insert(id);
        }
        self.records.insert(name, Arc::new(record));
    }

    fn take(&mut self, name: &str) {
        let Some(record) = self.records.remove(name) else { return };
        if let Some(parent) = &record.info.parent
            && let Some(count) = self.children.get_mut(parent)
        {
            *count -= 1;
            if *count == 0 {
                self.children.remove(parent);
            }
        }
        if let Some(target) = target(&record)
            && let Some(names) = self.targets.get_mut(&target)
        {
            names.remove(name);
            if names.is_empty() {
                self.targets.remove(&target);
            }
        }
        if let Backing::Directory { id, .. } = record.backing {
            self.directories.remove(&id);
        }
    }

    /// A record whose chain of parents does not end at a snapshot without a parent, or passes one
    /// that is not committed: nothing that was written in order can be so.
    pub(crate) fn first_without_root(&self) -> Option<&str> {
        let mut children: HashMap<&str, Vec<&str>> = HashMap::new();
        let mut reached: Vec<&str> = Vec::new();
        for record in self.records.values() {
            match &record.info.parent {
                Some(parent) => children.entry(parent).or_default().push(&record.info.name),
                None => reached.push(&record.info.name),
            }
        }
        let mut rooted: HashSet<&str> = HashSet::new();
        while let Some(name) = reached.pop() {
            rooted.insert(name);
            let committed =
                self.records.get(name).is_some_and(|record| record.info.kind == Kind::Committed);
            if committed {
                reached.extend(children.remove(name).unwrap_or_default());
            }
        }
        self.records.keys().map(String::as_str).find(|name| !rooted.contains(name))
    }
}

fn target(record: &Record) -> Option<Target> {
    let reference = record.info.target()?;
    Some((reference.to_owned(), record.info.parent.clone()))
}
