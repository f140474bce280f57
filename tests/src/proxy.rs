//! A proxy in front of a registry that counts what the registry sends and fails on command.
//!
//! Invariant: a byte is counted when it is handed to the connection, so what a client asked for and
//! then threw away counts too.

mod body;
mod tokens;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_RANGE, HeaderMap, LOCATION, RANGE, RETRY_AFTER,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use weightfs_store::Digest;

use crate::remote::{Credentials, block_on, spawn};
use body::{Body, Mishap};
use tokens::Gate;

/// What a fault applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Every request.
    All,
    /// Requests for manifests.
    Manifests,
    /// Requests for blobs.
    Blobs,
    /// Requests for that blob.
    Blob(Digest),
}

impl Target {
    fn matches(self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Manifests => path.contains("/manifests/"),
            Self::Blobs => path.contains("/blobs/"),
            Self::Blob(digest) => path.ends_with(&format!("/blobs/{digest}")),
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Takes the request and never answers, until healed.
    Hang,
    /// Sends that many bytes of the body, then nothing more until healed.
    Stall {
        /// Bytes of the body that still get through.
        after: u64,
    },
    /// Sends that many bytes of the body, then closes the connection.
    Cut {
        /// Bytes of the body that still get through.
        after: u64,
    },
    /// Answers with this status and no body.
    Status(u16),
    /// Answers with this status and asks to come again after so many seconds.
    Busy {
        /// 429 or 503.
        status: u16,
        /// What Retry-After says.
        retry_after: u64,
    },
    /// Sends a byte each second.
    Trickle,
    /// Answers a ranged request with another range, so many bytes further, and says so.
    Elsewhere {
        /// How many bytes further.
        by: u64,
    },
    /// Sends the bytes of another blob of the repository.
    Other(Digest),
    /// Flips the bits of the byte at that offset of the blob.
    Corrupt {
        /// The byte's offset in the whole blob.
        at: u64,
    },
    /// Answers a ranged request with 200 and the whole blob.
    IgnoreRange,
    /// Answers with this manifest instead of the registry's.
    Replace {
        /// Its media type.
        media_type: String,
        /// Its bytes.
        body: Bytes,
    },
    /// Redirects (307) to the same path at another host.
    Redirect {
        /// `host:port`; of one that speaks TLS, with `https://` before it.
        to: String,
    },
    /// Answers with this status, no body, and Dragonfly's word for who failed (`backend`, `proxy`,
    /// `dfdaemon`).
    Dragonfly {
        /// The status; dfdaemon says 200 where its registry is away.
        status: u16,
        /// What X-Dragonfly-Error-Type says.
        failed: &'static str,
    },
    /// Answers only after this time, as a registry that is far away does.
    Delay(Duration),
}

/// A request that came in, and what it got.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its method.
    pub method: Method,
    /// Its path.
    pub path: String,
    /// Its Range header.
    pub range: Option<String>,
    /// Its headers.
    pub headers: HeaderMap,
    bytes: Arc<AtomicU64>,
}

impl Seen {
    /// Whether it carried an Authorization header.
    pub fn authorized(&self) -> bool {
        self.headers.contains_key(AUTHORIZATION)
    }

    /// A header's value; empty if it has none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Bytes of the body that were sent so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct State {
    address: SocketAddr,
    upstream: String,
    faults: watch::Sender<Vec<(Target, Fault)>>,
    seen: Mutex<Vec<Seen>>,
    gate: Mutex<Option<Gate>>,
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    state: Arc<State>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

type Answer = Result<Response<Body>, io::Error>;

impl Proxy {
    /// Starts one in front of the registry at `host:port`.
    pub fn start(upstream: &str) -> Self {
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let state = Arc::new(State {
            address: listener.local_addr().unwrap(),
            upstream: upstream.to_owned(),
            faults: watch::Sender::default(),
            seen: Mutex::default(),
            gate: Mutex::default(),
        });
        let acceptor = Mutex::new(Some(accept_on(listener, &state)));
        Self { state, acceptor }
    }

    /// `127.0.0.1:port`.
    pub fn address(&self) -> String {
        self.state.address.to_string()
    }

    /// `127.0.0.1:port/repository:tag`.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.state.address)
    }

    /// Adds a fault. Where several match a request, the one that was added last holds.
    pub fn fail(&self, target: Target, fault: Fault) {
        self.state.faults.send_modify(|faults| faults.insert(0, (target, fault)));
    }

    /// Takes all faults away; what hangs goes on.
    pub fn heal(&self) {
        self.state.faults.send_modify(Vec::clear);
    }

    /// Closes the port and every connection: from now on connections are refused.
    pub fn refuse(&self) {
        let Some(acceptor) = self.acceptor.lock().unwrap().take() else { return };
        acceptor.abort();
        let _ = block_on(acceptor);
    }

    /// Opens the port again after [`Proxy::refuse`].
    pub fn accept(&self) {
        let listener = block_on(TcpListener::bind(self.state.address)).unwrap();
        *self.acceptor.lock().unwrap() = Some(accept_on(listener, &self.state));
    }

    /// From now on asks for bearer tokens, which its own `/token` gives for these credentials.
    pub fn require_tokens(&self, credentials: Credentials) {
        *self.state.gate.lock().unwrap() = Some(Gate::new(credentials));
    }

    /// Tokens given so far are worth nothing any more.
    pub fn expire_tokens(&self) {
        self.state.gate.lock().unwrap().as_mut().expect("tokens are required").expire();
    }

    /// Every request so far, oldest first.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Forgets what was counted.
    pub fn forget(&self) {
        self.state.seen.lock().unwrap().clear();
    }

    /// Bytes sent for requests that match `target`.
    pub fn bytes(&self, target: Target) -> u64 {
        self.matching(target).map(|seen| seen.bytes()).sum()
    }

    /// Number of requests that match `target`.
    pub fn requests(&self, target: Target) -> usize {
        self.matching(target).count()
    }

    fn matching(&self, target: Target) -> impl Iterator<Item = Seen> {
        self.seen().into_iter().filter(move |seen| target.matches(&seen.path))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse();
    }
}

/// Accepts until aborted; its connections end with it.
fn accept_on(listener: TcpListener, state: &Arc<State>) -> JoinHandle<()> {
    let state = Arc::clone(state);
    spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(serve(stream, Arc::clone(&state)));
            while connections.try_join_next().is_some() {}
        }
    })
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| answer(request, Arc::clone(&state)));
    let http = hyper::server::conn::http1::Builder::new();
    // An error here is a client that went away, or a fault that did what it should.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> Answer {
    let path = request.uri().path().to_owned();
    let bytes = state.record(&request);
    let refusal = state.gate.lock().unwrap().as_ref().and_then(|gate| gate.check(&request, &state));
    if let Some(refusal) = refusal {
        return Ok(refusal);
    }
    let response = match state.fault_for(&path) {
        Some(Fault::Hang) => {
            state.healed().await;
            state.forward(request, false).await?
        }
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            state.forward(request, false).await?
        }
        Some(Fault::Status(status)) => {
            let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
            return simple(Response::builder().status(status), Bytes::new());
        }
        Some(Fault::Dragonfly { status, failed }) => {
            let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
            let answer = Response::builder().status(status);
            return simple(answer.header("x-dragonfly-error-type", failed), Bytes::new());
        }
        Some(Fault::Busy { status, retry_after }) => {
            let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
            let answer = Response::builder().status(status).header(RETRY_AFTER, retry_after);
            return simple(answer, Bytes::new());
        }
        Some(Fault::Elsewhere { by }) => state.forward(elsewhere(request, by), false).await?,
        Some(Fault::Other(digest)) => state.forward(of_blob(request, digest)?, false).await?,
        Some(Fault::Replace { media_type, body }) => replaced(&media_type, body)?,
        Some(Fault::Redirect { to }) => {
            let scheme = if to.starts_with("https://") { "" } else { "http://" };
            let location = format!("{scheme}{to}{}", request.uri());
            return simple(
                Response::builder()
                    .status(StatusCode::TEMPORARY_REDIRECT)
                    .header(LOCATION, location),
                Bytes::new(),
            );
        }
        Some(Fault::IgnoreRange) => state.forward(request, true).await?,
        _ => state.forward(request, false).await?,
    };
    let mishap = Mishap::of(state.fault_for(&path), first_byte(&response));
    Ok(response.map(|inner| body::counted(inner, bytes, mishap, state)))
}

impl State {
    fn record(&self, request: &Request<Incoming>) -> Arc<AtomicU64> {
        let bytes = Arc::new(AtomicU64::new(0));
        let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok());
        self.seen.lock().unwrap().push(Seen {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            range: range.map(str::to_owned),
            headers: request.headers().clone(),
            bytes: Arc::clone(&bytes),
        });
        bytes
    }

    fn fault_for(&self, path: &str) -> Option<Fault> {
        let faults = self.faults.borrow();
        faults.iter().find(|(target, _)| target.matches(path)).map(|(_, fault)| fault.clone())
    }

    async fn healed(&self) {
        let _ = self.faults.subscribe().wait_for(Vec::is_empty).await;
    }

    async fn forward(&self, mut request: Request<Incoming>, whole: bool) -> Answer {
        let stream = TcpStream::connect(&self.upstream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(connection);
        if whole {
            request.headers_mut().remove(RANGE);
        }
        if self.gate.lock().unwrap().is_some() {
            // The registry behind the gate knows no tokens.
            request.headers_mut().remove(AUTHORIZATION);
        }
        let mut response = sender.send_request(request).await.map_err(io::Error::other)?;
        response.headers_mut().remove(CONNECTION);
        Ok(response.map(|inner| inner.map_err(io::Error::other).boxed_unsync()))
    }
}

/// The same request for bytes that lie so many further.
fn elsewhere(mut request: Request<Incoming>, by: u64) -> Request<Incoming> {
    let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok());
    let shifted = range.and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        format!("bytes={}-{}", first + by, last + by).parse().ok()
    });
    if let Some(shifted) = shifted {
        request.headers_mut().insert(RANGE, shifted);
    }
    request
}

/// The same request for another blob.
fn of_blob(mut request: Request<Incoming>, digest: Digest) -> io::Result<Request<Incoming>> {
    let path = request.uri().path();
    let (before, _) = path.rsplit_once('/').unwrap_or_default();
    let uri = format!("{before}/{digest}");
    *request.uri_mut() = uri.parse().map_err(io::Error::other)?;
    Ok(request)
}

/// A ready answer.
fn simple(builder: hyper::http::response::Builder, body: Bytes) -> Answer {
    let body = Full::new(body).map_err(|never: Infallible| match never {}).boxed_unsync();
    builder.body(body).map_err(io::Error::other)
}

fn replaced(media_type: &str, body: Bytes) -> Answer {
    let digest = Digest::of(&body).to_string();
    let builder = Response::builder()
        .header("content-type", media_type)
        .header("docker-content-digest", digest);
    simple(builder, body)
}

/// The offset in the blob of the body's first byte.
fn first_byte(response: &Response<Body>) -> u64 {
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    range
        .and_then(|text| text.strip_prefix("bytes ")?.split('-').next()?.parse().ok())
        .unwrap_or_default()
}
