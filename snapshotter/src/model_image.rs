//! `weightfs image`: makes the model image of an artifact and pushes it beside it. Nothing of the
//! weights is uploaded: the image has the artifact's own blobs.
//!
//! Invariant: what is pushed shows the same files as the artifact, or nothing is pushed.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use sha2::{Digest as _, Sha256};
use weightfs_fusefs::artifact::model_image::{ImageLayer, ModelImage, rank};
use weightfs_fusefs::index::find::Lookup;
use weightfs_fusefs::{
    Artifact, ArtifactKind, Base, Compression, NodeId, NodeKind, OpenLayer, Progress, Tree,
    TreeError,
};
use weightfs_store::blob::Read;
use weightfs_store::{Digest, ReadError, Reference, Repository, SourceError};

use crate::trees::{Opener, TreesError};

/// What is put behind the artifact's tag where none is given.
const TAG_SUFFIX: &str = "-image";

/// Bytes that are hashed at a time.
const HASH_BYTES: u64 = 1 << 20;

/// Why there is no model image.
#[derive(Debug, thiserror::Error)]
pub enum ModelImageError {
    /// The artifact can't be opened.
    #[error(transparent)]
    Trees(#[from] TreesError),
    /// It is an image as it is.
    #[error("{0} is an image already: containerd takes it as it is")]
    IsImage(String),
    /// It was named by digest, so there is no tag to make the image's of.
    #[error("{0} has no tag; name the image's with --tag")]
    NoTag(String),
    /// A layer can't be described in containerd's terms.
    #[error("layer {digest} has no place in an image: {why}")]
    Layer {
        /// The layer.
        digest: Digest,
        /// Why not.
        why: String,
    },
    /// Two layers have the same file, and containerd would see the wrong one.
    #[error(
        "two layers have {path:?}: in an image, where lazy layers come first, the other one would be seen; pack the model again without one of them"
    )]
    Order {
        /// The file.
        path: PathBuf,
    },
    /// A layer can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The registry does not say whether there is an index.
    #[error("looking for the artifact's index: {0}")]
    Index(#[source] SourceError),
    /// The registry did not take it.
    #[error("pushing the image: {0}")]
    Push(#[from] SourceError),
}

/// A model image that was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pushed {
    /// What to name it by.
    pub reference: String,
    /// Digest of its index.
    pub digest: Digest,
    /// The artifact's manifest.
    pub artifact: Digest,
    /// The artifact's index, which the image names; its chunks are compared with that.
    pub index: Option<Digest>,
    /// Layers that are mounted lazily.
    pub lazy_layers: usize,
    /// All layers.
    pub layers: usize,
    /// Bytes of the documents that were made; of the weights, nothing was uploaded.
    pub bytes: u64,
}

/// Makes and pushes the image of a model, under `tag` or the model's own with `-image`.
///
/// # Errors
/// When the artifact can't be opened, or is none; when the registry refuses.
pub async fn push(
    opener: &Opener,
    reference: &Reference,
    tag: Option<&str>,
    progress: &dyn Progress,
) -> Result<Pushed, ModelImageError> {
    let artifact = opener.resolve(reference).await?;
    if artifact.kind == ArtifactKind::Image {
        return Err(ModelImageError::IsImage(reference.to_string()));
    }
    let tag = match (tag, reference.tag()) {
        (Some(tag), _) => tag.to_owned(),
        (None, Some(tag)) => format!("{tag}{TAG_SUFFIX}"),
        (None, None) => return Err(ModelImageError::NoTag(reference.to_string())),
    };
    let layers = opener.open(&artifact, progress).await?.layers;
    let beside = opener.indexes.beside(&opener.registries, &artifact);
    let index = match beside.await.map_err(ModelImageError::Index)? {
        Lookup::Found(found) => Some(found.digest),
        Lookup::Refused(_) | Lookup::Nothing => None,
    };
    let image = make(&artifact, index, &layers).await?;
    let digest = upload(opener, &artifact.repository, &tag, &image).await?;
    let Repository { registry, name } = &artifact.repository;
    let documents = image.configs.iter().chain(&image.manifests).chain([&image.index]);
    Ok(Pushed {
        reference: format!("{registry}/{name}:{tag}"),
        digest,
        artifact: artifact.manifest_digest,
        index,
        lazy_layers: layers.iter().filter(|layer| is_lazy(layer)).count(),
        layers: layers.len(),
        bytes: documents.map(|document| document.len() as u64).sum(),
    })
}

async fn make(
    artifact: &Artifact,
    index: Option<Digest>,
    layers: &[Arc<OpenLayer>],
) -> Result<ModelImage, ModelImageError> {
    let mut ordered = layers.to_vec();
    ordered.sort_by_key(|layer| rank(&layer.descriptor));
    let merge = |layers: &[Arc<OpenLayer>]| {
        Tree::merge(layers, Base::Nothing).map_err(|error: TreeError| TreesError::from(error))
    };
    if let Some(path) = difference(&merge(layers)?, &merge(&ordered)?) {
        return Err(ModelImageError::Order { path });
    }
    let mut image_layers = Vec::with_capacity(ordered.len());
    for layer in &ordered {
        let diff_id = diff_id(layer).await?;
        image_layers.push(ImageLayer { layer: &layer.descriptor, diff_id });
    }
    ModelImage::new(artifact.manifest_digest, index, &image_layers)
        .map_err(|(digest, why)| ModelImageError::Layer { digest, why })
}

fn is_lazy(layer: &OpenLayer) -> bool {
    layer.descriptor.compression == Compression::None
}

/// The first path at which two trees of the same layers differ.
fn difference(one: &Tree, other: &Tree) -> Option<PathBuf> {
    let mut others = other.walk();
    for (path, id) in one.walk() {
        match others.next() {
            Some((same, other_id)) if same == path && seen(one, id) == seen(other, other_id) => {}
            _ => return Some(path),
        }
    }
    others.next().map(|(path, _)| path)
}

/// What tells the node of a tree from another's at the same path. Directories may have been made
/// up by any of the layers.
fn seen(tree: &Tree, id: NodeId) -> Option<(u16, Option<Digest>, Option<std::ops::Range<u64>>)> {
    let node = tree.node(id)?;
    match &node.kind {
        NodeKind::Directory(_) => Some((node.permissions, None, None)),
        NodeKind::File(content) => {
            Some((node.permissions, tree.layer_of(id), Some(content.range.clone())))
        }
        _ => Some((node.permissions, tree.layer_of(id), None)),
    }
}

/// What containerd calls the digest of a layer's decompressed bytes.
async fn diff_id(layer: &OpenLayer) -> Result<Digest, ModelImageError> {
    if is_lazy(layer) {
        return Ok(layer.descriptor.digest);
    }
    let layout = layer.blob.layout();
    let mut hash = Sha256::new();
    for segment in (0..layout.segments()).filter_map(|index| layout.segment(index)) {
        let mut at = segment.start;
        while at < segment.end {
            let end = segment.end.min(at.saturating_add(HASH_BYTES));
            let bytes = match layer.blob.read(at..end)? {
                Read::Ready(slice) => slice,
                Read::Missing(miss) => miss.wait().await?,
            };
            hash.update(&*bytes);
            at = end;
        }
    }
    Ok(Digest::from_raw(hash.finalize().into()))
}

async fn upload(
    opener: &Opener,
    to: &Repository,
    tag: &str,
    image: &ModelImage,
) -> Result<Digest, SourceError> {
    let registries = &opener.registries;
    for config in &image.configs {
        registries.push_blob(to, config).await?;
    }
    for manifest in &image.manifests {
        registries.push_manifest(to, None, ModelImage::MANIFEST_TYPE, manifest).await?;
    }
    // Last, so that the tag never names what is not all there.
    registries.push_manifest(to, Some(tag), ModelImage::INDEX_TYPE, &image.index).await
}
