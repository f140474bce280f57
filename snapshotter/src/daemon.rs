//! The daemon: one store, one mount, two sockets, and a third one for the kubelet if it is wanted. It puts the parts together and takes them
//! apart in the right order, and does nothing else.
//!
//! Order of a start: the directory's lock, the metadata, the mount, what was mounted before, and
//! only then the sockets: whoever can connect finds everything in place. A mount that a keeper
//! held is taken over instead, and only when everything that it showed is in place again; nothing
//! before that may ask it for a file, since nobody would answer.
//!
//! An end leaves the mount to the keeper, or takes it away. What is left ends as if it were
//! killed, only that what is cached is recorded: there is one way to take over, and it is used
//! every time.

mod mount;

use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{error, info, warn};
use weightfs_fusefs::Misses;
use weightfs_fusefs::index::signature::KeyError;
use weightfs_peers::{Peers, PeersError};
use weightfs_store::{OpenError, PullSecrets, SourceError, Store};

use crate::activity::{Observed, Observer};
use crate::cache::Cache;
use crate::config::{Config, ListenAddress};
use crate::containerd;
use crate::control::{self, ControlService};
use crate::cri;
use crate::handover::{Inherited, Keeper, Name};
use crate::images::ImageLayers;
use crate::metadata::{LazySnapshot, Metadata, MetadataError};
use crate::metrics::Metrics;
use crate::models::{Models, MountState};
use crate::node::doctor;
use crate::owner::Announcement;
use crate::publish::Publisher;
use crate::references::References;
use crate::snapshots::{SnapshotError, Snapshots};
use crate::socket::{Origin, SocketError, listen_at};
use crate::trees::{Opener, Trees};
use crate::volumes::Volumes;
use crate::web;

pub use mount::MOUNT_DIRECTORY;
use mount::{Mount, forget, unmount};

/// How long connections may take to end at a stop.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// Why the daemon can't run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state directory can't be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The registries' configuration can't be used.
    #[error(transparent)]
    Registries(#[from] SourceError),
    /// The other nodes can't be reached, or not reach this one.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// A public key can't be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The metadata can't be used.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The snapshots can't be used.
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    /// A socket can't be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The control socket broke.
    #[error("control socket: {0}")]
    Control(#[from] tonic::transport::Error),
    /// The mount can't be made or ended.
    #[error("mount at {}: {source}", path.display())]
    Mount {
        /// Where.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The mount was taken away from outside.
    #[error("somebody unmounted {}", .0.display())]
    Unmounted(PathBuf),
    /// No thread for containerd's calls.
    #[error("the thread for containerd's calls: {0}")]
    Thread(#[source] io::Error),
    /// A part of the daemon panicked.
    #[error("a part of the daemon failed: {0}")]
    Join(#[from] tokio::task::JoinError),
}

/// How a daemon is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Another one comes: the mount is left to the keeper, if there is one.
    Restart,
    /// For good: the mount is taken away.
    End,
}

/// What shows trees.
struct Parts {
    store: Arc<Store>,
    opener: Opener,
    metadata: Arc<Metadata>,
    trees: Arc<Trees>,
    models: Arc<Models>,
    layers: Arc<ImageLayers>,
}

impl Parts {
    fn new(config: &Config, store: Arc<Store>, mount: &Mount) -> Result<Self, DaemonError> {
        let opener = opener(config, Arc::clone(&store))?;
        let metadata = Arc::new(Metadata::open_or_rebuild(&config.root)?);
        let trees = Arc::new(mount.trees(&config.root)?);
        let models = Models::new(opener.clone(), Arc::clone(&trees), Arc::clone(&metadata));
        let min_layer_bytes = config.snapshotter.min_layer_size.as_u64();
        let layers = ImageLayers::new(
            opener.clone(),
            Arc::clone(&trees),
            Arc::clone(&metadata),
            min_layer_bytes,
        );
        let (models, layers) = (Arc::new(models), Arc::new(layers));
        Ok(Self { store, opener, metadata, trees, models, layers })
    }

    /// Serves the mount with all that it showed before. Gives who keeps it.
    fn show(&self, mount: Mount, config: &Config) -> Result<Keeper, DaemonError> {
        let misses = Misses { runtime: Handle::current(), deadline: config.fetch.deadline };
        let (keeper, missing) = match mount.state() {
            MountState::New => {
                let keeper = mount.serve(&self.trees, misses)?;
                (keeper, self.restore(MountState::New)?)
            }
            MountState::TakenOver => {
                let missing = self.restore(MountState::TakenOver)?;
                self.trees.restore_removed(&self.opener);
                // From here on there are requests under way, and what can't be finished must be
                // left to a successor. A store that is closed would fail them.
                std::mem::forget(Arc::clone(&self.store));
                (mount.serve(&self.trees, misses)?, missing)
            }
        };
        if !missing.is_empty() {
            let layers = Arc::clone(&self.layers);
            tokio::spawn(async move { layers.mend(missing).await });
        }
        Ok(keeper)
    }

    /// Shows what is on this machine; gives what is not.
    fn restore(&self, state: MountState) -> Result<Vec<LazySnapshot>, DaemonError> {
        self.models.restore(state)?;
        Ok(self.layers.restore())
    }
}

/// containerd's CRI for the kubelet.
#[derive(Debug)]
struct CriProxy {
    socket: UnixListener,
    containerd: PathBuf,
    secrets: Arc<PullSecrets>,
}

impl CriProxy {
    /// Serves until `shutdown`; without one, there is nothing to be done.
    async fn serve(proxy: Option<Self>, shutdown: impl Future<Output = ()>) {
        if let Some(Self { socket, containerd, secrets }) = proxy {
            cri::serve(socket, containerd, secrets, shutdown).await;
        }
    }
}

/// A daemon whose parts are in place.
#[derive(Debug)]
pub struct Daemon {
    store: Arc<Store>,
    trees: Arc<Trees>,
    snapshots: Arc<Snapshots>,
    control: ControlService,
    snapshotter_socket: UnixListener,
    control_socket: UnixListener,
    metrics: Metrics,
    metrics_socket: Option<TcpListener>,
    cri: Option<CriProxy>,
    announcement: Announcement,
    keeper: Keeper,
    publisher: Option<Publisher>,
    config: Config,
}

impl Daemon {
    /// Takes the state directory, takes over the mount or makes one, shows what was mounted
    /// before, and listens.
    ///
    /// # Errors
    /// When a part can't be had; what was taken before is given back.
    pub async fn start(config: &Config, mut inherited: Inherited) -> Result<Self, DaemonError> {
        raise_file_limit();
        let store = Store::open(&config.root, config.store_options())?;
        let mount = Mount::find(&config.root, &mut inherited)?;
        let parts = Parts::new(config, Arc::clone(&store), &mount)?;
        let keeper = parts.show(mount, config)?;
        // What was not restored is used by nobody.
        store.start_evicting();
        let Parts { metadata, trees, models, layers, opener, .. } = parts;
        let peers = opener.peers.clone();
        let secrets = Arc::clone(opener.registries.pull_secrets());
        let publisher = Publisher::start(config, &opener);
        let cache = Cache::new(opener, &config.root);
        let snapshots = Snapshots::open(&config.root, Arc::clone(&metadata), layers)?;
        let mut listen = |name, path| listen(&mut inherited, keeper, name, path);
        let snapshotter_address = config.snapshotter.address.clone();
        let snapshotter_socket = listen(Name::Snapshotter, &snapshotter_address)?;
        let control_socket = listen(Name::Control, &config.control.address)?;
        let cri = match &config.cri.address {
            Some(address) => {
                let (socket, containerd) =
                    (listen(Name::Cri, address)?, config.cri.containerd.clone());
                Some(CriProxy { socket, containerd, secrets })
            }
            None => None,
        };
        let metrics_socket = listen_for_metrics(config).await;
        let metrics = Metrics {
            store: Arc::clone(&store),
            filesystem: Arc::clone(trees.filesystem()),
            calls: Arc::clone(snapshots.calls()),
            decisions: Arc::clone(snapshots.decisions()),
            metadata: Arc::clone(&metadata),
            models: Arc::clone(&models),
        };
        let observer = Observer::new(Observed {
            store: Arc::clone(&store),
            trees: Arc::clone(&trees),
            models: Arc::clone(&models),
            metadata: Arc::clone(&metadata),
            peers: peers.clone(),
            root: config.root.display().to_string(),
        });
        observer.keep_history();
        let announcement = Announcement::new(&config.root, &config.control.address)
            .map_err(|source| OpenError::Io { path: config.root.clone(), source })?;
        let metrics_address = metrics_socket.as_ref().and_then(|socket| socket.local_addr().ok());
        let root = config.root.clone();
        let control = ControlService {
            volumes: Volumes::new(Arc::clone(&models)),
            models,
            trees: Arc::clone(&trees),
            metadata,
            cache,
            root,
            snapshotter_address,
            keeper,
            peers,
            decisions: Arc::clone(snapshots.decisions()),
            metrics_address,
            observer,
        };
        Ok(Self {
            store,
            trees,
            snapshots,
            control,
            snapshotter_socket,
            control_socket,
            metrics,
            metrics_socket,
            cri,
            announcement,
            keeper,
            publisher,
            config: config.clone(),
        })
    }

    /// Serves until `stop`, records what is cached, and leaves the mount or takes it away.
    ///
    /// After it, with an error or not, the process must end at once and take nothing down, the
    /// runtime included: a request that is dropped is answered, with an error, and no successor
    /// is asked for it again.
    ///
    /// # Errors
    /// When a socket breaks or somebody takes the mount away.
    pub async fn run(self, stop: impl Future<Output = Stop>) -> Result<(), DaemonError> {
        let Self { store, trees, snapshots, control, keeper, .. } = self;
        let (stopping, stopped) = watch::channel(());
        let wait = || {
            let mut stopped = stopped.clone();
            // Nothing is ever sent; the channel closes when the daemon stops.
            async move { stopped.changed().map(drop).await }
        };
        info!(
            snapshotter = %control.snapshotter_address.display(),
            root = %control.root.display(),
            %keeper,
            "serving"
        );
        let snapshotter = containerd::serve_alone(snapshots, self.snapshotter_socket, wait());
        let mut snapshotter = snapshotter.map_err(DaemonError::Thread)?;
        let observer = Arc::clone(&control.observer);
        let mut controller = tokio::spawn(control::serve(control, self.control_socket, wait()));
        if let Some(listener) = self.metrics_socket {
            let stopped = wait().map(drop);
            tokio::spawn(web::serve(self.metrics, observer, listener, stopped));
        }
        let cri = tokio::spawn(CriProxy::serve(self.cri, wait()));
        keeper.tell_ready();
        tokio::spawn(doctor::warn_at_start(self.config));
        let (result, running) = tokio::select! {
            stop = stop => (Ok(stop), true),
            () = ended(&trees) => {
                (Err(DaemonError::Unmounted(trees.mountpoint().to_owned())), true)
            }
            ended = &mut snapshotter => (flatten(ended.map(Ok::<_, DaemonError>)), false),
            ended = &mut controller => (flatten(ended), false),
        };
        keeper.tell_stopping();
        drop((stopping, self.publisher));
        if running {
            let servers = futures::future::join3(&mut snapshotter, &mut controller, cri);
            if tokio::time::timeout(SHUTDOWN_DEADLINE, servers).await.is_err() {
                warn!("connections did not end in time and are cut off");
            }
        }
        snapshotter.abort();
        controller.abort();
        let for_good = matches!(result, Ok(Stop::End) | Err(DaemonError::Unmounted(_)));
        if keeper != Keeper::Nobody && !for_good {
            return leave(&store, self.announcement, result);
        }
        drop(self.announcement);
        let unmounted = tokio::task::spawn_blocking(move || unmount(&trees, keeper)).await?;
        store.checkpoint()?;
        result?;
        unmounted
    }
}

/// Leaves everything to a successor, also after an error: readers wait for it.
fn leave(
    store: &Arc<Store>,
    announcement: Announcement,
    result: Result<Stop, DaemonError>,
) -> Result<(), DaemonError> {
    announcement.leave();
    // Not closed: reads go on till the end of this process.
    std::mem::forget(Arc::clone(store));
    store.checkpoint()?;
    info!("the mount is left to the next daemon");
    result.map(drop)
}

/// A server that ends by itself: the next daemon may do better.
fn flatten<E>(ended: Result<Result<(), E>, tokio::task::JoinError>) -> Result<Stop, DaemonError>
where
    DaemonError: From<E>,
{
    ended??;
    Ok(Stop::Restart)
}

fn opener(config: &Config, store: Arc<Store>) -> Result<Opener, DaemonError> {
    let registries = config.registries()?;
    if config.cri.address.is_some() {
        registries.pull_secrets().feed();
    }
    let references = References::new(&config.root);
    let indexes = config.indexes()?;
    // Checked when the configuration was read.
    let peers = config.peers.options().ok().flatten().map(Peers::start).transpose()?;
    let deadline = config.fetch.deadline;
    Ok(Opener { registries, store, references, indexes, deadline, peers })
}

/// Waits until somebody takes the mount away.
async fn ended(trees: &Trees) {
    match trees.session() {
        Some(session) => session.ended().await,
        None => std::future::pending().await,
    }
}

/// Listens at `path`; a new socket is given to the keeper.
fn listen(
    inherited: &mut Inherited,
    keeper: Keeper,
    name: Name,
    path: &Path,
) -> Result<UnixListener, DaemonError> {
    let (listener, origin) = listen_at(inherited.get(name), path)?;
    if origin == Origin::New && keeper != Keeper::Nobody {
        forget(keeper, name);
        if let Err(error) = keeper.keep(name, listener.as_fd()) {
            warn!(%keeper, %error, path = %path.display(), "the keeper did not take a socket");
        }
    }
    Ok(listener)
}

/// The metrics address, if it is wanted and can be had. Nobody is kept waiting for his files
/// because it can't.
async fn listen_for_metrics(config: &Config) -> Option<TcpListener> {
    let ListenAddress(address) = config.metrics.address?;
    let listener = web::listen(address).await;
    listener
        .inspect_err(|error| {
            error!(%address, %error, "no metrics: metrics.address can't be listened on");
        })
        .ok()
}

/// Each blob that is read keeps its cache files open.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "could not raise the limit of open files");
    }
}
