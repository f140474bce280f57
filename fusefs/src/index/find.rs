//! Finding the index of an artifact: the one that its manifest names by an annotation, or among
//! what refers to its manifest in the same repository.
//!
//! What is found there was put there by somebody who may push to the repository, like the artifact
//! itself; or it must be signed. One that can't be used is passed over with a warning: the artifact
//! is usable without.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use weightfs_store::registry::Referrer;
use weightfs_store::{Digest, DigestError, Registries, Repository, SourceError};

use super::signature::{self, PublicKey};
use super::{ANNOTATION, Index, MAX_INDEX_BYTES, MEDIA_TYPE, PROFILE_ANNOTATION};
use crate::artifact::{Artifact, model_image};

/// Which indexes are believed that refer to a manifest.
#[derive(Debug, Clone)]
pub enum Believe {
    /// All in its repository.
    SameRepository,
    /// Those that one of these keys has signed.
    Signed(Vec<PublicKey>),
}

/// What was found beside a manifest.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// An index that can be used.
    Found(Found),
    /// Indexes of which none can be used, and why not the last of them.
    Refused(String),
    /// None.
    Nothing,
}

/// An index, and where it was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// The index.
    pub index: Index,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Bytes,
    /// Digest of the manifest that carries it.
    pub referrer: Digest,
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
    let Some(digest) = annotated(manifest) else { return Ok(None) };
    let digest: Digest = digest.parse().map_err(|error: DigestError| error.to_string())?;
    let bytes = registries.small_blob(repository, digest, MAX_INDEX_BYTES).await;
    let bytes = bytes.map_err(|error| error.to_string())?;
    Index::parse_bound(&bytes).map(Some).map_err(|error| error.to_string())
}

/// What a manifest says is the digest of its index, if it says so: itself, or in a model image the
/// first of its layers that does.
pub fn annotated(manifest: &Bytes) -> Option<String> {
    let Annotations { annotations, layers } = serde_json::from_slice(manifest).unwrap_or_default();
    let own = annotations.unwrap_or_default().remove(ANNOTATION);
    own.or_else(|| {
        let layers = layers.unwrap_or_default().into_iter();
        let mut layers = layers.map(|layer| layer.annotations.unwrap_or_default());
        layers.find_map(|mut layer| layer.remove(model_image::INDEX))
    })
}

/// The manifest that an index refers to: of a model image, that of the artifact that it was made of.
pub fn subject_of(artifact: &Artifact) -> Digest {
    model_image::artifact_of(&artifact.manifest).unwrap_or(artifact.manifest_digest)
}

/// Whether there is something that says to be the index of an artifact: usable or not, allowed or
/// not. `false` where that can't be found out.
pub async fn has_index(registries: &Registries, artifact: &Artifact) -> bool {
    if annotated(&artifact.manifest).is_some() {
        return true;
    }
    let (repository, manifest) = (&artifact.repository, subject_of(artifact));
    let referrers = registries.referrers(repository, manifest, MEDIA_TYPE).await;
    referrers.is_ok_and(|referrers| !referrers.is_empty())
}

/// What a manifest and its layers are annotated with.
#[derive(Default, Deserialize)]
struct Annotations {
    annotations: Option<BTreeMap<String, String>>,
    layers: Option<Vec<Annotated>>,
}

#[derive(Deserialize)]
struct Annotated {
    annotations: Option<BTreeMap<String, String>>,
}

/// The first usable index of `manifest` in that repository; those with a recorded profile come
/// first.
///
/// # Errors
/// A registry that can't be reached or refuses. What it has of bad indexes is no error.
pub async fn find_index(
    registries: &Registries,
    repository: &Repository,
    manifest: Digest,
    believe: &Believe,
) -> Result<Lookup, SourceError> {
    let mut referrers = registries.referrers(repository, manifest, MEDIA_TYPE).await?;
    referrers.sort_by_key(|referrer| !referrer.annotations.contains_key(PROFILE_ANNOTATION));
    let mut lookup = Lookup::Nothing;
    for referrer in referrers {
        match fetch(registries, repository, &referrer, manifest, believe).await? {
            Ok(Some(found)) => return Ok(Lookup::Found(found)),
            Ok(None) => {}
            Err(why) => {
                tracing::warn!(%repository, %manifest, index = %referrer.digest, why, "index ignored");
                lookup = Lookup::Refused(format!("{}: {why}", referrer.digest));
            }
        }
    }
    Ok(lookup)
}

/// The index that a referrer carries, or why it can't be used; `None` if it never said that it
/// carries one.
async fn fetch(
    registries: &Registries,
    repository: &Repository,
    listed: &Referrer,
    manifest: Digest,
    believe: &Believe,
) -> Result<Result<Option<Found>, String>, SourceError> {
    let referrer = listed.digest;
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
        let is_other = listed.artifact_type.is_empty();
        return Ok(if is_other { Ok(None) } else { Err("it has no layer with an index".into()) });
    };
    if let Believe::Signed(keys) = believe
        && let Err(why) = signature::check(registries, repository, referrer, keys).await?
    {
        return Ok(Err(why));
    }
    if layer.size > MAX_INDEX_BYTES {
        return Ok(Err(format!("its size of {} bytes is over the limit", layer.size)));
    }
    match registries.small_blob(repository, layer.digest, layer.size).await {
        Ok(bytes) => Ok(match Index::parse(&bytes, manifest) {
            Ok(index) => Ok(Some(Found { index, digest: layer.digest, bytes, referrer })),
            Err(error) => Err(error.to_string()),
        }),
        Err(error) if error.may_pass() => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}
