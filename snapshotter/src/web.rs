//! The metrics address: Prometheus's text format, and whether the daemon serves. HTTP/1 over TCP,
//! only to be looked at: nothing can be changed from here.
//!
//! Invariant: whoever connects costs a bounded amount of memory and time; containerd and readers
//! notice nothing of it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::metrics::{CONTENT_TYPE, Metrics};

/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 32;

/// The pause after a failed accept: time for some other file to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take to say what it wants.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);

/// The longest life of a connection, whatever its client does.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);

/// Bytes of a request's head at the most.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Listens on the metrics address.
///
/// # Errors
/// When somebody else does, or there is no such address here.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers until `shutdown`.
pub async fn serve(metrics: Metrics, listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let router = router(metrics);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::pin!(shutdown);
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = &mut shutdown => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    let _place = place;
                    let _ = tokio::time::timeout(CONNECTION_LIFE, converse(stream, router)).await;
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection on the metrics address");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // A client that went away is none of our business.
    let _ = connection.await;
}

fn router(metrics: Metrics) -> Router {
    Router::new()
        .route("/metrics", get(move || exposition(metrics.clone())))
        .route("/healthz", get(|| async { "ok\n" }))
}

async fn exposition(metrics: Metrics) -> Response {
    // It looks at the disk.
    let rendered = tokio::task::spawn_blocking(move || metrics.render()).await;
    match rendered {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&error),
    }
}

fn failure(error: &dyn std::error::Error) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
}
