//! Who may talk to whom: mutual TLS with certificates of one authority, read again when they change.
//!
//! Invariant: without a certificate of the authority nobody gets as far as a request, on either
//! side. Only TLS 1.3 is spoken.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{PeersError, Transport, lock};

/// Largest file that is read.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// How often it is looked whether the files have changed, at the most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What ALPN calls HTTP/1.1 (bytes) and HTTP/2 (questions).
const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The authority that all peers have their certificates from.
    pub ca: PathBuf,
    /// This node's certificate, for clients and servers, with those between it and the authority.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The name that the certificates of all peers have; `None`: each has the host that it is
    /// known by.
    pub server_name: Option<String>,
}

/// Which protocol a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Questions.
    Http2,
    /// Bytes.
    Http1,
}

/// A connection.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// See the module.
#[derive(Debug)]
pub(crate) enum Security {
    Plaintext,
    Mutual { files: Files, loaded: Box<Mutex<Loaded>> },
}

/// What the files said when they were read.
#[derive(Debug)]
pub(crate) struct Loaded {
    stamp: Stamp,
    looked: Instant,
    configs: Configs,
}

#[derive(Debug, Clone)]
struct Configs {
    server: Arc<ServerConfig>,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
}

/// When the files changed last, and how long they are.
type Stamp = [Option<(SystemTime, u64)>; 3];

impl Security {
    pub(crate) fn new(transport: Transport) -> Result<Self, PeersError> {
        let files = match transport {
            Transport::Plaintext => return Ok(Self::Plaintext),
            Transport::Tls(files) => files,
        };
        let (stamp, looked) = (stamp(&files), Instant::now());
        let configs = load(&files)?;
        Ok(Self::Mutual { files, loaded: Box::new(Mutex::new(Loaded { stamp, looked, configs })) })
    }

    /// Makes sure who it is that has connected.
    pub(crate) async fn accept(&self, stream: TcpStream) -> std::io::Result<Box<dyn Io>> {
        stream.set_nodelay(true)?;
        match self {
            Self::Plaintext => Ok(Box::new(stream)),
            Self::Mutual { files, loaded } => {
                let acceptor = TlsAcceptor::from(current(files, loaded).server);
                Ok(Box::new(acceptor.accept(stream).await?))
            }
        }
    }

    /// Makes sure who it is that was connected to at `host`.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        host: &str,
        protocol: Protocol,
    ) -> std::io::Result<Box<dyn Io>> {
        stream.set_nodelay(true)?;
        let Self::Mutual { files, loaded } = self else { return Ok(Box::new(stream)) };
        let configs = current(files, loaded);
        let config = match protocol {
            Protocol::Http1 => configs.http1,
            Protocol::Http2 => configs.http2,
        };
        let name = files.server_name.as_deref().unwrap_or(host);
        let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(name).map_err(std::io::Error::other)?;
        Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?))
    }
}

/// The configurations of what the files say now. New files that are of no use change nothing.
fn current(files: &Files, loaded: &Mutex<Loaded>) -> Configs {
    let known = {
        let mut loaded = lock(loaded);
        if loaded.looked.elapsed() < LOOK_EVERY {
            return loaded.configs.clone();
        }
        loaded.looked = Instant::now();
        loaded.stamp
    };
    let found = stamp(files);
    let fresh = (found != known).then(|| load(files));
    let mut loaded = lock(loaded);
    match fresh {
        None => {}
        Some(Ok(configs)) => {
            tracing::info!("the certificates of peers have changed and are used");
            (loaded.stamp, loaded.configs) = (found, configs);
        }
        Some(Err(error)) => {
            tracing::warn!(%error, "new certificates of peers can't be used; the old ones stay");
        }
    }
    loaded.configs.clone()
}

fn stamp(files: &Files) -> Stamp {
    [&files.ca, &files.certificate, &files.key].map(|path| {
        let found = std::fs::metadata(path).ok()?;
        Some((found.modified().ok()?, found.len()))
    })
}

fn load(files: &Files) -> Result<Configs, PeersError> {
    let provider = Arc::new(ring::default_provider());
    let bad = |path: &Path, problem: String| PeersError::Tls { path: path.to_owned(), problem };
    let mut roots = RootCertStore::empty();
    for root in certificates(&files.ca)? {
        roots.add(root).map_err(|error| bad(&files.ca, error.to_string()))?;
    }
    let roots = Arc::new(roots);
    let chain = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|_| bad(&files.key, "it has no private key".into()))?;
    let unfit = |error: rustls::Error| bad(&files.certificate, error.to_string());
    let clients =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let clients = clients.build().map_err(|error| bad(&files.ca, error.to_string()))?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(unfit)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(unfit)?;
    server.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
    let client = |protocol: &[u8]| {
        let mut client = client(&provider, &roots, &chain, &key, &files.ca)?;
        client.alpn_protocols = vec![protocol.to_vec()];
        Ok(Arc::new(client))
    };
    Ok(Configs { server: Arc::new(server), http1: client(HTTP1)?, http2: client(HTTP2)? })
}

fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
    ca: &Path,
) -> Result<ClientConfig, PeersError> {
    let bad = |problem: String| PeersError::Tls { path: ca.to_owned(), problem };
    let servers =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider));
    let servers = servers.build().map_err(|error| bad(error.to_string()))?;
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| bad(error.to_string()))?
        .with_webpki_verifier(servers)
        .with_client_auth_cert(chain.to_vec(), key.clone_key())
        .map_err(|error| bad(error.to_string()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PeersError> {
    let bad = |problem: &str| PeersError::Tls { path: path.to_owned(), problem: problem.into() };
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|_| bad("it is no PEM file of certificates"))?;
    if found.is_empty() { Err(bad("it has no certificate")) } else { Ok(found) }
}

fn read(path: &Path) -> Result<Vec<u8>, PeersError> {
    let bad = |problem: String| PeersError::Tls { path: path.to_owned(), problem };
    let file = std::fs::File::open(path).map_err(|error| bad(error.to_string()))?;
    let mut bytes = vec![];
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut bytes).map_err(|error| bad(error.to_string()))?;
    if bytes.len() as u64 > MAX_PEM_BYTES {
        return Err(bad("it is larger than 1 MiB".into()));
    }
    Ok(bytes)
}
