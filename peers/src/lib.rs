//! Blobs from the other nodes of the cluster.
//!
//! A `PeerSource` (`source.rs`) stands in front of a blob's registry. For each group of bytes it goes
//! where the policy (`weightfs-swarm`) says: to a peer, or to the registry after all. The server
//! gives others what is published here, straight from the cache files' mappings.
//!
//! Invariants: who asks for a blob names the repository it may read it from, and gets it only if
//! this node has it from the same one; else the answer is that of a node that has nothing. Bytes
//! of peers go into the cache only where a digest of each chunk is known, or where the
//! configuration trusts the cluster. No lock is held across I/O.

mod client;
mod coming;
mod counters;
mod members;
mod server;
mod source;
mod table;
mod tls;
mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::runtime::Runtime;
use weightfs_store::{Blob, BlobId, Digest, Form, Repository, Source};
use weightfs_swarm::Limits;

use self::client::Client;
use self::coming::Coming;
use self::counters::Counters;
pub use self::counters::{Amount, PeerStatus, PeersStatus};
use self::source::PeerSource;
use self::table::Table;
pub use self::tls::Files;
use self::tls::Security;

/// Threads that give to others: few, so that what this node's readers wait for finds a core.
const SERVER_THREADS: usize = 2;

/// Whose bytes are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A peer's, where each chunk can be compared with its digest.
    Digest,
    /// A peer's in any case; the whole blob is hashed when it is here.
    Cluster,
}

/// Who the members are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Members {
    /// These, `host:port` each.
    Listed(Vec<String>),
    /// All addresses of a name, `host:port`; looked up again and again.
    Dns(String),
    /// The endpoints of a service, as Kubernetes tells a pod.
    Service(Service),
}

/// A service of Kubernetes, and the port that peers listen on: `namespace/name:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    namespace: String,
    name: String,
    port: u16,
}

impl std::str::FromStr for Service {
    type Err = NoService;

    fn from_str(text: &str) -> Result<Self, NoService> {
        let (rest, port) = text.rsplit_once(':').ok_or(NoService)?;
        let (namespace, name) = rest.split_once('/').ok_or(NoService)?;
        // RFC 1123, as Kubernetes names things.
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let is_label = |text: &str| (1..=63).contains(&text.len()) && text.bytes().all(fits);
        if !is_label(namespace) || !is_label(name) {
            return Err(NoService);
        }
        let port = port.parse().map_err(|_| NoService)?;
        Ok(Self { namespace: namespace.to_owned(), name: name.to_owned(), port })
    }
}

impl std::fmt::Display for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}:{}", self.namespace, self.name, self.port)
    }
}

/// A text that names no service.
#[derive(Debug, thiserror::Error)]
#[error("it is not namespace/name:port")]
pub struct NoService;

/// How peers know each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// Mutual TLS.
    Tls(Files),
    /// Plain text; for loopback only.
    Plaintext,
}

/// What the configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where others reach this node.
    pub listen: SocketAddr,
    /// This node's name among the members, `host:port`; `None`: the member that is an address of
    /// this machine.
    pub name: Option<String>,
    /// Who the others are.
    pub members: Members,
    /// How they know each other.
    pub transport: Transport,
    /// Whose bytes are used.
    pub trust: Trust,
    /// Answers to others at once.
    pub uploads: usize,
}

/// Why peers can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// Nobody can listen there.
    #[error("peers can't be listened for on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A certificate, a key or an authority can't be used.
    #[error("{}: {problem}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// This program can't ask Kubernetes.
    #[error("peers.service needs a program that was built with the feature endpoint-slices")]
    NoKubernetes,
    /// No threads.
    #[error("no threads for peers: {0}")]
    Threads(#[source] std::io::Error),
}

/// A blob, by the names that peers know it by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    digest: Digest,
    repository: String,
}

impl Name {
    /// What the policy knows it by.
    fn key(&self) -> u64 {
        hash(&format!("{} {}", self.repository, self.digest))
    }
}

/// The other nodes, and what this one gives to them.
#[derive(Debug)]
pub struct Peers {
    trust: Trust,
    table: Table,
    client: Client,
    coming: Coming,
    counters: Counters,
    shared: Mutex<HashMap<Name, Weak<Blob>>>,
    /// Ended when this is dropped.
    server: Mutex<Option<Runtime>>,
}

impl Peers {
    /// Listens, and looks for the members from now on. To be called in a tokio runtime.
    ///
    /// # Errors
    /// An address that is in use; certificates that can't be used.
    pub fn start(options: Options) -> Result<Arc<Self>, PeersError> {
        let Options { listen, name, members, transport, trust, uploads } = options;
        if matches!(members, Members::Service(_)) && !cfg!(feature = "endpoint-slices") {
            return Err(PeersError::NoKubernetes);
        }
        let security = Arc::new(Security::new(transport)?);
        let failed = |source| PeersError::Listen { address: listen, source };
        let listener = std::net::TcpListener::bind(listen).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(SERVER_THREADS)
            .thread_name("peers")
            .enable_all()
            .build()
            .map_err(PeersError::Threads)?;
        let limits = Limits { slots: uploads, ..Limits::default() };
        let peers = Arc::new(Self {
            trust,
            table: Table::new(name, limits),
            client: Client::new(Arc::clone(&security)),
            coming: Coming::default(),
            counters: Counters::default(),
            shared: Mutex::default(),
            server: Mutex::default(),
        });
        members::begin(&peers, &members, listen);
        runtime.spawn(members::follow(Arc::downgrade(&peers), members, listen));
        runtime.spawn(server::serve(Arc::downgrade(&peers), listener, security));
        *lock(&peers.server) = Some(runtime);
        Ok(peers)
    }

    /// A source that asks peers, too. Before [`Peers::share`] is told of the blob, it asks the
    /// registry only.
    pub fn in_front_of(
        self: &Arc<Self>,
        source: Arc<dyn Source>,
        digest: Digest,
        repository: &Repository,
    ) -> Arc<dyn Source> {
        let name = Name { digest, repository: repository.to_string() };
        Arc::new(PeerSource::new(Arc::clone(self), source, name))
    }

    /// A blob that this node may read from that repository is given to others who may.
    pub fn share(&self, blob: &Arc<Blob>, repository: &Repository) {
        let BlobId { digest, form } = blob.id();
        if form != Form::AsStored {
            return;
        }
        let mut shared = lock(&self.shared);
        if shared.len() == shared.capacity() {
            shared.retain(|_, blob| blob.strong_count() > 0);
        }
        let name = Name { digest, repository: repository.to_string() };
        blob.scatter(name.key() ^ self.table.me().0);
        shared.insert(name, Arc::downgrade(blob));
    }

    /// Who the others are, how they are, and what came from where.
    pub fn status(&self) -> PeersStatus {
        self.counters.status(&self.table)
    }

    fn shared(&self, name: &Name) -> Option<Arc<Blob>> {
        lock(&self.shared).get(name).and_then(Weak::upgrade)
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        if let Some(runtime) = lock(&self.server).take() {
            // May be dropped in an async context, where nothing may block.
            runtime.shutdown_background();
        }
    }
}

/// The same on all nodes.
fn hash(text: &str) -> u64 {
    let digest = Digest::of(text.as_bytes());
    digest.as_raw().iter().take(8).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
