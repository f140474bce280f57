//! Artifacts: what a manifest says of a model's layers.

use std::path::PathBuf;

use bytes::Bytes;
use oci_spec::distribution::Reference;
use serde::{Deserialize, Serialize};
use weightfs_store::{Digest, Registries, Repository};

use crate::tree::Timestamp;

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

/// An operating system and a processor, as image indexes name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`, …
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v8`, …
    pub variant: Option<String>,
}

impl Platform {
    /// The platform that this program runs on.
    pub fn host() -> Self {
        todo!()
    }
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
    /// The config blob; empty where it says nothing about files.
    pub config: Bytes,
    /// Its layers from the lowest to the highest.
    pub layers: Vec<LayerDescriptor>,
}

/// Why a reference does not give an artifact.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {}

impl Artifact {
    /// Fetches and parses what `reference` names. Of an index, `platform`'s manifest is taken.
    ///
    /// # Errors
    /// A registry that fails, a manifest that is malformed or over its bounds, or no model.
    pub async fn resolve(
        _registries: &Registries,
        _reference: &Reference,
        _platform: &Platform,
    ) -> Result<Self, ArtifactError> {
        todo!()
    }

    /// Parses a manifest and its config (which may be empty) without any network.
    ///
    /// # Errors
    /// A manifest that is malformed or over its bounds, or no model.
    pub fn parse(
        _repository: Repository,
        _manifest_digest: Digest,
        _manifest: Bytes,
        _config: Bytes,
    ) -> Result<Self, ArtifactError> {
        todo!()
    }
}
