//! One registry: its address, connections, and requests that authenticate themselves.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Once, OnceLock};
use std::time::Duration;

use lru::LruCache;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Certificate, Client, ClientBuilder, RequestBuilder, Response, StatusCode, Url};

use super::auth::{Access, Authority, Authorization, Right};
use super::{RegistryOptions, Repository};
use crate::SourceError;
use crate::shared::lock;

/// What registries see of us.
pub(super) const USER_AGENT: &str = concat!("weightfs/", env!("CARGO_PKG_VERSION"));

/// Idle connections that are kept; as many as a few busy blobs use at once.
const MAX_IDLE_CONNECTIONS: usize = 64;

/// How long they are kept: shorter than the minute after which common proxies close them.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);

/// A connection that gives no byte for this long is dead, whatever the timeout allows.
const MAX_SILENCE: Duration = Duration::from_secs(10);

/// Redirects that are followed: registries send one, to their storage.
const MAX_REDIRECTS: usize = 5;

/// Repositories whose tokens are remembered for a registry.
const MAX_REPOSITORIES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// A registry.
#[derive(Debug)]
pub(super) struct Host {
    base: Url,
    clients: Clients,
    authority: Arc<Authority>,
    access: Mutex<LruCache<(String, Right), Arc<Access>>>,
}

impl Host {
    pub(super) fn new(
        registry: &str,
        options: &RegistryOptions,
        docker_config: Option<PathBuf>,
        timeout: Duration,
    ) -> Result<Self, SourceError> {
        install_crypto();
        let failed = |message: String| SourceError::Unreachable {
            source_name: registry.to_owned(),
            message,
        };
        let base = base_url(registry, options).ok_or_else(|| failed("not a host name".into()))?;
        let ca = match &options.ca_file {
            None => None,
            Some(path) => Some(
                std::fs::read(path)
                    .map_err(|error| failed(format!("CA file {}: {error}", path.display())))?,
            ),
        };
        let clients = Clients::new(&base, ca.as_deref(), timeout.min(MAX_SILENCE))
            .map_err(|error| failed(no_tls(&error)))?;
        let authority = Authority::new(registry, &base, ca, docker_config, timeout);
        let access = Mutex::new(LruCache::new(MAX_REPOSITORIES));
        Ok(Self { base, clients, authority: Arc::new(authority), access })
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
        let build = |client: &Client| client.get(url.clone()).headers(headers.clone());
        self.ask(from, what, Right::Pull, build).await
    }

    /// Sends what `build` makes, with the right to do so; see [`Host::get`].
    pub(super) async fn ask(
        &self,
        from: &Repository,
        what: &str,
        right: Right,
        build: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<Response, SourceError> {
        let access = self.access(&from.name, right);
        let known = access.current().await;
        let answer = self.send(from, &build, known.authorization()).await?;
        if !is_refusal(answer.status()) {
            return Ok(answer);
        }
        let fresh = access.renew(&known, from, what).await?;
        let answer = self.send(from, &build, fresh.authorization()).await?;
        if is_refusal(answer.status()) {
            return Err(fresh.refused(from, what));
        }
        Ok(answer)
    }

    /// Sends it again where it turns out that TLS is spoken behind a plain registry.
    async fn send(
        &self,
        from: &Repository,
        build: impl Fn(&Client) -> RequestBuilder,
        authorization: &Authorization,
    ) -> Result<Response, SourceError> {
        let answer = send(from, build(self.clients.known()), authorization).await?;
        if !leads_to_tls(&answer) {
            return Ok(answer);
        }
        let client = self.client_with_tls(from)?;
        send(from, build(client), authorization).await
    }

    /// For a request to another place than the registry.
    pub(super) fn client_for(&self, from: &Repository, url: &Url) -> Result<&Client, SourceError> {
        match url.scheme() {
            "https" => self.client_with_tls(from),
            _ => Ok(self.clients.known()),
        }
    }

    fn client_with_tls(&self, from: &Repository) -> Result<&Client, SourceError> {
        self.clients.with_tls().map_err(|error| SourceError::Unreachable {
            source_name: from.to_string(),
            message: no_tls(&error),
        })
    }

    pub(super) fn url(&self, from: &Repository, path: &str) -> Result<Url, SourceError> {
        let url = self.base.join(&format!("/v2/{}/{path}", from.name));
        url.map_err(|error| SourceError::BadAnswer {
            source_name: from.to_string(),
            what: path.to_owned(),
            message: format!("not a repository: {error}"),
        })
    }

    fn access(&self, repository: &str, right: Right) -> Arc<Access> {
        let mut known = lock(&self.access);
        let key = (repository.to_owned(), right);
        if let Some(access) = known.get(&key) {
            return Arc::clone(access);
        }
        let access = Arc::new(Access::new(Arc::clone(&self.authority), right));
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

fn is_refusal(status: StatusCode) -> bool {
    // 403, too: some registries say so of a token that has expired.
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// reqwest drops the header itself when a redirect leads to another host.
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
    let retry_after = answer.headers().get(RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
    SourceError::Status { source_name, what, status: answer.status().as_u16(), retry_after }
}

/// A failure of the transport. Its text leaves out the URL: a redirect's may be signed, and who
/// has it has access.
pub(super) fn unreachable(from: &Repository, error: reqwest::Error) -> SourceError {
    let message = words(&error.without_url());
    SourceError::Unreachable { source_name: from.to_string(), message }
}

/// An error with its causes, in one line.
fn words(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Docker Hub's registry answers under another name than its references have.
fn base_url(registry: &str, options: &RegistryOptions) -> Option<Url> {
    let address = match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    };
    let plain = options.plain_http.unwrap_or_else(|| is_loopback(address));
    let scheme = if plain { "http" } else { "https" };
    let url = Url::parse(&format!("{scheme}://{address}/")).ok()?;
    let only_host = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    (only_host && url.username().is_empty() && url.password().is_none()).then_some(url)
}

/// Whether `host` or `host:port` is this machine.
pub(super) fn is_loopback(address: &str) -> bool {
    let Ok(url) = Url::parse(&format!("http://{address}/")) else { return false };
    let host = url.host_str().unwrap_or_default();
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}

/// The clients of a registry. Reading the machine's certificates takes some 40 ms of a core, so
/// where a registry speaks plain HTTP they are not read before something leads to TLS.
#[derive(Debug)]
struct Clients {
    /// Knows no certificates where the registry is plain.
    first: Client,
    /// Set once something led to TLS.
    with_tls: OnceLock<Client>,
    builder: Builder,
}

/// Makes clients.
#[derive(Debug)]
struct Builder {
    loopback: bool,
    ca: Vec<Certificate>,
    silence: Duration,
}

impl Clients {
    fn new(base: &Url, ca: Option<&[u8]>, silence: Duration) -> reqwest::Result<Self> {
        let ca = ca.map(Certificate::from_pem_bundle).transpose()?.unwrap_or_default();
        let builder = Builder { loopback: is_loopback(base.authority()), ca, silence };
        if base.scheme() == "http" {
            return Ok(Self { first: builder.plain()?, with_tls: OnceLock::new(), builder });
        }
        let first = builder.with_tls()?;
        Ok(Self { with_tls: OnceLock::from(first.clone()), first, builder })
    }

    /// The one to begin with.
    fn known(&self) -> &Client {
        self.with_tls.get().unwrap_or(&self.first)
    }

    /// One that knows the certificates of this machine, which are read now if they were not.
    fn with_tls(&self) -> reqwest::Result<&Client> {
        if let Some(client) = self.with_tls.get() {
            return Ok(client);
        }
        let client = self.builder.with_tls()?;
        Ok(self.with_tls.get_or_init(|| client))
    }
}

impl Builder {
    fn plain(&self) -> reqwest::Result<Client> {
        let policy = Policy::custom(follow_to_plain);
        self.either().redirect(policy).tls_certs_only([]).build()
    }

    fn with_tls(&self) -> reqwest::Result<Client> {
        let policy = Policy::custom(follow);
        self.either().redirect(policy).tls_certs_merge(self.ca.clone()).build()
    }

    fn either(&self) -> ClientBuilder {
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            // One connection for each range: HTTP/2 would put them all through one window.
            .http1_only()
            .referer(false)
            .connect_timeout(self.silence)
            .read_timeout(self.silence)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .pool_idle_timeout(IDLE_CONNECTION);
        // A proxy can't reach what listens on our own loopback.
        if self.loopback { builder.no_proxy() } else { builder }
    }
}

fn no_tls(error: &reqwest::Error) -> String {
    format!("TLS can't be set up: {}", words(error))
}

/// Whether a redirect was not followed because it needs certificates.
fn leads_to_tls(answer: &Response) -> bool {
    let location = answer.headers().get(LOCATION).and_then(|location| location.to_str().ok());
    let target = location.and_then(|location| answer.url().join(location).ok());
    answer.status().is_redirection() && target.is_some_and(|target| target.scheme() == "https")
}

/// As [`follow`], up to where TLS begins.
fn follow_to_plain(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    if attempt.url().scheme() == "https" { attempt.stop() } else { follow(attempt) }
}

/// Follows redirects, but not from TLS to plain text: what is believed for its transport must
/// have had that transport all the way.
fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let was_secure = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
    if was_secure && attempt.url().scheme() != "https" {
        return attempt.error("the registry redirects from https to plain http");
    }
    if attempt.previous().len() > MAX_REDIRECTS {
        return attempt.error("too many redirects");
    }
    attempt.follow()
}

/// rustls wants one provider for the process; whoever came first has chosen.
fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_plain_by_itself() {
        let scheme = |registry: &str, plain_http| {
            let options = RegistryOptions { plain_http, ca_file: None };
            base_url(registry, &options).unwrap().scheme().to_owned()
        };
        for registry in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9", "[::1]:5000"]
        {
            assert_eq!(scheme(registry, None), "http", "{registry}");
            assert_eq!(scheme(registry, Some(false)), "https", "{registry}");
        }
        for registry in ["example.com", "localhost.example.com", "10.0.0.1:5000", "128.0.0.1"] {
            assert_eq!(scheme(registry, None), "https", "{registry}");
            assert_eq!(scheme(registry, Some(true)), "http", "{registry}");
        }
    }

    #[test]
    fn a_registry_is_a_host_and_nothing_else() {
        for registry in ["", "a/b", "user@host", "host?x", "host#x", "a b"] {
            assert!(base_url(registry, &RegistryOptions::default()).is_none(), "{registry}");
        }
        let hub = base_url("docker.io", &RegistryOptions::default()).unwrap();
        assert_eq!(hub.as_str(), "https://registry-1.docker.io/");
    }
}
