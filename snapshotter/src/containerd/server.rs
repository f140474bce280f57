//! HTTP/2 for containerd's calls, below the gRPC service of its crate.
//!
//! containerd asks for one thing after the other, on a full node a thousand times a second, and most
//! of what that costs is not the answer. So what lies between the socket and the service is as
//! little as can be: h2 hands over a call, the service is polled at once, and what it can answer
//! from memory goes out before anything else is looked at. Only a call that waits becomes a task.
//!
//! Invariant: the end of a connection, or of the service, ends the calls on it; what they had begun
//! still comes to its end ([`Snapshots`](crate::snapshots::Snapshots)).

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use containerd_snapshots::tonic::body::BoxBody;
use containerd_snapshots::tonic::codegen::http::{HeaderMap, Request, Response};
use containerd_snapshots::tonic::codegen::{Body, Service};
use futures::poll;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::wire::Wire;

/// How long the service waits for calls under way when it shuts down. containerd keeps its
/// connection open and ignores the request to close it, so this time always passes.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// The pause after a failed accept: time for some other file to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Calls of one connection at the same time; containerd waits with more.
const MAX_CALLS: u32 = 1024;

/// Bytes of a call's headers. containerd sends a namespace, a lease and the usual ones.
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// What tonic generates of a service: all of its failures are answers.
pub(super) trait Calls:
    Service<Request<Asked>, Response = Response<BoxBody>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + 'static
{
}

impl<S> Calls for S where
    S: Service<Request<Asked>, Response = Response<BoxBody>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] h2::Error),
}

/// Serves a listening socket until `shutdown` is ready and the calls under way have ended, or were
/// cut off after a short deadline.
pub(super) async fn serve(
    service: impl Calls,
    listener: UnixListener,
    shutdown: impl Future<Output = ()>,
) {
    let (stopping, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(stream, service.clone(), stopped.clone()));
            }
            // No file descriptor is left, for example.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection from containerd");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(stopping);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(SHUTDOWN_DEADLINE, ended).await.is_err() {
        connections.shutdown().await;
    }
}

async fn connection(stream: UnixStream, service: impl Calls, stopped: watch::Receiver<()>) {
    if let Err(error) = calls(stream, service, stopped).await {
        tracing::debug!(%error, "a connection from containerd ended");
    }
}

async fn calls(
    stream: UnixStream,
    service: impl Calls,
    mut stopped: watch::Receiver<()>,
) -> Result<(), ConnectionError> {
    let mut connection = h2::server::Builder::new()
        .max_concurrent_streams(MAX_CALLS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .handshake::<_, Bytes>(Wire::new(stream.into_std()?)?)
        .await?;
    let mut waiting = JoinSet::new();
    let mut stopping = false;
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = connection.accept() => accepted,
            Some(_) = waiting.join_next() => continue,
            // Nothing is ever sent; the channel closes.
            _ = stopped.changed(), if !stopping => {
                stopping = true;
                connection.graceful_shutdown();
                continue;
            }
        };
        let Some(accepted) = accepted else { return Ok(()) };
        let (request, respond) = accepted?;
        let mut call = Box::pin(call(service.clone(), request.map(Asked), respond));
        if poll!(call.as_mut()).is_pending() {
            waiting.spawn(call);
        }
    }
}

async fn call(mut service: impl Calls, request: Request<Asked>, respond: SendResponse<Bytes>) {
    let Ok(response) = service.call(request).await;
    if let Err(error) = answer(response, respond).await {
        tracing::debug!(%error, "an answer to containerd was not taken");
    }
}

async fn answer(
    response: Response<BoxBody>,
    mut respond: SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    let (head, mut body) = response.into_parts();
    let head = Response::from_parts(head, ());
    if body.is_end_stream() {
        return respond.send_response(head, true).map(drop);
    }
    let mut stream = respond.send_response(head, false)?;
    while let Some(data) = body.data().await {
        let Ok(data) = data else {
            stream.send_reset(Reason::INTERNAL_ERROR);
            return Ok(());
        };
        send(&mut stream, data).await?;
    }
    // A message without its status would be taken for a failure.
    let trailers = body.trailers().await.ok().flatten();
    stream.send_trailers(trailers.unwrap_or_default())
}

/// Sends as the other side has room for it: a list of all snapshots is not buffered whole.
async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = poll_fn(|context| stream.poll_capacity(context)).await;
        let room = room.ok_or_else(|| h2::Error::from(Reason::CANCEL))??;
        // h2 wakes without room, too.
        if room > 0 {
            stream.send_data(data.split_to(room.min(data.len())), false)?;
        }
    }
    Ok(())
}

/// The message of a call, as it comes.
#[derive(Debug)]
pub(super) struct Asked(RecvStream);

impl Body for Asked {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_data(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, h2::Error>>> {
        let data = ready!(self.0.poll_data(context));
        if let Some(Ok(bytes)) = &data {
            self.0.flow_control().release_capacity(bytes.len())?;
        }
        Poll::Ready(data)
    }

    fn poll_trailers(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<HeaderMap>, h2::Error>> {
        self.0.poll_trailers(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use containerd_snapshots::tonic::body::empty_body;

    use super::*;

    /// A service that knows no method, and the client's end of a connection to it.
    fn client() -> (UnixStream, watch::Sender<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stop, stopped) = watch::channel(());
        let service = tower::service_fn(|_: Request<Asked>| async {
            Ok::<_, Infallible>(Response::new(empty_body()))
        });
        tokio::spawn(connection(ours, service, stopped));
        (theirs, stop)
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_is_acknowledged_although_nobody_calls() {
        let (socket, _stop) = client();
        let (_calls, mut connection) = h2::client::handshake(socket).await.unwrap();
        let mut pings = connection.ping_pong().unwrap();
        tokio::spawn(connection);
        for _ in 0..3 {
            pings.ping(h2::Ping::opaque()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_service_that_stops_lets_calls_end_and_closes() {
        let (socket, stop) = client();
        let (mut calls, connection) = h2::client::handshake(socket).await.unwrap();
        let connection = tokio::spawn(connection);
        let (answer, mut message) = calls.send_request(Request::new(()), false).unwrap();
        drop(stop);
        message.send_data(Bytes::new(), true).unwrap();
        answer.await.unwrap();
        drop((calls, message));
        connection.await.unwrap().unwrap();
    }
}
