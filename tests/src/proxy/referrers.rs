//! The referrers API (distribution-spec 1.1, "Listing Referrers"), which docker-registry does not
//! have. A stand-in: it knows of what is pushed through this proxy, and forgets it at its end; all
//! else is the registry's.

use std::io;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, LINK};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use weightfs_store::Digest;

use super::State;
use super::answers::simple;
use super::body::Body;
use crate::remote::OCI_INDEX;

/// Referrers on one page.
const PAGE: usize = 2;

/// What the API does with `artifactType` in a query; it may do either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filters {
    /// Lists what is of that type, and says so.
    Applied,
    /// Lists everything.
    Ignored,
}

/// What was pushed with a subject.
#[derive(Debug)]
pub(super) struct Referrers {
    filters: Filters,
    /// The repository, the subject's digest and the referrer's descriptor.
    pushed: Vec<(String, String, Value)>,
}

impl Referrers {
    pub(super) fn new(filters: Filters) -> Self {
        Self { filters, pushed: vec![] }
    }

    /// A page of a list; `None` if the request is for something else.
    pub(super) fn list(&self, request: &Request<Incoming>) -> Option<Response<Body>> {
        let path = request.uri().path();
        let (repository, subject) = path.strip_prefix("/v2/")?.split_once("/referrers/")?;
        let parameter = |name: &str| {
            let pairs = request.uri().query().unwrap_or_default().split('&');
            pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name)
        };
        let wanted = parameter("artifactType").map(|(_, text)| text.replace("%2F", "/"));
        let filter = wanted.as_ref().filter(|_| self.filters == Filters::Applied);
        let first = parameter("from").map_or(0, |(_, number)| number.parse().unwrap());
        let all: Vec<_> = self
            .pushed
            .iter()
            .filter(|(of, to, _)| of == repository && to == subject)
            .map(|(_, _, descriptor)| descriptor)
            .filter(|found| filter.is_none_or(|wanted| found["artifactType"] == **wanted))
            .collect();
        let page: Vec<_> = all.iter().skip(first).take(PAGE).collect();
        let list = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": page});
        let mut builder = Response::builder().header(CONTENT_TYPE, OCI_INDEX);
        if filter.is_some() {
            builder = builder.header("OCI-Filters-Applied", "artifactType");
        }
        if all.len() > first + PAGE {
            let kind = wanted.map(|kind| format!("&artifactType={kind}")).unwrap_or_default();
            let next = format!("<{path}?from={}{kind}>; rel=\"next\"", first + PAGE);
            builder = builder.header(LINK, next);
        }
        Some(simple(builder, Bytes::from(list.to_string())).unwrap())
    }

    /// Remembers a manifest that was pushed; its subject, if it has one.
    fn add(&mut self, repository: &str, manifest: &Bytes) -> Option<String> {
        let document: Value = serde_json::from_slice(manifest).ok()?;
        let subject = document["subject"]["digest"].as_str()?.to_owned();
        let mut descriptor = json!({
            "mediaType": document["mediaType"],
            "digest": Digest::of(manifest).to_string(),
            "size": manifest.len(),
            "artifactType": document["artifactType"],
        });
        if document["annotations"].is_object() {
            descriptor["annotations"] = document["annotations"].clone();
        }
        let entry = (repository.to_owned(), subject.clone(), descriptor);
        if !self.pushed.contains(&entry) {
            self.pushed.push(entry);
        }
        Some(subject)
    }
}

/// The repository of a request that pushes a manifest.
pub(super) fn pushes_to(request: &Request<Incoming>) -> Option<String> {
    let path = request.uri().path().strip_prefix("/v2/")?;
    let (repository, _) = path.split_once("/manifests/")?;
    (request.method() == Method::PUT).then(|| repository.to_owned())
}

impl State {
    /// Hands on a manifest, and lists it among the referrers of its subject.
    pub(super) async fn push_manifest(
        &self,
        repository: &str,
        request: Request<Incoming>,
    ) -> io::Result<Response<Body>> {
        let (head, body) = request.into_parts();
        let manifest = body.collect().await.map_err(io::Error::other)?.to_bytes();
        let request = Request::from_parts(head, Full::new(manifest.clone()));
        let mut response = self.forward(request, false).await?;
        let mut referrers = self.referrers.lock().unwrap();
        if response.status() == StatusCode::CREATED
            && let Some(referrers) = referrers.as_mut()
            && let Some(subject) = referrers.add(repository, &manifest)
        {
            let subject = subject.parse().map_err(io::Error::other)?;
            response.headers_mut().insert("OCI-Subject", subject);
        }
        Ok(response)
    }
}
