//! The members that Kubernetes knows: the endpoints of a service, listed once and watched from then
//! on (EndpointSlices of discovery.k8s.io/v1). Of the API server no more is needed than to get, list
//! and watch them in one namespace, which the pod's service account must be allowed to.
//!
//! Invariant: what comes is bounded: a page, a line, the number of slices. An address that is none is
//! passed over. When the API server fails, whoever was known stays a member.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::{Duration, Instant};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::WatchEvent;
use k8s_openapi::{List, Resource as _};
use reqwest::{Certificate, Client, Response, StatusCode};
use tracing::warn;

use super::{LOOK_UP_EVERY, MAX_MEMBERS, set};
use crate::{Peers, Service};

/// Where a pod finds the API server's authority and its own token.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Slices of a page, and bytes of one; a slice has a thousand endpoints at the most.
const PAGE: usize = 100;
const MAX_PAGE_BYTES: usize = 64 << 20;
const MAX_EVENT_BYTES: usize = 4 << 20;

/// Slices that are remembered.
const MAX_SLICES: usize = 1024;

/// How long the API server keeps a watch open, and how long it may say nothing.
const WATCH: Duration = Duration::from_secs(300);
const SILENCE: Duration = Duration::from_secs(330);

#[derive(Debug, thiserror::Error)]
enum ApiError {
    #[error("this is no pod: {0} is not set")]
    NoPod(&'static str),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Request(#[from] reqwest::Error),
    #[error("it answers {0}; may the service account list and watch endpointslices?")]
    Status(StatusCode),
    #[error("it sends more than {0} bytes at once")]
    TooLong(usize),
    #[error("it sends something else than was asked for: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the watch ended: {0}")]
    Ended(String),
}

/// Sets the members whenever they change, until there are no peers any more.
pub(super) async fn follow(peers: Weak<Peers>, service: Service, listen: SocketAddr) {
    while peers.strong_count() > 0 {
        let followed = async {
            let server = ApiServer::in_cluster()?;
            list_and_watch(&server, &peers, &service, listen).await
        };
        if let Err(error) = followed.await {
            warn!(%service, %error, "members can't be asked of Kubernetes");
        }
        tokio::time::sleep(LOOK_UP_EVERY).await;
    }
}

/// Ends with an error, or with the peers.
async fn list_and_watch(
    server: &ApiServer,
    peers: &Weak<Peers>,
    service: &Service,
    listen: SocketAddr,
) -> Result<(), ApiError> {
    let mut known = server.list(service).await?;
    loop {
        let Some(peers_now) = peers.upgrade() else { return Ok(()) };
        set(&peers_now, known.members(service.port), listen);
        drop(peers_now);
        let began = Instant::now();
        let mut events = server.watch(service, &known.version).await?;
        while let Some(event) = events.next().await? {
            known.take(event)?;
            let Some(peers) = peers.upgrade() else { return Ok(()) };
            set(&peers, known.members(service.port), listen);
        }
        if began.elapsed() < LOOK_UP_EVERY {
            tokio::time::sleep(LOOK_UP_EVERY).await;
        }
    }
}

/// The API server, as a pod sees it.
#[derive(Debug, Clone)]
struct ApiServer {
    url: String,
    client: Client,
    /// Read for each request, since it is renewed every hour.
    token: PathBuf,
}

impl ApiServer {
    fn in_cluster() -> Result<Self, ApiError> {
        let variable = |name| std::env::var(name).map_err(|_| ApiError::NoPod(name));
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let account = Path::new(ACCOUNT);
        Self::new(format!("https://{host}:{port}"), &account.join("ca.crt"), account.join("token"))
    }

    fn new(url: String, authority: &Path, token: PathBuf) -> Result<Self, ApiError> {
        let authorities = Certificate::from_pem_bundle(&read(authority)?)?;
        let client = Client::builder()
            .no_proxy()
            .tls_certs_only(authorities)
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(SILENCE)
            .build()?;
        Ok(Self { url, client, token })
    }

    async fn get(&self, service: &Service, query: &str) -> Result<Response, ApiError> {
        let Service { namespace, name, .. } = service;
        let url = format!(
            "{}/apis/{}/namespaces/{namespace}/endpointslices\
             ?labelSelector=kubernetes.io%2Fservice-name%3D{name}&{query}",
            self.url,
            EndpointSlice::API_VERSION
        );
        let token = String::from_utf8_lossy(&read(&self.token)?).trim().to_owned();
        let answer = self.client.get(url).bearer_auth(token).send().await?;
        match answer.status() {
            StatusCode::OK => Ok(answer),
            status => Err(ApiError::Status(status)),
        }
    }

    /// All slices, page by page.
    async fn list(&self, service: &Service) -> Result<Known, ApiError> {
        let mut known = Known::default();
        let mut from = String::new();
        loop {
            let answer = self.get(service, &format!("limit={PAGE}{from}")).await?;
            let mut body = Lines::new(answer, MAX_PAGE_BYTES);
            let page: List<EndpointSlice> = serde_json::from_slice(&body.whole().await?)?;
            page.items.into_iter().for_each(|slice| known.add(slice));
            known.version = page.metadata.resource_version.unwrap_or_default();
            match page.metadata.continue_.filter(|next| !next.is_empty()) {
                Some(next) if known.slices.len() < MAX_SLICES => {
                    from = format!("&continue={}", escaped(&next));
                }
                _ => return Ok(known),
            }
        }
    }

    /// What happens from that version on.
    async fn watch(&self, service: &Service, version: &str) -> Result<Lines, ApiError> {
        let query = format!(
            "watch=1&allowWatchBookmarks=true&timeoutSeconds={}&resourceVersion={}",
            WATCH.as_secs(),
            escaped(version)
        );
        Ok(Lines::new(self.get(service, &query).await?, MAX_EVENT_BYTES))
    }
}

/// For a query (RFC 3986, section 2.1).
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, ApiError> {
    std::fs::read(path).map_err(|source| ApiError::File { path: path.to_owned(), source })
}

/// A body of lines.
#[derive(Debug)]
struct Lines {
    answer: Response,
    /// What came and is not yet taken.
    rest: Vec<u8>,
    most: usize,
}

impl Lines {
    fn new(answer: Response, most: usize) -> Self {
        Self { answer, rest: vec![], most }
    }

    /// All of it.
    async fn whole(&mut self) -> Result<Vec<u8>, ApiError> {
        while self.more().await? {}
        Ok(std::mem::take(&mut self.rest))
    }

    /// The next line's event; `None` at the end.
    async fn next(&mut self) -> Result<Option<WatchEvent<EndpointSlice>>, ApiError> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            if !self.more().await? {
                return Ok(None);
            }
        }
    }

    async fn more(&mut self) -> Result<bool, ApiError> {
        let Some(piece) = self.answer.chunk().await? else { return Ok(false) };
        if self.rest.len() + piece.len() > self.most {
            return Err(ApiError::TooLong(self.most));
        }
        self.rest.extend_from_slice(&piece);
        Ok(true)
    }
}

/// The slices of a service, and as of when.
#[derive(Debug, Default)]
struct Known {
    version: String,
    /// Addresses, by the slice's name.
    slices: BTreeMap<String, Vec<IpAddr>>,
}

impl Known {
    fn add(&mut self, slice: EndpointSlice) {
        if let Some(version) = slice.metadata.resource_version.clone() {
            self.version = version;
        }
        let name = slice.metadata.name.clone().unwrap_or_default();
        if self.slices.len() < MAX_SLICES || self.slices.contains_key(&name) {
            self.slices.insert(name, addresses(slice));
        }
    }

    fn take(&mut self, event: WatchEvent<EndpointSlice>) -> Result<(), ApiError> {
        match event {
            WatchEvent::Added(slice) | WatchEvent::Modified(slice) => self.add(slice),
            WatchEvent::Deleted(slice) => {
                self.slices.remove(&slice.metadata.name.unwrap_or_default());
                self.version = slice.metadata.resource_version.unwrap_or_default();
            }
            WatchEvent::Bookmark { resource_version, .. } => self.version = resource_version,
            // Mostly that the version is too old: all is listed again.
            WatchEvent::ErrorStatus(status) => {
                return Err(ApiError::Ended(status.message.unwrap_or_default()));
            }
            WatchEvent::ErrorOther(other) => return Err(ApiError::Ended(format!("{other:?}"))),
        }
        Ok(())
    }

    fn members(&self, port: u16) -> Vec<String> {
        let all = self.slices.values().flatten();
        all.take(MAX_MEMBERS).map(|address| SocketAddr::new(*address, port).to_string()).collect()
    }
}

/// Those that are ready, or of which it is not known (which is to be read as ready).
fn addresses(slice: EndpointSlice) -> Vec<IpAddr> {
    let ready = |endpoint: &k8s_openapi::api::discovery::v1::Endpoint| {
        endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false)
    };
    let endpoints = slice.endpoints.into_iter().filter(ready);
    let texts = endpoints.flat_map(|endpoint| endpoint.addresses);
    texts.filter_map(|text| text.parse().ok()).collect()
}

#[cfg(test)]
mod tests;
