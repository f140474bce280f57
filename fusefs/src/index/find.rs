//! Finding the index of an artifact: the one that its manifest names by an annotation, or among
//! what refers to its manifest in the same repository.
//!
//! What is found there was put there by somebody who may push to the repository, like the artifact
//! itself. One that can't be used is passed over with a warning: the artifact is usable without.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use weightfs_store::{Digest, DigestError, Registries, Repository, SourceError};

use super::{ANNOTATION, Index, MAX_INDEX_BYTES, MEDIA_TYPE};
use crate::artifact::Artifact;

/// An index, and where it was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// The index.
    pub index: Index,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Bytes,
}

#[derive(Deserialize)]
struct Carrier {
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: Digest,
    size: u64,
}

/// The index that a manifest names by its digest.
///
/// # Errors
/// What is wrong with it, or why it can't be had.
pub async fn annotated_index(
    registries: &Registries,
    repository: &Repository,
    manifest: &Bytes,
) -> Result<Option<Index>, String> {
    let named = serde_json::from_slice::<Annotated>(manifest).unwrap_or_default();
    let Some(digest) = named.annotations.unwrap_or_default().remove(ANNOTATION) else {
        return Ok(None);
    };
    let digest: Digest = digest.parse().map_err(|error: DigestError| error.to_string())?;
    let bytes = registries.small_blob(repository, digest, MAX_INDEX_BYTES).await;
    let bytes = bytes.map_err(|error| error.to_string())?;
    Index::parse_bound(&bytes).map(Some).map_err(|error| error.to_string())
}

/// Whether there is something that says to be the index of an artifact: usable or not, allowed or
/// not. `false` where that can't be found out.
pub async fn has_index(registries: &Registries, artifact: &Artifact) -> bool {
    let named = serde_json::from_slice::<Annotated>(&artifact.manifest).unwrap_or_default();
    if named.annotations.unwrap_or_default().contains_key(ANNOTATION) {
        return true;
    }
    let (repository, manifest) = (&artifact.repository, artifact.manifest_digest);
    let referrers = registries.referrers(repository, manifest, MEDIA_TYPE).await;
    referrers.is_ok_and(|referrers| !referrers.is_empty())
}

/// What a manifest is annotated with.
#[derive(Default, Deserialize)]
struct Annotated {
    annotations: Option<BTreeMap<String, String>>,
}

/// The first usable index of `manifest` in that repository.
///
/// # Errors
/// A registry that can't be reached or refuses. What it has of bad indexes is no error.
pub async fn find_index(
    registries: &Registries,
    repository: &Repository,
    manifest: Digest,
) -> Result<Option<Found>, SourceError> {
    for referrer in registries.referrers(repository, manifest, MEDIA_TYPE).await? {
        match fetch(registries, repository, referrer.digest, manifest).await? {
            Ok(found) => return Ok(Some(found)),
            Err(why) => {
                tracing::warn!(%repository, %manifest, index = %referrer.digest, why, "index ignored");
            }
        }
    }
    Ok(None)
}

/// The index that a referrer carries, or why it can't be used.
async fn fetch(
    registries: &Registries,
    repository: &Repository,
    referrer: Digest,
    manifest: Digest,
) -> Result<Result<Found, String>, SourceError> {
    let carrier = match registries.manifest(repository, referrer).await {
        Ok(carrier) => carrier,
        Err(error) if error.may_pass() => return Err(error),
        Err(error) => return Ok(Err(error.to_string())),
    };
    let carrier = match serde_json::from_slice::<Carrier>(&carrier.bytes) {
        Ok(carrier) => carrier,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let Some(layer) = carrier.layers.into_iter().find(|layer| layer.media_type == MEDIA_TYPE)
    else {
        return Ok(Err("it has no layer with an index".into()));
    };
    if layer.size > MAX_INDEX_BYTES {
        return Ok(Err(format!("its size of {} bytes is over the limit", layer.size)));
    }
    match registries.small_blob(repository, layer.digest, layer.size).await {
        Ok(bytes) => Ok(match Index::parse(&bytes, manifest) {
            Ok(index) => Ok(Found { index, digest: layer.digest, bytes }),
            Err(error) => Err(error.to_string()),
        }),
        Err(error) if error.may_pass() => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}
