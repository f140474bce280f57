//! The daemon: one store, one mount, two sockets. It puts the parts together and takes them
//! apart in the right order, and does nothing else.
//!
//! Order of a start: the directory's lock, the metadata, the mount, what was mounted before, and
//! only then the sockets: whoever can connect finds everything in place. A stop is the reverse.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{info, warn};
use weightfs_fusefs::session::detach;
use weightfs_fusefs::{Filesystem, Session, SpecialFiles};
use weightfs_store::{OpenError, SourceError, Store};

use crate::cache::Cache;
use crate::config::Config;
use crate::control::{self, ControlService};
use crate::images::ImageLayers;
use crate::metadata::{Metadata, MetadataError};
use crate::models::Models;
use crate::owner::Announcement;
use crate::references::References;
use crate::snapshots::{SnapshotError, Snapshots};
use crate::socket::{SocketError, bind_socket};
use crate::trees::{Opener, Trees};
use crate::{containerd, owner};

/// Directory of the mount, below the root.
const MOUNT_DIRECTORY: &str = "mnt";

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
    /// The metadata can't be used.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The snapshots can't be used.
    #[error(transparent)]
    Snapshots(#[from] SnapshotError),
    /// A socket can't be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The snapshotter's socket broke.
    #[error(transparent)]
    Containerd(#[from] containerd::ServeError),
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
    /// A part of the daemon panicked.
    #[error("a part of the daemon failed: {0}")]
    Join(#[from] tokio::task::JoinError),
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
    announcement: Announcement,
}

impl Daemon {
    /// Takes the state directory, mounts, shows what was mounted before, and listens.
    ///
    /// # Errors
    /// When a part can't be had; what was taken before is given back.
    pub async fn start(config: &Config) -> Result<Self, DaemonError> {
        raise_file_limit();
        warn_of_private_mounts();
        let store = Store::open(&config.root, config.store_options())?;
        let metadata = Arc::new(Metadata::open(&config.root)?);
        let trees = Arc::new(Trees::new(mount(&config.root.join(MOUNT_DIRECTORY))?));
        let opener = opener(config, Arc::clone(&store))?;
        let cache = Cache::new(opener.clone(), &config.root);
        let models =
            Arc::new(Models::new(opener.clone(), Arc::clone(&trees), Arc::clone(&metadata)));
        models.restore()?;
        let min_layer_bytes = config.snapshotter.min_layer_size.as_u64();
        let layers =
            ImageLayers::new(opener, Arc::clone(&trees), Arc::clone(&metadata), min_layer_bytes);
        layers.restore().await;
        // What was not restored is used by nobody.
        store.start_evicting();
        let snapshots = Snapshots::open(&config.root, Arc::clone(&metadata), Arc::new(layers))?;
        let snapshotter_address = config.snapshotter.address.clone();
        let snapshotter_socket = bind_socket(&snapshotter_address)?;
        let control_socket = bind_socket(&config.control.address)?;
        let announcement = Announcement::new(&config.root, &config.control.address)
            .map_err(|source| OpenError::Io { path: config.root.clone(), source })?;
        let root = config.root.clone();
        let control = ControlService {
            models,
            trees: Arc::clone(&trees),
            metadata,
            cache,
            root,
            snapshotter_address,
        };
        Ok(Self {
            store,
            trees,
            snapshots,
            control,
            snapshotter_socket,
            control_socket,
            announcement,
        })
    }

    /// Serves until `stop`, then unmounts and records what is cached.
    ///
    /// # Errors
    /// When a socket breaks or somebody takes the mount away.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), DaemonError> {
        let Self { store, trees, snapshots, control, .. } = self;
        let (stopping, stopped) = watch::channel(());
        let wait = || {
            let mut stopped = stopped.clone();
            // Nothing is ever sent; the channel closes when the daemon stops.
            async move { stopped.changed().map(drop).await }
        };
        info!(
            snapshotter = %control.snapshotter_address.display(),
            root = %control.root.display(),
            "serving"
        );
        let mountpoint = trees.session().mountpoint().to_owned();
        let mut snapshotter =
            tokio::spawn(containerd::serve(snapshots, self.snapshotter_socket, wait()));
        let mut controller = tokio::spawn(control::serve(control, self.control_socket, wait()));
        let (result, running) = tokio::select! {
            () = stop => (Ok(()), true),
            () = trees.session().ended() => (Err(DaemonError::Unmounted(mountpoint)), true),
            ended = &mut snapshotter => (flatten(ended), false),
            ended = &mut controller => (flatten(ended), false),
        };
        drop(stopping);
        if running {
            let servers = futures::future::join(&mut snapshotter, &mut controller);
            if tokio::time::timeout(SHUTDOWN_DEADLINE, servers).await.is_err() {
                warn!("connections did not end in time and are cut off");
            }
        }
        snapshotter.abort();
        controller.abort();
        drop(self.announcement);
        let unmounted = tokio::task::spawn_blocking(move || unmount(&trees)).await?;
        store.checkpoint()?;
        result.and(unmounted)
    }
}

fn flatten<E>(ended: Result<Result<(), E>, tokio::task::JoinError>) -> Result<(), DaemonError>
where
    DaemonError: From<E>,
{
    Ok(ended??)
}

fn opener(config: &Config, store: Arc<Store>) -> Result<Opener, DaemonError> {
    let docker_config = config.credentials.docker_config.clone();
    let deadline = config.fetch.deadline;
    let registries =
        weightfs_store::Registries::new(config.registry_options(), docker_config, deadline)?;
    let references = References::new(&config.root);
    Ok(Opener { registries, store, references, deadline })
}

/// Mounts at `path`. What a dead daemon left there is detached first.
fn mount(path: &Path) -> Result<Session, DaemonError> {
    let failed = |source| DaemonError::Mount { path: path.to_owned(), source };
    // Several daemons may have died on top of each other.
    while owner::is_mountpoint(path).map_err(failed)? {
        warn!(path = %path.display(), "detaching the mount of an earlier daemon");
        detach(path).map_err(failed)?;
    }
    std::fs::create_dir_all(path).map_err(failed)?;
    let filesystem = Arc::new(Filesystem::of_trees());
    Session::mount(filesystem, path, SpecialFiles::Honoured, Handle::current()).map_err(failed)
}

fn unmount(trees: &Trees) -> Result<(), DaemonError> {
    let path = trees.session().mountpoint();
    trees.session().unmount().map_err(|source| DaemonError::Mount { path: path.to_owned(), source })
}

/// Each blob that is read keeps its cache files open.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "could not raise the limit of open files");
    }
}

/// In a mount namespace of its own, whatever is mounted here is an empty directory elsewhere.
fn warn_of_private_mounts() {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    if let (Some(own), Some(init)) = (namespace("self"), namespace("1"))
        && own != init
    {
        warn!(
            "this daemon runs in a mount namespace of its own: containers see its mounts only if \
             their propagation is shared (no PrivateMounts or PrivateTmp in a unit, \
             mountPropagation: Bidirectional in a pod)"
        );
    }
}
