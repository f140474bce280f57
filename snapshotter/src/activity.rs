//! What goes on, for people: `weightfs status`, `top`, `map` and the status page.
//!
//! Totals are taken from the counters when somebody looks; rates are what they grew by since the
//! look before it. Only the history of the whole node is noted all the time, a pair of numbers a
//! second.

mod mounts;
mod rates;
pub mod text;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::task::{JoinError, spawn_blocking};
use weightfs_fusefs::{LayerContent, OpenLayer, ReadFrom};
use weightfs_peers::Peers;
use weightfs_proto::control::{ActivityReply, BlobMap, MapReply, PeersActivity};
use weightfs_store::Store;

use crate::metadata::Metadata;
use crate::models::Models;
use crate::trees::{Trees, trust_name};
use mounts::{Key, Parts};
use rates::{Bytes, History, Rates};

/// Mounts that are told of at the most.
const MAX_MOUNTS: usize = 500;

/// Blobs of a map at the most.
const MAX_BLOBS: usize = 1000;

/// Parts of a map at the most.
pub const MAX_CELLS: u32 = 16_384;

/// The wait for a second look, where there was none before.
const FIRST_LOOK: Duration = Duration::from_millis(300);

/// The parts of a daemon that are looked at.
#[derive(Debug)]
pub struct Observed {
    /// Its cache.
    pub store: Arc<Store>,
    /// What it shows.
    pub trees: Arc<Trees>,
    /// Models among it.
    pub models: Arc<Models>,
    /// Images among it.
    pub metadata: Arc<Metadata>,
    /// Other nodes.
    pub peers: Option<Arc<Peers>>,
    /// Its state directory.
    pub root: String,
}

/// Looks at a daemon.
#[derive(Debug)]
pub struct Observer {
    daemon: Observed,
    began: Instant,
    rates: Mutex<Rates<Key>>,
    history: Mutex<History>,
}

impl Observer {
    /// Looks at a daemon from now on.
    pub fn new(daemon: Observed) -> Arc<Self> {
        let (rates, history) = Default::default();
        Arc::new(Self { daemon, began: Instant::now(), rates, history })
    }

    /// Notes the history as long as the observer is there.
    pub fn keep_history(self: &Arc<Self>) {
        tokio::spawn(note_seconds(Arc::downgrade(self)));
    }

    /// What goes on now. Waits a moment if something does and nobody has looked lately.
    ///
    /// # Errors
    /// When the process is about to end.
    pub async fn activity(self: &Arc<Self>) -> Result<ActivityReply, JoinError> {
        let (first, then) = (Arc::clone(self), Arc::clone(self));
        let is_still = lock(&self.history).is_still(self.total());
        if !is_still && lock(&self.rates).are_old(Instant::now()) {
            spawn_blocking(move || first.look()).await?;
            tokio::time::sleep(FIRST_LOOK).await;
        }
        // It looks at each file.
        spawn_blocking(move || then.describe()).await
    }

    /// Where the chunks of a mount are; `None` if there is none of that name. Looks at each of them.
    pub fn map(&self, subject: &str, cells: u32) -> Option<MapReply> {
        let mounts = self.mounts();
        let (key, parts) = mounts.iter().find(|(key, _)| key.is_named(subject))?;
        let size = parts.layers.iter().map(|layer| layer.blob.layout().size()).sum::<u64>();
        let cells = u64::from(cells.clamp(1, MAX_CELLS));
        let blobs = parts.layers.iter().take(MAX_BLOBS).map(|layer| {
            let share = u128::from(cells) * u128::from(layer.blob.layout().size());
            let share = share.checked_div(u128::from(size)).unwrap_or(1).max(1);
            blob_map(layer, usize::try_from(share).unwrap_or(usize::MAX))
        });
        Some(MapReply { name: key.name.clone(), blobs: blobs.collect() })
    }

    fn mounts(&self) -> BTreeMap<Key, Parts> {
        let Observed { models, metadata, trees, .. } = &self.daemon;
        mounts::find(models, metadata, trees)
    }

    /// Notes how far all mounts are.
    fn look(&self) -> BTreeMap<Key, Parts> {
        let (mounts, filesystem) = (self.mounts(), self.daemon.trees.filesystem());
        let bytes = |(key, parts): (&Key, &Parts)| (key.clone(), mounts::bytes(parts, filesystem));
        let totals = mounts.iter().map(bytes).collect();
        lock(&self.rates).look(totals, Instant::now());
        mounts
    }

    fn describe(&self) -> ActivityReply {
        let Observed { store, trees, peers, root, .. } = &self.daemon;
        let (mounts, filesystem, traffic) = (self.look(), trees.filesystem(), store.traffic());
        let describe = |(key, parts): (&Key, &Parts)| {
            let rate = lock(&self.rates).of(key);
            mounts::describe(key, parts, filesystem, rate)
        };
        let history = lock(&self.history).clone();
        ActivityReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            root: root.clone(),
            uptime_seconds: self.began.elapsed().as_secs(),
            mounts: mounts.iter().take(MAX_MOUNTS).map(describe).collect(),
            mounts_total: mounts.len() as u64,
            read_history: history.seconds().map(|second| second.read).collect(),
            fetch_history: history.seconds().map(|second| second.fetched).collect(),
            reads_waiting: filesystem.counters().waiting(),
            requests: traffic.requests as u64,
            request_limit: traffic.limit as u64,
            peers: peers.as_deref().map(peers_activity),
        }
    }

    fn total(&self) -> Bytes {
        let Observed { store, trees, .. } = &self.daemon;
        let reads = trees.filesystem().counters();
        let read = ReadFrom::ALL.iter().map(|from| reads.bytes(*from)).sum();
        Bytes { read, fetched: store.counters().fetched.total() }
    }
}

async fn note_seconds(observer: Weak<Observer>) {
    let mut seconds = tokio::time::interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        seconds.tick().await;
        let Some(observer) = observer.upgrade() else { return };
        lock(&observer.history).note(observer.total(), Instant::now());
    }
}

fn peers_activity(peers: &Peers) -> PeersActivity {
    let status = peers.status();
    let answering = status.peers.iter().filter(|peer| peer.state == "ok").count();
    PeersActivity {
        members: status.peers.len() as u64,
        answering: answering as u64,
        from_peers: status.from_peers.bytes,
        to_peers: status.to_peers.bytes,
    }
}

fn blob_map(layer: &OpenLayer, cells: usize) -> BlobMap {
    let blob = &layer.blob;
    let (stats, map) = (blob.stats(), blob.map(cells));
    BlobMap {
        digest: blob.id().digest.to_string(),
        name: match &layer.descriptor.content {
            LayerContent::Raw(file) => file.path.display().to_string(),
            LayerContent::ModelTar { .. } | LayerContent::ImageTar => String::new(),
        },
        size: stats.size,
        cached: stats.cached,
        trust: trust_name(stats.trust).to_owned(),
        chunks: map.iter().flatten().map(|count| u64::from(*count)).sum(),
        cells: map.into_iter().flatten().collect(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
