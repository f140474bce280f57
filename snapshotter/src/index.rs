//! `weightfs index`: makes the index of an artifact and pushes it as a referrer of its manifest.
//!
//! Invariant: the same artifact and profile give the same bytes, whoever makes them.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use tracing::info;
use weightfs_fusefs::index::build::{Reading, layer_index};
use weightfs_fusefs::index::find::{Believe, Found, Lookup, find_index};
use weightfs_fusefs::index::{Index, IndexError, LayerIndex, MEDIA_TYPE, PROFILE_ANNOTATION};
use weightfs_fusefs::{Artifact, Compression, LayerError, OpenLayer, Profile, Progress};
use weightfs_store::registry::Referrer;
use weightfs_store::{Digest, ReadError, SourceError, Verify};

use crate::indexes::Indexes;
use crate::trees::{Opener, TreeRecord, TreesError, layer_records};

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
    #[error("the index of {manifest}: {source}")]
    Index {
        /// The artifact's manifest.
        manifest: Digest,
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
    /// The recorded profile in it.
    profile: Option<Profile>,
}

/// What an index has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The artifact's manifest.
    pub manifest: Digest,
    /// Digest of the index.
    pub index: Digest,
    /// Digest of the manifest that carries it in the registry: what is to be signed.
    pub referrer: Option<Digest>,
    /// Its bytes.
    pub bytes: usize,
    /// Its layers.
    pub layers: usize,
    /// Its chunks.
    pub chunks: usize,
    /// Its files; a raw layer is one.
    pub files: usize,
    /// Bytes that its recorded profile covers.
    pub profiled: u64,
}

impl Summary {
    fn of(artifact: &Artifact, index: &Index, bytes: &Bytes, referrer: Option<Digest>) -> Self {
        let layers = index.layers();
        let profile = profile_in(index, artifact);
        Self {
            manifest: artifact.manifest_digest,
            index: Digest::of(bytes),
            referrer,
            bytes: bytes.len(),
            layers: layers.len(),
            chunks: layers.iter().map(|layer| layer.chunk_digests.len() / 32).sum(),
            files: layers.iter().map(|layer| layer.listing.entries().len().max(1)).sum(),
            profiled: profile.map_or(0, |profile| profile.bytes()),
        }
    }
}

fn digests(artifact: &Artifact) -> Vec<Digest> {
    artifact.layers.iter().map(|layer| layer.digest).collect()
}

fn profile_in(index: &Index, artifact: &Artifact) -> Option<Profile> {
    index.profile_of(artifact.manifest_digest, &digests(artifact))
}

/// The index that the registry has of an artifact, if it has one for all its layers, and with that
/// profile if one is given.
///
/// # Errors
/// A registry that fails.
pub async fn present(
    opener: &Opener,
    artifact: &Artifact,
    profile: Option<&Profile>,
) -> Result<Option<Summary>, MakeIndexError> {
    let (from, manifest) = (&artifact.repository, artifact.manifest_digest);
    let lookup = find_index(&opener.registries, from, manifest, &Believe::SameRepository).await?;
    let Lookup::Found(Found { index, bytes, referrer, .. }) = lookup else { return Ok(None) };
    let is_whole = artifact.layers.iter().all(|layer| index.layer(layer.digest).is_some());
    let has_profile = profile.is_none() || profile_in(&index, artifact).as_ref() == profile;
    let is_good = is_whole && has_profile;
    Ok(is_good.then(|| Summary::of(artifact, &index, &bytes, Some(referrer))))
}

/// Makes the index of an artifact: each layer is read once, if it was not verified here.
///
/// # Errors
/// Layers that can't be opened or read.
pub async fn make(
    opener: &Opener,
    artifact: Artifact,
    profile: Option<Profile>,
    progress: &dyn Progress,
) -> Result<Made, MakeIndexError> {
    // What an older index says is not handed on.
    let indexes = Indexes::new(None, Verify::Background);
    let open = Opener { indexes, ..opener.clone() }.open(&artifact, progress).await?;
    let mut layers: Vec<LayerIndex> = Vec::new();
    for layer in once_each(&open.layers) {
        let descriptor = &layer.descriptor;
        if descriptor.compression != Compression::None {
            // Where it was read in part until now.
            layer.blob.complete().await?;
        }
        let (digest, size) = (descriptor.digest, descriptor.size);
        let source = opener.registries.source(&artifact.repository, digest, size);
        let reading = Reading::From { source: &source, deadline: opener.deadline, progress };
        let made = layer_index(&opener.store, layer, reading).await?;
        let made = made.ok_or(LayerError::Stopped { digest })?;
        if descriptor.compression != Compression::None && made.points.is_empty() {
            info!(layer = %digest, "it is one piece: it can't be read in part");
        }
        layers.push(made);
    }
    Made::new(artifact, layers, profile)
}

/// Makes the index of an artifact of what is here, if all its layers were verified here.
///
/// # Errors
/// A cache that can't be used.
pub async fn make_of_what_is_here(
    opener: &Opener,
    artifact: Artifact,
) -> Result<Option<Made>, MakeIndexError> {
    let record = TreeRecord::new(layer_records(&artifact), false);
    let (local, stopped) = (opener.clone(), artifact.layers.first().map(|layer| layer.digest));
    let open = match tokio::task::spawn_blocking(move || local.reopen(record)).await {
        Ok(Ok(open)) => open,
        Ok(Err(TreesError::Forgotten(_))) => return Ok(None),
        Ok(Err(error)) => return Err(error.into()),
        Err(_) => {
            let digest = stopped.unwrap_or(artifact.manifest_digest);
            return Err(LayerError::Stopped { digest }.into());
        }
    };
    let mut layers = Vec::new();
    for layer in once_each(&open.layers) {
        match layer_index(&opener.store, layer, Reading::Local).await? {
            Some(made) => layers.push(made),
            None => return Ok(None),
        }
    }
    Made::new(artifact, layers, None).map(Some)
}

/// Layers without those that have the same blob as one before.
fn once_each(layers: &[Arc<OpenLayer>]) -> impl Iterator<Item = &Arc<OpenLayer>> {
    let mut seen = std::collections::HashSet::new();
    layers.iter().filter(move |layer| seen.insert(layer.descriptor.digest))
}

impl Made {
    fn new(
        artifact: Artifact,
        layers: Vec<LayerIndex>,
        profile: Option<Profile>,
    ) -> Result<Self, MakeIndexError> {
        let manifest = artifact.manifest_digest;
        let mut index = Index::new(manifest, layers);
        if let Some(profile) = &profile {
            index = index.with_profile(profile, &digests(&artifact));
        }
        let bytes =
            index.to_bytes().map_err(|source| MakeIndexError::Index { manifest, source })?;
        let summary = Summary::of(&artifact, &index, &bytes, None);
        Ok(Self { artifact, bytes, summary, profile })
    }

    /// Pushes it beside the artifact; what is there then.
    ///
    /// # Errors
    /// A registry that fails or refuses.
    pub async fn push(self, opener: &Opener) -> Result<Summary, MakeIndexError> {
        let Artifact { repository, manifest, manifest_digest, .. } = &self.artifact;
        let document: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
        let media_type = document["mediaType"].as_str().unwrap_or(MANIFEST_TYPE).to_owned();
        let subject = Referrer {
            media_type,
            digest: *manifest_digest,
            size: manifest.len() as u64,
            artifact_type: String::new(),
            annotations: BTreeMap::new(),
        };
        let named = |profile: &Profile| {
            (PROFILE_ANNOTATION.to_owned(), Digest::of(&profile.encode()).to_string())
        };
        let annotations = self.profile.iter().map(named).collect();
        let registries = &opener.registries;
        let pushed =
            registries.push_referrer(repository, &subject, MEDIA_TYPE, &annotations, &self.bytes);
        Ok(Summary { referrer: Some(pushed.await?), ..self.summary })
    }
}
