//! What the contract says: calls on a few names, and what is there after each of them.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use weightfs::metadata::{Kind, SNAPSHOT_REF};
use weightfs::snapshots::SnapshotError;

/// Few names, so that calls meet.
pub const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// The first two are lazy.
pub const CHAINS: [&str; 3] = ["sha256:lazy-1", "sha256:lazy-2", "sha256:ordinary"];

/// A call.
#[derive(Debug, Clone)]
pub enum Call {
    Prepare {
        key: usize,
        parent: Option<usize>,
    },
    Layer {
        key: usize,
        parent: Option<usize>,
        chain: usize,
    },
    View {
        key: usize,
        parent: Option<usize>,
    },
    Commit {
        name: usize,
        key: usize,
        chain: Option<usize>,
    },
    Remove {
        name: usize,
    },
    Label {
        name: usize,
        value: u8,
    },
    /// A file of that number into an active snapshot.
    Write {
        name: usize,
        file: u8,
    },
    Cleanup,
    /// The process ends and another one begins.
    Restart,
}

/// Sequences of up to so many calls.
pub fn calls(at_most: usize) -> impl Strategy<Value = Vec<Call>> {
    let name = || 0..NAMES.len();
    let parent = move || prop::option::weighted(0.6, name());
    let chain = || 0..CHAINS.len();
    let call = prop_oneof![
        4 => (name(), parent()).prop_map(|(key, parent)| Call::Prepare { key, parent }),
        4 => (name(), parent(), chain())
            .prop_map(|(key, parent, chain)| Call::Layer { key, parent, chain }),
        2 => (name(), parent()).prop_map(|(key, parent)| Call::View { key, parent }),
        4 => (name(), name(), prop::option::of(chain()))
            .prop_map(|(name, key, chain)| Call::Commit { name, key, chain }),
        3 => name().prop_map(|name| Call::Remove { name }),
        2 => (name(), any::<u8>()).prop_map(|(name, value)| Call::Label { name, value }),
        3 => (name(), 0..4u8).prop_map(|(name, file)| Call::Write { name, file }),
        1 => Just(Call::Cleanup),
        1 => Just(Call::Restart),
    ];
    prop::collection::vec(call, 1..at_most)
}

/// What the contract says is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modelled {
    pub kind: Kind,
    pub parent: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub lazy: bool,
    /// Files of its own.
    pub files: BTreeSet<String>,
}

/// How a call ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    LayerExists,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
}

impl From<SnapshotError> for Outcome {
    fn from(error: SnapshotError) -> Outcome {
        match error {
            SnapshotError::NotFound { .. } | SnapshotError::NoParent { .. } => Outcome::NotFound,
            SnapshotError::AlreadyExists { .. } => Outcome::AlreadyExists,
            SnapshotError::HasChildren { .. } | SnapshotError::WrongKind { .. } => {
                Outcome::FailedPrecondition
            }
            SnapshotError::ParentNotCommitted { .. } => Outcome::InvalidArgument,
            other => panic!("unexpected: {other:?}"),
        }
    }
}

/// All that is there.
#[derive(Debug, Clone, Default)]
pub struct Model(pub BTreeMap<String, Modelled>);

impl Model {
    /// Makes a call.
    pub fn apply(&mut self, call: &Call) -> Outcome {
        let outcome = match call {
            Call::Prepare { key, parent } => self.create(*key, *parent, Kind::Active, None),
            Call::View { key, parent } => self.create(*key, *parent, Kind::View, None),
            Call::Layer { key, parent, chain } => self.layer(*key, *parent, *chain),
            Call::Commit { name, key, chain } => self.commit(*name, *key, *chain),
            Call::Remove { name } => self.remove(*name),
            Call::Label { name, value } => self.label(*name, *value),
            Call::Write { name, file } => self.write(*name, *file),
            Call::Cleanup | Call::Restart => Ok(Outcome::Done),
        };
        outcome.unwrap_or_else(|failed| failed)
    }

    fn check_new(&self, key: usize, parent: Option<usize>) -> Result<(), Outcome> {
        if let Some(parent) = parent {
            match self.0.get(NAMES[parent]) {
                None => return Err(Outcome::NotFound),
                Some(found) if found.kind != Kind::Committed => {
                    return Err(Outcome::InvalidArgument);
                }
                Some(_) => {}
            }
        }
        match self.0.contains_key(NAMES[key]) {
            true => Err(Outcome::AlreadyExists),
            false => Ok(()),
        }
    }

    fn create(
        &mut self,
        key: usize,
        parent: Option<usize>,
        kind: Kind,
        chain: Option<usize>,
    ) -> Result<Outcome, Outcome> {
        self.check_new(key, parent)?;
        let lazy = kind == Kind::Committed;
        let parent = parent.map(|parent| NAMES[parent].to_owned());
        let files = chain.filter(|_| lazy).map(|chain| lazy_file(chain).to_owned());
        let files = files.into_iter().collect();
        let modelled = Modelled { kind, parent, labels: labels(chain), lazy, files };
        self.0.insert(NAMES[key].to_owned(), modelled);
        Ok(Outcome::Done)
    }

    fn layer(
        &mut self,
        key: usize,
        parent: Option<usize>,
        chain: usize,
    ) -> Result<Outcome, Outcome> {
        self.check_new(key, parent)?;
        let is_target = |found: &Modelled| {
            found.kind == Kind::Committed
                && found.parent.as_deref() == parent.map(|parent| NAMES[parent])
                && found.labels.get(SNAPSHOT_REF).map(String::as_str) == Some(CHAINS[chain])
        };
        if self.0.values().any(is_target) {
            return Ok(Outcome::LayerExists);
        }
        if chain == 2 {
            return self.create(key, parent, Kind::Active, Some(chain));
        }
        self.create(key, parent, Kind::Committed, Some(chain))?;
        Ok(Outcome::LayerExists)
    }

    fn commit(
        &mut self,
        name: usize,
        key: usize,
        chain: Option<usize>,
    ) -> Result<Outcome, Outcome> {
        if self.0.contains_key(NAMES[name]) {
            return Err(Outcome::AlreadyExists);
        }
        let active = self.0.get(NAMES[key]).ok_or(Outcome::NotFound)?.clone();
        if active.kind != Kind::Active {
            return Err(Outcome::FailedPrecondition);
        }
        self.0.remove(NAMES[key]);
        let committed = Modelled { kind: Kind::Committed, labels: labels(chain), ..active };
        self.0.insert(NAMES[name].to_owned(), committed);
        Ok(Outcome::Done)
    }

    fn remove(&mut self, name: usize) -> Result<Outcome, Outcome> {
        if !self.0.contains_key(NAMES[name]) {
            return Err(Outcome::NotFound);
        }
        if self.0.values().any(|found| found.parent.as_deref() == Some(NAMES[name])) {
            return Err(Outcome::FailedPrecondition);
        }
        self.0.remove(NAMES[name]);
        Ok(Outcome::Done)
    }

    fn label(&mut self, name: usize, value: u8) -> Result<Outcome, Outcome> {
        let found = self.0.get_mut(NAMES[name]).ok_or(Outcome::NotFound)?;
        found.labels.insert("value".to_owned(), value.to_string());
        Ok(Outcome::Done)
    }

    fn write(&mut self, name: usize, file: u8) -> Result<Outcome, Outcome> {
        let found = self.0.get_mut(NAMES[name]).ok_or(Outcome::NotFound)?;
        if found.kind != Kind::Active {
            return Err(Outcome::FailedPrecondition);
        }
        found.files.insert(file.to_string());
        Ok(Outcome::Done)
    }

    /// The files that a snapshot shows: its own and its parents'.
    pub fn shown(&self, name: &str) -> BTreeSet<String> {
        let found = &self.0[name];
        let below = found.parent.as_deref().map(|parent| self.shown(parent));
        found.files.iter().cloned().chain(below.into_iter().flatten()).collect()
    }

    /// The names for which something holds.
    pub fn names(&self, holds: impl Fn(&str, &Modelled) -> bool) -> Vec<&str> {
        let all = self.0.iter().map(|(name, found)| (name.as_str(), found));
        all.filter(|(name, found)| holds(name, found)).map(|(name, _)| name).collect()
    }
}

/// The file that a lazy layer has.
pub fn lazy_file(chain: usize) -> &'static str {
    ["lazy-1", "lazy-2", "never"][chain]
}

/// The labels of a layer.
pub fn labels(chain: Option<usize>) -> BTreeMap<String, String> {
    chain.map(|chain| (SNAPSHOT_REF.to_owned(), CHAINS[chain].to_owned())).into_iter().collect()
}
