//! How fast bytes go from one node to another, over mutual TLS 1.3 on loopback: as ranges of
//! HTTP/1.1, which is what peers speak, and as a gRPC stream. The CPU time is that of both ends.
//!
//! `cargo run --release -p weightfs-peers --example transport`

use std::convert::Infallible;
use std::error::Error;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::service::service_fn;
use hyper::{Request, Response, Uri, Version};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::Status;
use tonic::body::Body;
use tonic::server::ServerStreamingService;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;
use tower_service::Service;

/// Bytes of one request: a group.
const REQUEST: u64 = 4 << 20;

/// Bytes that are given at once: a chunk. gRPC has the least that was quickest, too.
const PIECES: [u64; 2] = [1 << 20, 256 << 10];

/// Requests at once.
const AT_ONCE: usize = 8;

/// Bytes of the blob, which is asked for again and again, and of all that is sent.
const BLOB: usize = 64 << 20;
const ALL: u64 = 4 << 30;

/// HTTP/2 with its default windows is half as fast.
const WINDOW: u32 = 16 << 20;

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    rustls::crypto::ring::default_provider().install_default().ok();
    let dir = tempfile::tempdir()?;
    let tls = Tls::make(dir.path())?;
    let blob = Bytes::from(vec![0x5a; BLOB]);
    let address = serve(tls.server, blob)?;
    let connector = |protocol: &[u8]| {
        let mut config = tls.client.clone();
        config.alpn_protocols = vec![protocol.to_vec()];
        Connector(TlsConnector::from(Arc::new(config)))
    };
    println!("{:<34} {:>8}  {:>14}", "over mutual TLS 1.3, loopback", "MB/s", "CPU, s per GB");
    for piece in PIECES {
        let client = Client::builder(TokioExecutor::new()).build(connector(b"http/1.1"));
        let what = format!("HTTP/1.1 ranges, {} KiB a piece", piece >> 10);
        measure(&what, |range| by_http(client.clone(), address.clone(), range, piece)).await?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let channel = endpoint.connect_with_connector_lazy(connector(b"h2"));
        let what = format!("gRPC stream, {} KiB a message", piece >> 10);
        measure(&what, |range| by_grpc(channel.clone(), range, piece)).await?;
    }
    Ok(())
}

/// Asks for all, [`AT_ONCE`] requests at a time, after a few that don't count.
async fn measure<F>(what: &str, ask: impl Fn(Range<u64>) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<u64, Failure>>,
{
    let requests = |bytes: u64| (0..bytes / REQUEST).map(|n| n * REQUEST % BLOB as u64);
    let run = async |bytes| -> Result<u64, Failure> {
        let answers = stream::iter(requests(bytes)).map(|at| ask(at..at + REQUEST));
        answers.buffer_unordered(AT_ONCE).try_fold(0, async |sum, came| Ok(sum + came)).await
    };
    run(ALL / 32).await?;
    let (start, cpu) = (Instant::now(), cpu_seconds()?);
    let came = run(ALL).await?;
    assert_eq!(came, ALL, "not all of it came");
    let (time, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    println!("{what:<34} {:>8.0}  {:>14.2}", ALL as f64 / 1e6 / time, cpu / (ALL as f64 / 1e9));
    Ok(())
}

async fn by_http(
    client: Client<Connector, Empty<Bytes>>,
    address: String,
    range: Range<u64>,
    piece: u64,
) -> Result<u64, Failure> {
    let uri = format!("http://{address}/?{}-{}-{piece}", range.start, range.end);
    let mut body = client.request(Request::get(uri).body(Empty::new())?).await?.into_body();
    let mut came = 0;
    while let Some(frame) = body.frame().await {
        came += frame?.data_ref().map_or(0, Bytes::len) as u64;
    }
    Ok(came)
}

async fn by_grpc(channel: Channel, range: Range<u64>, piece: u64) -> Result<u64, Failure> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    let ask = tonic::Request::new(Ask { start: range.start, end: range.end, piece });
    let path = hyper::http::uri::PathAndQuery::from_static("/transport/Give");
    let codec = ProstCodec::<Ask, Piece>::default();
    let mut pieces = client.server_streaming(ask, path, codec).await?.into_inner();
    let mut came = 0;
    while let Some(piece) = pieces.message().await? {
        came += piece.data.len() as u64;
    }
    Ok(came)
}

#[derive(Clone, PartialEq, prost::Message)]
struct Ask {
    #[prost(uint64, tag = "1")]
    start: u64,
    #[prost(uint64, tag = "2")]
    end: u64,
    #[prost(uint64, tag = "3")]
    piece: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Piece {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

/// Pieces of the blob, not copied.
fn pieces(blob: &Bytes, Ask { start, end, piece }: &Ask) -> Vec<Bytes> {
    let (piece, end) = (*piece as usize, *end as usize);
    let starts = (*start as usize..end).step_by(piece);
    starts.map(|at| blob.slice(at..(at + piece).min(end))).collect()
}

struct Give(Bytes);

impl ServerStreamingService<Ask> for Give {
    type Response = Piece;
    type ResponseStream = BoxStream<'static, Result<Piece, Status>>;
    type Future = BoxFuture<'static, Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, ask: tonic::Request<Ask>) -> Self::Future {
        let pieces = pieces(&self.0, ask.get_ref()).into_iter().map(|data| Ok(Piece { data }));
        Box::pin(async { Ok(tonic::Response::new(stream::iter(pieces).boxed())) })
    }
}

/// Serves both protocols on two threads of its own, as the daemon does.
fn serve(tls: ServerConfig, blob: Bytes) -> Result<String, Failure> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?.to_string();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    std::thread::spawn(move || -> io::Result<()> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                tokio::spawn(connection(acceptor.clone(), stream, blob.clone()));
            }
        })
    });
    Ok(address)
}

async fn connection(acceptor: TlsAcceptor, stream: TcpStream, blob: Bytes) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http2().max_send_buf_size(4 << 20);
    let service = service_fn(move |request: Request<Incoming>| answer(blob.clone(), request));
    // A client that goes away ends it.
    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(blob: Bytes, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    if request.version() == Version::HTTP_2 {
        let codec = ProstCodec::<Piece, Ask>::default();
        return Ok(tonic::server::Grpc::new(codec).server_streaming(Give(blob), request).await);
    }
    let numbers = request.uri().query().unwrap_or_default().split('-');
    let numbers: Vec<u64> = numbers.filter_map(|number| number.parse().ok()).collect();
    let [start, end, piece] = numbers[..] else { return Ok(Response::new(Body::empty())) };
    let pieces = pieces(&blob, &Ask { start, end, piece }).into_iter();
    let frames = stream::iter(pieces.map(|data| Ok::<_, Infallible>(Frame::data(data))));
    Ok(Response::new(Body::new(StreamBody::new(frames))))
}

/// Mutual TLS 1.3, as peers have it.
struct Tls {
    server: ServerConfig,
    client: ClientConfig,
}

impl Tls {
    fn make(dir: &Path) -> Result<Self, Failure> {
        let line = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                    -subj /CN=peer -addext subjectAltName=DNS:peer \
                    -addext basicConstraints=critical,CA:FALSE -keyout key.pem -out cert.pem";
        let made =
            Command::new("openssl").current_dir(dir).args(line.split_whitespace()).output()?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into());
        }
        let certificate = CertificateDer::from_pem_slice(&fs::read(dir.join("cert.pem"))?)?;
        let key = PrivateKeyDer::from_pem_slice(&fs::read(dir.join("key.pem"))?)?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone())?;
        let clients = WebPkiClientVerifier::builder(Arc::new(roots.clone())).build()?;
        let mut server = ServerConfig::builder_with_protocol_versions(&[&TLS13])
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate.clone()], key.clone_key())?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let client = ClientConfig::builder_with_protocol_versions(&[&TLS13])
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)?;
        Ok(Self { server, client })
    }
}

#[derive(Clone)]
struct Connector(TlsConnector);

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Stream>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, peer: Uri) -> Self::Future {
        let connector = self.0.clone();
        Box::pin(async move {
            let nowhere = || io::Error::other("no host and port");
            let peer = peer.authority().ok_or_else(nowhere)?.as_str().to_owned();
            let stream = TcpStream::connect(peer).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from("peer").map_err(io::Error::other)?;
            Ok(Stream(TokioIo::new(connector.connect(name, stream).await?)))
        })
    }
}

/// A connection, for hyper.
struct Stream(TokioIo<TlsStream<TcpStream>>);

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
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, into)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// User and system time of this process (proc_pid_stat(5): fields 14 and 15, in hundredths).
fn cpu_seconds() -> Result<f64, Failure> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let rest = stat.rsplit_once(") ").ok_or("the form of /proc/self/stat")?.1;
    let ticks = rest.split(' ').skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}
