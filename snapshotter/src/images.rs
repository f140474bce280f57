//! Layers of images, and whole artifacts, mounted lazily for the snapshots service.
//!
//! Invariant: a layer that can't be lazy is declined with a reason, never with an error: containerd
//! then pulls it as it would pull any.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::join;
use lru::LruCache;
use serde::Deserialize as _;
use tonic::async_trait;
use tracing::{error, info, warn};
use weightfs_fusefs::index::Index;
use weightfs_fusefs::{Artifact, Compression, LayerContent, LayerDescriptor, Quiet, TreeNumber};
use weightfs_store::{Digest, Reference, Repository, parse_reference};

use crate::metadata::{LazySnapshot, Metadata, Usage};
use crate::profiles;
use crate::reason::Reason;
use crate::snapshots::{LayerMounter, LayerRequest, LazyLayer, Subject, Verdict};
use crate::trees::{LayerRecord, OpenTree, Opener, TreeRecord, Trees};

/// Manifests that are remembered: containerd asks for each layer of an image in turn.
const MANIFESTS: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// Manifests of repositories.
type Manifests = LruCache<(Repository, Digest), Arc<Artifact>>;

/// Mounts the layers that can be lazy.
#[derive(Debug)]
pub struct ImageLayers {
    opener: Opener,
    trees: Arc<Trees>,
    metadata: Arc<Metadata>,
    min_layer_bytes: u64,
    /// By repository, too: who may read one may not have the right to another.
    manifests: Mutex<Manifests>,
}

impl ImageLayers {
    /// Layers from `min_layer_bytes` on, shown among `trees`.
    pub fn new(
        opener: Opener,
        trees: Arc<Trees>,
        metadata: Arc<Metadata>,
        min_layer_bytes: u64,
    ) -> Self {
        let manifests = Mutex::new(LruCache::new(MANIFESTS));
        Self { opener, trees, metadata, min_layer_bytes, manifests }
    }

    /// Shows all lazy snapshots again, from what is on this machine. Gives those that it has not.
    pub fn restore(&self) -> Vec<LazySnapshot> {
        let mut missing = Vec::new();
        for snapshot in self.metadata.lazy_snapshots() {
            if let Err(reason) = self.restore_one(&snapshot) {
                warn!(snapshot = snapshot.name, reason, "a lazy snapshot is not shown yet");
                missing.push(snapshot);
            }
        }
        missing
    }

    /// Shows lazy snapshots of which something must be asked of the registry. One that can't be
    /// shown is logged and left out: its containers fail to start, and pulling the image anew
    /// mends it.
    pub async fn mend(&self, missing: Vec<LazySnapshot>) {
        for snapshot in missing {
            match self.mend_one(&snapshot).await {
                Ok(()) => info!(snapshot = snapshot.name, "a lazy snapshot is shown again"),
                Err(reason) => {
                    error!(
                        snapshot = snapshot.name,
                        reason, "a lazy snapshot can't be shown again"
                    );
                }
            }
        }
    }

    async fn mend_one(&self, snapshot: &LazySnapshot) -> Result<(), String> {
        for layer in &remembered(snapshot)?.layers {
            let layer = self.opener.open_layer(layer, None, &Quiet).await;
            layer.map_err(|error| error.to_string())?;
        }
        self.restore_one(snapshot)
    }

    fn restore_one(&self, snapshot: &LazySnapshot) -> Result<(), String> {
        let record = remembered(snapshot)?;
        let below = match snapshot.parent_tree {
            Some(tree) => Some(self.trees.get(tree).ok_or("its parent is not shown")?),
            None => None,
        };
        let own = self.opener.reopen(record).map_err(|error| error.to_string())?;
        let tree = own.over(below.as_deref());
        self.trees.show(snapshot.tree, tree).map_err(|error| error.to_string())
    }

    async fn mount_layer(&self, request: &LayerRequest) -> Result<LazyLayer, Reason> {
        let (reference, manifest) = artifact_of(request)?;
        let digest = layer_of(request)?;
        let artifact = self.artifact(&reference, manifest).await?;
        let descriptor =
            artifact.layers.iter().find(|layer| layer.digest == digest).ok_or_else(|| {
                Reason::bad_labels(format!("the manifest {manifest} has no layer {digest}"))
            })?;
        if descriptor.compression == Compression::None {
            self.check(descriptor, None)?;
        }
        let opener = &self.opener;
        let index = opener.indexes.find(&opener.registries, &artifact, None).await;
        let index = index.map_err(Reason::failed)?;
        self.check(descriptor, index.as_deref())?;
        let below = match &request.parent {
            Some(parent) => {
                let shown = self.trees.get(parent.tree);
                Some(shown.ok_or_else(|| Reason::failed("its parent is not shown"))?)
            }
            None => None,
        };
        let over_foreign = match &below {
            Some(below) => below.record.over_foreign,
            None => request.has_parent,
        };
        let layer =
            LayerRecord { descriptor: descriptor.clone(), repository: artifact.repository.clone() };
        opener.confirm(&layer).await?;
        let open = opener.open_layer(&layer, index.as_deref(), &Quiet).await?;
        if let Some(profile) = index.and_then(|index| index.profile_of(manifest, &[digest])) {
            profile.expect(std::slice::from_ref(&open));
        }
        let record = TreeRecord::new(vec![layer], over_foreign);
        let open = OpenTree::new(vec![open], record);
        self.show(&reference, manifest, below.as_deref(), open).await
    }

    async fn mount_artifact(&self, request: &LayerRequest) -> Result<LazyLayer, Reason> {
        let (reference, manifest) = artifact_of(request)?;
        if request.has_parent {
            return Err(Reason::bad_labels("an artifact goes on top of no other snapshot"));
        }
        let artifact = self.artifact(&reference, manifest).await?;
        let open = self.opener.open(&artifact, &Quiet).await?;
        match profiles::choose(&self.opener.store, manifest, None) {
            Ok(Some(profile)) => profile.expect(&open.layers),
            Ok(None) => {}
            // It only says what comes first.
            Err(error) => warn!(%manifest, %error, "the recorded load is not gone by"),
        }
        self.show(&reference, manifest, None, open).await
    }

    /// Shows a tree on top of the one `below`.
    async fn show(
        &self,
        reference: &Reference,
        manifest: Digest,
        below: Option<&OpenTree>,
        open: OpenTree,
    ) -> Result<LazyLayer, Reason> {
        let record = open.record.clone();
        let name = reference.whole();
        // Each waits for the disk.
        let (number, ()) =
            join(self.allocate(), self.opener.remember(&name, manifest, &record)).await;
        let number = number?;
        self.trees.show(number, open.over(below))?;
        match serde_json::to_value(&record) {
            Ok(record) => Ok(LazyLayer { tree: number, record }),
            Err(error) => {
                self.unmount(number).await;
                Err(Reason::failed(error))
            }
        }
    }

    /// The image, from memory or from its registry.
    async fn artifact(
        &self,
        reference: &Reference,
        manifest: Digest,
    ) -> Result<Arc<Artifact>, Reason> {
        let key = (Repository::of(reference), manifest);
        if let Some(artifact) = self.manifests().get(&key) {
            return Ok(Arc::clone(artifact));
        }
        let pinned = reference.clone_with_digest(manifest.to_string());
        let artifact = self.opener.resolve(&pinned).await?;
        let artifact = Arc::new(artifact);
        self.manifests().put(key, Arc::clone(&artifact));
        Ok(artifact)
    }

    /// Whether a layer of that kind is worth mounting.
    fn check(&self, layer: &LayerDescriptor, index: Option<&Index>) -> Result<(), Reason> {
        let index = index.and_then(|index| index.layer(layer.digest));
        let has_points = index.is_some_and(|index| !index.points.is_empty());
        let compressed = |with: &str| Err(Reason::Compressed { with: with.to_owned() });
        match (&layer.content, layer.compression) {
            (_, Compression::Gzip) if !has_points => compressed("gzip"),
            (_, Compression::Zstd) if !has_points => compressed("zstd"),
            // A model's, whatever its size: above one that is downloaded, raw layers would have to
            // be, too, and only we can unpack those.
            (LayerContent::Raw(_) | LayerContent::ModelTar { .. }, _) => Ok(()),
            (LayerContent::ImageTar, _) if layer.size < self.min_layer_bytes => {
                Err(Reason::Small { bytes: layer.size, least: self.min_layer_bytes })
            }
            (LayerContent::ImageTar, _) => Ok(()),
        }
    }

    async fn allocate(&self) -> Result<TreeNumber, Reason> {
        let metadata = Arc::clone(&self.metadata);
        let allocated = tokio::task::spawn_blocking(move || metadata.allocate_tree()).await;
        match allocated {
            Ok(Ok(number)) => Ok(number),
            Ok(Err(error)) => Err(Reason::failed(error)),
            Err(error) => Err(Reason::failed(error)),
        }
    }

    fn manifests(&self) -> std::sync::MutexGuard<'_, Manifests> {
        self.manifests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl LayerMounter for ImageLayers {
    async fn mount(&self, request: LayerRequest) -> Verdict {
        match request.subject {
            Subject::Layer => match self.mount_layer(&request).await {
                Ok(lazy) => Verdict::Lazy(lazy),
                Err(reason) => Verdict::Ordinary { reason },
            },
            Subject::Artifact => match self.mount_artifact(&request).await {
                Ok(lazy) => Verdict::Lazy(lazy),
                Err(reason) => Verdict::Refused { reason },
            },
        }
    }

    fn directory(&self, tree: TreeNumber) -> PathBuf {
        self.trees.directory(tree)
    }

    async fn unmount(&self, tree: TreeNumber) {
        let trees = Arc::clone(&self.trees);
        // It may wait for a LOOKUP. A panic in there has been reported; the tree is gone anyway.
        let _ = tokio::task::spawn_blocking(move || trees.hide(tree)).await;
    }

    fn clean_up(&self) {
        self.trees.sweep();
    }

    fn usage(&self, tree: TreeNumber) -> Usage {
        let Some(tree) = self.trees.get(tree) else { return Usage::default() };
        let entries = tree.own_layers().iter().map(|layer| layer.listing.entries().len() as u64);
        Usage { bytes: tree.own_stats().cached, inodes: entries.sum() }
    }
}

/// What was remembered of a lazy snapshot: its own layers. Those below are its parent's.
fn remembered(snapshot: &LazySnapshot) -> Result<TreeRecord, String> {
    TreeRecord::deserialize(&snapshot.record).map_err(|error| error.to_string())
}

/// Which artifact containerd speaks of.
fn artifact_of(request: &LayerRequest) -> Result<(Reference, Digest), Reason> {
    let image = request.image_ref.as_ref().ok_or_else(|| missing("which image it is of"))?;
    let manifest = request.manifest_digest.as_ref().ok_or_else(|| missing("its manifest"))?;
    let reference = parse_reference(image)
        .map_err(|error| Reason::bad_labels(format!("{image:?}: {error}")))?;
    Ok((reference, manifest.parse::<Digest>().map_err(Reason::bad_labels)?))
}

/// Which layer of it.
fn layer_of(request: &LayerRequest) -> Result<Digest, Reason> {
    let layer = request.layer_digest.as_ref().ok_or_else(|| missing("its digest"))?;
    layer.parse().map_err(Reason::bad_labels)
}

fn missing(what: &str) -> Reason {
    Reason::NoAnnotations { missing: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The labels that containerd sets, one on a line.
    const LABELS: &str = "containerd.io/snapshot/cri.image-ref=localhost:5000/m:1\n\
        containerd.io/snapshot/cri.manifest-digest=sha256:\
        f338e13524cf74c04cefcbd19e8f625e65aa35831bbd8b9ae24aa7d1a6e8bd19\n\
        containerd.io/snapshot/cri.layer-digest=sha256:\
        5d13da7718a982061b95bd12b5fd1161c9c850437f5e2f63a774f014bd0ba581\n\
        containerd.io/snapshot/cri.image-layers=sha256:aa,sha256:bb\n\
        containerd.io/snapshot/other=x\nforeign=y";

    #[test]
    fn fuzz_labels_name_a_layer_or_a_reason() {
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[LABELS.as_bytes()], input);
            let text = String::from_utf8_lossy(&bytes);
            let pairs = text.lines().filter_map(|line| line.split_once('='));
            let labels: BTreeMap<_, _> =
                pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            let request = LayerRequest::new("chain", &labels, None, false);
            assert!(!request.annotations.contains_key("foreign"));
            let named = artifact_of(&request).and_then(|of| Ok((of, layer_of(&request)?)));
            match named {
                Ok(((_, manifest), layer)) => {
                    assert_eq!(request.subject, Subject::Layer);
                    assert_eq!(request.manifest_digest, Some(manifest.to_string()));
                    assert_eq!(request.layer_digest, Some(layer.to_string()));
                }
                Err(reason) => {
                    assert!(reason.kind() == "no-annotations" || reason.kind() == "bad-labels")
                }
            }
        });
    }
}
