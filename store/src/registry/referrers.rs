//! What refers to a manifest: indexes, signatures and the like (distribution-spec 1.1, "Listing
//! Referrers"). Registries without that API keep a list under a tag made of the digest ("Referrers
//! Tag Schema"); whoever pushes a referrer there adds it to the list.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::future::join;
use reqwest::header::{CONTENT_TYPE, HeaderMap, LINK};
use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::auth::Right;
use super::host::failed_status;
use super::{Asked, MAX_MANIFEST_BYTES, Registries, Repository, manifest_headers};
use crate::{Digest, SourceError};

/// Referrers of a manifest that are looked at, at the most.
const MAX_REFERRERS: usize = 1000;

/// Pages of a list that are asked for at the most.
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
    /// The manifests of that artifact type that refer to `subject`.
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
        // Both at once: whoever waits for the answer waits for one.
        let list = match join(self.listed(of, subject, path), self.tagged(of, subject)).await {
            (Err(SourceError::NotFound { .. }), tagged) => tagged?,
            (listed, _) => listed?,
        };
        let referrers = list.manifests.into_iter().take(MAX_REFERRERS);
        let known = referrers.filter_map(|value| serde_json::from_value::<Referrer>(value).ok());
        Ok(known.filter(|referrer| referrer.artifact_type == artifact_type).collect())
    }

    /// What the API lists, page after page.
    async fn listed(
        &self,
        of: &Repository,
        subject: Digest,
        path: String,
    ) -> Result<List, SourceError> {
        let (asked, headers) = (asked(of, subject), manifest_headers());
        let (mut all, mut next) = (List::default(), Some(path));
        for _ in 0..MAX_PAGES {
            let Some(path) = next else { break };
            let (answer, bytes) = self.get_small(&asked, &path, &headers).await?;
            all.manifests.extend(parse(&asked, &bytes)?.manifests);
            next = next_page(&answer, subject);
        }
        Ok(all)
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

fn parse(asked: &Asked<'_>, bytes: &[u8]) -> Result<List, SourceError> {
    serde_json::from_slice(bytes).map_err(|error| asked.bad(error.to_string()))
}

/// Where a list goes on (RFC 8288, as distribution-spec has it in "Listing Tags"): below the same
/// repository, whatever host or path the registry names.
fn next_page(headers: &HeaderMap, subject: Digest) -> Option<String> {
    let link = headers.get(LINK)?.to_str().ok()?;
    let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    let is_next =
        parameters.split(';').any(|one| matches!(one.trim(), "rel=\"next\"" | "rel=next"));
    let (_, query) = target.split_once('?').filter(|_| is_next)?;
    Some(format!("referrers/{subject}?{query}"))
}

/// The tag under which the referrers of a manifest are listed.
fn tag(subject: Digest) -> String {
    subject.to_string().replace(':', "-")
}

/// A media type in a query.
fn escaped(media_type: &str) -> String {
    media_type.replace('/', "%2F").replace('+', "%2B")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(link: &str) -> Option<String> {
        let headers = HeaderMap::from_iter([(LINK, link.parse().ok()?)]);
        next_page(&headers, Digest::of(b"x"))
    }

    #[test]
    fn a_list_goes_on_in_its_own_repository() {
        let digest = Digest::of(b"x");
        let wanted = Some(format!("referrers/{digest}?last=a&n=2"));
        for link in [
            "</v2/a/referrers/x?last=a&n=2>; rel=\"next\"",
            "<https://elsewhere/v2/b?last=a&n=2>;rel=next",
        ] {
            assert_eq!(next(link), wanted, "{link}");
        }
        for link in
            ["", "x", "<x", "<x>; rel=next", "<x?y>; rel=prev", "<x?y>", "</v2/a>; rel=\"next\""]
        {
            assert_eq!(next(link), None, "{link}");
        }
        assert_eq!(next_page(&HeaderMap::new(), digest), None);
    }

    #[test]
    fn fuzz_links_stay_below_the_referrers_of_the_subject() {
        let sample = b"</v2/a/referrers/x?last=a&n=2>; rel=\"next\"";
        let base = reqwest::Url::parse("http://host/v2/name/").unwrap();
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&[sample], input);
            let Ok(value) = reqwest::header::HeaderValue::from_bytes(&bytes) else { return };
            let headers = HeaderMap::from_iter([(LINK, value)]);
            if let Some(path) = next_page(&headers, Digest::of(b"x")) {
                let url = base.join(&path).unwrap();
                assert!(url.as_str().starts_with("http://host/v2/name/referrers/sha256:"), "{url}");
            }
        });
    }
}
