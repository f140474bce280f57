//! The seam to what mounts layers lazily. Snapshots know nothing of registries, artifacts or
//! FUSE: they hand on what containerd says of a layer, and get a directory or a reason.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tonic::async_trait;

use crate::metadata::{TreeNumber, Usage};
use crate::reason::Reason;

/// Annotations of a layer's descriptor come as labels with this prefix; all others are dropped.
const ANNOTATION_PREFIX: &str = "containerd.io/snapshot/";
pub(crate) const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
pub(crate) const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
pub(crate) const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
const IMAGE_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";

/// What a client of ours wants shown that sends no layer's digest: `artifact`.
pub(crate) const SHOW: &str = "containerd.io/snapshot/weightfs.show";
/// All layers of the manifest, as files.
pub(crate) const SHOW_ARTIFACT: &str = "artifact";

/// What is to be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// One layer of an image; containerd can unpack it as well.
    Layer,
    /// A whole artifact as one snapshot, for `weightfs prepare`; nobody else can do that.
    Artifact,
}

/// What containerd says of the layer that it is about to unpack: the labels of a Prepare. Nothing
/// in it is checked beyond its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRequest {
    /// What is to be mounted.
    pub subject: Subject,
    /// The chain ID: `containerd.io/snapshot.ref`.
    pub chain_id: String,
    /// The image's reference, of the first pull that brought the layer.
    pub image_ref: Option<String>,
    /// The digest of the image's manifest.
    pub manifest_digest: Option<String>,
    /// The digest of the layer's blob.
    pub layer_digest: Option<String>,
    /// The digests of this layer's blob and of those above it, as many as fit in a label.
    pub image_layers: Vec<String>,
    /// All other labels that begin with `containerd.io/snapshot/`, under their whole names.
    pub annotations: BTreeMap<String, String>,
    /// The parent, if it is lazy: the layer is merged over it.
    pub parent: Option<LazyParent>,
    /// Whether there is a parent of any kind.
    pub has_parent: bool,
}

/// A lazy layer that another one goes on top of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LazyParent {
    /// The parent snapshot's name.
    pub name: String,
    /// The tree that shows it.
    pub tree: TreeNumber,
}

/// What becomes of a layer.
#[derive(Debug)]
pub enum Verdict {
    /// It is mounted.
    Lazy(LazyLayer),
    /// containerd shall download and unpack it.
    Ordinary {
        /// Why.
        reason: Reason,
    },
    /// The call fails: nobody could unpack an artifact into an ordinary snapshot.
    Refused {
        /// Why it can't be mounted.
        reason: Reason,
    },
}

/// A layer that is mounted.
#[derive(Debug)]
pub struct LazyLayer {
    /// The tree that shows it.
    pub tree: TreeNumber,
    /// What the mounter needs to show it again after a restart. Kept with the snapshot.
    pub record: serde_json::Value,
}

/// Mounts layers lazily. Implemented by the daemon, and by directories in tests.
#[async_trait]
pub trait LayerMounter: Send + Sync {
    /// Makes the layer, merged over its lazy parents, visible as `directory(tree)`, or says why
    /// not; then nothing is left behind.
    async fn mount(&self, request: LayerRequest) -> Verdict;

    /// Where a tree is visible: an absolute path.
    fn directory(&self, tree: TreeNumber) -> PathBuf;

    /// Takes the tree's directory away: its snapshot is gone, or never came to be. Never waits on
    /// the network.
    async fn unmount(&self, tree: TreeNumber);

    /// Forgets what was kept of trees that were in use when they were unmounted, and are not any
    /// more. Blocks on the disk.
    fn clean_up(&self);

    /// What the cache of this layer takes on the disk, without its parents. From memory.
    fn usage(&self, tree: TreeNumber) -> Usage;
}

impl LayerRequest {
    /// Reads the labels of a Prepare.
    pub(crate) fn new(
        chain_id: &str,
        labels: &BTreeMap<String, String>,
        parent: Option<LazyParent>,
        has_parent: bool,
    ) -> LayerRequest {
        let known = [IMAGE_REF, MANIFEST_DIGEST, LAYER_DIGEST, IMAGE_LAYERS, SHOW];
        let show = labels.get(SHOW).map(String::as_str);
        // An annotation of an image's layer comes as a label as well, but never without its digest.
        let subject = match labels.get(LAYER_DIGEST) {
            None if show == Some(SHOW_ARTIFACT) => Subject::Artifact,
            _ => Subject::Layer,
        };
        let is_annotation =
            |name: &str| name.starts_with(ANNOTATION_PREFIX) && !known.contains(&name);
        let annotations = labels.iter().filter(|(name, _)| is_annotation(name));
        let layers = labels.get(IMAGE_LAYERS).map(String::as_str).unwrap_or_default();
        LayerRequest {
            subject,
            chain_id: chain_id.to_owned(),
            image_ref: labels.get(IMAGE_REF).cloned(),
            manifest_digest: labels.get(MANIFEST_DIGEST).cloned(),
            layer_digest: labels.get(LAYER_DIGEST).cloned(),
            image_layers: layers
                .split(',')
                .map(str::trim)
                .filter(|digest| !digest.is_empty())
                .map(str::to_owned)
                .collect(),
            annotations: annotations.map(|(k, v)| (k.clone(), v.clone())).collect(),
            parent,
            has_parent,
        }
    }
}
