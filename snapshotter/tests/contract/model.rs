//! Random sequences of calls, with restarts in between, against a model of the contract.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use weightfs::metadata::{Backing, Kind, Metadata, SNAPSHOT_REF};
use weightfs::snapshots::{LayerMounter, Prepared, SnapshotError, Snapshots};

use crate::harness::{Answer, FakeMounter, new_root};

/// Few names, so that calls meet.
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// The first two are lazy.
const CHAINS: [&str; 3] = ["sha256:lazy-1", "sha256:lazy-2", "sha256:ordinary"];

#[derive(Debug, Clone)]
enum Call {
    Prepare { key: usize, parent: Option<usize> },
    Layer { key: usize, parent: Option<usize>, chain: usize },
    View { key: usize, parent: Option<usize> },
    Commit { name: usize, key: usize, chain: Option<usize> },
    Remove { name: usize },
    Label { name: usize, value: u8 },
    Cleanup,
    Restart,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
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
        1 => Just(Call::Cleanup),
        1 => Just(Call::Restart),
    ];
    prop::collection::vec(call, 1..40)
}

/// What the contract says is there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Modelled {
    kind: Kind,
    parent: Option<String>,
    labels: BTreeMap<String, String>,
    lazy: bool,
}

/// How a call ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
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

#[derive(Debug, Default)]
struct Model(BTreeMap<String, Modelled>);

impl Model {
    fn apply(&mut self, call: &Call) -> Outcome {
        let outcome = match call {
            Call::Prepare { key, parent } => self.create(*key, *parent, Kind::Active, None),
            Call::View { key, parent } => self.create(*key, *parent, Kind::View, None),
            Call::Layer { key, parent, chain } => self.layer(*key, *parent, *chain),
            Call::Commit { name, key, chain } => self.commit(*name, *key, *chain),
            Call::Remove { name } => self.remove(*name),
            Call::Label { name, value } => self.label(*name, *value),
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
        let modelled = Modelled { kind, parent, labels: labels(chain), lazy };
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
}

fn labels(chain: Option<usize>) -> BTreeMap<String, String> {
    chain.map(|chain| (SNAPSHOT_REF.to_owned(), CHAINS[chain].to_owned())).into_iter().collect()
}

/// The real thing.
struct Subject {
    metadata: Arc<Metadata>,
    mounter: Arc<FakeMounter>,
    snapshots: Arc<Snapshots>,
}

impl Subject {
    fn open(root: &Path) -> Subject {
        let metadata = Arc::new(Metadata::open(root).unwrap());
        let mounter = FakeMounter::new(root, metadata.clone());
        for chain in &CHAINS[..2] {
            mounter.answer(chain, Answer::Lazy(vec![]));
        }
        let snapshots = Snapshots::open(root, metadata.clone(), mounter.clone()).unwrap();
        Subject { metadata, mounter, snapshots }
    }

    async fn apply(&self, call: &Call) -> Outcome {
        let ended: Result<Outcome, SnapshotError> = match call {
            Call::Prepare { key, parent } => self.prepare(*key, *parent, None).await,
            Call::Layer { key, parent, chain } => self.prepare(*key, *parent, Some(*chain)).await,
            Call::View { key, parent } => {
                let parent = parent.map(|parent| NAMES[parent]);
                let viewed = self.snapshots.view(NAMES[*key], parent, BTreeMap::new()).await;
                viewed.map(|_| Outcome::Done)
            }
            Call::Commit { name, key, chain } => {
                let committed = self.snapshots.commit(NAMES[*name], NAMES[*key], labels(*chain));
                committed.await.map(|()| Outcome::Done)
            }
            Call::Remove { name } => {
                self.snapshots.remove(NAMES[*name]).await.map(|()| Outcome::Done)
            }
            Call::Label { name, value } => {
                let label = BTreeMap::from([("value".to_owned(), value.to_string())]);
                let mask = ["labels.value".to_owned()];
                let updated = self.snapshots.update(NAMES[*name], label, &mask).await;
                updated.map(|_| Outcome::Done)
            }
            Call::Cleanup => self.snapshots.cleanup().await.map(|()| Outcome::Done),
            Call::Restart => Ok(Outcome::Done),
        };
        ended.unwrap_or_else(Outcome::from)
    }

    async fn prepare(
        &self,
        key: usize,
        parent: Option<usize>,
        chain: Option<usize>,
    ) -> Result<Outcome, SnapshotError> {
        let parent = parent.map(|parent| NAMES[parent]);
        Ok(match self.snapshots.prepare(NAMES[key], parent, labels(chain)).await? {
            Prepared::Active(mounts) => {
                assert_eq!(self.snapshots.mounts(NAMES[key])?, mounts);
                Outcome::Done
            }
            Prepared::Committed { .. } => Outcome::LayerExists,
        })
    }

    /// Everything that is there, and that memory, records, directories and trees agree on it.
    fn observe(&self, root: &Path) -> BTreeMap<String, Modelled> {
        let mut seen = BTreeMap::new();
        let (mut directories, mut trees) = (BTreeSet::new(), BTreeSet::new());
        for record in self.snapshots.list(&[]).unwrap() {
            let info = self.snapshots.stat(&record.info.name).unwrap();
            assert_eq!(info, record.info);
            let (lazy, unseen) = match record.backing {
                Backing::Directory { id, .. } => (false, directories.insert(id.to_string())),
                Backing::Lazy { tree, .. } => (true, trees.insert(tree)),
            };
            assert!(unseen, "two snapshots share {:?}", record.backing);
            let modelled =
                Modelled { kind: info.kind, parent: info.parent, labels: info.labels, lazy };
            seen.insert(info.name, modelled);
        }
        let on_disk: BTreeSet<String> = std::fs::read_dir(root.join("snapshots"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(on_disk, directories);
        assert_eq!(self.mounter.trees().into_iter().collect::<BTreeSet<_>>(), trees);
        for lazy in self.metadata.lazy_snapshots() {
            assert!(self.mounter.directory(lazy.tree).is_dir());
        }
        seen
    }
}

async fn run(calls: Vec<Call>) {
    let root = new_root();
    let mut subject = Subject::open(root.path());
    let mut model = Model::default();
    for call in &calls {
        if matches!(call, Call::Restart) {
            drop(subject);
            subject = Subject::open(root.path());
        }
        let expected = model.apply(call);
        assert_eq!(subject.apply(call).await, expected, "{call:?}");
        assert_eq!(subject.observe(root.path()), model.0, "after {call:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_calls_do_what_the_contract_says(calls in calls()) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run(calls));
    }
}
