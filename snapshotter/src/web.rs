//! The metrics address: Prometheus's text format, a status page, and whether the daemon serves. HTTP/1
//! over TCP, only to be looked at: nothing can be changed from here.
//!
//! Invariant: whoever connects costs a bounded amount of memory and time; containerd and readers
//! notice nothing of it.

mod page;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use maud::Markup;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::warn;
use weightfs_proto::control::{ActivityReply, MapReply};

use crate::activity::{Observer, text};
use crate::metrics::{CONTENT_TYPE, Metrics};

/// Connections at once; more wait.
const MAX_CONNECTIONS: usize = 32;

/// The pause after a failed accept: time for some other file to be closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client may take to say what it wants.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);

/// The longest life of a connection, whatever its client does.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);

/// A page may run its own script and ask this address again, and nothing else.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; \
                      connect-src 'self'; img-src data:; frame-ancestors 'none'";

const SCRIPT_TYPE: [(header::HeaderName, &str); 1] =
    [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")];

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
pub async fn serve(
    metrics: Metrics,
    observer: Arc<Observer>,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) {
    let router = router(metrics, observer);
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

fn router(metrics: Metrics, observer: Arc<Observer>) -> Router {
    let for_page = Arc::clone(&observer);
    Router::new()
        .route("/", get(move || shown(for_page, page::page)))
        .route("/live", get(move || shown(observer, page::content)))
        .route("/page.js", get(|| async { (SCRIPT_TYPE, page::SCRIPT) }))
        .route("/metrics", get(move || exposition(metrics.clone())))
        .route("/healthz", get(|| async { "ok\n" }))
}

/// What goes on, with the maps of the first mounts.
async fn shown(
    observer: Arc<Observer>,
    render: fn(&ActivityReply, &[MapReply]) -> Markup,
) -> Response {
    let activity = match observer.activity().await {
        Ok(activity) => activity,
        Err(error) => return failure(&error),
    };
    // It looks at each chunk.
    let rendered = tokio::task::spawn_blocking(move || {
        let mounts = activity.mounts.iter().take(page::MAPS);
        let map = |mount| observer.map(text::subject(mount), page::MAP_CELLS);
        let maps: Vec<_> = mounts.filter_map(map).collect();
        render(&activity, &maps).into_string()
    });
    match rendered.await {
        Ok(text) => {
            let headers = [
                (header::CONTENT_SECURITY_POLICY, POLICY),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (header::CACHE_CONTROL, "no-store"),
            ];
            (headers, Html(text)).into_response()
        }
        Err(error) => failure(&error),
    }
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
