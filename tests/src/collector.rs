//! A collector of OpenTelemetry's traces: takes what is sent by OTLP over HTTP and keeps the spans. A
//! stand-in: real collectors are large, and what is to be seen is what is sent to them.
//!
//! The messages are those of opentelemetry/proto/collector/trace/v1, as far as they are looked at.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::remote::{block_on, spawn};

/// A running collector.
#[derive(Debug)]
pub struct Collector {
    address: String,
    spans: Arc<Mutex<Vec<Span>>>,
    task: JoinHandle<()>,
}

/// A span that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The tree that it is of.
    pub trace: Vec<u8>,
    /// Its own number.
    pub id: Vec<u8>,
    /// The number of the span that it is part of; empty for the root of a tree.
    pub parent: Vec<u8>,
    /// What it is of.
    pub name: String,
    /// What is said of it; numbers in digits.
    pub attributes: BTreeMap<String, String>,
}

impl Collector {
    /// Starts one.
    pub fn start() -> Self {
        let listener = block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let spans = Arc::default();
        let task = spawn(serve(listener, Arc::clone(&spans)));
        Self { address, spans, task }
    }

    /// What OTEL_EXPORTER_OTLP_ENDPOINT is set to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What came until now.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, spans: Arc<Mutex<Vec<Span>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(converse(stream, Arc::clone(&spans)));
    }
}

async fn converse(stream: TcpStream, spans: Arc<Mutex<Vec<Span>>>) {
    let service = service_fn(|request| take(request, Arc::clone(&spans)));
    let http = hyper::server::conn::http1::Builder::new();
    // A client that went away.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

async fn take(
    request: Request<Incoming>,
    spans: Arc<Mutex<Vec<Span>>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let is_traces = request.uri().path() == "/v1/traces";
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes);
    let export = body.ok().and_then(|body| Export::decode(body).ok()).filter(|_| is_traces);
    let mut response = Response::new(Full::default());
    match export {
        Some(export) => spans.lock().unwrap().extend(export.spans()),
        None => *response.status_mut() = StatusCode::BAD_REQUEST,
    }
    Ok(response)
}

#[derive(Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<ResourceSpans>,
}

#[derive(Message)]
struct ResourceSpans {
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<ScopeSpans>,
}

#[derive(Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<SpanMessage>,
}

#[derive(Message)]
struct SpanMessage {
    #[prost(bytes, tag = "1")]
    trace: Vec<u8>,
    #[prost(bytes, tag = "2")]
    id: Vec<u8>,
    #[prost(bytes, tag = "4")]
    parent: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<Attribute>,
}

#[derive(Message)]
struct Attribute {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Message)]
struct AnyValue {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(int64, optional, tag = "3")]
    number: Option<i64>,
}

impl Export {
    fn spans(self) -> impl Iterator<Item = Span> {
        let scopes = self.resources.into_iter().flat_map(|resource| resource.scopes);
        scopes.flat_map(|scope| scope.spans).map(|span| Span {
            trace: span.trace,
            id: span.id,
            parent: span.parent,
            name: span.name,
            attributes: span.attributes.into_iter().map(Attribute::written).collect(),
        })
    }
}

impl Attribute {
    fn written(self) -> (String, String) {
        let value = self.value.unwrap_or_default();
        let number = value.number.map(|number| number.to_string());
        (self.key, value.text.or(number).unwrap_or_default())
    }
}
