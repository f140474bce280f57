//! `weightfs index`: makes the index of an artifact and pushes it as a referrer of its manifest.

use bytes::Bytes;
use serde::Serialize;
use tracing::info;
use weightfs_fusefs::index::build::layer_index;
use weightfs_fusefs::index::find::find_index;
use weightfs_fusefs::index::{Index, IndexError, MEDIA_TYPE};
use weightfs_fusefs::{Artifact, Compression, LayerError, Progress, stored_points};
use weightfs_store::{Digest, ReadError, Reference, SourceError};

use crate::indexes::{IndexPolicy, Indexes};
use crate::trees::{Opener, TreesError};

/// The media type of manifests that don't say their own.
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
pub enum MakeIndexError {
    /// The artifact can't be opened.
    #[error(transparent)]
    Trees(#[from] TreesError),
    /// A layer can't be read.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A layer can't be decompressed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It would be over its bound.
    #[error("the index of {reference}: {source}")]
    Index {
        /// The artifact.
        reference: String,
        /// What is wrong.
        source: IndexError,
    },
    /// The registry did not answer, or did not take it.
    #[error("the index: {0}")]
    Registry(#[from] SourceError),
}

/// An index that was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// The artifact.
    pub artifact: Artifact,
    /// The index, as bytes.
    pub bytes: Bytes,
    /// What it has.
    pub summary: Summary,
}

/// What an index has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The artifact's manifest.
    pub manifest: Digest,
    /// Digest of the index.
    pub index: Digest,
    /// Its bytes.
    pub bytes: usize,
    /// Its layers.
    pub layers: usize,
    /// Its chunks.
    pub chunks: usize,
    /// Its files; a raw layer is one.
    pub files: usize,
}

impl Summary {
    fn of(manifest: Digest, index: &Index, bytes: &Bytes) -> Self {
        let layers = index.layers();
        Self {
            manifest,
            index: Digest::of(bytes),
            bytes: bytes.len(),
            layers: layers.len(),
            chunks: layers.iter().map(|layer| layer.chunk_digests.len() / 32).sum(),
            files: layers.iter().map(|layer| layer.listing.entries().len().max(1)).sum(),
        }
    }
}

/// The index that the registry has of what `reference` names, if it has one for all its layers.
///
/// # Errors
/// A registry that fails.
pub async fn present(
    opener: &Opener,
    reference: &Reference,
) -> Result<Option<Summary>, MakeIndexError> {
    let artifact = opener.resolve(reference).await?;
    let (from, manifest) = (&artifact.repository, artifact.manifest_digest);
    let found = find_index(&opener.registries, from, manifest).await?;
    let whole = found.filter(|found| {
        artifact.layers.iter().all(|layer| found.index.layer(layer.digest).is_some())
    });
    Ok(whole.map(|found| Summary::of(manifest, &found.index, &found.bytes)))
}

/// Makes the index of what `reference` names: each layer is read once.
///
/// # Errors
/// An artifact that can't be opened or read.
pub async fn make(
    opener: &Opener,
    reference: &Reference,
    progress: &dyn Progress,
) -> Result<Made, MakeIndexError> {
    let artifact = opener.resolve(reference).await?;
    // What an older index says is not handed on.
    let opener = &Opener { indexes: Indexes::new(IndexPolicy::Off), ..opener.clone() };
    let open = opener.open(&artifact, progress).await?;
    let mut layers: Vec<weightfs_fusefs::index::LayerIndex> = Vec::new();
    for layer in &open.layers {
        let descriptor = &layer.descriptor;
        if layers.iter().any(|known| known.digest == descriptor.digest) {
            continue;
        }
        let (digest, size) = (descriptor.digest, descriptor.size);
        let source = opener.registries.source(&artifact.repository, digest, size);
        let points = match descriptor.compression {
            Compression::None => Bytes::new(),
            Compression::Gzip | Compression::Zstd => {
                // Where it was read in part until now.
                layer.blob.complete().await?;
                stored_points(&opener.store, descriptor)
            }
        };
        if descriptor.compression != Compression::None && points.is_empty() {
            info!(layer = %digest, "it is one piece: it can't be read in part");
        }
        layers.push(layer_index(layer, source, points, opener.deadline, progress).await?);
    }
    let index = Index::new(artifact.manifest_digest, layers);
    let bytes = index
        .to_bytes()
        .map_err(|source| MakeIndexError::Index { reference: reference.to_string(), source })?;
    let summary = Summary::of(artifact.manifest_digest, &index, &bytes);
    Ok(Made { artifact, bytes, summary })
}

impl Made {
    /// Pushes it beside the artifact; the digest of the manifest that carries it.
    ///
    /// # Errors
    /// A registry that fails or refuses.
    pub async fn push(&self, opener: &Opener) -> Result<Digest, MakeIndexError> {
        let Artifact { repository, manifest, manifest_digest, .. } = &self.artifact;
        let document: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
        let media_type = document["mediaType"].as_str().unwrap_or(MANIFEST_TYPE).to_owned();
        let subject = weightfs_store::registry::Referrer {
            media_type,
            digest: *manifest_digest,
            size: manifest.len() as u64,
            artifact_type: String::new(),
        };
        Ok(opener.registries.push_referrer(repository, &subject, MEDIA_TYPE, &self.bytes).await?)
    }
}
