//! containerd's CRI as the kubelet sees it through us (`--image-service-endpoint`): every call goes on
//! to containerd, and the credentials that come with PullImage are remembered for the repository,
//! because containerd passes none on to a snapshotter.
//!
//! What goes through is frames of HTTP/2, not messages: methods and fields that are newer than this
//! program, streams, compression and trailers arrive as they were sent.
//!
//! Invariants: nothing of a call is changed or kept but those credentials, and they are in memory only.
//! No call is logged. A call that can't reach containerd is answered with UNAVAILABLE, which kubelets
//! try again.

mod pull;
mod upstream;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};
use weightfs_store::{Noted, PullSecrets};

use self::pull::Told;
use self::upstream::Upstream;

/// Largest PullImage that is read, in bytes: what containerd accepts.
const MAX_PULL_BYTES: usize = 16 << 20;

/// Calls of one connection at the same time: what containerd allows, which is all that h2 can count.
const MAX_CALLS: u32 = u32::MAX;

/// Bytes on their way of one call and of one connection. Lists of thousands of images are large.
const WINDOW_BYTES: u32 = 1 << 20;

/// The pause after a connection could not be accepted: descriptors are all in use.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// gRPC's names for what went wrong ("Status codes and their use in gRPC").
const RESOURCE_EXHAUSTED: u8 = 8;
const UNAVAILABLE: u8 = 14;

const GRPC_STATUS: &str = "grpc-status";

/// What goes to containerd.
type Asked = Either<Incoming, Full<Bytes>>;

/// What comes back.
type Answer = Response<Either<Incoming, Empty<Bytes>>>;

/// Serves `listener` with what answers at `containerd`, until `shutdown`. Calls that run then are
/// waited for.
pub async fn serve(
    listener: UnixListener,
    containerd: PathBuf,
    secrets: Arc<PullSecrets>,
    shutdown: impl Future<Output = ()>,
) {
    let (stopping, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                let proxy = Proxy {
                    upstream: Upstream::new(containerd.clone()),
                    secrets: Arc::clone(&secrets),
                };
                connections.spawn(connection(stream, Arc::new(proxy), stopped.clone()));
            }
            Err(error) => {
                warn!(%error, "a connection for CRI can't be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(stopping);
    while connections.join_next().await.is_some() {}
}

async fn connection(stream: UnixStream, proxy: Arc<Proxy>, mut stopped: watch::Receiver<()>) {
    let service = service_fn(move |request| {
        let proxy = Arc::clone(&proxy);
        async move { Ok::<_, Infallible>(proxy.answer(request).await) }
    });
    let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_CALLS)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    let ended = tokio::select! {
        ended = &mut serving => ended,
        // Nothing is ever sent; the channel closes.
        _ = stopped.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a connection for CRI ended");
    }
}

/// What one connection of a kubelet leads to.
#[derive(Debug)]
struct Proxy {
    upstream: Upstream,
    secrets: Arc<PullSecrets>,
}

impl Proxy {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        if !is_pull(request.uri().path()) {
            return self.pass(request.map(Either::Left)).await;
        }
        let (head, body) = request.into_parts();
        let Ok(body) = Limited::new(body, MAX_PULL_BYTES).collect().await else {
            return failed(RESOURCE_EXHAUSTED, "PullImage is larger than 16 MiB, or was cut off");
        };
        let body = body.to_bytes();
        let told = pull::told(&body);
        let request = Request::from_parts(head, Either::Right(Full::new(body)));
        match told {
            Some(told) => self.pull(request, told).await,
            None => self.pass(request).await,
        }
    }

    /// Passes a pull on. What it tells is known before: the snapshotter is asked while it runs. New
    /// credentials with which nothing could be pulled are forgotten.
    async fn pull(&self, request: Request<Asked>, told: Told) -> Answer {
        let Told { repository, credentials } = told;
        let noted = self.secrets.note(&repository, credentials.clone());
        let answer = self.pass(request).await;
        if noted == Noted::New && !is_ok(answer.headers()) {
            self.secrets.withdraw(&repository, &credentials);
        }
        answer
    }

    async fn pass(&self, request: Request<Asked>) -> Answer {
        match self.upstream.send(request).await {
            Ok(answer) => answer.map(Either::Left),
            Err(why) => failed(UNAVAILABLE, &why),
        }
    }
}

/// Whether that is PullImage, of any version.
fn is_pull(path: &str) -> bool {
    path.ends_with(".ImageService/PullImage")
}

/// Whether a call went well, as far as can be told from the head: one that failed has no body, so its
/// status comes here.
fn is_ok(headers: &HeaderMap) -> bool {
    headers.get(GRPC_STATUS).is_none_or(|status| status == "0")
}

/// An answer of our own.
fn failed(status: u8, message: &str) -> Answer {
    let mut answer = Response::new(Either::Right(Empty::new()));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(status)));
    // Percent is the only character of our texts that gRPC encodes.
    if let Ok(message) = HeaderValue::try_from(message.replace('%', "%25")) {
        headers.insert("grpc-message", message);
    }
    answer
}
