//! What is mounted, as people name it: a model, or an image with lazy layers.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use weightfs_fusefs::{Filesystem, OpenLayer, Tree, TreeNumber};
use weightfs_proto::control::MountActivity;
use weightfs_store::{SourceKind, Trust};

use super::rates::Bytes;
use crate::metadata::{Backing, Metadata, Record};
use crate::models::Models;
use crate::snapshots::layer::IMAGE_REF;
use crate::trees::{Trees, least, trust_name};

/// Files of a tree that are looked at at the most.
const MAX_FILES: usize = 4096;

/// What tells mounts apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    kind: Kind,
    /// Its reference; empty for layers that came without one.
    pub(super) name: String,
    /// Where a model is bound.
    target: String,
}

impl Key {
    fn image(record: &Record) -> Self {
        let name = record.info.labels.get(IMAGE_REF).cloned().unwrap_or_default();
        Self { kind: Kind::Image, name, target: String::new() }
    }

    pub(super) fn is_named(&self, subject: &str) -> bool {
        self.name == subject || self.kind == Kind::Model && self.target == subject
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    Model,
    Image,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Image => "image",
        }
    }
}

/// What one mount is made of.
#[derive(Debug, Default)]
pub(super) struct Parts {
    trees: Vec<TreeNumber>,
    /// Each blob once.
    pub(super) layers: Vec<Arc<OpenLayer>>,
    /// Kinds of reasons why layers are not lazy, and how many layers.
    reasons: BTreeMap<&'static str, u64>,
}

/// All that is mounted, by name.
pub(super) fn find(models: &Models, metadata: &Metadata, trees: &Trees) -> BTreeMap<Key, Parts> {
    let mut mounts = BTreeMap::<Key, Parts>::new();
    for (number, reference, target) in models.names() {
        let target = target.display().to_string();
        let key = Key { kind: Kind::Model, name: reference, target };
        mounts.entry(key).or_default().trees.push(number);
    }
    // containerd waits while the index is held: nothing else is looked at meanwhile.
    for record in metadata.index().records() {
        match &record.backing {
            Backing::Lazy { tree, .. } => {
                mounts.entry(Key::image(record)).or_default().trees.push(*tree);
            }
            Backing::Directory { reason: Some(reason), .. } => {
                let reasons = &mut mounts.entry(Key::image(record)).or_default().reasons;
                *reasons.entry(reason.kind()).or_default() += 1;
            }
            Backing::Directory { reason: None, .. } => {}
        }
    }
    // Images without anything lazy are containerd's own.
    mounts.retain(|_, parts| !parts.trees.is_empty());
    for parts in mounts.values_mut() {
        let layers = parts.trees.iter().filter_map(|number| trees.get(*number));
        let mut seen = HashSet::new();
        let layers = layers.flat_map(|tree| tree.layers.clone());
        parts.layers = layers.filter(|layer| seen.insert(layer.blob.id())).collect();
    }
    mounts
}

/// What was read of it and fetched for it.
pub(super) fn bytes(parts: &Parts, filesystem: &Filesystem) -> Bytes {
    let counters = parts.trees.iter().filter_map(|tree| filesystem.tree_counters(*tree));
    let read = counters.map(|tree| tree.hit_bytes.get() + tree.missed_bytes.get()).sum();
    let fetched = parts.layers.iter().map(|layer| layer.blob.fetched().total()).sum();
    Bytes { read, fetched }
}

/// All that is told of it.
pub(super) fn describe(
    key: &Key,
    parts: &Parts,
    filesystem: &Filesystem,
    rate: Bytes,
) -> MountActivity {
    // Each layer of a chain adds a tree; the last one has the files of all.
    let top = parts.trees.iter().max();
    let files = |tree: &Tree| (tree.files(), complete_files(tree));
    let files = top.and_then(|tree| filesystem.with_tree(*tree, files));
    let (files, files_complete) = files.unwrap_or_default();
    let mut mount = MountActivity {
        name: key.name.clone(),
        kind: key.kind.as_str().to_owned(),
        target: key.target.clone(),
        files,
        files_complete,
        read_rate: rate.read,
        fetch_rate: rate.fetched,
        reasons: parts.reasons.iter().map(|(kind, count)| pulled(kind, *count)).collect(),
        ..MountActivity::default()
    };
    for tree in parts.trees.iter().filter_map(|tree| filesystem.tree_counters(*tree)) {
        mount.hits += tree.hits.get();
        mount.hit_bytes += tree.hit_bytes.get();
        mount.misses += tree.misses.get();
        mount.missed_bytes += tree.missed_bytes.get();
    }
    let trust = add_blobs(&mut mount, &parts.layers);
    mount.trust = trust_name(trust).to_owned();
    mount.state = state(&mount, trust).to_owned();
    mount
}

/// Adds the numbers of its blobs, and says what is known of all of them.
fn add_blobs(mount: &mut MountActivity, layers: &[Arc<OpenLayer>]) -> Trust {
    let mut trust = Trust::Verified;
    for blob in layers.iter().map(|layer| &layer.blob) {
        let (stats, in_flight) = (blob.stats(), blob.in_flight());
        trust = least(trust, stats.trust);
        mount.size += stats.size;
        mount.cached += stats.cached;
        mount.rejected += stats.rejected;
        mount.requests += in_flight.requests as u64;
        mount.in_flight += in_flight.bytes;
        for kind in SourceKind::ALL {
            let bytes = blob.fetched().get(kind);
            if bytes > 0 {
                *mount.fetched.entry(kind.as_str().to_owned()).or_default() += bytes;
            }
        }
    }
    trust
}

/// The worst is said first.
fn state(mount: &MountActivity, trust: Trust) -> &'static str {
    match trust {
        Trust::Poisoned => "poisoned",
        _ if mount.in_flight > 0 => "fetching",
        _ if mount.cached >= mount.size => "complete",
        _ => "partial",
    }
}

/// Files that are here as a whole, if they can be counted in no time.
fn complete_files(tree: &Tree) -> Option<u64> {
    let mut complete = 0;
    for (number, file) in tree.contents().enumerate() {
        if number == MAX_FILES {
            return None;
        }
        complete += u64::from(file.blob.is_cached(file.range.clone()));
    }
    Some(complete)
}

fn pulled(reason: &str, count: u64) -> String {
    match count {
        1 => format!("1 layer is pulled: {reason}"),
        _ => format!("{count} layers are pulled: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worst_is_said_first() {
        let mount = |cached, in_flight| MountActivity {
            size: 10,
            cached,
            in_flight,
            ..MountActivity::default()
        };
        assert_eq!(state(&mount(10, 5), Trust::Poisoned), "poisoned");
        assert_eq!(state(&mount(9, 1), Trust::Transport), "fetching");
        assert_eq!(state(&mount(10, 0), Trust::Verified), "complete");
        assert_eq!(state(&mount(9, 0), Trust::Indexed), "partial");
    }

    #[test]
    fn a_name_is_a_reference_or_where_a_model_is() {
        let key = |kind, target: &str| Key { kind, name: "r/m:1".into(), target: target.into() };
        assert!(
            key(Kind::Model, "/mnt").is_named("/mnt") && key(Kind::Image, "").is_named("r/m:1")
        );
        assert!(!key(Kind::Image, "").is_named(""), "no image is what has no name");
    }
}
