//! Answering peers: questions over HTTP/2, bytes over HTTP/1.1, on one port. On threads of its own,
//! so that what this node's readers wait for does not wait for them.

use std::convert::Infallible;
use std::net::TcpListener as StdListener;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout};
use tonic::body::Body;
use tonic::{Status, async_trait};
use tower_service::Service as _;
use weightfs_proto::peer::peer_server::{Peer, PeerServer};
use weightfs_proto::peer::{Have, Later, LocateReply, LocateRequest, Nothing, Refer, locate_reply};
use weightfs_store::{Blob, Slice};
use weightfs_swarm::{Answer, Group, Here, Inquiry, Node};

use crate::client::IDLE;
use crate::table::node_of;
use crate::tls::Security;
use crate::wire::{self, TRUST, Wanted};
use crate::{Name, Peers};

/// Connections at the most.
const MAX_CONNECTIONS: usize = 4096;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long the headers of a request may take, and the next request: longer than who asks keeps a
/// connection, or it would be closed while a request is on its way.
const HEADERS: Duration = Duration::from_secs(2 * IDLE.as_secs());

/// Largest question, and largest headers.
const MAX_QUESTION_BYTES: usize = 64 << 10;

/// Questions of one connection that are answered at once.
const MAX_QUESTIONS: u32 = 64;

/// How long the next bytes are waited for that come in from somebody, and that are pulled.
const NEXT_BYTES: Duration = Duration::from_secs(2);
const PULLED_BYTES: Duration = Duration::from_secs(5);

/// What is given to others leaves after what this node's own readers ask for, where both wait for its
/// network card: socket(7), SO_PRIORITY; the kernel's TC_PRIO_BULK. Nobody else sees it.
const BEHIND_OWN: u32 = 2;

/// Pause after a connection could not be accepted (no descriptors).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until there are no peers any more.
pub(crate) async fn serve(peers: Weak<Peers>, listener: StdListener, security: Arc<Security>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "peers can't be listened for"),
    };
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (peers, security) = (peers.clone(), Arc::clone(&security));
                tokio::spawn(connection(peers, stream, security, permit));
            }
            Err(error) => {
                tracing::debug!(%error, "a peer's connection is not accepted");
                sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn connection(
    peers: Weak<Peers>,
    stream: TcpStream,
    security: Arc<Security>,
    _permit: OwnedSemaphorePermit,
) {
    if let Err(error) = SockRef::from(&stream).set_priority(BEHIND_OWN) {
        tracing::debug!(%error, "what peers get is as urgent as what this node asks for");
    }
    let stream = match timeout(HANDSHAKE, security.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "a peer is not who it should be"),
        Err(_) => return,
    };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(MAX_QUESTION_BYTES);
    builder.http2().max_concurrent_streams(MAX_QUESTIONS);
    let questions = PeerServer::new(Desk { peers: peers.clone() })
        .max_decoding_message_size(MAX_QUESTION_BYTES);
    let service = service_fn(move |request: Request<Incoming>| {
        let (peers, mut questions) = (peers.clone(), questions.clone());
        async move {
            if request.version() == Version::HTTP_2 {
                return questions.call(request).await;
            }
            Ok::<_, Infallible>(give(&peers, &request))
        }
    });
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a peer's connection ended");
    }
}

/// Answers questions.
#[derive(Debug, Clone)]
struct Desk {
    peers: Weak<Peers>,
}

#[async_trait]
impl Peer for Desk {
    async fn locate(
        &self,
        request: tonic::Request<LocateRequest>,
    ) -> Result<tonic::Response<LocateReply>, Status> {
        let peers = self.peers.upgrade().ok_or_else(|| Status::unavailable("it ends"))?;
        let request = request.into_inner();
        let bad = || Status::invalid_argument("not bytes of a group");
        let (name, inquiry, urgency) = wire::inquiry(&request).ok_or_else(bad)?;
        let blob = peers.shared(&name);
        let here = blob.as_ref().map_or(Here::Nothing, |blob| here(&peers, &name, blob, &inquiry));
        let answer = peers.table.locate(&inquiry, here, blob.is_some(), urgency);
        Ok(tonic::Response::new(reply(&peers, answer)))
    }
}

fn here(peers: &Peers, name: &Name, blob: &Blob, inquiry: &Inquiry) -> Here {
    match blob.first_missing(&inquiry.bytes) {
        None => Here::Whole,
        Some(at) if peers.coming.has(name, at, inquiry.asker) => Here::Coming,
        Some(_) => Here::Nothing,
    }
}

fn reply(peers: &Peers, answer: Answer) -> LocateReply {
    use locate_reply::Answer as Wire;
    let later = |retry: Duration| Later {
        retry_milliseconds: u32::try_from(retry.as_millis()).unwrap_or(u32::MAX),
    };
    let answer = match answer {
        Answer::Have => Wire::Have(Have {}),
        Answer::Refer(nodes) => Wire::Refer(Refer { members: peers.table.names(&nodes) }),
        Answer::Fetching { retry } => Wire::Fetching(later(retry)),
        Answer::Busy { retry } => Wire::Busy(later(retry)),
        Answer::NotHome => Wire::NotHome(Nothing {}),
        Answer::Absent => Wire::Absent(Nothing {}),
    };
    LocateReply { answer: Some(answer) }
}

/// Gives bytes, or says why not.
fn give(peers: &Weak<Peers>, request: &Request<Incoming>) -> Response<Body> {
    let wanted = Wanted::parse(request.method(), request.uri().path(), request.headers());
    let Some(wanted) = wanted else { return empty(StatusCode::BAD_REQUEST) };
    let Some(peers) = peers.upgrade() else { return empty(StatusCode::SERVICE_UNAVAILABLE) };
    let Some(blob) = peers.shared(&wanted.name) else { return empty(StatusCode::NOT_FOUND) };
    let Wanted { name, bytes, asker, urgency, pull } = wanted;
    let node = node_of(&asker);
    let missing = blob.first_missing(&bytes);
    let comes = missing.is_none_or(|at| at > bytes.start || peers.coming.has(&name, at, node));
    let pulls = pull && peers.table.is_home(Group::at(name.key(), bytes.start));
    if !comes && !pulls {
        return empty(StatusCode::CONFLICT);
    }
    if !peers.table.admit(node, urgency) {
        return empty(StatusCode::SERVICE_UNAVAILABLE);
    }
    let slot = Slot { peers, node };
    if let Some(missing) = missing.filter(|_| pulls) {
        blob.pull(&(missing..bytes.end), urgency);
    }
    let trust = if blob.is_checked() { "checked" } else { "transport" };
    let upload = Upload { blob, name, at: bytes.start, end: bytes.end, pulls, slot };
    let body = StreamBody::new(stream::unfold(upload, Upload::next));
    let answer = Response::builder().status(StatusCode::PARTIAL_CONTENT).header(TRUST, trust);
    answer.body(Body::new(body)).unwrap_or_else(|_| empty(StatusCode::INTERNAL_SERVER_ERROR))
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = status;
    answer
}

/// A place among those who are given something.
struct Slot {
    peers: Arc<Peers>,
    node: Node,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.peers.table.done(self.node);
    }
}

/// Bytes on their way to a peer, chunk by chunk.
struct Upload {
    blob: Arc<Blob>,
    name: Name,
    at: u64,
    end: u64,
    /// Whether this node gets them for who asks.
    pulls: bool,
    slot: Slot,
}

impl Upload {
    /// How long the next bytes are waited for.
    fn patience(&self) -> Duration {
        let Slot { peers, node } = &self.slot;
        match self.pulls {
            true => PULLED_BYTES,
            false if peers.coming.has(&self.name, self.at, *node) => NEXT_BYTES,
            // Who asks finds somebody else at once.
            false => Duration::ZERO,
        }
    }

    /// The next bytes; the body ends when they don't come in time, or can't be had.
    async fn next(mut self) -> Option<(Result<Frame<Bytes>, Infallible>, Self)> {
        if self.at >= self.end {
            return None;
        }
        let until = Instant::now() + self.patience();
        let slice = self.blob.published_by(self.at, self.end, until).await.ok()??;
        let bytes = Bytes::from_owner(Mapped(slice));
        self.at += bytes.len() as u64;
        self.slot.peers.counters.went_to(self.slot.node, bytes.len() as u64);
        Some((Ok(Frame::data(bytes)), self))
    }
}

/// Published bytes, straight from the mapping.
struct Mapped(Slice);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
