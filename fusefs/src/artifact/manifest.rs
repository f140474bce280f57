//! Manifests and indexes as JSON (OCI image-spec, "Image Manifest", "Image Index"; Docker's schema
//! 2). Read more leniently than the specification, because artifacts in use leave fields out or
//! write them as null; what is needed is checked where it is used.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use weightfs_store::Digest;

use super::{ArtifactError, Platform};

/// Layers of a manifest at the most. Images in use have 200 at the most (overlayfs allows 500),
/// ModelPack artifacts one for each file.
pub const MAX_LAYERS: usize = 10_000;

/// A manifest or an index.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    #[serde(default, deserialize_with = "or_null")]
    pub media_type: String,
    #[serde(default, deserialize_with = "or_null")]
    pub artifact_type: String,
    pub config: Option<Descriptor>,
    pub layers: Option<Vec<Descriptor>>,
    pub manifests: Option<Vec<Descriptor>>,
}

/// What a manifest says of a blob or an index of a manifest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default, deserialize_with = "or_null")]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    #[serde(default, deserialize_with = "or_null")]
    pub annotations: BTreeMap<String, String>,
    platform: Option<RawPlatform>,
}

#[derive(Debug, Deserialize)]
struct RawPlatform {
    #[serde(default, deserialize_with = "or_null")]
    os: String,
    #[serde(default, deserialize_with = "or_null")]
    architecture: String,
    variant: Option<String>,
}

fn or_null<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Document {
    /// Reads a manifest or index; `reference` names it in errors.
    pub fn parse(reference: &str, bytes: &[u8]) -> Result<Self, ArtifactError> {
        let malformed =
            |message: String| ArtifactError::Manifest { reference: reference.to_owned(), message };
        let limit = weightfs_store::registry::MAX_MANIFEST_BYTES;
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit {
            return Err(malformed(format!("it is larger than {limit} bytes")));
        }
        let document: Self =
            serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        if document.manifests.is_some() && document.layers.is_some() {
            // Image-spec 1.0.2: such a document can be read in two ways (CVE-2021-41190).
            return Err(malformed("it is an index and a manifest at once".to_owned()));
        }
        if document.layers.as_ref().is_some_and(|layers| layers.len() > MAX_LAYERS) {
            return Err(malformed(format!("it has more than {MAX_LAYERS} layers")));
        }
        Ok(document)
    }

    /// The config's media type, "" if there is none.
    pub fn config_type(&self) -> &str {
        self.config.as_ref().map_or("", |config| &config.media_type)
    }

    /// The media types, for people.
    pub fn describe(&self) -> String {
        let named = |what: &str, text: &str| match text {
            "" => format!("no {what}"),
            _ => format!("{what} {text:?}"),
        };
        let first = self.layers.as_deref().unwrap_or_default().first();
        [
            named("media type", &self.media_type),
            named("artifact type", &self.artifact_type),
            named("config type", self.config_type()),
            named("layer type", first.map_or("", |layer| &layer.media_type)),
        ]
        .join(", ")
    }
}

impl Descriptor {
    /// The digest, checked.
    pub fn digest(&self, reference: &str) -> Result<Digest, ArtifactError> {
        self.digest.parse().map_err(|error: weightfs_store::digest::DigestError| {
            ArtifactError::Manifest { reference: reference.to_owned(), message: error.to_string() }
        })
    }

    /// The platform, if the descriptor names one.
    pub fn platform(&self) -> Option<Platform> {
        let RawPlatform { os, architecture, variant } = self.platform.as_ref()?;
        let variant = variant.clone().filter(|variant| !variant.is_empty());
        Some(Platform { os: os.clone(), architecture: architecture.clone(), variant })
    }

    /// An annotation, if it is there and not empty.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str).filter(|text| !text.is_empty())
    }
}
