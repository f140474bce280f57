//! Asking peers: questions over one HTTP/2 connection for each, bytes over HTTP/1.1 ones.

use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::{Response, StatusCode, Uri};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client as HttpClient, Error as HttpError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lru::LruCache;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;
use weightfs_proto::peer::peer_client::PeerClient;
use weightfs_proto::peer::{LocateReply, LocateRequest};
use weightfs_swarm::Urgency;

use crate::lock;
use crate::tls::{Io, Protocol, Security};
use crate::wire::Wanted;

/// Peers to which a connection for questions is kept.
const MAX_CHANNELS: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// Largest answer: a few names.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Idle connections for bytes that are kept to a peer, and for how long.
const MAX_IDLE: usize = 8;
pub(crate) const IDLE: Duration = Duration::from_secs(20);

/// How long a connection may take: one that was lost on its way is tried again by the kernel after
/// a second (RFC 6298, section 2).
const CONNECT: Duration = Duration::from_secs(3);

/// How long a peer may take to say something. A reader does not wait for who may be dead; what
/// nobody waits for does not take a peer for dead whose link is full.
const fn patience(urgency: Urgency) -> Duration {
    match urgency {
        Urgency::Demand => Duration::from_secs(1),
        Urgency::Ahead | Urgency::Background => Duration::from_secs(4),
    }
}

/// Why a peer gave nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It has not got it, or gives too much already.
    Refused,
    /// It does not answer, or not as it should.
    Gone,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Client {
    security: Arc<Security>,
    bytes: HttpClient<Connector, Empty<Bytes>>,
    channels: Mutex<LruCache<Arc<str>, PeerClient<Channel>>>,
}

impl Client {
    pub(crate) fn new(security: Arc<Security>) -> Self {
        let connector = Connector { security: Arc::clone(&security), protocol: Protocol::Http1 };
        let bytes = HttpClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .build(connector);
        Self { security, bytes, channels: Mutex::new(LruCache::new(MAX_CHANNELS)) }
    }

    /// Asks a peer where bytes are.
    pub(crate) async fn locate(
        &self,
        member: &Arc<str>,
        question: LocateRequest,
        urgency: Urgency,
    ) -> Result<LocateReply, Failure> {
        let mut client = self.channel(member).ok_or(Failure::Gone)?;
        match timeout(patience(urgency), client.locate(question)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(error)) => {
                tracing::debug!(%member, %error, "a peer does not answer");
                Err(Failure::Gone)
            }
            Err(_) => Err(Failure::Gone),
        }
    }

    /// Asks a peer for bytes.
    pub(crate) async fn fetch(
        &self,
        member: &str,
        wanted: &Wanted,
    ) -> Result<Response<Incoming>, Failure> {
        let request = wanted.request(member, Empty::new()).ok_or(Failure::Gone)?;
        let answer = match timeout(patience(wanted.urgency), self.bytes.request(request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                tracing::debug!(member, error = said(&error), "a peer gives nothing");
                return Err(Failure::Gone);
            }
            Err(_) => return Err(Failure::Gone),
        };
        match answer.status() {
            StatusCode::PARTIAL_CONTENT => Ok(answer),
            StatusCode::NOT_FOUND | StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE => {
                Err(Failure::Refused)
            }
            _ => Err(Failure::Gone),
        }
    }

    fn channel(&self, member: &Arc<str>) -> Option<PeerClient<Channel>> {
        let mut channels = lock(&self.channels);
        if let Some(client) = channels.get(member) {
            return Some(client.clone());
        }
        let connector =
            Connector { security: Arc::clone(&self.security), protocol: Protocol::Http2 };
        let endpoint = Endpoint::from_shared(format!("http://{member}")).ok()?;
        let channel = endpoint.connect_with_connector_lazy(connector);
        let client = PeerClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        channels.put(Arc::clone(member), client.clone());
        Some(client)
    }
}

/// With what caused it.
fn said(error: &HttpError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Makes connections.
#[derive(Debug, Clone)]
struct Connector {
    security: Arc<Security>,
    protocol: Protocol,
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, std::io::Result<Stream>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, peer: Uri) -> Self::Future {
        let Self { security, protocol } = self.clone();
        Box::pin(async move {
            let connect = async {
                let nowhere = || std::io::Error::other("no host and port");
                let host = peer.host().ok_or_else(nowhere)?;
                let port = peer.port_u16().ok_or_else(nowhere)?;
                let bare = host.trim_start_matches('[').trim_end_matches(']');
                let stream = TcpStream::connect((bare, port)).await?;
                security.connect(stream, host, protocol).await
            };
            let late = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
            let io = timeout(CONNECT, connect).await.map_err(late)??;
            Ok(Stream(TokioIo::new(io)))
        })
    }
}

/// A connection, for hyper.
struct Stream(TokioIo<Box<dyn Io>>);

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
