//! What refers to a manifest: indexes, signatures and the like (distribution-spec 1.1, "Listing
//! Referrers"). Registries without that API keep a list under a tag made of the digest ("Referrers
//! Tag Schema"); whoever pushes a referrer there adds it to the list.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::future::join;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::auth::Right;
use super::host::failed_status;
use super::link::next_page;
use super::{Asked, MAX_MANIFEST_BYTES, Registries, Repository, manifest_headers};
use crate::{Digest, SourceError};

/// Referrers of a manifest that are looked at, at the most.
const MAX_REFERRERS: usize = 1000;

/// Pages of a list that are asked for, at the most.
const MAX_PAGES: usize = 20;

/// With this header a registry says that it lists the manifest among the subject's referrers.
const OCI_SUBJECT: &str = "OCI-Subject";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const EMPTY_BYTES: &[u8] = b"{}";

/// A manifest that refers to another, or is referred to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrer {
    /// Media type of the manifest.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size, in bytes.
    pub size: u64,
    /// What it is; "" if it doesn't say.
    #[serde(default)]
    pub artifact_type: String,
    /// The annotations of the manifest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// An image index as it is kept under a tag: what is not understood is kept as it is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct List {
    schema_version: u32,
    media_type: String,
    #[serde(default)]
    manifests: Vec<Value>,
}

impl Registries {
    /// The manifests that refer to `subject` and are of that artifact type, or don't say of which:
    /// copies of lists may lack it (skopeo 1.9 leaves it out).
    ///
    /// # Errors
    /// When the registry can't be reached, refuses, or gives something else than a list.
    pub async fn referrers(
        &self,
        of: &Repository,
        subject: Digest,
        artifact_type: &str,
    ) -> Result<Vec<Referrer>, SourceError> {
        let path = format!("referrers/{subject}?artifactType={}", escaped(artifact_type));
        let asked = asked(of, subject);
        // Both at once: whoever waits for the answer waits for one.
        let headers = manifest_headers();
        let listed = self.get_small(&asked, &path, &headers);
        let list = match join(listed, self.tagged(of, subject)).await {
            (Ok((headers, bytes)), _) => {
                let first = parse(&asked, &bytes)?.manifests;
                self.further_pages(&asked, subject, first, next_page(&headers)).await?
            }
            // Some that know no such path say so of its form.
            (Err(error), tagged) if knows_no_referrers(&error) => tagged?.manifests,
            (Err(error), _) => return Err(error),
        };
        let referrers = list.into_iter().take(MAX_REFERRERS);
        let known = referrers.filter_map(|value| serde_json::from_value::<Referrer>(value).ok());
        let may_be = |kind: &str| kind.is_empty() || kind == artifact_type;
        Ok(known.filter(|referrer| may_be(&referrer.artifact_type)).collect())
    }

    /// A list that begins with `list` and goes on at `next`.
    async fn further_pages(
        &self,
        asked: &Asked<'_>,
        subject: Digest,
        mut list: Vec<Value>,
        mut next: Option<String>,
    ) -> Result<Vec<Value>, SourceError> {
        for _ in 1..MAX_PAGES {
            let Some(query) = next.filter(|_| list.len() < MAX_REFERRERS) else { break };
            let path = format!("referrers/{subject}?{query}");
            let (headers, bytes) = self.get_small(asked, &path, &manifest_headers()).await?;
            list.extend(parse(asked, &bytes)?.manifests);
            next = next_page(&headers);
        }
        Ok(list)
    }

    /// The list under the subject's tag; an empty one if there is none.
    async fn tagged(&self, of: &Repository, subject: Digest) -> Result<List, SourceError> {
        let asked = asked(of, subject);
        let path = format!("manifests/{}", tag(subject));
        match self.get_small(&asked, &path, &manifest_headers()).await {
            Ok((_, bytes)) => parse(&asked, &bytes),
            Err(SourceError::NotFound { .. }) => Ok(List::default()),
            Err(error) => Err(error),
        }
    }

    /// Pushes `content` as an artifact of that type, with these annotations, that refers to
    /// `subject`, and sees to it that it is found. The digest of the manifest that carries it; the
    /// same content gives the same manifest.
    ///
    /// # Errors
    /// When the registry can't be reached or refuses.
    pub async fn push_referrer(
        &self,
        to: &Repository,
        subject: &Referrer,
        artifact_type: &str,
        annotations: &BTreeMap<String, String>,
        content: &Bytes,
    ) -> Result<Digest, SourceError> {
        let config = self.push_blob(to, &Bytes::from_static(EMPTY_BYTES)).await?;
        let blob = self.push_blob(to, content).await?;
        let Referrer { media_type, digest: subject, size, .. } = subject;
        let mut manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": artifact_type,
            "config": {"mediaType": EMPTY, "digest": config, "size": EMPTY_BYTES.len()},
            "layers": [{"mediaType": artifact_type, "digest": blob, "size": content.len()}],
            "subject": {"mediaType": media_type, "digest": subject, "size": size},
        });
        if !annotations.is_empty() {
            manifest["annotations"] = serde_json::json!(annotations);
        }
        let manifest = Bytes::from(manifest.to_string());
        let digest = Digest::of(&manifest);
        if !self.put_manifest(to, &digest.to_string(), MANIFEST, &manifest).await? {
            let referrer = Referrer {
                media_type: MANIFEST.to_owned(),
                digest,
                size: manifest.len() as u64,
                artifact_type: artifact_type.to_owned(),
                annotations: annotations.clone(),
            };
            self.list(to, *subject, &referrer).await?;
        }
        Ok(digest)
    }

    /// Adds a referrer to the list under the subject's tag.
    async fn list(
        &self,
        to: &Repository,
        subject: Digest,
        referrer: &Referrer,
    ) -> Result<(), SourceError> {
        let mut list = self.tagged(to, subject).await?;
        let digest = referrer.digest.to_string();
        if list.manifests.iter().any(|known| known["digest"] == *digest) {
            return Ok(());
        }
        list.manifests.extend(serde_json::to_value(referrer));
        let bytes = Bytes::from(serde_json::to_vec(&list).unwrap_or_default());
        self.put_manifest(to, &tag(subject), INDEX, &bytes).await.map(drop)
    }

    /// Puts a manifest; whether the registry lists it among its subject's referrers.
    pub(super) async fn put_manifest(
        &self,
        to: &Repository,
        name: &str,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<bool, SourceError> {
        let what = format!("manifest {name}");
        let host = self.host_to_push(&to.registry)?;
        let url = host.url(to, &format!("manifests/{name}"))?;
        let put = || {
            let request = host.request(to, Method::PUT, url.clone())?;
            Ok(request.header(CONTENT_TYPE, media_type).body(bytes.clone()))
        };
        let answer = host.ask(to, &what, Right::Push, put).await?;
        match answer.status() {
            StatusCode::CREATED => Ok(answer.headers().contains_key(OCI_SUBJECT)),
            _ => Err(failed_status(to, &what, &answer)),
        }
    }
}

impl Default for List {
    fn default() -> Self {
        Self { schema_version: 2, media_type: INDEX.to_owned(), manifests: vec![] }
    }
}

fn asked(of: &Repository, subject: Digest) -> Asked<'_> {
    let what = format!("referrers of {subject}");
    // A list has no digest: who gives it must be trusted for what it names.
    Asked { from: of, what, limit: MAX_MANIFEST_BYTES, checked: false }
}

/// Whether an answer means that there is no such API.
fn knows_no_referrers(error: &SourceError) -> bool {
    match error {
        SourceError::NotFound { .. } => true,
        SourceError::Status { status, .. } => matches!(status, 400 | 405 | 406 | 501),
        _ => false,
    }
}

fn parse(asked: &Asked<'_>, bytes: &[u8]) -> Result<List, SourceError> {
    serde_json::from_slice(bytes).map_err(|error| asked.bad(error.to_string()))
}

/// The tag under which the referrers of a manifest are listed.
fn tag(subject: Digest) -> String {
    subject.to_string().replace(':', "-")
}

/// A media type in a query.
fn escaped(media_type: &str) -> String {
    media_type.replace('/', "%2F").replace('+', "%2B")
}
