//! The cache of a state directory, wherever it can be reached: through the daemon that owns it, or
//! here, if nobody does.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tonic::transport::Channel;
use weightfs::cache::{Cache, Repair, Selection, Subject};
use weightfs::config::Config;
use weightfs::{control, owner};
use weightfs_proto::control::control_client::ControlClient;
use weightfs_proto::control::{
    CacheReply, CacheRequest, EvictReply, EvictRequest, PinReply, PinRequest, PruneReply,
    PruneRequest, PullEvent, PullRequest, VerifyEvent, VerifyRequest,
};
use weightfs_store::{OpenError, Reference, Store};

/// Who does it.
pub enum Reach {
    /// This process.
    Here(Box<Cache>),
    /// The daemon that owns the directory.
    Daemon(Box<ControlClient<Channel>>),
}

impl Reach {
    /// As [`Reach::new`]; makes the state directory if there is none.
    pub async fn create(config: &Config) -> anyhow::Result<Self> {
        let root = config.root.display();
        std::fs::create_dir_all(&config.root).with_context(|| format!("state directory {root}"))?;
        Self::new(config).await
    }

    /// Opens the store, or connects to the daemon that has it open.
    pub async fn new(config: &Config) -> anyhow::Result<Self> {
        let root = config.root.display();
        if !config.root.exists() {
            bail!("there is no state directory {root}");
        }
        match Store::open(&config.root, config.store_options()) {
            Ok(store) => {
                let opener = super::opener(config, Arc::clone(&store))?;
                Ok(Self::Here(Box::new(Cache::new(opener, &config.root))))
            }
            Err(OpenError::Owned { pid, .. }) => {
                let address = owner::control_address(&config.root).with_context(|| {
                    format!(
                        "{root} is in use by process {pid}, a mount; unmount it, then try again"
                    )
                })?;
                let daemon = control::connect(&address).await.with_context(|| {
                    format!("the daemon's control socket {}", address.display())
                })?;
                Ok(Self::Daemon(Box::new(daemon)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the cache holds.
    pub async fn list(&mut self) -> anyhow::Result<CacheReply> {
        match self {
            Self::Here(cache) => Ok(cache.list()?),
            Self::Daemon(daemon) => {
                Ok(daemon.cache(CacheRequest {}).await.map_err(said)?.into_inner())
            }
        }
    }

    /// Evicts.
    pub async fn evict(&mut self, subject: &Subject) -> anyhow::Result<EvictReply> {
        match self {
            Self::Here(cache) => Ok(cache.evict(subject)?),
            Self::Daemon(daemon) => {
                let request = EvictRequest { subject: subject.to_string() };
                Ok(daemon.evict(request).await.map_err(said)?.into_inner())
            }
        }
    }

    /// Prunes.
    pub async fn prune(&mut self) -> anyhow::Result<PruneReply> {
        match self {
            Self::Here(cache) => Ok(cache.prune()?),
            Self::Daemon(daemon) => {
                Ok(daemon.prune(PruneRequest {}).await.map_err(said)?.into_inner())
            }
        }
    }

    /// Pins.
    pub async fn pin(&mut self, reference: &Reference) -> anyhow::Result<PinReply> {
        match self {
            Self::Here(cache) => Ok(cache.pin(reference).await?),
            Self::Daemon(daemon) => {
                let request = PinRequest { reference: reference.whole() };
                Ok(daemon.pin(request).await.map_err(said)?.into_inner())
            }
        }
    }

    /// Takes a pin away.
    pub async fn unpin(&mut self, reference: &Reference) -> anyhow::Result<PinReply> {
        match self {
            Self::Here(cache) => Ok(cache.unpin(reference).await?),
            Self::Daemon(daemon) => {
                let request = PinRequest { reference: reference.whole() };
                Ok(daemon.unpin(request).await.map_err(said)?.into_inner())
            }
        }
    }

    /// Hashes again; the events end with an error if it could not be done.
    pub async fn verify(
        &mut self,
        subject: Option<Subject>,
        repair: Repair,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<VerifyEvent>>> {
        match self {
            Self::Here(cache) => {
                let events = cache.verify(subject, repair);
                Ok(events.map(|event| event.map_err(anyhow::Error::from)).boxed())
            }
            Self::Daemon(daemon) => {
                let subject = subject.map(|subject| subject.to_string()).unwrap_or_default();
                let request = VerifyRequest { subject, repair: repair == Repair::Yes };
                let events = daemon.verify(request).await.map_err(said)?.into_inner();
                Ok(events.map(|event| event.map_err(said)).boxed())
            }
        }
    }

    /// Fetches files; the last event is the result, or an error.
    pub async fn pull(
        &mut self,
        reference: &Reference,
        selection: Selection,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<PullEvent>>> {
        match self {
            Self::Here(cache) => {
                let events = cache.pull(reference.clone(), selection);
                Ok(events.map(|event| event.map_err(anyhow::Error::from)).boxed())
            }
            Self::Daemon(daemon) => {
                let (files, profile) = match selection {
                    Selection::Files(patterns) => {
                        (patterns.iter().map(ToString::to_string).collect(), None)
                    }
                    Selection::Profile(given) => {
                        (vec![], Some(given.map(|profile| profile.encode()).unwrap_or_default()))
                    }
                };
                let request = PullRequest { reference: reference.whole(), files, profile };
                let events = daemon.pull(request).await.map_err(said)?.into_inner();
                Ok(events.map(|event| event.map_err(said)).boxed())
            }
        }
    }
}

/// What a daemon refused, in its words.
fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
