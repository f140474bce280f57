//! What the program does for each subcommand.

pub mod cache;
pub mod csi;
pub mod doctor;
pub mod fluid;
pub mod generate;
pub mod image;
pub mod index;
pub mod log;
pub mod ls;
pub mod map;
pub mod mount;
pub mod node;
pub mod peers;
pub mod prepare;
pub mod progress;
pub mod pull;
pub mod reach;
pub mod rpull;
pub mod serve;
pub mod status;
pub mod top;
pub mod umount;
pub mod verify;

use std::sync::Arc;

use anyhow::Context as _;
use tonic::transport::Channel;
pub use weightfs::activity::text::size;
use weightfs::config::Config;
use weightfs::references::References;
use weightfs::trees::Opener;
use weightfs::{control, owner};
use weightfs_proto::control::control_client::ControlClient;
use weightfs_store::{OpenError, Registries, Store};

/// The registries that the configuration speaks of.
pub fn registries(config: &Config) -> anyhow::Result<Arc<Registries>> {
    config.registries().context("the registries' configuration")
}

/// What opens artifacts into that store.
pub fn opener(config: &Config, store: Arc<Store>) -> anyhow::Result<Opener> {
    let registries = registries(config)?;
    let references = References::new(&config.root);
    let (deadline, indexes) = (config.fetch.deadline, config.indexes()?);
    Ok(Opener { registries, store, references, indexes, deadline, peers: None })
}

/// Where scratch stores go: not a tmpfs, as /tmp often is.
const SCRATCH: &str = "/var/tmp";

/// A store for a command that needs nothing to last: the state directory's, if nobody owns it,
/// else one of its own that ends with it.
#[derive(Debug)]
pub struct Scratch {
    /// The store.
    pub store: Arc<Store>,
    /// After the store, so that it is removed when that is closed.
    _dir: Option<tempfile::TempDir>,
}

impl Scratch {
    /// Opens it.
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        let own = config.root.exists().then(|| Store::open(&config.root, config.store_options()));
        match own {
            Some(Ok(store)) => Ok(Self { store, _dir: None }),
            // There is none, a daemon owns it, or we may not write to it.
            None | Some(Err(OpenError::Owned { .. } | OpenError::Io { .. })) => {
                let dir = tempfile::Builder::new().prefix("weightfs-").tempdir_in(SCRATCH)?;
                let store = Store::open(dir.path(), config.store_options())?;
                Ok(Self { store, _dir: Some(dir) })
            }
            Some(Err(error)) => Err(error.into()),
        }
    }
}

/// The daemon that owns the state directory.
pub async fn daemon(config: &Config) -> anyhow::Result<ControlClient<Channel>> {
    let root = config.root.display();
    let address = owner::control_address(&config.root)
        .with_context(|| format!("no daemon owns {root}; start one with `weightfs serve`"))?;
    control::connect(&address)
        .await
        .with_context(|| format!("the daemon's control socket {}", address.display()))
}

/// What a daemon refused, in its words.
pub fn refused(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
