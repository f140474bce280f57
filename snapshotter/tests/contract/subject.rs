//! The real snapshots on a mounter of directories: calls, and all that can be seen of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use weightfs::metadata::{Backing, Kind, Metadata, SNAPSHOT_REF};
use weightfs::snapshots::{LayerMounter, Mount, MountKind, Prepared, SnapshotError, Snapshots};

use crate::harness::{Answer, FakeMounter};
use crate::model::{CHAINS, Call, Model, Modelled, NAMES, Outcome, labels, lazy_file};

/// The real thing.
pub struct Subject {
    metadata: Arc<Metadata>,
    mounter: Arc<FakeMounter>,
    snapshots: Arc<Snapshots>,
}

impl Subject {
    /// Opens what is in a root directory.
    pub fn open(root: &Path) -> Subject {
        let metadata = Arc::new(Metadata::open(root).unwrap());
        let mounter = FakeMounter::new(root, metadata.clone());
        mounter.show_only_what_is_recorded();
        for (number, chain) in CHAINS[..2].iter().enumerate() {
            mounter.answer(chain, Answer::Lazy(vec![(lazy_file(number), "x")]));
        }
        let snapshots = Snapshots::open(root, metadata.clone(), mounter.clone()).unwrap();
        Subject { metadata, mounter, snapshots }
    }

    /// Makes a call.
    pub async fn apply(&self, call: &Call) -> Outcome {
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
            Call::Write { name, file } => self.write(NAMES[*name], *file),
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

    fn write(&self, name: &str, file: u8) -> Result<Outcome, SnapshotError> {
        let mounts = self.snapshots.mounts(name)?;
        if self.snapshots.stat(name)?.kind == Kind::View {
            return Ok(Outcome::FailedPrecondition);
        }
        let upper = directories(&mounts).remove(0);
        std::fs::write(upper.join(file.to_string()), "x").unwrap();
        Ok(Outcome::Done)
    }

    /// Everything that is there; and memory, records, directories, trees, filters, mounts and usage
    /// agree on it.
    pub async fn observe(&self, root: &Path) -> BTreeMap<String, Modelled> {
        let mut seen = BTreeMap::new();
        let (mut numbers, mut trees) = (BTreeSet::new(), BTreeSet::new());
        for record in self.snapshots.list(&[]).unwrap() {
            let info = self.snapshots.stat(&record.info.name).unwrap();
            assert_eq!(info, record.info);
            let (lazy, directory, unseen) = match &record.backing {
                Backing::Directory { id, reason, .. } => {
                    let is_layer = info.kind == Kind::Committed;
                    assert!(reason.is_some() || !is_layer, "no reason for {info:?}");
                    let directory = root.join("snapshots").join(id.to_string()).join("fs");
                    (false, directory, numbers.insert(id.to_string()))
                }
                Backing::Lazy { tree, .. } => {
                    (true, self.mounter.directory(*tree), trees.insert(*tree))
                }
            };
            assert!(unseen, "two snapshots share {:?}", record.backing);
            let files = names_in(&directory);
            self.assert_usage(&info.name, info.kind, lazy, files.len()).await;
            let (kind, parent, labels) = (info.kind, info.parent, info.labels);
            seen.insert(info.name, Modelled { kind, parent, labels, lazy, files });
        }
        assert_eq!(names_in(&root.join("snapshots")), numbers);
        assert_eq!(self.mounter.trees().into_iter().collect::<BTreeSet<_>>(), trees);
        assert_eq!(self.metadata.lazy_snapshots().len(), trees.len());
        seen
    }

    async fn assert_usage(&self, name: &str, kind: Kind, lazy: bool, files: usize) {
        let usage = self.snapshots.usage(name).await.unwrap();
        match (lazy, kind) {
            (true, _) => assert!(usage.bytes > 1000 && usage.inodes == 3, "{usage:?}"),
            // Nothing is ever in it.
            (false, Kind::View) => assert_eq!(usage.inodes, 0),
            // Its root counts as well.
            (false, _) => assert_eq!(usage.inodes, files as u64 + 1, "{name}"),
        }
    }

    /// Asserts that what is there is what the model says.
    pub async fn assert_is(&self, root: &Path, model: &Model, after: &str) {
        let mut seen = self.observe(root).await;
        // A lazy tree shows its lazy parents' files, too.
        for (name, seen) in seen.iter_mut().filter(|(_, seen)| seen.lazy) {
            let shown = model.0.get(name).map(|_| model.shown(name)).unwrap_or_default();
            assert!(seen.files.is_subset(&shown), "{name} after {after}");
            seen.files = model.0.get(name).map(|found| found.files.clone()).unwrap_or_default();
        }
        assert_eq!(seen, model.0, "after {after}");
        for name in model.names(|_, found| found.kind != Kind::Committed) {
            let mounts = self.snapshots.mounts(name).unwrap();
            let shown = directories(&mounts).iter().flat_map(|dir| names_in(dir)).collect();
            assert_eq!(model.shown(name), shown, "{name} after {after}: {mounts:?}");
        }
        self.assert_filters(model);
    }

    fn assert_filters(&self, model: &Model) {
        let listed = |filters: &[&str]| -> Vec<String> {
            let filters: Vec<_> = filters.iter().map(|&filter| filter.to_owned()).collect();
            let found = self.snapshots.list(&filters).unwrap();
            found.iter().map(|record| record.info.name.clone()).collect()
        };
        let target = format!("labels.\"{SNAPSHOT_REF}\"=={},parent==\"a\"", CHAINS[0]);
        let is_target = |_: &str, found: &Modelled| {
            found.parent.as_deref() == Some("a")
                && found.labels.get(SNAPSHOT_REF).is_some_and(|chain| chain == CHAINS[0])
        };
        assert_eq!(listed(&[&target]), model.names(is_target));
        let active = |_: &str, found: &Modelled| found.kind == Kind::Active;
        assert_eq!(listed(&["kind==active"]), model.names(active));
        let one_of = |name: &str, _: &Modelled| name == "a" || name == "b";
        assert_eq!(listed(&["name==a", "name~=^b$"]), model.names(one_of));
        let labelled = |_: &str, found: &Modelled| found.labels.contains_key("value");
        assert_eq!(listed(&["labels.value"]), model.names(labelled));
    }
}

/// The directories that a mount shows, the uppermost first.
fn directories(mounts: &[Mount]) -> Vec<PathBuf> {
    let [mount] = mounts else { panic!("one mount expected: {mounts:?}") };
    if mount.kind == MountKind::Bind {
        return vec![PathBuf::from(&mount.source)];
    }
    let option = |name: &str| mount.options.iter().find_map(|text| text.strip_prefix(name));
    let lower = option("lowerdir=").unwrap().split(':');
    option("upperdir=").into_iter().chain(lower).map(PathBuf::from).collect()
}

fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
