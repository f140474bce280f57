//! One host that answers for a registry: its connections, requests that authenticate themselves,
//! and whether it is well.
//!
//! Invariant: what is ours (authorization, configured headers) goes to this host alone. A redirect
//! to another one is followed without.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use lru::LruCache;
use reqwest::header::{CONTENT_ENCODING, HeaderMap, LOCATION, TRANSFER_ENCODING};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};

use super::Repository;
use super::auth::{Access, Authority, Authorization, Right, Tried};
use super::clients::{Clients, pem};
use super::credentials::Sources;
use super::dragonfly::Dragonfly;
use super::endpoints::{Capabilities, Endpoint};
use super::health::Health;
use super::retry_after::retry_after;
use crate::SourceError;
use crate::shared::lock;
use crate::source::SourceKind;

/// What registries see of us.
pub(super) const USER_AGENT: &str = concat!("weightfs/", env!("CARGO_PKG_VERSION"));

/// Redirects that are followed: registries send one, to their storage.
pub(super) const MAX_REDIRECTS: usize = 5;

/// Repositories whose tokens are remembered for a registry.
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// A host that answers for a registry.
#[derive(Debug)]
pub(super) struct Host {
    /// What its repositories are below.
    api: Url,
    /// The registry that it stands for, where it is not that itself; it is told with each request,
    /// for hosts that stand for many (containerd does the same).
    stands_for: Option<String>,
    can: Capabilities,
    way: Way,
    headers: HeaderMap,
    clients: Arc<Clients>,
    authority: Arc<Authority>,
    accesses: Arc<Accesses>,
    health: Health,
}

/// What we may do in which repository.
type Accesses = Mutex<LruCache<(String, Right), Arc<Access>>>;

/// How a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Directly,
    /// Through Dragonfly's daemon on this node.
    Dragonfly,
}

impl Host {
    /// What it is, for those who count what came from where.
    pub(super) fn kind(&self) -> SourceKind {
        match (self.way, &self.stands_for) {
            (Way::Dragonfly, _) => SourceKind::Dragonfly,
            (Way::Directly, Some(_)) => SourceKind::Mirror,
            (Way::Directly, None) => SourceKind::Registry,
        }
    }

    /// `timeout` bounds authentication. A connection that gives no byte for `silence` is given up.
    pub(super) fn new(
        registry: &str,
        endpoint: Endpoint,
        sources: Arc<Sources>,
        timeout: Duration,
        silence: Duration,
    ) -> Result<Self, SourceError> {
        install_crypto();
        let failed = |message: String| SourceError::Unreachable {
            source_name: registry.to_owned(),
            message,
        };
        let ca = pem(&endpoint.authorities).map_err(failed)?;
        let clients = Arc::new(Clients::new(&endpoint, ca.as_deref(), silence).map_err(failed)?);
        let Endpoint { api, mirror, can, headers, .. } = endpoint;
        let name = if mirror { api.authority() } else { registry };
        let authority = Authority::new(name, &api, Arc::clone(&clients), sources, timeout);
        let stands_for = mirror.then(|| registry.to_owned());
        let (authority, health) = (Arc::new(authority), Health::default());
        let accesses = Arc::new(Mutex::new(LruCache::new(MAX_REPOSITORIES)));
        let way = Way::Directly;
        Ok(Self { api, stands_for, can, way, headers, clients, authority, accesses, health })
    }

    /// The blobs of this host by way of Dragonfly, with the same tokens.
    ///
    /// # Errors
    /// In words: no client can be had.
    pub(super) fn through(&self, dragonfly: &Dragonfly, silence: Duration) -> Result<Self, String> {
        let endpoint = dragonfly.lead_to(&self.api)?;
        let clients = Arc::new(Clients::new(&endpoint, None, silence)?);
        let Endpoint { api, can, mut headers, .. } = endpoint;
        headers.extend(self.headers.clone());
        Ok(Self {
            api,
            stands_for: self.stands_for.clone(),
            can,
            way: Way::Dragonfly,
            headers,
            clients,
            authority: Arc::clone(&self.authority),
            accesses: Arc::clone(&self.accesses),
            health: Health::default(),
        })
    }

    /// Whether Dragonfly's daemon answers for it.
    pub(super) fn is_dragonfly(&self) -> bool {
        self.way == Way::Dragonfly
    }

    /// What it may be asked for.
    pub(super) const fn can(&self) -> Capabilities {
        self.can
    }

    /// How it has answered lately.
    pub(super) const fn health(&self) -> &Health {
        &self.health
    }

    /// Why not to ask it now: it wants to be left alone.
    pub(super) fn rests(&self, from: &Repository, what: &str) -> Option<SourceError> {
        let (status, left) = self.health.resting()?;
        let (source_name, what) = (from.to_string(), what.to_owned());
        Some(SourceError::Status { source_name, what, status, retry_after: Some(left) })
    }

    /// Asks for `path` below the repository; authenticates, once, where the registry wants it.
    /// The answer may have any status but 401 and 403.
    pub(super) async fn get(
        &self,
        from: &Repository,
        what: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, SourceError> {
        let url = self.url(from, path)?;
        let build = || {
            let request = self.request(from, Method::GET, url.clone())?;
            Ok(request.headers(headers.clone()))
        };
        let answer = self.ask(from, what, Right::Pull, build).await?;
        self.follow(from, what, answer, headers).await
    }

    /// Asks another host, to which the registry sent us, without anything of ours.
    pub(super) async fn get_elsewhere(
        &self,
        from: &Repository,
        what: &str,
        url: Url,
        headers: &HeaderMap,
    ) -> Result<Response, SourceError> {
        let answer = self.send_elsewhere(from, url, headers).await?;
        self.follow(from, what, answer, headers).await
    }

    async fn send_elsewhere(
        &self,
        from: &Repository,
        url: Url,
        headers: &HeaderMap,
    ) -> Result<Response, SourceError> {
        let request = self.request_elsewhere(from, Method::GET, url)?.headers(headers.clone());
        send(from, request, &Authorization::None).await
    }

    /// Goes where an answer sends us. Not from TLS to plain text: what is believed for its
    /// transport must have had that transport all the way.
    async fn follow(
        &self,
        from: &Repository,
        what: &str,
        mut answer: Response,
        headers: &HeaderMap,
    ) -> Result<Response, SourceError> {
        let bad = |message: &str| SourceError::BadAnswer {
            source_name: from.to_string(),
            what: what.to_owned(),
            message: message.to_owned(),
        };
        for _ in 0..MAX_REDIRECTS {
            if !is_redirect(answer.status()) {
                return plain(answer).map_err(|encoding| bad(&format!("it comes {encoding}")));
            }
            let place = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let place = place.and_then(|place| answer.url().join(place).ok());
            let place = place.ok_or_else(|| bad("it redirects to nowhere"))?;
            match (answer.url().scheme(), place.scheme()) {
                (_, "https") | ("http", "http") => {}
                ("https", "http") => {
                    return Err(bad("the registry redirects from https to plain http"));
                }
                _ => return Err(bad("it redirects to something else than http or https")),
            }
            answer = self.send_elsewhere(from, place, headers).await?;
        }
        Err(bad("too many redirects"))
    }

    /// A request to this host.
    pub(super) fn request(
        &self,
        from: &Repository,
        method: Method,
        url: Url,
    ) -> Result<RequestBuilder, SourceError> {
        Ok(self.request_elsewhere(from, method, url)?.headers(self.headers.clone()))
    }

    /// A request to another host, without anything of ours.
    pub(super) fn request_elsewhere(
        &self,
        from: &Repository,
        method: Method,
        url: Url,
    ) -> Result<RequestBuilder, SourceError> {
        let client = self.clients.for_url(&url).map_err(|message| SourceError::Unreachable {
            source_name: from.to_string(),
            message,
        })?;
        Ok(client.request(method, url))
    }

    /// Sends what `build` makes, with the right to do so. A redirect to another host is answered
    /// as it is.
    pub(super) async fn ask(
        &self,
        from: &Repository,
        what: &str,
        right: Right,
        build: impl Fn() -> Result<RequestBuilder, SourceError>,
    ) -> Result<Response, SourceError> {
        let (access, mut tried) = (self.access(from, right), Tried::default());
        let mut grant = access.current(&mut tried, what).await?;
        loop {
            let answer = send(from, build()?, grant.authorization()).await?;
            if !access.is_refused(&grant, &tried, &answer) {
                return Ok(answer);
            }
            grant = access.renew(&grant, &answer, &mut tried, what).await?;
        }
    }

    pub(super) fn url(&self, from: &Repository, path: &str) -> Result<Url, SourceError> {
        let url = self.api.join(&format!("{}/{path}", from.name));
        let mut url = url.map_err(|error| SourceError::BadAnswer {
            source_name: from.to_string(),
            what: path.to_owned(),
            message: format!("not a repository: {error}"),
        })?;
        if let Some(registry) = &self.stands_for {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        Ok(url)
    }

    fn access(&self, from: &Repository, right: Right) -> Arc<Access> {
        let mut known = lock(&self.accesses);
        let key = (from.name.clone(), right);
        if let Some(access) = known.get(&key) {
            return Arc::clone(access);
        }
        let access = Arc::new(Access::new(Arc::clone(&self.authority), from, right));
        known.put(key, Arc::clone(&access));
        access
    }
}

async fn send(
    from: &Repository,
    request: RequestBuilder,
    authorization: &Authorization,
) -> Result<Response, SourceError> {
    let request = authorized(request, authorization);
    request.send().await.map_err(|error| unreachable(from, error))
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Bytes are compared with digests as they come. So they must come as they are: compressing them
/// on the way is nothing that we asked for.
fn plain(answer: Response) -> Result<Response, String> {
    let list = |name, harmless: &[&str]| {
        let values = answer.headers().get_all(name).iter();
        let all: Vec<_> = values.map(|value| value.to_str().unwrap_or("?")).collect();
        let mut codings = all.iter().flat_map(|value| value.split(',')).map(str::trim);
        let bad = codings.find(|coding| {
            !coding.is_empty() && !harmless.iter().any(|known| coding.eq_ignore_ascii_case(known))
        });
        bad.map(str::to_owned)
    };
    let content = list(CONTENT_ENCODING, &["identity"]);
    let transfer = list(TRANSFER_ENCODING, &["identity", "chunked"]);
    match (content, transfer) {
        (None, None) => Ok(answer),
        (Some(coding), _) => Err(format!("with Content-Encoding {coding:?}")),
        (None, Some(coding)) => Err(format!("with Transfer-Encoding {coding:?}")),
    }
}

fn authorized(request: RequestBuilder, authorization: &Authorization) -> RequestBuilder {
    match authorization {
        Authorization::None => request,
        Authorization::Bearer(token) => request.bearer_auth(token),
        Authorization::Basic { user, password } => request.basic_auth(user, Some(password)),
    }
}

/// An answer that is no success and no refusal, as an error.
pub(super) fn failed_status(from: &Repository, what: &str, answer: &Response) -> SourceError {
    let (source_name, what) = (from.to_string(), what.to_owned());
    if answer.status() == StatusCode::NOT_FOUND {
        return SourceError::NotFound { source_name, what };
    }
    let retry_after = retry_after(answer.headers());
    SourceError::Status { source_name, what, status: answer.status().as_u16(), retry_after }
}

/// A failure of the transport. Its text leaves out the URL: a redirect's may be signed, and who
/// has it has access.
pub(super) fn unreachable(from: &Repository, error: reqwest::Error) -> SourceError {
    let message = words(&error.without_url());
    SourceError::Unreachable { source_name: from.to_string(), message }
}

/// An error with its causes, in one line.
pub(super) fn words(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Whether `host` or `host:port` is this machine.
pub(super) fn is_loopback(address: &str) -> bool {
    let Ok(url) = Url::parse(&format!("http://{address}/")) else { return false };
    let host = url.host_str().unwrap_or_default();
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

/// Whoever makes a client for TLS needs a provider: rustls wants one for the process, and whoever came
/// first has chosen.
pub fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
