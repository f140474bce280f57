//! A proxy in front of a registry that counts what the registry sends and fails on command.
//!
//! Invariant: a byte is counted when it is handed to the connection, so what a client asked for and
//! then threw away counts too.

mod answers;
mod body;
mod fault;
mod referrers;
mod signed;
mod tokens;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONNECTION, HeaderMap, RANGE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

pub use self::fault::{Fault, Target, Total};
pub use self::referrers::Filters;
pub use self::signed::Signatures;
use crate::certificates::Certificates;
use crate::remote::{Credentials, block_on, spawn};
use body::{Body, Mishap};
use referrers::{Referrers, pushes_to};
use tokens::Gate;

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
    tls: Option<Arc<ServerConfig>>,
    /// Requests that were counted for bursts.
    burst: AtomicUsize,
    referrers: Mutex<Option<Referrers>>,
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    state: Arc<State>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
    /// Never listens: keeps the port from everybody else while connections are refused.
    _reserved: TcpSocket,
}

type Answer = Result<Response<Body>, io::Error>;

impl Proxy {
    /// Starts one in front of the registry at `host:port`.
    pub fn start(upstream: &str) -> Self {
        Self::start_on("127.0.0.1:0", upstream, None)
    }

    /// Starts one on an address of this machine.
    pub fn start_at(address: &str, upstream: &str) -> Self {
        Self::start_on(address, upstream, None)
    }

    /// Starts one that speaks TLS, to everybody or to who shows a certificate.
    pub fn start_tls(
        upstream: &str,
        certificates: &Certificates,
        client_certificates: bool,
    ) -> Self {
        let config = certificates.server_config(client_certificates);
        Self::start_on("127.0.0.1:0", upstream, Some(config))
    }

    fn start_on(address: &str, upstream: &str, tls: Option<Arc<ServerConfig>>) -> Self {
        let reserved = bound(address.parse().unwrap());
        let address = reserved.local_addr().unwrap();
        let state = Arc::new(State {
            address,
            upstream: upstream.to_owned(),
            faults: watch::Sender::default(),
            seen: Mutex::default(),
            gate: Mutex::default(),
            tls,
            burst: AtomicUsize::new(0),
            referrers: Mutex::default(),
        });
        let acceptor = Mutex::new(Some(accept_on(listen(address), &state)));
        Self { state, acceptor, _reserved: reserved }
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
        let listener = listen(self.state.address);
        *self.acceptor.lock().unwrap() = Some(accept_on(listener, &self.state));
    }

    /// From now on asks for bearer tokens, which its own `/token` gives for these credentials.
    pub fn require_tokens(&self, credentials: Credentials) {
        *self.state.gate.lock().unwrap() = Some(Gate::new(credentials));
    }

    /// From now on lists referrers, of those manifests that are pushed through it.
    pub fn list_referrers(&self, filters: Filters) {
        *self.state.referrers.lock().unwrap() = Some(Referrers::new(filters));
    }

    /// The same with tokens that live so long.
    pub fn require_tokens_of(&self, credentials: Credentials, life: Duration) {
        *self.state.gate.lock().unwrap() = Some(Gate::new(credentials).with_life(life));
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
/// A socket bound beside the others of a proxy.
fn bound(address: SocketAddr) -> TcpSocket {
    let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }.unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

fn listen(address: SocketAddr) -> TcpListener {
    block_on(async { bound(address).listen(1024).unwrap() })
}

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
    match state.tls.clone() {
        None => serve_on(stream, state).await,
        // An error is a client that does not like us, or that we are to refuse.
        Some(config) => {
            if let Ok(stream) = TlsAcceptor::from(config).accept(stream).await {
                serve_on(stream, state).await;
            }
        }
    }
}

async fn serve_on(stream: impl AsyncRead + AsyncWrite + Unpin + Send, state: Arc<State>) {
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
    let listed = state.referrers.lock().unwrap().as_ref().and_then(|known| known.list(&request));
    if let Some(listed) = listed {
        return Ok(listed);
    }
    let fault = state.fault_for(&path);
    if let Some(repository) = pushes_to(&request).filter(|_| fault.is_none()) {
        return state.push_manifest(&repository, request).await;
    }
    let ranged = request.headers().contains_key(RANGE);
    let response = match fault.clone() {
        Some(Fault::Hang) => {
            state.healed().await;
            state.forward(request, false).await?
        }
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            state.forward(request, false).await?
        }
        Some(Fault::Status(status)) => return answers::bare(status),
        Some(Fault::Busy { status, retry_after }) => {
            return answers::busy(status, retry_after, false);
        }
        Some(Fault::Bursts { of, refused }) => match state.burst(of) {
            number if number < refused => return answers::busy(429, 1, number % 2 == 1),
            _ => state.forward(request, false).await?,
        },
        Some(Fault::Dragonfly { status, failed }) => return answers::dragonfly(status, failed),
        Some(Fault::Unsatisfiable) if ranged => return answers::bare(416),
        Some(Fault::Unsigned(signatures)) if !signatures.honour(request.uri()) => {
            return answers::bare(403);
        }
        Some(Fault::Redirect { to }) => {
            let scheme = if to.starts_with("https://") { "" } else { "http://" };
            return answers::redirect(&format!("{scheme}{to}{}", request.uri()));
        }
        Some(Fault::Sign { to, signatures }) => {
            return answers::redirect(&format!("http://{to}{path}?{}", signatures.sign()));
        }
        Some(Fault::Elsewhere { by }) => {
            state.forward(answers::elsewhere(request, by), false).await?
        }
        Some(Fault::Other(digest)) => {
            state.forward(answers::of_blob(request, digest)?, false).await?
        }
        Some(Fault::Replace { media_type, body }) => answers::replaced(&media_type, body)?,
        Some(Fault::IgnoreRange) => state.forward(request, true).await?,
        _ => state.forward(request, false).await?,
    };
    let mishap = Mishap::of(state.fault_for(&path), answers::first_byte(&response));
    let response = match fault {
        Some(Fault::ContentRange(total)) => answers::with_total(response, total),
        Some(Fault::NoLength) => answers::without_length(response, 0),
        Some(Fault::TooMuch(more)) if ranged => answers::without_length(response, more),
        Some(Fault::Compressed { transfer }) => answers::compressed(response, transfer),
        _ => response,
    };
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

    /// Counts a request; its number in its burst.
    fn burst(&self, of: usize) -> usize {
        self.burst.fetch_add(1, Ordering::Relaxed) % of
    }

    async fn healed(&self) {
        let _ = self.faults.subscribe().wait_for(Vec::is_empty).await;
    }

    async fn forward<B>(&self, mut request: Request<B>, whole: bool) -> Answer
    where
        B: hyper::body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
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
