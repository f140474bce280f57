//! The HTTP clients of a host: one for plain text, one for TLS.
//!
//! Reading the machine's certificates takes some 40 ms of a core: where a host speaks plain HTTP they
//! are not read before something leads to TLS.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Certificate, Client, ClientBuilder, Identity, Proxy, Url};

use super::endpoints::Endpoint;
use super::files;
use super::host::{MAX_REDIRECTS, USER_AGENT, is_loopback, words};

/// Idle connections that are kept; as many as a few busy blobs use at once.
const MAX_IDLE_CONNECTIONS: usize = 64;

/// How long they are kept: shorter than the minute after which common proxies close them.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);

/// Bytes are compared with digests as they come.
const AS_IT_IS: HeaderValue = HeaderValue::from_static("identity");

/// Largest PEM file that is read, in bytes.
const MAX_PEM_BYTES: u64 = 4 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Clients {
    plain: Client,
    tls: OnceLock<Client>,
    builder: Builder,
}

/// How requests get there.
#[derive(Debug)]
enum Route {
    /// By the proxies of the environment.
    Environment,
    /// By none: they can't reach what listens on our own loopback.
    Direct,
    /// By the one that the host's configuration names.
    Proxy(Box<Proxy>),
}

impl Route {
    fn to(endpoint: &Endpoint) -> Result<Self, String> {
        match &endpoint.proxy {
            // Without the error's text: the address may hold a password.
            Some(url) => Proxy::all(url.clone())
                .map(|proxy| Self::Proxy(Box::new(proxy)))
                .map_err(|_| "its proxy can't be used".into()),
            None if is_loopback(endpoint.api.authority()) => Ok(Self::Direct),
            None => Ok(Self::Environment),
        }
    }
}

/// What both have in common.
#[derive(Debug)]
struct Builder {
    route: Route,
    dial_timeout: Duration,
    authorities: Vec<Certificate>,
    identity: Option<Identity>,
    skip_verify: bool,
    silence: Duration,
}

impl Clients {
    /// A connection that gives no byte for `silence` is given up. `authorities` is PEM.
    ///
    /// # Errors
    /// In words: a certificate or a key that can't be used.
    pub(super) fn new(
        endpoint: &Endpoint,
        authorities: Option<&[u8]>,
        silence: Duration,
    ) -> Result<Self, String> {
        let authorities = authorities.map(Certificate::from_pem_bundle).transpose();
        let identity = pem(&endpoint.identity)?.map(|pem| Identity::from_pem(&pem)).transpose();
        let builder = Builder {
            route: Route::to(endpoint)?,
            dial_timeout: endpoint.dial_timeout.unwrap_or(silence),
            authorities: authorities.map_err(no_tls)?.unwrap_or_default(),
            // The error's text could show a part of the key.
            identity: identity.map_err(|_| "the client's certificate and key can't be used")?,
            skip_verify: endpoint.skip_verify,
            silence,
        };
        let plain = builder.common().tls_certs_only([]).build().map_err(no_tls)?;
        let clients = Self { plain, tls: OnceLock::new(), builder };
        clients.for_url(&endpoint.api)?;
        Ok(clients)
    }

    /// The one to ask with.
    ///
    /// # Errors
    /// In words: certificates that can't be read.
    pub(super) fn for_url(&self, url: &Url) -> Result<&Client, String> {
        if url.scheme() != "https" {
            return Ok(&self.plain);
        }
        if let Some(client) = self.tls.get() {
            return Ok(client);
        }
        let client = self.builder.with_tls().map_err(no_tls)?;
        Ok(self.tls.get_or_init(|| client))
    }
}

impl Builder {
    fn with_tls(&self) -> reqwest::Result<Client> {
        let builder = self
            .common()
            .tls_certs_merge(self.authorities.clone())
            .tls_danger_accept_invalid_certs(self.skip_verify);
        match &self.identity {
            Some(identity) => builder.identity(identity.clone()).build(),
            None => builder.build(),
        }
    }

    fn common(&self) -> ClientBuilder {
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, AS_IT_IS)]))
            // One connection for each range: HTTP/2 would put them all through one window.
            .http1_only()
            .redirect(Policy::custom(stay))
            .referer(false)
            .connect_timeout(self.dial_timeout)
            .read_timeout(self.silence)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .pool_idle_timeout(IDLE_CONNECTION);
        match &self.route {
            Route::Environment => builder,
            Route::Direct => builder.no_proxy(),
            Route::Proxy(proxy) => builder.no_proxy().proxy(Proxy::clone(proxy)),
        }
    }
}

/// Follows redirects within a host, with what is ours. One to another host is the answer.
fn stay(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    if attempt.previous().len() > MAX_REDIRECTS {
        return attempt.error("too many redirects");
    }
    let here = attempt.previous().last().is_some_and(|url| url.origin() == attempt.url().origin());
    if here { attempt.follow() } else { attempt.stop() }
}

fn no_tls(error: reqwest::Error) -> String {
    format!("TLS can't be set up: {}", words(&error))
}

/// The contents of PEM files, one after the other; `None` if there are none.
///
/// # Errors
/// In words: a file that can't be read.
pub(super) fn pem(files: &[PathBuf]) -> Result<Option<Vec<u8>>, String> {
    let mut whole: Option<Vec<u8>> = None;
    for path in files {
        let bytes = files::read(path, MAX_PEM_BYTES)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let whole = whole.get_or_insert_default();
        whole.extend_from_slice(&bytes);
        whole.push(b'\n');
    }
    Ok(whole)
}
