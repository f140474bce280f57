//! Putting small things beside what a registry has: configs, indexes and their manifests
//! (distribution-spec, "Pushing blobs", "Pushing manifests").

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};

use super::auth::Right;
use super::host::{Host, failed_status};
use super::{Registries, Repository};
use crate::{Digest, SourceError};

impl Registries {
    /// Puts a small blob into a repository, unless it is there. In one request: what is pushed
    /// here is held in memory anyway.
    ///
    /// # Errors
    /// When the registry can't be reached, refuses, or says that the bytes have another digest.
    pub async fn push_blob(&self, to: &Repository, bytes: &Bytes) -> Result<Digest, SourceError> {
        let digest = Digest::of(bytes);
        let what = format!("blob {digest}");
        let host = self.host_to_push(&to.registry)?;
        if has(&host, to, &what, &format!("blobs/{digest}")).await? {
            return Ok(digest);
        }
        let begin = host.url(to, "blobs/uploads/")?;
        let begin = || {
            let request = host.request(to, Method::POST, begin.clone())?;
            Ok(request.header(CONTENT_LENGTH, 0))
        };
        let answer = host.ask(to, &what, Right::Push, begin).await?;
        let mut upload = expect(to, &what, &answer, StatusCode::ACCEPTED)
            .and_then(|()| location(to, &what, &answer))?;
        upload.query_pairs_mut().append_pair("digest", &digest.to_string());
        let put = |request: RequestBuilder| {
            request.header(CONTENT_TYPE, "application/octet-stream").body(bytes.clone())
        };
        let answer = if upload.origin() == host.url(to, "")?.origin() {
            let put = || host.request(to, Method::PUT, upload.clone()).map(put);
            host.ask(to, &what, Right::Push, put).await?
        } else {
            // Another host's business: it gets no credentials of ours.
            let put = put(host.request_elsewhere(to, Method::PUT, upload)?);
            put.send().await.map_err(|error| super::host::unreachable(to, error))?
        };
        expect(to, &what, &answer, StatusCode::CREATED).map(|()| digest)
    }

    /// Puts a manifest into a repository, by its digest or under a tag, which it takes over.
    /// What it refers to must be there.
    ///
    /// # Errors
    /// As [`Registries::push_blob`].
    pub async fn push_manifest(
        &self,
        to: &Repository,
        tag: Option<&str>,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<Digest, SourceError> {
        let digest = Digest::of(bytes);
        let name = tag.map_or_else(|| digest.to_string(), str::to_owned);
        self.put_manifest(to, &name, media_type, bytes).await.map(|_| digest)
    }
}

async fn has(host: &Host, to: &Repository, what: &str, path: &str) -> Result<bool, SourceError> {
    let url = host.url(to, path)?;
    // With the right to push, so that one token serves for all that follows.
    let head = || host.request(to, Method::HEAD, url.clone());
    let answer = host.ask(to, what, Right::Push, head).await?;
    match answer.status() {
        StatusCode::OK => Ok(true),
        // Its storage has it.
        status if status.is_redirection() => Ok(true),
        StatusCode::NOT_FOUND => Ok(false),
        _ => Err(failed_status(to, what, &answer)),
    }
}

fn expect(
    to: &Repository,
    what: &str,
    answer: &Response,
    wanted: StatusCode,
) -> Result<(), SourceError> {
    if answer.status() == wanted { Ok(()) } else { Err(failed_status(to, what, answer)) }
}

/// Where an upload goes on; it may be relative.
fn location(to: &Repository, what: &str, answer: &Response) -> Result<Url, SourceError> {
    let given = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let url = given.and_then(|given| answer.url().join(given).ok());
    let safe = url.filter(|url| url.scheme() == answer.url().scheme() || url.scheme() == "https");
    safe.ok_or_else(|| SourceError::BadAnswer {
        source_name: to.to_string(),
        what: what.to_owned(),
        message: "it names no place to upload to".into(),
    })
}
