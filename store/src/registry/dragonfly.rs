//! Dragonfly's daemon on this node (dfdaemon) as a way to a registry's blobs: its HTTP proxy, which
//! gets ranges from other nodes, or from the registry with the authorization that we send along.
//!
//! Invariants: it is asked for ranges of blobs and for nothing else. What names them comes from the
//! registry, which so decides for each mount whether we may read it: dfdaemon gives what it has to
//! anybody. Its answers are believed as little as a registry's, and only where they are the range
//! that was asked for: when its registry fails it may answer with an empty 200.

use std::ops::Range;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, StatusCode, Url};

use super::Repository;
use super::endpoints::{Capabilities, Endpoint};
use super::host::{failed_status, is_loopback};
use crate::SourceError;

/// The registry that is meant, with its scheme.
const REGISTRY: HeaderName = HeaderName::from_static("x-dragonfly-registry");
/// Whether what lies behind a range is to be fetched, too.
const PREFETCH: HeaderName = HeaderName::from_static("x-dragonfly-prefetch");
/// Tells tasks apart that are otherwise the same.
const TAG: HeaderName = HeaderName::from_static("x-dragonfly-tag");
/// Who failed.
const ERROR_TYPE: HeaderName = HeaderName::from_static("x-dragonfly-error-type");

/// What each request says: peers are asked whatever dfdaemon's rules say, for small ranges, too
/// (dfdaemon 1.5.10), and a blob is one task for all repositories and mirrors that have it.
const ALWAYS: [(HeaderName, HeaderValue); 4] = [
    (HeaderName::from_static("x-dragonfly-use-p2p"), HeaderValue::from_static("true")),
    (
        HeaderName::from_static("x-dragonfly-enable-task-id-based-blob-digest"),
        HeaderValue::from_static("true"),
    ),
    (HeaderName::from_static("x-dragonfly-scheduling-policy"), HeaderValue::from_static("always")),
    // A piece is fetched whole, whatever is read of it, and its size is a part of the task's
    // identity: the least that there is, and the same on all nodes.
    (HeaderName::from_static("x-dragonfly-piece-length"), HeaderValue::from_static("4mib")),
];

/// Bytes of a piece.
const PIECE_BYTES: u64 = 4 << 20;

/// Where the daemon is.
#[derive(Debug, Clone)]
pub struct Dragonfly {
    proxy: Url,
    tag: Option<HeaderValue>,
}

impl Dragonfly {
    /// `endpoint` is dfdaemon's proxy (`http://127.0.0.1:4001`). What has another `tag` shares
    /// nothing: one for each domain of authorization.
    ///
    /// # Errors
    /// In words: not the address of a host; plain HTTP over a network, where everybody could read
    /// the registry's tokens; a tag that is no header's value.
    pub fn new(endpoint: &str, tag: Option<&str>) -> Result<Self, String> {
        let proxy = Url::parse(endpoint).map_err(|error| format!("{endpoint:?}: {error}"))?;
        let alone = proxy.path() == "/" && proxy.query().is_none() && proxy.fragment().is_none();
        let anonymous = proxy.username().is_empty() && proxy.password().is_none();
        if !alone || !anonymous || !matches!(proxy.scheme(), "http" | "https") {
            return Err(format!("{endpoint:?} is not http://host:port"));
        }
        if proxy.scheme() == "http" && !is_loopback(proxy.authority()) {
            return Err(format!(
                "{endpoint:?} would get the registry's tokens in plain text: name dfdaemon's proxy on this node (http://127.0.0.1:4001), or https://"
            ));
        }
        let tag = tag.map(HeaderValue::try_from).transpose();
        let tag = tag.map_err(|_| "the tag is not a header's value".to_owned())?;
        Ok(Self { proxy, tag })
    }

    /// The way to the host whose repositories are below `api`.
    pub(super) fn lead_to(&self, api: &Url) -> Result<Endpoint, String> {
        let registry = api.origin().ascii_serialization();
        let registry = HeaderValue::try_from(registry)
            .map_err(|_| format!("{api}: not to be reached through Dragonfly"))?;
        let mut headers = HeaderMap::from_iter(ALWAYS);
        headers.insert(REGISTRY, registry);
        headers.extend(self.tag.clone().map(|tag| (TAG, tag)));
        let mut proxied = self.proxy.clone();
        proxied.set_path(api.path());
        Ok(Endpoint {
            api: proxied,
            mirror: false,
            can: Capabilities::RANGES,
            authorities: vec![],
            identity: vec![],
            skip_verify: false,
            headers,
            dial_timeout: None,
            proxy: None,
        })
    }
}

/// What a request for a range says of those to come: who reads more than a piece reads on.
pub(super) fn expectation(range: &Range<u64>) -> (HeaderName, HeaderValue) {
    let more = range.end - range.start > PIECE_BYTES;
    (PREFETCH, HeaderValue::from_static(if more { "true" } else { "false" }))
}

/// Whether an answer is a range, and else who failed.
pub(super) fn check(from: &Repository, what: &str, answer: &Response) -> Result<(), SourceError> {
    let failed = answer.headers().get(ERROR_TYPE).map(HeaderValue::as_bytes);
    let broken = |who: &str| SourceError::Unreachable {
        source_name: format!("{from} through Dragonfly"),
        message: format!("{who} failed for {what} (status {})", answer.status().as_u16()),
    };
    match failed {
        None if answer.status() == StatusCode::PARTIAL_CONTENT => Ok(()),
        None if answer.status().is_success() => Err(broken("dfdaemon gave no range; it")),
        // The registry's own answer, or dfdaemon's that it is asked too much.
        None | Some(b"backend" | b"proxy") if !answer.status().is_success() => {
            Err(failed_status(from, what, answer))
        }
        Some(b"backend") => Err(broken("the registry")),
        _ => Err(broken("dfdaemon")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, error: Option<&str>) -> Response {
        let mut answer = http::Response::builder().status(status);
        if let Some(error) = error {
            answer = answer.header(ERROR_TYPE, error);
        }
        answer.body("").unwrap().into()
    }

    fn checked(status: u16, error: Option<&str>) -> Result<(), SourceError> {
        let from = Repository { registry: "registry.example.com".into(), name: "a/b".into() };
        check(&from, "blob x", &answer(status, error))
    }

    #[test]
    fn tokens_go_through_this_node_or_tls_only() {
        for good in ["http://127.0.0.1:4001", "http://localhost:4001/", "https://dfdaemon:4001"] {
            assert!(Dragonfly::new(good, None).is_ok(), "{good}");
        }
        for bad in [
            "http://10.0.0.1:4001",
            "127.0.0.1:4001",
            "http://127.0.0.1:4001/v2",
            "http://user:secret@127.0.0.1:4001",
            "ftp://127.0.0.1",
            "",
        ] {
            assert!(Dragonfly::new(bad, None).is_err(), "{bad}");
        }
        assert!(Dragonfly::new("http://127.0.0.1:4001", Some("a\nb")).is_err());
    }

    #[test]
    fn the_registry_is_named_with_its_scheme_and_keeps_its_paths() {
        let dragonfly = Dragonfly::new("http://127.0.0.1:4001", Some("team")).unwrap();
        let way = dragonfly.lead_to(&"https://r.example.com:5000/v2/hub/".parse().unwrap());
        let way = way.unwrap();
        assert_eq!(way.api.as_str(), "http://127.0.0.1:4001/v2/hub/");
        assert_eq!(way.headers.get(&REGISTRY).unwrap(), "https://r.example.com:5000");
        assert_eq!(way.headers.get(&TAG).unwrap(), "team");
    }

    #[test]
    fn only_a_range_without_an_error_is_an_answer() {
        assert!(checked(206, None).is_ok());
        for (status, error) in [(200, None), (200, Some("backend")), (206, Some("dfdaemon"))] {
            let error = checked(status, error).unwrap_err();
            assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");
        }
    }

    #[test]
    fn who_failed_decides_what_is_to_be_done() {
        let told = |status, error| checked(status, Some(error)).unwrap_err();
        assert!(matches!(told(404, "backend"), SourceError::NotFound { .. }));
        assert!(matches!(told(500, "backend"), SourceError::Status { status: 500, .. }));
        assert!(told(429, "proxy").is_complaint());
        let own = told(503, "dfdaemon");
        assert!(own.may_pass() && !own.is_complaint(), "the registry is asked itself");
    }

    #[test]
    fn whoever_reads_more_than_a_piece_reads_on() {
        assert_eq!(expectation(&(0..PIECE_BYTES)).1, "false");
        assert_eq!(expectation(&(5..PIECE_BYTES + 6)).1, "true");
    }
}
