//! Artifacts: what a manifest says of the layers of a model or an image.
//!
//! A manifest, its annotations and its config are foreign bytes. They are bounded and checked
//! here, once: what an [`Artifact`] holds is valid, its raw layers' paths are clean.

mod image;
mod manifest;
mod model;
pub mod model_image;
mod platform;

use std::path::PathBuf;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use weightfs_store::{Digest, Manifest, Reference, Registries, Repository, SourceError};

pub use manifest::MAX_LAYERS;
use manifest::{Descriptor, Document};
pub use platform::{Platform, PlatformError};

use crate::tree::Timestamp;

/// Bytes of a config at the most, as for a manifest.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// What kind of artifact a manifest describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArtifactKind {
    /// CNCF ModelPack, under its present (cncf) or its older (cnai) name.
    ModelPack,
    /// Docker Model Runner's format.
    DockerModel,
    /// Files pushed by ORAS, named by their title annotation.
    Oras,
    /// An OCI or Docker image.
    Image,
}

/// How a layer's blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952, one member or more.
    Gzip,
    /// RFC 8878, one frame or more.
    Zstd,
}

/// What a raw layer is in the tree: one file (or an empty directory).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawFile {
    /// Where: relative to the root, clean.
    pub path: PathBuf,
    /// A file with the blob's bytes, or a directory.
    pub kind: RawKind,
    /// rwx for owner, group and others.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// When the artifact was made: the time of directories that no layer lists.
    pub created: Timestamp,
}

/// What a raw layer stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RawKind {
    /// A regular file.
    File,
    /// A directory; the blob is empty.
    Directory,
}

/// How a layer's bytes become files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerContent {
    /// The blob is one file.
    Raw(RawFile),
    /// A tar of a model: owners, devices, whiteouts and privileges in it mean nothing.
    ModelTar {
        /// When the artifact was made: the time of directories that no layer lists.
        created: Timestamp,
    },
    /// A tar of an image, unpacked as containerd does it.
    ImageTar,
}

/// A layer as its manifest describes it, validated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDescriptor {
    /// Digest of the blob in the registry.
    pub digest: Digest,
    /// Bytes of the blob in the registry.
    pub size: u64,
    /// The media type, as the manifest has it.
    pub media_type: String,
    /// How the blob is compressed.
    pub compression: Compression,
    /// How its bytes become files.
    pub content: LayerContent,
}

/// A model artifact or image.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// What it is.
    pub kind: ArtifactKind,
    /// Where it is.
    pub repository: Repository,
    /// Digest of its manifest (the platform's own, where the reference names an index).
    pub manifest_digest: Digest,
    /// The manifest.
    pub manifest: Bytes,
    /// The config blob; empty where it says nothing about files (images, ORAS).
    pub config: Bytes,
    /// Its layers from the lowest to the highest.
    pub layers: Vec<LayerDescriptor>,
}

/// Why a reference does not give an artifact.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The registry did not give it.
    #[error("{reference}: {source}")]
    Source {
        /// The artifact.
        reference: String,
        /// What the registry said.
        source: SourceError,
    },
    /// It is something else.
    #[error(
        "{reference} is not a model: it has {found}. Accepted are ModelPack artifacts (cncf or cnai), Docker Model Runner models, ORAS artifacts with titled layers, and OCI or Docker images"
    )]
    NotAModel {
        /// The artifact.
        reference: String,
        /// The media types that were found.
        found: String,
    },
    /// An index has nothing for the platform.
    #[error("{reference} has nothing for {wanted}; it has {available}")]
    Platform {
        /// The index.
        reference: String,
        /// The platform that was asked for.
        wanted: Platform,
        /// The platforms that there are, for people.
        available: String,
    },
    /// Its manifest can't be used.
    #[error("the manifest of {reference} can't be used: {message}")]
    Manifest {
        /// The artifact.
        reference: String,
        /// What is wrong with it.
        message: String,
    },
    /// One of its layers can't be used.
    #[error("layer {index} of {reference} ({digest}) can't be used: {message}")]
    Layer {
        /// The artifact.
        reference: String,
        /// Position in the manifest, from 0.
        index: usize,
        /// The layer's digest, as the manifest has it.
        digest: String,
        /// What is wrong with it.
        message: String,
    },
}

impl Artifact {
    /// Fetches and parses what `reference` names. Of an index, `platform`'s manifest is taken.
    ///
    /// # Errors
    /// A registry that fails, a manifest that is malformed or over its bounds, or no model.
    pub async fn resolve(
        registries: &Registries,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Self, ArtifactError> {
        let name = reference.to_string();
        let failed = |source| ArtifactError::Source { reference: name.clone(), source };
        let mut manifest = registries.resolve(reference).await.map_err(failed)?;
        let mut document = Document::parse(&name, &manifest.bytes)?;
        if let Some(offered) = document.manifests.take() {
            let digest = choose(&name, &offered, platform)?;
            manifest = registries.manifest(&manifest.repository, digest).await.map_err(failed)?;
            document = Document::parse(&name, &manifest.bytes)?;
        }
        let config = match (kind_of(&name, &document)?, &document.config) {
            (ArtifactKind::ModelPack | ArtifactKind::DockerModel, Some(config)) => {
                let digest = config.digest(&name)?;
                let config =
                    registries.small_blob(&manifest.repository, digest, MAX_CONFIG_BYTES).await;
                config.map_err(failed)?
            }
            _ => Bytes::new(),
        };
        Self::from_document(&name, &document, manifest, config)
    }

    /// Parses a manifest and its config (which may be empty) without any network.
    ///
    /// # Errors
    /// A manifest that is malformed or over its bounds, or no model.
    pub fn parse(
        repository: Repository,
        manifest_digest: Digest,
        manifest: Bytes,
        config: Bytes,
    ) -> Result<Self, ArtifactError> {
        let name = format!("{}/{}@{manifest_digest}", repository.registry, repository.name);
        let document = Document::parse(&name, &manifest)?;
        let media_type = document.media_type.clone();
        let manifest =
            Manifest { repository, digest: manifest_digest, media_type, bytes: manifest };
        Self::from_document(&name, &document, manifest, config)
    }

    fn from_document(
        name: &str,
        document: &Document,
        manifest: Manifest,
        config: Bytes,
    ) -> Result<Self, ArtifactError> {
        let kind = kind_of(name, document)?;
        let layers = layers_of(name, document, kind, &config)?;
        let Manifest { repository, digest: manifest_digest, bytes: manifest, .. } = manifest;
        Ok(Self { kind, repository, manifest_digest, manifest, config, layers })
    }
}

/// The manifest of an index that suits the platform.
fn choose(
    reference: &str,
    offered: &[Descriptor],
    platform: &Platform,
) -> Result<Digest, ArtifactError> {
    let platforms: Vec<_> = offered.iter().map(Descriptor::platform).collect();
    let chosen = platform.choose(&platforms).and_then(|at| offered.get(at));
    let chosen = chosen.ok_or_else(|| {
        let named = platforms.iter().flatten().map(Platform::to_string);
        let available: Vec<_> = named.filter(|text| !text.starts_with("unknown/")).collect();
        let available = match available.as_slice() {
            [] => "no manifest that names a platform".to_owned(),
            some => some.join(", "),
        };
        ArtifactError::Platform {
            reference: reference.to_owned(),
            wanted: platform.clone(),
            available,
        }
    })?;
    chosen.digest(reference)
}

fn kind_of(reference: &str, document: &Document) -> Result<ArtifactKind, ArtifactError> {
    let config = document.config_type();
    let kind = document.layers.as_ref().and_then(|layers| {
        if model::is_model_pack(&document.artifact_type) || model::is_model_pack(config) {
            Some(ArtifactKind::ModelPack)
        } else if model::is_docker_model(config) {
            Some(ArtifactKind::DockerModel)
        } else if image::CONFIG_TYPES.contains(&config) {
            Some(ArtifactKind::Image)
        } else {
            layers.iter().any(model::has_title).then_some(ArtifactKind::Oras)
        }
    });
    kind.ok_or_else(|| ArtifactError::NotAModel {
        reference: reference.to_owned(),
        found: document.describe(),
    })
}

fn layers_of(
    reference: &str,
    document: &Document,
    kind: ArtifactKind,
    config: &[u8],
) -> Result<Vec<LayerDescriptor>, ArtifactError> {
    let descriptors = document.layers.as_deref().unwrap_or_default();
    let created = model::created(config);
    let contents: Vec<Option<Result<_, String>>> = match kind {
        ArtifactKind::ModelPack => {
            descriptors.iter().map(|layer| Some(model::model_pack_layer(layer, created))).collect()
        }
        ArtifactKind::DockerModel => {
            model::docker_layers(descriptors, created).into_iter().map(Some).collect()
        }
        ArtifactKind::Oras => {
            descriptors.iter().map(|layer| model::oras_layer(layer, created)).collect()
        }
        ArtifactKind::Image => descriptors.iter().map(|layer| Some(image_layer(layer))).collect(),
    };
    let numbered = descriptors.iter().zip(contents).enumerate();
    let named = numbered.filter_map(|(index, (layer, content))| Some((index, layer, content?)));
    let describe = |(index, layer, content): (usize, &Descriptor, Result<_, String>)| {
        describe(layer, content).map_err(|message| ArtifactError::Layer {
            reference: reference.to_owned(),
            index,
            digest: layer.digest.chars().take(MAX_SHOWN_CHARS).collect(),
            message,
        })
    };
    named.map(describe).collect()
}

/// Characters of a foreign text in an error at the most: those of a sha512 digest.
const MAX_SHOWN_CHARS: usize = 135;

fn image_layer(layer: &Descriptor) -> Result<(Compression, LayerContent), String> {
    if let Some(content) = model_image::layer(layer) {
        return content;
    }
    let unknown = || format!("its type {:?} is no tar of an image", layer.media_type);
    image::layer(&layer.media_type).ok_or_else(unknown)
}

fn describe(
    layer: &Descriptor,
    content: Result<(Compression, LayerContent), String>,
) -> Result<LayerDescriptor, String> {
    let (compression, content) = content?;
    let digest = layer.digest.parse::<Digest>().map_err(|error| error.to_string())?;
    if i64::try_from(layer.size).is_err() {
        return Err(format!("its size of {} bytes is beyond any file", layer.size));
    }
    let media_type = layer.media_type.clone();
    Ok(LayerDescriptor { digest, size: layer.size, media_type, compression, content })
}

#[cfg(test)]
mod tests;
